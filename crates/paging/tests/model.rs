//! Every operation on every format, held against a flat map; with memory, and with memory running out at one allocation after the other (of
//! operations with many, not at each of the later ones).

#![cfg(not(loom))]

#[path = "common/machine.rs"]
mod machine;
#[path = "common/ops/mod.rs"]
mod ops;

use kmem_paging::format::{
    Aarch64, Format, RiscvSv39, RiscvSv48, RiscvSv57, X86_64, X86_64La57, X86Pae, X86Pse36,
    X86TwoLevel,
};
use ops::World;
use proptest::prelude::*;

fn run<F: Format>(codes: &[[u8; 6]]) {
    let mut world = World::<F>::new();
    for (number, &code) in codes.iter().enumerate() {
        world.step(code, None);
        if number % 8 == 7 {
            world.compare();
        }
    }
    world.finish();
}

/// Each operation fails at its first allocation, then at its second and so on, as `step_failing` chooses; gives how often one did.
fn run_without_memory<F: Format>(codes: &[[u8; 6]]) -> usize {
    let mut world = World::<F>::new();
    let mut failures = 0;
    for &code in codes {
        world.step_failing(code, |world| {
            world.compare();
            failures += 1;
        });
    }
    world.finish();
    failures
}

macro_rules! formats {
    ($($name:ident $format:ty),*) => {$(
        mod $name {
            use super::*;

            proptest! {
                #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

                #[test]
                fn agrees_with_a_flat_map(codes in prop::collection::vec(any::<[u8; 6]>(), 1..60)) {
                    run::<$format>(&codes);
                }

                #[test]
                fn changes_nothing_without_memory(codes in prop::collection::vec(any::<[u8; 6]>(), 1..12)) {
                    run_without_memory::<$format>(&codes);
                }
            }
        }
    )*};
}

formats!(four_levels X86_64, five_levels X86_64La57, pae X86Pae, two_levels X86TwoLevel, pse36 X86Pse36,
    sv39 RiscvSv39, sv48 RiscvSv48, sv57 RiscvSv57, aarch64 Aarch64);

#[test]
fn memory_does_run_out_in_these_tests() {
    // Map huge, unmap a page of it, move, map a range: each needs tables.
    let codes = [
        [0, 0, 0, 0, 0, 1],
        [3, 0, 5, 0, 0, 0],
        [12, 0, 0, 20, 0, 3],
        [2, 3, 0, 39, 0, 0],
    ];
    assert!(run_without_memory::<X86_64>(&codes) >= 6);
}

#[test]
fn single_frames_may_leave_as_one_block() {
    // A range of single leaves whose frames follow each other, and the merge of its first 512.
    run::<kmem_paging::format::X86Pae>(&[[2, 154, 56, 10, 0, 128], [11, 118, 0, 0, 0, 0]]);
}

#[test]
fn a_page_that_becomes_the_users_is_told() {
    let codes = [
        [76, 18, 0, 0, 81, 55],
        [51, 49, 2, 69, 154, 252],
        [130, 102, 192, 130, 24, 58],
    ];
    run::<X86Pse36>(&codes);
    run::<X86_64>(&codes);
}
