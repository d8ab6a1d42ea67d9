//! kmalloc and a typed cache on three CPUs and one to four memory nodes against a model: any bytes become calls.
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
    ARENA.with(|arena| {
        let nodes = 1 + ops.len() as u16 % 4;
        arena
            .nodes
            .store(nodes, std::sync::atomic::Ordering::Relaxed);
        run(arena, &ops[..ops.len().min(200)]);
    });
});
