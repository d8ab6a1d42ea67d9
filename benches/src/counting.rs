//! Counts of locked instructions, made by this program built once more with the facade's counting backend.
//!
//! A count needs another build: the counting atomics cost time, so that nothing can be timed in it. Optimisation does not change it. [`rows_of`] builds `compare`
//! with `--cfg kmem_counting` and without the peers into `target/counting`, runs it with `--counting`, and reads its rows.
//! Decision record 002 tells what is counted: read-modify-writes, and stores and fences that lock.

#[cfg(kmem_counting)]
pub use measure::measure;

#[cfg(not(kmem_counting))]
pub use run::rows_of;

/// What counting builds are called with.
pub const FLAG: &str = "--counting";

#[cfg(not(kmem_counting))]
mod run {
    use std::path::Path;
    use std::process::{Command, Stdio};

    use crate::output::{Row, parse};

    /// Builds the counting program, runs it, and gives the rows of an area.
    ///
    /// # Errors
    ///
    /// What failed: the build, the run, or reading its answer.
    pub fn rows_of(area: &str) -> Result<Vec<Row>, String> {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let target = here
            .parent()
            .ok_or("no workspace around benches")?
            .join("target/counting");
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let status = Command::new(cargo)
            .args(["build", "--quiet", "--no-default-features"])
            .args(["--bin", "compare", "--manifest-path"])
            .arg(here.join("Cargo.toml"))
            .arg("--target-dir")
            .arg(&target)
            .env("RUSTFLAGS", "--cfg kmem_counting --cap-lints allow")
            .env("CARGO_PROFILE_DEV_DEBUG", "0")
            .stdout(Stdio::null())
            .status()
            .map_err(|error| format!("cargo cannot be run: {error}"))?;
        if !status.success() {
            return Err("the counting build failed".into());
        }
        let output = Command::new(target.join("debug/compare"))
            .arg(super::FLAG)
            .stderr(Stdio::inherit())
            .output()
            .map_err(|error| format!("the counting program cannot be run: {error}"))?;
        if !output.status.success() {
            return Err(format!("the counting program failed: {}", output.status));
        }
        let text = String::from_utf8_lossy(&output.stdout);
        let rows = parse(&text)?;
        if rows.is_empty() {
            return Err("the counting program counted nothing".into());
        }
        Ok(rows.into_iter().filter(|row| row.area == area).collect())
    }
}

#[cfg(kmem_counting)]
mod measure {
    use std::alloc::Layout;

    use kmem_hal::sync::{counts, reset_counts};

    use crate::clock::{Watch, race};
    use crate::harness::{Options, Runner, Slice, Workload};
    use crate::mixed::{Frames, Mixed};
    use crate::output::{Row, Unit};
    use crate::platform::{Machine, Region, buddy, run_as};
    use crate::rng::Rng;

    /// Locked instructions in `work`, by `ops`.
    fn locked(ops: u64, work: impl FnOnce()) -> f64 {
        reset_counts();
        work();
        counts().locked as f64 / ops as f64
    }

    /// All rows of counts.
    pub fn measure() -> Vec<Row> {
        let mut runner = Runner::new(Options {
            print: false,
            ..Options::new(true)
        });
        pairs(&mut runner);
        mixed(&mut runner);
        refills(&mut runner);
        replaces(&mut runner);
        runner.rows().to_vec()
    }

    fn pairs(runner: &mut Runner) {
        const PAIRS: u64 = 100_000;
        let frames = buddy(Region::leak(1 << 16));
        let pair = |_: u64, _: &mut Watch| {
            Slice::value(locked(2 * PAIRS, || {
                for _ in 0..PAIRS {
                    let frame = Frames::alloc(frames, 0).expect("memory is free");
                    Frames::free(frames, frame, 0);
                }
            }))
        };
        runner.run(Workload::new("buddy", "shared_rmw_pair", Unit::Count).with("kmem", pair));
    }

    fn mixed(runner: &mut Runner) {
        const OPS: u64 = 100_000;
        const FRAMES: u64 = 1 << 16;
        let frames = buddy(Region::leak(FRAMES));
        let mut mixed = Mixed::new(FRAMES * 8 / 10, 1);
        mixed.fill(&frames);
        let step = |_: u64, _: &mut Watch| {
            Slice::value(locked(OPS, || {
                for _ in 0..OPS {
                    mixed.step(&frames);
                }
            }))
        };
        runner.run(Workload::new("buddy", "shared_rmw_mixed", Unit::Count).with("kmem", step));
    }

