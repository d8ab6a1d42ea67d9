//! Several processes, every word of each in a model, on the mock machine.

mod common;

use common::{World, driver};
use kmem_mock_x86::{Adversary, Machine, MemoryMap};
use kmem_testkit::processes::{ProcessOp, process_ops};
use proptest::prelude::*;

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
