//! The stages of `kmem boot` with programs: exec of the running binary, the recorded programs, forks that write,
//! reclaim and swap.

use super::waiting::Waiting;
use super::{Running, exec, figures, forks, swap};
use crate::elf::Image;
use crate::input::InputError;
use crate::output::units::{bytes, grouped};
use crate::replay::Outcome;
use crate::replay::mm::MmUnderTest as _;
use crate::replay::trace_run::TraceRun;
use crate::world::World;
use crate::world::process::Process;
use kmem_hal::PAGE_SIZE;

/// Pages over which processes fork and write.
const FORK_PAGES: usize = 512;

impl Running {
    /// The program, the recorded programs, the forks; prints what Linux would print while all of it is there.
    pub(super) fn user_land(
        &mut self,
        world: &'static World,
        image: &Image,
        traces: Vec<Waiting>,
    ) -> Result<(), InputError> {
        let mut init = match Process::new(world) {
            Ok(process) => process,
            Err(e) => {
                self.checks
                    .holds("first process", false, "an address space", e.name());
                return Ok(());
            }
        };
        self.exec(&mut init, image);
        world.settle();
        let before_runs = figures::Tags::of(world);
        for waiting in traces {
            self.trace(world, waiting)?;
        }
        world.settle();
        let after_runs = figures::Tags::of(world);
        let (before, after) = (before_runs.without_slab(), after_runs.without_slab());
        self.checks.equal(
            "pages after the programs' exits",
            after,
            before,
            "pages",
            "before the first of them",
        );
        self.forks(world, &mut init);
        self.swap(world, &mut init);
        self.figures(world, &init);
        Ok(())
    }

    fn exec(&mut self, init: &mut Process, image: &Image) {
        let stage = self.stages.start("exec", image.file_pages());
        let started = init.exec(image, &["kmem", "boot"]);
        let compared = started
            .clone()
            .and_then(|_| exec::compare(init, image, &mut |page| stage.progress(page)));
        let faults = init.counts().faults;
        stage.done(&format!(
            "{}, faulted in by {} page faults",
            image.name,
            grouped(faults)
        ));
        match (started, compared) {
            (Ok(start), Ok(done)) => {
                self.checks.address(
                    "base address",
                    start.bias,
                    image.base,
                    "Linux without randomisation",
                );
                self.checks.address(
                    "entry",
                    start.entry.as_u64(),
                    image.entry,
                    "the file's header",
                );
                let wanted = image.pages() * PAGE_SIZE;
                self.checks.equal(
                    "bytes equal to the file",
                    done.bytes,
                    wanted,
                    "bytes",
                    "the file's program headers",
                );
                let mut argc = [0; 8];
                let read = init.read(start.stack.as_u64(), &mut argc).is_ok();
                self.checks.equal(
                    "argc on the stack",
                    u64::from_le_bytes(argc),
                    if read { 2 } else { u64::MAX },
                    "",
                    "kmem boot",
                );
            }
            (Err(why), _) | (_, Err(why)) => {
                self.checks
                    .holds("the program in memory", false, "equal to its file", &why);
            }
        }
    }

    fn trace(&mut self, world: &'static World, waiting: Waiting) -> Result<(), InputError> {
        let name = waiting.name;
        let stage = self.stages.start(&format!("run {name}"), 0);
        let mm = match Process::new(world) {
            Ok(mm) => mm,
            Err(e) => {
                stage.done("no address space");
                self.checks
                    .holds(&name, false, "an address space", e.name());
                return Ok(());
            }
        };
        let mut run = TraceRun::new(waiting.reader, mm);
        let outcome = loop {
            stage.progress(run.calls() as u64);
            if let Some(outcome) = run.step()? {
                break outcome;
            }
        };
        let (calls, checkpoints, faults) =
            (run.calls(), run.checkpoints(), run.mm().counts().faults);
        let usage = run.mm().space().recount();
        stage.done(&format!(
            "{} calls, {} page faults, {} mappings of {} at exit, {} resident",
            grouped(calls as u64),
            grouped(faults),
            usage.mappings,
            bytes(usage.total * PAGE_SIZE),
            bytes((usage.rss_anon + usage.rss_file + usage.rss_shmem) * PAGE_SIZE)
        ));
        match outcome {
            Outcome::Pass { .. } => {
                let list = format!("Linux's, at {checkpoints} checkpoints");
                self.checks.holds(
                    &format!("{name}: list of mappings"),
                    true,
                    &list,
                    "the same",
                );
            }
            Outcome::Fail {
                line,
                expected,
                got,
            } => {
                self.checks
                    .holds(&format!("{name}: line {line}"), false, &expected, &got);
            }
        }
        Ok(())
    }

    fn forks(&mut self, world: &World, init: &mut Process) {
        let stage = self.stages.start("fork and write", 0);
        let before = (init.counts().faults, world.source().ledger(|l| l.given));
        // Below the image, where nothing is.
        let done = forks::run(init, 0x1000_0000, FORK_PAGES);
        let faults = init.counts().faults - before.0;
        let given = world.source().ledger(|l| l.given) - before.1;
        let children = done.as_ref().map_or(0, |d| d.children);
        stage.done(&format!(
            "{children} children over {FORK_PAGES} pages, {} page faults, {} frames taken for copies and tables",
            grouped(faults),
            grouped(given)
        ));
        match done {
            Ok(d) => {
                let text = format!("{} words, each its writer's own", grouped(d.compared));
                self.checks.holds(
                    "words read by parent and children",
                    true,
                    &text,
                    &grouped(d.compared),
                );
            }
            Err(why) => {
                self.checks.holds(
                    "words read by parent and children",
                    false,
                    "each its writer's own",
                    &why,
                );
            }
        }
    }

    /// Pages go to swap and come back, and some get other frames; every figure beside what the device and the tables say.
    fn swap(&mut self, world: &'static World, init: &mut Process) {
        let stage = self.stages.start("reclaim and swap", 0);
        let outcome = swap::run(world, init, 0x1000_0000);
        let made = match outcome {
            Ok(made) => made,
            Err(why) => {
                stage.done("stopped");
                self.checks
                    .holds("pages in swap", false, "each as it was written", &why);
                return;
            }
        };
        stage.done(&format!(
            "{} pages reclaimed of {} looked at, {} written to swap, {} read back ({} ahead), {} moved",
            grouped(made.events.freed),
            grouped(made.events.scanned),
            grouped(made.events.swapped_out),
            grouped(made.events.swapped_in),
            grouped(made.events.read_ahead),
            grouped(made.events.moved)
        ));
        for figure in made.figures {
            let swap::Figure {
                what,
                said,
                recount,
                unit,
                of,
            } = figure;
            self.checks.equal(what, said, recount, unit, of);
        }
        let text = format!("{} words, each as it was written", grouped(made.compared));
        self.checks.holds(
            "words read out of swap",
            true,
            &text,
            &grouped(made.compared),
        );
        self.report
            .section("/proc/meminfo while pages were in swap", made.meminfo);
    }
}
