//! How many bytes of stack a function needs, from its machine code.
//!
//! Each function is followed along its branches with the distance of rsp from its value at entry. A call adds the
//! return address and the callee's need, a tail call the callee's need alone. What is found this way is exact but
//! for two things, both reported: a call through a pointer counts nothing for its callee, and a chain of calls that
//! returns to itself has no bound. Aligning rsp counts as the largest gap it can make.

use std::collections::{HashMap, HashSet};

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register};

use super::program::{Function, Program};

/// What a public call needs.
pub struct Depth {
    /// The call's name, without its prefix.
    pub entry: String,
    /// Bytes below the caller's rsp, the return address not counted.
    pub bytes: u64,
    /// Functions on any path that call through a pointer.
    pub indirect: Vec<String>,
    /// Whether some path ends in a panic of core.
    pub panics: bool,
    /// A function that is reached from itself.
    pub cycle: Option<String>,
    /// The deepest chain of calls, with each function's own part.
    pub path: Vec<String>,
}

/// The need of every function named `call_..`, deepest first.
pub fn depths(program: &Program) -> Vec<Depth> {
    let frames: Vec<Frame> = program
        .functions
        .iter()
        .map(|function| frame(program, function))
        .collect();
    let sorts = |(index, function): (usize, &Function)| {
        function
            .name
            .starts_with("core::slice::sort::")
            .then_some(index)
    };
    let mut search = Search {
        frames: &frames,
        bounded: program
            .functions
            .iter()
            .enumerate()
            .filter_map(sorts)
            .collect(),
        known: HashMap::new(),
        open: HashSet::new(),
        cycle: None,
    };
    let mut depths = Vec::new();
    for (index, function) in program.functions.iter().enumerate() {
        let Some(entry) = function.name.strip_prefix("call_") else {
            continue;
        };
        search.cycle = None;
        let bytes = search.need(index);
        let (indirect, panics) = search.reached(program, index);
        let cycle = search
            .cycle
            .map(|index| program.functions[index].name.clone());
        depths.push(Depth {
            entry: entry.to_owned(),
            bytes,
            indirect,
            panics,
            cycle,
            path: search.path(program, index),
        });
    }
    depths.sort_by(|a, b| b.bytes.cmp(&a.bytes).then_with(|| a.entry.cmp(&b.entry)));
    depths
}

/// A function's own stack use and where it goes from there.
struct Frame {
    own: u64,
    /// Callee and the bytes in use when it begins, return address included.
    calls: Vec<(usize, u64)>,
    indirect: usize,
}

fn frame(program: &Program, function: &Function) -> Frame {
    let decoder = Decoder::with_ip(64, &function.code, function.start, DecoderOptions::NONE);
    let instructions: Vec<Instruction> = decoder.into_iter().collect();
    let at: HashMap<u64, usize> = instructions
        .iter()
        .enumerate()
        .map(|(i, one)| (one.ip(), i))
        .collect();
    let mut walk = Walk {
        frame: Frame {
            own: 0,
            calls: Vec::new(),
            indirect: 0,
        },
        seen: vec![false; instructions.len()],
        todo: vec![(0, State { depth: 0, base: 0 })],
    };
    let mut table = None;
    loop {
        while let Some((index, state)) = walk.todo.pop() {
            if index < instructions.len() && !std::mem::replace(&mut walk.seen[index], true) {
                walk.step(program, &instructions[index], index, state, &at, &mut table);
            }
        }
        // What no branch reaches is reached through a jump table, with the state of the jump.
        let hidden =
            (0..instructions.len()).find(|&i| !walk.seen[i] && !is_padding(&instructions[i]));
        match (hidden, table) {
            (Some(index), Some(state)) => walk.todo.push((index, state)),
            (None, Some(_)) if walk.frame.calls.is_empty() && instructions.len() < 8 => {
                walk.frame.indirect += 1; // nothing but a tail call through a pointer
                break;
            }
            _ => break,
        }
    }
    walk.frame
}

fn is_padding(instruction: &Instruction) -> bool {
    matches!(
        instruction.mnemonic(),
        Mnemonic::Nop | Mnemonic::Int3 | Mnemonic::Ud2
    )
}

#[derive(Clone, Copy)]
struct State {
    /// Bytes between rsp at entry and rsp now.
    depth: u64,
    /// The depth when rbp was set from rsp.
    base: u64,
}

struct Walk {
    frame: Frame,
    seen: Vec<bool>,
    todo: Vec<(usize, State)>,
}

impl Walk {
    fn step(
        &mut self,
        program: &Program,
        instruction: &Instruction,
        index: usize,
        mut state: State,
        at: &HashMap<u64, usize>,
        table: &mut Option<State>,
    ) {
        let (peak, after) = effect(instruction, state);
        state = after;
        self.frame.own = self.frame.own.max(peak).max(state.depth);
        match instruction.flow_control() {
            FlowControl::Next => self.todo.push((index + 1, state)),
            FlowControl::ConditionalBranch => {
                self.jump(program, instruction.near_branch_target(), state, at);
                self.todo.push((index + 1, state));
            }
            FlowControl::UnconditionalBranch => {
                self.jump(program, instruction.near_branch_target(), state, at)
            }
            FlowControl::IndirectBranch => match through_table(program, instruction) {
                Some(callee) => self.frame.calls.push((callee, state.depth)),
                None => *table = Some(state),
            },
            FlowControl::Call => {
                if let Some(callee) = program.at(instruction.near_branch_target()) {
                    self.frame.calls.push((callee, state.depth + 8));
                }
                self.todo.push((index + 1, state));
            }
            FlowControl::IndirectCall => {
                match through_table(program, instruction) {
                    Some(callee) => self.frame.calls.push((callee, state.depth + 8)),
                    None => self.frame.indirect += 1,
                }
                self.todo.push((index + 1, state));
            }
            FlowControl::Return
            | FlowControl::Exception
            | FlowControl::Interrupt
            | FlowControl::XbeginXabortXend => {}
        }
    }

