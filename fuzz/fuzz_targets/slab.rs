//! kmalloc and a typed cache on three CPUs against a model: any bytes become calls.
#![no_main]

#[path = "../../crates/slab/tests/common/mod.rs"]
mod common;

use common::Arena;
use common::world::{SlabOp, run};
use libfuzzer_sys::fuzz_target;

thread_local! {
    static ARENA: &'static Arena = Arena::new(4096);
}

fuzz_target!(|ops: Vec<SlabOp>| {
    ARENA.with(|arena| run(arena, &ops[..ops.len().min(200)]));
});
