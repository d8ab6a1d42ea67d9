//! hal's arithmetic and bookkeeping against models: addresses, canonical forms, ranges, CPU sets, slots, grace periods, ranks.
#![no_main]

#[path = "../../crates/hal/tests/common/mod.rs"]
mod common;

use arbitrary::Arbitrary;
use common::{GraceOp, SetOp, SlotOp};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
enum Input {
    Addresses(u64, u64, u8),
    Canonical(u64, u64, u8),
    FrameRanges(u64, u64, u64, u8),
    PageRanges(u64, u64, u64, u64),
    CpuSets(Vec<SetOp>),
    Slots(Vec<SlotOp>),
    Graces(Vec<GraceOp>),
    Ranks(Vec<(bool, u8)>),
}

fuzz_target!(|input: Input| {
    match input {
        Input::Addresses(a, b, shift) => common::addresses(a, b, shift),
        Input::Canonical(a, b, bits) => common::canonical(a, b, bits),
        Input::FrameRanges(base, length, cut, top) => common::frame_ranges(base, length, cut, top),
        Input::PageRanges(a, n, b, m) => common::page_ranges(a, n, b, m),
        Input::CpuSets(ops) => common::cpu_sets(&ops),
        Input::Slots(ops) => common::slots(&ops),
        Input::Graces(ops) => common::graces(&ops),
        Input::Ranks(steps) => common::ranks(&steps),
    }
});
