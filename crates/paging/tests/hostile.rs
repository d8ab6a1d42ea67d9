//! A long adversarial run: page tables of every x86 mode on a machine that takes every liberty that hardware has.
//!
//! `KMEM_SEED` replays a run, `KMEM_STEPS` makes it longer (a step is an access or a change of a frame's owner).
//!
//! ```text
//! KMEM_STEPS=100000000 cargo test --release -p kmem-paging --test hostile -- --ignored --nocapture
//! ```

#![cfg(not(loom))]

#[path = "common/crowd.rs"]
mod crowd;
#[path = "common/directed/mod.rs"]
mod directed;
#[path = "common/family.rs"]
mod family;
#[path = "common/hostile/mod.rs"]
mod hostile;
#[path = "common/hostile_env.rs"]
mod hostile_env;
#[path = "common/modes.rs"]
mod modes;

use std::panic::catch_unwind;

use hostile::{Setup, World, add};
use hostile_env::Caller;
use kmem_mock_x86::{Adversary, Stats};
use kmem_paging::format::{Format, X86_64};
use modes::Kind;

/// Operations in one world; then it is taken down, and everything must be back.
const EPOCH: u64 = 1500;

/// Says which run it was, if it ends badly.
struct Story<'a>(&'a str, u64);

impl Drop for Story<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("replay with KMEM_MODE={} KMEM_SEED={}", self.0, self.1);
        }
    }
}

fn world<F: Format>(setup: Setup, seed: u64, operations: u64) -> Stats {
    let mut world = World::<F>::new(setup, seed);
    for _ in 0..operations {
        world.step();
    }
    world.finish()
}

fn epoch<F: Format>(kind: Kind, seed: u64) -> Stats {
    let _story = Story(kind.name(), seed);
    world::<F>(Setup::new::<F>(kind.registers()), seed, EPOCH)
}

/// Whether anybody notices what the kernel around the tables does wrong.
fn is_caught(caller: Caller) -> bool {
    (0..8).any(|seed| {
        let kind = [Kind::Tagged, Kind::Long][seed as usize % 2];
        let setup = Setup {
            caller,
            ..Setup::new::<X86_64>(kind.registers())
        };
        catch_unwind(|| world::<X86_64>(setup, seed, 300)).is_err()
            || catch_unwind(|| crowd::crowd(seed, 40, Adversary::FULL, caller)).is_err()
    })
}

#[test]
fn a_kernel_that_flushes_wrongly_is_caught() {
    let missed: Vec<Caller> = Caller::FAULTS
        .into_iter()
        .filter(|&caller| !is_caught(caller))
        .collect();
    assert!(missed.is_empty(), "nobody noticed {missed:?}");
}

#[test]
fn a_seed_is_a_run() {
    let run = || {
        let stats = world::<X86_64>(Setup::new::<X86_64>(Kind::Tagged.registers()), 77, 200);
        (stats, crowd::crowd(5, 30, Adversary::FULL, Caller::Right))
    };
    assert_eq!(run(), run());
    let other = crowd::crowd(6, 30, Adversary::FULL, Caller::Right);
    assert_ne!(run().1, other);
}

fn run(steps: u64) {
    let number = |name| {
        std::env::var(name)
            .ok()
            .and_then(|text| text.parse::<u64>().ok())
    };
    let only = std::env::var("KMEM_MODE").ok();
    let steps = number("KMEM_STEPS").unwrap_or(steps);
    let first = number("KMEM_SEED").unwrap_or(0);
    println!("seed {first}, {steps} steps");
    let mut total = Stats::default();
    let mut done = 0;
    let mut seed = first;
    while done < steps {
        if only.as_ref().is_none_or(|only| only == "crowd") {
            let _story = Story("crowd", seed);
            let stats = crowd::crowd(seed, 120, Adversary::FULL, Caller::Right);
            done += stats.accesses;
            add(&mut total, &stats);
        }
        for kind in Kind::ALL {
            if only.as_ref().is_some_and(|only| only != kind.name()) {
                continue;
            }
            let stats = modes::with_format!(kind, F => epoch::<F>(kind, seed));
            done += stats.accesses;
            add(&mut total, &stats);
        }
        seed += 1;
    }
    println!("{done} accesses, seeds {first}..{seed}, 0 violations\n{total}");
}

#[test]
fn a_million_steps_without_a_violation() {
    run(1_000_000);
}

#[test]
#[ignore = "a hundred million steps: for the night, in release"]
fn a_hundred_million_steps_without_a_violation() {
    run(100_000_000);
}

#[test]
fn single_situations() {
    for (name, run) in directed::ALL {
        println!("{name}");
        run();
    }
}

/// What the machines of several runs did.
fn print_total(runs: impl Iterator<Item = Stats>) {
    let mut total = Stats::default();
    runs.for_each(|stats| add(&mut total, &stats));
    println!("{total}");
}

#[test]
fn a_family_that_shares_tables() {
    print_total((0..20).map(|seed| family::family(seed, 200)));
}

#[test]
fn one_table_made_and_emptied_by_three() {
    print_total((0..6).map(|seed| crowd::duel(seed, 60)));
}
