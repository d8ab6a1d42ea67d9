//! Several processes, every word of each in a model, on the mock machine.

mod common;

use arbitrary::{Arbitrary, Unstructured};
use common::{World, driver};
use kmem_mock_x86::{Adversary, Machine, MemoryMap};
use kmem_testkit::processes::{ProcessOp, process_ops};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

fn machine(adversary: Adversary, seed: u64) -> &'static World {
    let machine = Machine::builder()
        .memory(MemoryMap::pc(32 << 20))
        .cpus(2)
        .adversary(adversary)
        .seed(seed)
        .build();
    World::on(Box::leak(Box::new(machine.unwrap())))
}

fn run(world: &'static World, ops: &[ProcessOp], failures: bool) {
    driver::run(world, world.mm(), ops, failures);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn words_are_the_models(ops in process_ops(160)) {
        run(machine(Adversary::OFF, 0), &ops, false);
    }

    #[test]
    fn words_are_the_models_under_the_adversary(ops in process_ops(160), seed: u64) {
        run(machine(Adversary::FULL, seed), &ops, false);
    }

    #[test]
    fn a_step_without_memory_changes_nothing(ops in process_ops(60)) {
        run(machine(Adversary::OFF, 0), &ops, true);
    }
}

/// As many steps as `KMEM_STEPS` says, in lists of 2000, on one machine in turn without and with its adversary, and on a third list with every
/// allocation failing. A million in a release build: `KMEM_STEPS=1000000 cargo test --release -p kmem-cow-mm --test processes long`.
#[test]
fn words_are_the_models_for_a_long_time() {
    let steps = std::env::var("KMEM_STEPS").ok();
    let steps: usize = steps.map_or(6_000, |steps| steps.parse().expect("a number"));
    let world = |adversary, seed| {
        let world = machine(adversary, seed);
        (world, world.mm())
    };
    let (quiet, hostile) = (world(Adversary::OFF, 0), world(Adversary::FULL, 1));
    let mut runner = TestRunner::deterministic();
    let mut done = 0;
    for round in 0.. {
        let failures = round % 3 == 2;
        let lists = process_ops(if failures { 400 } else { 4000 });
        let ops = lists.new_tree(&mut runner).unwrap().current();
        let (world, mm) = if round % 3 == 1 { hostile } else { quiet };
        driver::run(world, mm, &ops, failures);
        done += ops.len();
        if done >= steps {
            break;
        }
    }
    println!("{done} steps");
}

/// The committed seeds of the fuzz target, decoded as it does, without its toolchain.
#[test]
fn seeds_of_the_fuzz_target_are_lists_of_steps() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus/cow_mm");
    let Ok(seeds) = std::fs::read_dir(folder) else {
        common::host::skipped(&format!("no seeds at {folder}"));
        return;
    };
    for seed in seeds {
        let bytes = std::fs::read(seed.unwrap().path()).unwrap();
        let input = <(bool, Vec<ProcessOp>)>::arbitrary_take_rest(Unstructured::new(&bytes));
        let (failures, ops) = input.unwrap();
        assert!(ops.len() >= 20, "{} steps", ops.len());
        run(machine(Adversary::OFF, 0), &ops, failures);
    }
}

/// Faults on purpose that short random lists must notice; those that need a rare order of steps the named regressions do.
///
/// `RUSTFLAGS="--cfg kmem_mutants" cargo test -p kmem-cow-mm --test processes faults`.
#[cfg(kmem_mutants)]
#[test]
fn faults_on_purpose_are_noticed() {
    use kmem_cow_mm::mutants::select;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    let names = [
        "moved-page-not-copied",
        "private-write-hits-the-file",
        "shared-stays-exclusive",
        "swapped-page-not-written",
    ];
    std::panic::set_hook(Box::new(|_| {}));
    let mut unnoticed = Vec::new();
    for name in names {
        let mut runner = TestRunner::deterministic();
        let noticed = (0..60).position(|_| {
            let ops = process_ops(300).new_tree(&mut runner).unwrap().current();
            let world = machine(Adversary::OFF, 0);
            select(name);
            let outcome = catch_unwind(AssertUnwindSafe(|| run(world, &ops, false)));
            select("");
            outcome.is_err()
        });
        match noticed {
            Some(list) => println!("{name}: list {list}"),
            None => unnoticed.push(name),
        }
    }
    let _ = std::panic::take_hook();
    assert!(unnoticed.is_empty(), "{unnoticed:?}");
}

/// A pinned page that is moved: its new table counts the pin.
#[test]
fn a_pin_moves_along() {
    let ops = [
        ProcessOp::Map {
            process: 0,
            page: 0,
            pages: 2,
            rights: 3,
            shared: false,
        },
        ProcessOp::Map {
            process: 3,
            page: 11,
            pages: 11,
            rights: 3,
            shared: false,
        },
        ProcessOp::Fork { process: 4 },
        ProcessOp::Exit { process: 2 },
        ProcessOp::Pin {
            process: 3,
            page: 21,
            write: true,
        },
        ProcessOp::Move {
            process: 2,
            page: 19,
            pages: 4,
            to: 8,
        },
    ];
    run(machine(Adversary::OFF, 0), &ops, false);
}
