//! The workload of `kmem top`: recorded programs that run side by side, each again and again.
//!
//! Each slice makes a few steps of every program in turn, so that their address spaces live at the same time. A program that
//! ends frees everything and starts anew with the next slice.

use super::Workload;
use super::view::{ORDERS, SlabRow, View, ZoneRow};
use crate::boot::figures::caches;
use crate::boot::{Waiting, open_traces};
use crate::input::InputError;
use crate::output::units::{bytes, grouped};
use crate::replay::Outcome;
use crate::replay::trace_run::TraceRun;
use crate::world::World;
use crate::world::process::{Counts, Process};
use kmem_hal::PAGE_SIZE;

/// Steps that a program makes in a slice.
const STEPS: usize = 8;

/// A program: the trace it follows, and its run.
struct Program {
    name: String,
    run: Option<TraceRun<Process>>,
}

/// All programs.
pub struct Programs {
    world: &'static World,
    files: Vec<String>,
    programs: Vec<Program>,
    /// Whether programs start again when they end.
    again: bool,
    done: Counts,
    ended: u64,
    trouble: Vec<String>,
}

impl Programs {
    /// Prepares the programs of the files, or all embedded ones.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn new(world: &'static World, files: &[String], again: bool) -> Result<Self, InputError> {
        let mut all = Self {
            world,
            files: files.to_vec(),
            programs: Vec::new(),
            again,
            done: Counts::default(),
            ended: 0,
            trouble: Vec::new(),
        };
        for waiting in open_traces(files)? {
            let program = all.start(waiting);
            all.programs.push(program);
        }
        Ok(all)
    }

    fn start(&mut self, waiting: Waiting) -> Program {
        let run = match Process::new(self.world) {
            Ok(process) => Some(TraceRun::new(waiting.reader, process)),
            Err(e) => {
                self.trouble
                    .push(format!("{}: no address space: {e}", waiting.name));
                None
            }
        };
        Program {
            name: waiting.name,
            run,
        }
    }

    /// Opens one program's trace once more.
    fn reopen(&self, index: usize) -> Option<Waiting> {
        let mut all = match self.files.get(index) {
            Some(file) => open_traces(std::slice::from_ref(file)).ok()?,
            None => open_traces(&[]).ok()?,
        };
        let at = if self.files.is_empty() { index } else { 0 };
        (at < all.len()).then(|| all.swap_remove(at))
    }

    /// Makes a few steps of one program; `true` if it has something left to do.
    fn slice(&mut self, index: usize) -> bool {
        let Some(run) = self.programs[index].run.as_mut() else {
            return false;
        };
        let mut over = None;
        for _ in 0..STEPS {
            match run.step() {
                Ok(None) => {}
                Ok(Some(outcome)) => {
                    over = Some(Ok(outcome));
                    break;
                }
                Err(bad) => {
                    over = Some(Err(bad));
                    break;
                }
            }
        }
        let Some(over) = over else {
            return true;
        };
        let name = self.programs[index].name.clone();
        match over {
            Ok(Outcome::Pass { .. }) => {}
            Ok(Outcome::Fail {
                line,
                expected,
                got,
            }) => {
                self.trouble.push(format!(
                    "{name} line {line}: expected {expected}, got {got}"
                ));
            }
            Err(bad) => self.trouble.push(bad.to_string()),
        }
        self.ended += 1;
        if let Some(mut run) = self.programs[index].run.take() {
            add(&mut self.done, run.mm().counts());
        }
        if self.again
            && let Some(waiting) = self.reopen(index)
        {
            self.programs[index] = self.start(waiting);
            return true;
        }
        false
    }

    fn counts(&self) -> Counts {
        let mut sum = self.done;
        for run in self.programs.iter().filter_map(|p| p.run.as_ref()) {
            add(&mut sum, run.process().counts());
        }
        sum
    }
}

fn add(sum: &mut Counts, more: Counts) {
    sum.faults += more.faults;
    sum.accesses += more.accesses;
    sum.calls += more.calls;
    sum.forks += more.forks;
}

impl Workload for Programs {
    fn advance(&mut self) -> bool {
        let mut busy = false;
        for index in 0..self.programs.len() {
            busy |= self.slice(index);
        }
        busy
    }

    fn view(&self) -> View {
        let info = self.world.frames().mem_info();
        let counts = self.counts();
        let mut lines = vec![format!(
            "calls {}   page faults {}   programs ended {}",
            grouped(counts.calls),
            grouped(counts.faults),
            grouped(self.ended)
        )];
        let (mut spaces, mut mappings, mut resident) = (0u64, 0, 0);
        for run in self.programs.iter().filter_map(|p| p.run.as_ref()) {
            let usage = run.process().space().recount();
            spaces += 1;
            mappings += usage.mappings;
            resident += usage.rss_anon + usage.rss_file + usage.rss_shmem;
        }
        let (given, taken) = self.world.source().ledger(|l| (l.given, l.taken));
        lines.push(format!(
            "address spaces {spaces}   mappings {}   resident {}",
            grouped(mappings),
            bytes(resident * PAGE_SIZE)
        ));
        lines.push(format!(
            "blocks given {}   taken back {}",
            grouped(given),
            grouped(taken)
        ));
        lines.extend(self.trouble.last().map(|t| format!("trouble: {t}")));
        let zones = self
            .world
            .frames()
            .zones()
            .filter(|z| z.present > 0)
            .map(|z| {
                let mut blocks = [0; ORDERS];
                blocks.copy_from_slice(&z.blocks);
                ZoneRow {
                    name: format!("node {} {}", z.node, z.kind),
                    present: z.present,
                    free: z.free,
                    blocks,
                }
            });
        let mut slabs: Vec<SlabRow> = caches(self.world)
            .iter()
            .map(|c| SlabRow {
                name: c.name.into(),
                active: c.active_objects,
                total: c.total_objects,
                size: c.object_size as u64,
                slabs: c.slabs,
                bytes: c.frames * PAGE_SIZE,
            })
            .collect();
        slabs.sort_by_key(|s| core::cmp::Reverse(s.bytes));
        let names: Vec<&str> = self.programs.iter().map(|p| p.name.as_str()).collect();
        View {
            title: names.join(", "),
            total: info.total * PAGE_SIZE,
            free: (info.free + info.cached) * PAGE_SIZE,
            lines,
            zones: zones.collect(),
            slabs,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::default_map;
    use crate::input::map;

    #[test]
    fn programs_run_side_by_side_and_end() {
        let world = World::new(&map::read(default_map().unwrap()).unwrap(), 2).unwrap();
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/data/oracle/traces/");
        let files: Vec<String> = ["ls", "sort-parallel"]
            .iter()
            .map(|n| format!("{dir}{n}.txt.gz"))
            .collect();
        let mut programs = Programs::new(world, &files, false).unwrap();
        assert!(programs.advance());
        let during = programs.view();
        assert!(
            during.lines[1].starts_with("address spaces 2 "),
            "{:?}",
            during.lines
        );
        while programs.advance() {}
        let after = programs.view();
        assert!(
            after.lines[0].contains("programs ended 2"),
            "{:?}",
            after.lines
        );
        assert!(programs.trouble.is_empty(), "{:?}", programs.trouble);
        assert!(
            after
                .slabs
                .iter()
                .any(|s| s.name == "vm_area_struct" && s.active == 0)
        );
        // With `again` the work never ends.
        let mut programs = Programs::new(world, &files[1..], true).unwrap();
        for _ in 0..60 {
            assert!(programs.advance());
        }
        assert!(programs.ended >= 1);
    }
}