    /// Locked instructions for each 64 objects of a page that leave their slabs and come back, by way of the arrays of one CPU: refills and
    /// flushes. And for each 64 objects of new slabs, the page allocator included.
    fn refills(runner: &mut Runner) {
        const OBJECTS: usize = 64 * 1024;
        let machine = Machine::leak(Region::new(1 << 14));
        let layout = Layout::new::<[u64; 8]>();
        let take = |objects: &mut Vec<*mut u8>, count| {
            for _ in 0..count {
                let object = machine.slab.alloc(layout);
                assert!(!object.is_null());
                objects.push(object);
            }
        };
        let give = |objects: &mut Vec<*mut u8>| {
            for object in objects.drain(..) {
                // SAFETY: allocated with this layout, freed once.
                unsafe { machine.slab.dealloc(object, layout) };
            }
        };
        let mut objects = Vec::with_capacity(OBJECTS);
        let new = |_: u64, _: &mut Watch| {
            let count = locked((OBJECTS / 64) as u64, || take(&mut objects, OBJECTS));
            give(&mut objects);
            machine.slab.shrink();
            Slice::value(count)
        };
        runner.run(Workload::new("slab", "rmw_per_64_new", Unit::Count).with("kmem", new));
        let (mut held, mut kept) = (Vec::with_capacity(OBJECTS), Vec::new());
        let again = |_: u64, _: &mut Watch| {
            // One page in two stays in use, so that no slab goes back and every object comes from one.
            take(&mut held, OBJECTS);
            let mut free: Vec<_> = held
                .extract_if(.., |object| object.addr() & 4096 == 0)
                .collect();
            kept.append(&mut held);
            let batches = (free.len() / 64) as u64;
            let count = locked(batches, || give(&mut free))
                + locked(batches, || take(&mut free, OBJECTS / 2));
            give(&mut free);
            give(&mut kept);
            machine.slab.shrink();
            Slice::value(count / 2.0)
        };
        runner.run(Workload::new("slab", "rmw_per_64", Unit::Count).with("kmem", again));
    }

    /// Locked instructions and stores to shared words for each replacement of a random live object, 8 to 4096 bytes, by two
    /// CPUs at once: all that one of them does to lines of the other, the page allocator included.
    fn replaces(runner: &mut Runner) {
        const LIVE: usize = 25_000;
        const REPLACES: u64 = 100_000;
        let machine = Machine::leak(Region::new(1 << 15));
        let layout = |rng: &mut Rng| {
            let power = 3 + rng.below(9);
            let size = (1 << power) + rng.below(1 << power);
            Layout::from_size_align(size as usize, 8).expect("a layout")
        };
        let take = |layout: Layout| {
            let object = machine.slab.alloc(layout);
            assert!(!object.is_null(), "memory is free");
            (object, layout)
        };
        let one = |seed: u64| {
            let mut rng = Rng::new(seed);
            let mut live: Vec<_> = (0..LIVE).map(|_| take(layout(&mut rng))).collect();
            reset_counts();
            for _ in 0..REPLACES {
                let place = &mut live[rng.below(LIVE as u64) as usize];
                // SAFETY: allocated with this layout, replaced below.
                unsafe { machine.slab.dealloc(place.0, place.1) };
                *place = take(layout(&mut rng));
            }
            let spent = counts();
            for (object, layout) in live {
                // SAFETY: allocated with this layout, freed once.
                unsafe { machine.slab.dealloc(object, layout) };
            }
            (spent.locked + spent.stores) as f64
        };
        let both = |seed: u64, _: &mut Watch| {
            let (_, spent) = race(|cpu| {
                run_as(cpu);
                one(2 * seed + cpu as u64)
            });
            Slice::value((spent[0] + spent[1]) / (2 * REPLACES) as f64)
        };
        let workload = Workload::new("slab", "shared_stores_replace", Unit::Count).threads(2);
        runner.run(workload.n(LIVE as u64).with("kmem", both));
    }
}