    fn jump(&mut self, program: &Program, target: u64, state: State, at: &HashMap<u64, usize>) {
        match (at.get(&target), program.at(target)) {
            (Some(&index), _) => self.todo.push((index, state)),
            (None, Some(callee)) => self.frame.calls.push((callee, state.depth)),
            (None, None) => {}
        }
    }
}

/// The callee of a call through a fixed table of addresses (`call [rip + slot]`).
fn through_table(program: &Program, instruction: &Instruction) -> Option<usize> {
    if !instruction.is_ip_rel_memory_operand() {
        return None;
    }
    program.at(program.word(instruction.ip_rel_memory_address())?)
}

/// The depth an instruction reaches and the state after it.
fn effect(instruction: &Instruction, mut state: State) -> (u64, State) {
    let is = |operand: u32, register| {
        instruction.op_kind(operand) == OpKind::Register
            && instruction.op_register(operand) == register
    };
    let constant = || instruction.op_count() == 2 && is_constant(instruction.op1_kind());
    match instruction.mnemonic() {
        Mnemonic::Call => {}
        Mnemonic::Sub if is(0, Register::RSP) && constant() => {
            state.depth += instruction.immediate(1)
        }
        Mnemonic::Add if is(0, Register::RSP) && constant() => {
            state.depth = state.depth.wrapping_sub(instruction.immediate(1));
        }
        Mnemonic::And if is(0, Register::RSP) && constant() => {
            state.depth += !instruction.immediate(1)
        }
        Mnemonic::Mov if is(0, Register::RBP) && is(1, Register::RSP) => state.base = state.depth,
        Mnemonic::Mov if is(0, Register::RSP) && is(1, Register::RBP) => state.depth = state.base,
        Mnemonic::Lea if is(0, Register::RSP) && instruction.memory_base() == Register::RBP => {
            state.depth = state.base.wrapping_sub(instruction.memory_displacement64());
        }
        // The end of a stack probe's loop, for a frame larger than a page.
        Mnemonic::Lea if instruction.memory_base() == Register::RSP => {
            let below = 0u64.wrapping_sub(instruction.memory_displacement64());
            if below < 1 << 32 {
                return (state.depth + below, state);
            }
        }
        Mnemonic::Push | Mnemonic::Pop | Mnemonic::Pushfq | Mnemonic::Popfq => {
            let grown = -i64::from(instruction.stack_pointer_increment());
            state.depth = state.depth.wrapping_add_signed(grown);
        }
        _ => {}
    }
    (state.depth, state)
}

fn is_constant(kind: OpKind) -> bool {
    matches!(
        kind,
        OpKind::Immediate8to64 | OpKind::Immediate32to64 | OpKind::Immediate64
    )
}

struct Search<'a> {
    frames: &'a [Frame],
    /// Functions whose recursion has a bound: core's sort takes a median of medians, and calls itself for the shorter part.
    bounded: HashSet<usize>,
    known: HashMap<usize, u64>,
    open: HashSet<usize>,
    cycle: Option<usize>,
}

impl Search<'_> {
    fn need(&mut self, index: usize) -> u64 {
        if let Some(&bytes) = self.known.get(&index) {
            return bytes;
        }
        if !self.open.insert(index) {
            if !self.bounded.contains(&index) {
                self.cycle = Some(index);
            }
            return 0;
        }
        let frame = &self.frames[index];
        let bytes = frame
            .calls
            .iter()
            .map(|&(callee, used)| used + self.need(callee))
            .fold(frame.own, u64::max);
        self.open.remove(&index);
        self.known.insert(index, bytes);
        bytes
    }

    /// Functions under an entry that call through pointers, and whether a panic is reached.
    fn reached(&self, program: &Program, entry: usize) -> (Vec<String>, bool) {
        let (mut seen, mut todo, mut indirect) = (HashSet::new(), vec![entry], Vec::new());
        let mut panics = false;
        while let Some(index) = todo.pop() {
            if seen.insert(index) {
                panics |= program.functions[index]
                    .name
                    .starts_with("core::panicking::");
                if self.frames[index].indirect > 0 {
                    indirect.push(program.functions[index].name.clone());
                }
                todo.extend(self.frames[index].calls.iter().map(|call| call.0));
            }
        }
        (indirect, panics)
    }

    fn path(&mut self, program: &Program, entry: usize) -> Vec<String> {
        let (mut path, mut index) = (Vec::new(), entry);
        while path.len() < 64 {
            path.push(format!(
                "{:>6} {}",
                self.frames[index].own, program.functions[index].name
            ));
            let total = self.known.get(&index).copied().unwrap_or(0);
            let calls = &self.frames[index].calls;
            let Some(next) = calls.iter().find(|&&(callee, used)| {
                total > self.frames[index].own
                    && used + self.known.get(&callee).copied().unwrap_or(0) == total
            }) else {
                break;
            };
            index = next.0;
        }
        path
    }
}
