//! Random calls against the textbook twin; see `common/world.rs`.

mod common;

use std::collections::BTreeSet;

use arbitrary::{Arbitrary, Unstructured};
use common::layout::END;
use common::machine::{MIB, boot};
use common::op::{BuddyOp, buddy_ops, emptying_ops};
use common::window::Window;
use common::world::World;
use kmem_hal::{Frame, FrameRequest, FrameSink, FrameSource, Order};
use kmem_testkit::ops::{FrameOp, run_frames};
use proptest::prelude::*;

fn play(ops: &[BuddyOp]) {
    let window = Window::new(END << 12, END << 12);
    let mut world = World::new(&window);
    for op in ops {
        world.apply(op);
    }
    world.finish();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 400, ..ProptestConfig::default() })]
    #[test]
    fn behaves_like_the_textbook(ops in buddy_ops(END as u16)) {
        play(&ops);
    }

    /// Whatever the owners of pages do, ranges are emptied or refused as the model says.
    #[test]
    fn empties_ranges_honestly(ops in emptying_ops(END as u16)) {
        play(&ops);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, max_shrink_iters: 200, ..ProptestConfig::default() })]
    /// What any frame source must do: blocks apart from each other, zeroed, written by nobody else.
    #[test]
    fn serves_like_any_frame_source(ops in prop::collection::vec(any::<FrameOp>(), 1..80)) {
        let window = Window::new(END << 12, END << 12);
        let world = World::new(&window);
        run_frames(&world.buddy, &&window, &ops).unwrap();
        world.finish();
    }
}

/// What the fuzzer begins with: every call there is, the seeds of old enums rewritten to mean what they meant.
#[test]
fn the_fuzzer_begins_with_every_call() {
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus/buddy");
    // By name: a fuzzer that works there leaves its own beside them.
    let named = "areas blocks claims compaction compaction-across-nodes compaction-gains cpus nodes one-place";
    let old = (0..12).map(|number| format!("seed-{number:02}"));
    let mut calls = BTreeSet::new();
    for seed in named.split(' ').map(str::to_owned).chain(old) {
        let bytes = std::fs::read(format!("{corpus}/{seed}")).unwrap();
        let ops = Vec::<BuddyOp>::arbitrary_take_rest(Unstructured::new(&bytes)).unwrap();
        play(&ops);
        let names = ops.iter().map(|op| format!("{op:?}"));
        calls.extend(names.map(|name| name.split([' ', '(']).next().map(str::to_owned)));
    }
    assert_eq!(calls.len(), 24, "{calls:?}");
}

/// The course's order 3 out of 32 frames: 8 given, 8 and 16 left, 32 again.
#[test]
fn a_split_gives_the_lower_half_and_buddies_merge() {
    let window = Window::new(4 * MIB, 4 * MIB);
    let buddy = boot(&window, &[]);
    // Everything is taken but the 32 frames from 64 on.
    let mut rest = Vec::new();
    let island = buddy
        .alloc_at(Frame::new(64).unwrap(), Order::new(5).unwrap())
        .unwrap();
    while let Ok(frame) = buddy.alloc(&FrameRequest::ONE) {
        rest.push(frame);
    }
    buddy.free(island);
    let blocks = || {
        buddy.drain_all();
        buddy.zones().next().unwrap().blocks
    };
    assert_eq!(blocks()[..6], [0, 0, 0, 0, 0, 1]);
    let order = Order::new(4).unwrap();
    let upper = buddy.alloc(&FrameRequest::new(order)).unwrap();
    assert_eq!(upper.first().number(), 64);
    assert_eq!(blocks()[..6], [0, 0, 0, 0, 1, 0]);
    buddy.free(upper);
    let eight = buddy
        .alloc_at(Frame::new(64).unwrap(), Order::new(3).unwrap())
        .unwrap();
    assert_eq!(blocks()[..6], [0, 0, 0, 1, 1, 0]);
    buddy.free(eight);
    assert_eq!(blocks()[..6], [0, 0, 0, 0, 0, 1]);
    assert!(
        buddy
            .buddy_info()
            .to_string()
            .starts_with("Node 0, zone   Normal      0      0      0      0      0      1 ")
    );
}
