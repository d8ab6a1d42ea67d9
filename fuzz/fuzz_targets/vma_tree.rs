//! The range tree against a sorted list: any bytes become stores, erasures, merges and changes; every answer is compared,
//! and every allocation fails once.
#![no_main]

#[path = "../../crates/vma-tree/tests/common/mod.rs"]
mod common;

use arbitrary::Arbitrary;
use common::Request;
use common::ops::{Op, differential, failing};
use kmem_hal::{Page, PageRange};
use libfuzzer_sys::fuzz_target;

/// Where a range lies: dense at the bottom, anywhere, or at the top of the space.
#[derive(Arbitrary, Debug)]
enum Place {
    Dense(u16, u8),
    Any(u64, u64),
    Top(u8, u8),
}

impl Place {
    fn range(&self) -> PageRange {
        let (first, more) = match *self {
            Self::Dense(first, more) => (u64::from(first) % 600, u64::from(more)),
            Self::Any(first, more) => (first >> 12, more >> (12 + first % 50)),
            Self::Top(down, more) => (Page::MAX.number() - u64::from(down), u64::from(more)),
        };
        let last = first.saturating_add(more).min(Page::MAX.number());
        PageRange::new(Page::from_number(first), Page::from_number(last)).unwrap()
    }
}

#[derive(Arbitrary, Debug)]
enum Call {
    Store(Place, u8),
    Erase(Place),
    Merged(Place, u8),
    Modify(Place, u8),
    Clear,
}

#[derive(Arbitrary, Debug)]
struct Ask {
    page: u64,
    limits: Place,
    pages: u64,
    /// The shift of a power of two; one beyond them is the largest number.
    alignment: u8,
    offset: u64,
    sure: bool,
}

#[derive(Arbitrary, Debug)]
struct Input {
    calls: Vec<Call>,
    ask: Ask,
    turns: u64,
    out_of_memory: bool,
}

fuzz_target!(|input: Input| {
    let ops: Vec<Op> = input
        .calls
        .iter()
        .take(200)
        .map(|call| match call {
            Call::Store(place, value) => Op::Store(place.range(), u64::from(value % 4)),
            Call::Erase(place) => Op::Erase(place.range()),
            Call::Merged(place, value) => Op::Merged(place.range(), u64::from(value % 4)),
            Call::Modify(place, by) => Op::Modify(place.range(), u64::from(by % 6)),
            Call::Clear => Op::Clear,
        })
        .collect();
    if input.out_of_memory {
        failing::<32>(&ops[..ops.len().min(30)]);
        return;
    }
    let ask = &input.ask;
    let alignment: u64 = match ask.alignment % 65 {
        64 => u64::MAX,
        bit => 1 << bit,
    };
    let pages = (ask.pages >> (ask.pages % 60)).clamp(1, Page::LIMIT / 2);
    let request = Request {
        limits: ask.limits.range(),
        pages,
        alignment,
        offset: ask.offset % alignment,
        at_least: if ask.sure {
            pages.saturating_add(alignment - 1)
        } else {
            pages
        },
    };
    let asks = [(ask.page, request)];
    differential::<32>(&ops, &asks, input.turns);
    differential::<8>(&ops, &asks, input.turns);
});
