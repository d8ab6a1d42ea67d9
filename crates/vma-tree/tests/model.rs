//! The tree against a sorted list: every operation, every shape, every point where memory may run out.

mod common;

use common::ops::{Op, differential, differential_shared, failing, reserved};
use common::{Request, count, page, pages};
use kmem_hal::{Page, PageRange};
use proptest::prelude::*;

/// Numbers of pages: dense and small, scattered, and at the far ends of the space.
fn any_range() -> impl Strategy<Value = PageRange> {
    prop_oneof![
        8 => (0_u64..400, 1_u64..12).prop_map(|(first, pages)| count(first, pages)),
        2 => (0_u64..400, 1_u64..200).prop_map(|(first, pages)| count(first, pages)),
        1 => (any::<u64>(), any::<u64>(), 0_u32..50).prop_map(|(at, length, bits)| {
            let first = page(at >> 12);
            let last = first.number().saturating_add(length >> (12 + bits)).min(Page::MAX.number());
            PageRange::new(first, page(last)).unwrap()
        }),
        1 => (0_u64..40, 1_u64..40).prop_map(|(down, pages)| {
            let last = Page::MAX.number() - down;
            common::pages(last - (pages - 1), last)
        }),
    ]
}

fn any_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        10 => (any_range(), 0_u64..4).prop_map(|(range, value)| Op::Store(range, value)),
        6 => any_range().prop_map(Op::Erase),
        6 => (any_range(), 0_u64..4).prop_map(|(range, value)| Op::Merged(range, value)),
        4 => (any_range(), 0_u64..6).prop_map(|(range, value)| Op::Modify(range, value)),
        1 => (0_u8..8).prop_map(|rare| if rare == 0 { Op::Clear } else { Op::Erase(count(rare.into(), 90)) }),
    ]
}

fn any_request() -> impl Strategy<Value = Request> {
    let limits = prop_oneof![
        2 => Just(PageRange::ALL),
        3 => (0_u64..500, 1_u64..300).prop_map(|(first, pages)| count(first, pages)),
        1 => (1_u64..400).prop_map(|first| pages(first, Page::MAX.number())),
    ];
    let alignment = prop_oneof![
        6 => prop::sample::select(vec![1_u64, 2, 4, 16, 512, 3]),
        1 => (0_u32..64).prop_map(|bit| 1 << bit),
        1 => 1_u64..,
        1 => Just(u64::MAX),
    ];
    (
        limits,
        1_u64..40,
        alignment,
        any::<u64>(),
        any::<bool>(),
        0_u32..42,
    )
        .prop_map(|(limits, pages, alignment, offset, sure, shift)| {
            let pages = match shift {
                36..40 => pages << shift,
                40 => u64::MAX - pages,
                41 => Page::LIMIT - pages,
                _ => pages,
            };
            Request {
                limits,
                pages,
                alignment,
                offset: offset % alignment,
                at_least: if sure {
                    pages.saturating_add(alignment - 1)
                } else {
                    pages
                },
            }
        })
}

fn cases(cases: u32) -> ProptestConfig {
    let long = std::env::var("KMEM_LONG").is_ok();
    ProptestConfig {
        cases: if long { cases * 600 } else { cases },
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(cases(60))]

    #[test]
    fn agrees_with_a_list(
        ops in prop::collection::vec(any_op(), 1..120),
        asks in prop::collection::vec((0_u64..420, any_request()), 1..20),
        turns: u64,
    ) {
        differential::<32>(&ops, &asks, turns);
    }

    #[test]
    fn agrees_with_a_list_in_small_nodes(
        ops in prop::collection::vec(any_op(), 1..120),
        asks in prop::collection::vec((0_u64..420, any_request()), 1..20),
        turns: u64,
    ) {
        differential::<8>(&ops, &asks, turns);
        differential::<11>(&ops, &asks, turns);
    }

    #[test]
    fn changes_nothing_when_memory_runs_out(ops in prop::collection::vec(any_op(), 1..50)) {
        failing::<32>(&ops);
        failing::<8>(&ops);
    }

    #[test]
    fn a_shared_tree_agrees_with_a_list(
        ops in prop::collection::vec(any_op(), 1..60),
        asks in prop::collection::vec((0_u64..420, any_request()), 1..20),
    ) {
        differential_shared::<32>(&ops, &asks);
        differential_shared::<8>(&ops, &asks);
    }

    #[test]
    fn a_reserved_store_needs_no_memory(
        fill in prop::collection::vec(any_op(), 1..120),
        stores in prop::collection::vec((any_range(), prop::option::of(0_u64..4), any::<bool>()), 1..10),
    ) {
        reserved::<32>(&fill, &stores);
        reserved::<8>(&fill, &stores);
    }
}
