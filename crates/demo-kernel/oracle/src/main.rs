//! Runs the demo kernel's differential programs on mock-x86 and compares: `demo-oracle FILE`, where FILE holds what the
//! kernel printed; `demo-oracle --only N` prints one program in full, as the kernel does with `only=N`.
//!
//! Flushed programs must be equal to the mock's plain mode in every word. For lazy ones the mock's adversary plays each
//! program under many seeds, and the kernel's outcomes must be among the mock's, step for step.

#[path = "../../src/differential/steps.rs"]
mod steps;

use std::process::ExitCode;

use kmem_hal::{FrameRange, FrameRequest, FrameSource, Mmu, Order, OwnedFrame, SingleGrace};
use kmem_mock_x86::{
    Adversary, Fault, Features, FramePool, Machine, OnViolation, Registers, VirtualCpu,
};
use kmem_paging::Parts;
use kmem_testkit::SlotArena;
use steps::{Access, Bench, Digest, FLUSHED, Kind, LAZY, Outcome, Processor, Seen, Tables};

const WP: u64 = 1 << 16;
const SMEP: u64 = 1 << 20;
const SMAP: u64 = 1 << 21;
const PGE: u64 = 1 << 7;

/// The mock's CPU 0.
struct Mock<'m>(VirtualCpu<'m>);

impl Processor for Mock<'_> {
    fn access(&mut self, access: Access, address: u64, value: u64) -> Outcome {
        self.0.set_ac(access.ac && !access.user).expect("STAC");
        let cpu = if access.user { self.0.user() } else { self.0 };
        let outcome = match access.kind {
            Kind::Read => cpu.read_u64(address),
            Kind::Write => cpu.write_u64(address, value).map(|()| 0),
            // The byte of the code that is its ID.
            Kind::Execute => cpu
                .fetch(address)
                .and_then(|_| cpu.fetch(address + 1))
                .map(u64::from),
        };
        self.0.set_ac(false).expect("CLAC");
        match outcome {
            Ok(value) => Outcome::Value(value),
            Err(Fault::Page { address, code }) => Outcome::Fault(code, address),
            Err(other) => panic!("{other}"),
        }
    }

    fn control(&mut self, wp: bool, smep: bool, smap: bool) {
        let registers = self.0.registers();
        let set = |word: u64, bit: u64, on: bool| if on { word | bit } else { word & !bit };
        let cr4 = set(set(registers.cr4, SMEP, smep), SMAP, smap);
        self.0.write_cr0(set(registers.cr0, WP, wp)).expect("CR0");
        self.0.write_cr4(cr4).expect("CR4");
    }

    fn invlpg(&mut self, address: u64) {
        self.0.invlpg(address).expect("INVLPG");
    }

    fn flush_all(&mut self) {
        let cr4 = self.0.registers().cr4;
        self.0.write_cr4(cr4 & !PGE).expect("CR4");
        self.0.write_cr4(cr4).expect("CR4");
    }
}

/// Runs programs on a machine of their own.
fn on_mock(
    levels: usize,
    adversary: Adversary,
    seed: u64,
    run: impl FnOnce(&mut dyn FnMut(u64, bool, &mut dyn FnMut(Seen))),
) {
    let mut registers = Registers::LONG;
    if levels == 5 {
        registers.cr4 |= 1 << 12;
    }
    let machine = Machine::builder()
        .features(Features {
            max_phys_bits: 40, // as QEMU's `max`
            pcid: false,
            ..Features::default()
        })
        .registers(registers)
        .seed(seed)
        .adversary(adversary)
        .on_violation(OnViolation::Record)
        .history(0)
        .verify(false)
        .build()
        .expect("a machine");
    let range = FrameRange::from_numbers(0, machine.memory().frame_limit()).expect("frames");
    let slots = SlotArena::new(range);
    let frames = FramePool::new(&machine, 256);
    // SAFETY: one thread, and the parts belong to one machine.
    let parts = unsafe {
        Parts::new(
            &machine,
            &frames,
            &machine,
            SingleGrace::new(),
            &machine,
            &slots,
        )
    };
    let tables: Tables<_> = Tables::with_levels(&parts, levels).expect("a root");
    let block = |order: u8| -> OwnedFrame {
        let order = Order::new(order).expect("an order");
        frames
            .alloc(&FrameRequest::new(order).zeroed())
            .expect("frames")
    };
    // Ends with the machine: dropped frames are leaked to it.
    let small: [OwnedFrame; steps::FRAMES] = std::array::from_fn(|_| block(0));
    let large: [OwnedFrame; steps::BLOCKS] = std::array::from_fn(|_| block(9));
    // SAFETY: nothing of the host runs in the tables.
    unsafe { machine.load_root(tables.root(), false) };
    let mut bench = Bench {
        tables: &tables,
        frames: small.each_ref().map(OwnedFrame::first),
        blocks: large.each_ref().map(OwnedFrame::first),
        processor: Mock(machine.cpu(0)),
    };
    run(&mut |number, lazy, see| bench.run(number, lazy, &mut |seen| see(seen)));
}

