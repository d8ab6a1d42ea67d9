//! Processes against the model of every word, on the mock machine: any bytes become calls and accesses.
//!
//! The first byte chooses whether each all-or-nothing step is also tried with every allocation failing.
#![no_main]

#[path = "../../crates/cow-mm/tests/common/mod.rs"]
mod common;

use common::{World, driver};
use kmem_cow_mm::Mm;
use kmem_testkit::processes::ProcessOp;
use libfuzzer_sys::fuzz_target;

thread_local! {
    /// One machine for all runs: every run gives back what it took, and the driver checks that.
    static MACHINE: (&'static World, &'static Mm<'static, World>) = {
        let world = World::new();
        (world, world.mm())
    };
}

fuzz_target!(|input: (bool, Vec<ProcessOp>)| {
    let (failures, ops) = input;
    let ops = &ops[..ops.len().min(200)];
    MACHINE.with(|(world, mm)| driver::run(world, mm, ops, failures));
});
