//! The page-frame allocator against the textbook twin: any bytes become calls; every refusal must be honest.
#![no_main]

#[path = "../../crates/buddy/tests/common/mod.rs"]
mod common;

use common::layout::END;
use common::op::BuddyOp;
use common::window::Window;
use common::world::World;
use libfuzzer_sys::fuzz_target;

thread_local! {
    static WINDOW: Window = Window::new(END << 12, END << 12);
}

fuzz_target!(|ops: Vec<BuddyOp>| {
    WINDOW.with(|window| {
        let mut world = World::new(window);
        for op in ops.iter().take(200) {
            world.apply(op);
        }
        world.finish();
    });
});