/// As the kernel prints the outcomes of a lazy program.
fn word(seen: Seen) -> Option<String> {
    match seen {
        Seen::Access(_, _, Outcome::Value(value)) => Some(format!("v{value:x}")),
        Seen::Access(_, _, Outcome::Fault(code, at)) => Some(format!("f{code:x}@{at:x}")),
        Seen::Entry(..) => None,
    }
}

/// Seeds under which the adversary may play a lazy program.
const SEEDS: u64 = 400;
/// Liberties taken often: programs are short.
const HOSTILE: Adversary = Adversary {
    evict: 200,
    speculate: 0,
    any_hit: 512,
    stale_fault: 300,
    fracture: 200,
    delay_interrupts: 0,
};

fn compare(text: &str) -> Result<String, String> {
    let mut levels = 4;
    let mut digests = Vec::new();
    let mut lazy = Vec::new();
    for line in text.lines().map(str::trim) {
        if let Some(rest) = line.strip_prefix("differential levels=") {
            levels = rest.parse().map_err(|_| format!("levels {rest}"))?;
        } else if let Some(rest) = line.strip_prefix("lazy ") {
            lazy.push(
                rest.split(' ')
                    .skip(1)
                    .map(str::to_owned)
                    .collect::<Vec<_>>(),
            );
        } else {
            let words = line.split(' ').map(|word| {
                (word.len() == 16)
                    .then(|| u64::from_str_radix(word, 16).ok())
                    .flatten()
            });
            if let Some(words) = words.collect::<Option<Vec<u64>>>() {
                digests.extend(words);
            }
        }
    }
    if digests.len() as u64 != FLUSHED || lazy.len() as u64 != LAZY {
        return Err(format!(
            "{} digests and {} lazy programs were printed",
            digests.len(),
            lazy.len()
        ));
    }
    let mut wrong = Vec::new();
    on_mock(levels, Adversary::OFF, 0, |run| {
        for (number, kernel) in digests.iter().enumerate() {
            let mut digest = Digest::EMPTY;
            run(number as u64, false, &mut |seen| digest.add(seen));
            if digest.0 != *kernel {
                wrong.push(number);
            }
        }
    });
    if let Some(first) = wrong.first() {
        return Err(format!(
            "{} of {FLUSHED} flushed programs differ from the mock's plain mode, the first is {first}: {wrong:?}",
            wrong.len()
        ));
    }
    let mut plain = 0;
    for (number, kernel) in lazy.iter().enumerate() {
        let mut allowed = vec![Vec::new(); kernel.len()];
        let found = (0..SEEDS).find(|seed| {
            let adversary = if *seed == 0 { Adversary::OFF } else { HOSTILE };
            let mut own = Vec::new();
            on_mock(levels, adversary, *seed, |run| {
                run(number as u64, true, &mut |seen| own.extend(word(seen)));
            });
            // What the mock did next in plays that agree so far.
            for step in 0..kernel.len() {
                allowed[step].push(own[step].clone());
                if own[step] != kernel[step] {
                    return false;
                }
            }
            own.len() == kernel.len()
        });
        match found {
            Some(0) => plain += 1,
            Some(_) => {}
            None => {
                let step = (0..kernel.len())
                    .find(|step| !allowed[*step].contains(&kernel[*step]))
                    .unwrap_or(0);
                let mut others = allowed[step].clone();
                others.sort();
                others.dedup();
                return Err(format!(
                    "lazy program {number}, access {step}: {} here, the mock allows {others:?}",
                    kernel[step]
                ));
            }
        }
    }
    Ok(format!(
        "{FLUSHED} flushed programs equal in every word, {LAZY} lazy ones allowed ({plain} as in plain mode)"
    ))
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--only", number] => {
            let number = number.parse().expect("a number");
            on_mock(4, Adversary::OFF, 0, |run| {
                run(number, false, &mut |seen| println!("{seen:x?}"))
            });
            ExitCode::SUCCESS
        }
        [file] => match compare(&std::fs::read_to_string(file).expect("a file")) {
            Ok(note) => {
                println!("{note}");
                ExitCode::SUCCESS
            }
            Err(why) => {
                println!("{why}");
                ExitCode::FAILURE
            }
        },
        _ => panic!("demo-oracle FILE, or --only N"),
    }
}
