//! Property tests of hal's arithmetic and bookkeeping; the checks are in `common`.
#![cfg(not(any(loom, shuttle)))]

mod common;

use common::{GraceOp, SetOp, SlotOp};
use kmem_hal::{
    Barrier, CallBarrier, Canonical, Cpu, CpuId, CpuSet, Frame, FrameRange, OffsetMap, Order, Page,
    PageRange, PhysMap, SingleCpu, VirtAddr,
};
use proptest::collection::vec;
use proptest::prelude::*;

/// One CPU more than a set can name.
struct Crowd;

// SAFETY: one thread; the count breaks C3, which is what is tested.
unsafe impl Cpu for Crowd {
    type Guard<'a> = ();
    fn raw_pin(&self) {}
    fn id(&self, (): &()) -> CpuId {
        CpuId::BOOT
    }
    fn count(&self) -> u32 {
        CpuSet::CAPACITY + 1
    }
}

#[test]
#[should_panic(expected = "more than a set can name")]
fn a_grace_period_that_cannot_name_every_cpu_is_none() {
    // SAFETY: one thread.
    CallBarrier::new(Crowd, unsafe { SingleCpu::new() }).writer();
}

/// Numbers where arithmetic goes wrong: near powers of two, near the top, and anywhere.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        0u64..20_000,
        (0u32..64, -5000i64..5000).prop_map(|(bit, off)| (1u64 << bit).wrapping_add_signed(off)),
        (0u64..20_000).prop_map(|below| u64::MAX - below),
    ]
}

fn set_op() -> impl Strategy<Value = SetOp> {
    prop_oneof![
        8 => (0u16..4200).prop_map(SetOp::Insert),
        4 => (0u16..4200).prop_map(SetOp::Remove),
        1 => (0u16..4200).prop_map(SetOp::First),
    ]
}

fn slot_op() -> impl Strategy<Value = SlotOp> {
    prop_oneof![
        Just(SlotOp::AddMapping),
        Just(SlotOp::SubMapping),
        Just(SlotOp::AddReference),
        Just(SlotOp::SubReference),
        any::<u16>().prop_map(SlotOp::Set),
        any::<u16>().prop_map(SlotOp::Clear),
        (any::<u32>(), any::<u64>()).prop_map(|(object, page)| SlotOp::Move(object, page)),
        any::<u16>().prop_map(SlotOp::Age),
        (any::<u32>(), any::<u32>()).prop_map(|(next, previous)| SlotOp::Link(next, previous)),
    ]
}

fn grace_op() -> impl Strategy<Value = GraceOp> {
    prop_oneof![
        3 => Just(GraceOp::Read),
        3 => any::<u8>().prop_map(GraceOp::Drop),
        3 => Just(GraceOp::Defer),
        2 => Just(GraceOp::Poll),
        1 => Just(GraceOp::Synchronize),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn addresses(a in number(), b in number(), shift in 0u8..64) {
        common::addresses(a, b, shift);
    }

    #[test]
    fn canonical(a in number(), b in number(), bits in 0u8..64) {
        common::canonical(a, b, bits);
    }

    #[test]
    fn frame_ranges(base in number(), length in number(), cut in number(), top in 0u8..52) {
        common::frame_ranges(base, length, cut, top);
        common::frame_ranges(base, length % (1 << 24), cut, top);
    }

    #[test]
    fn page_ranges(a in number(), n in number(), b in number(), m in number()) {
        common::page_ranges(a, n, b, m);
        common::page_ranges(a % 100, n % 50 + 1, b % 100, m % 50 + 1);
    }

    #[test]
    fn cpu_sets(ops in vec(set_op(), 0..60)) {
        common::cpu_sets(&ops);
    }

    #[test]
    fn slots(ops in vec(slot_op(), 0..60)) {
        common::slots(&ops);
    }

    #[test]
    fn graces(ops in vec(grace_op(), 0..80)) {
        common::graces(&ops);
    }

    #[test]
    fn ranks(steps in vec(any::<(bool, u8)>(), 0..40)) {
        common::ranks(&steps);
    }
}

#[test]
fn canonical_forms_of_the_formats() {
    let cases = [
        (Canonical::X86_32, 0xffff_ffff, None),
        (
            Canonical::X86_48,
            0x7fff_ffff_ffff,
            Some(0xffff_8000_0000_0000),
        ),
        (
            Canonical::X86_57,
            0xff_ffff_ffff_ffff,
            Some(0xff00_0000_0000_0000),
        ),
        (Canonical::SV39, 0x3f_ffff_ffff, Some(0xffff_ffc0_0000_0000)),
        (
            Canonical::SV48,
            0x7fff_ffff_ffff,
            Some(0xffff_8000_0000_0000),
        ),
        (
            Canonical::SV57,
            0xff_ffff_ffff_ffff,
            Some(0xff00_0000_0000_0000),
        ),
        (
            Canonical::AARCH64_48,
            0x7fff_ffff_ffff,
            Some(0xffff_8000_0000_0000),
        ),
    ];
    for (form, lower_end, upper_start) in cases {
        assert_eq!(form.lower_end(), VirtAddr::new(lower_end), "{form:?}");
        assert_eq!(
            form.upper_start(),
            upper_start.map(VirtAddr::new),
            "{form:?}"
        );
        let past = VirtAddr::new(lower_end + 1);
        assert!(!form.contains(past), "{form:?}");
        assert_eq!(form.checked_add(VirtAddr::new(lower_end), 1), None);
        assert_eq!(
            form.checked_add(VirtAddr::new(lower_end), 0),
            Some(VirtAddr::new(lower_end))
        );
        if let Some(upper) = upper_start {
            // Over the hole is not a sum, though both ends are canonical.
            assert_eq!(
                form.checked_add(VirtAddr::new(lower_end), upper - lower_end),
                None
            );
            let top = VirtAddr::new(u64::MAX);
            assert_eq!(form.checked_add(top, 0), Some(top));
            assert_eq!(form.checked_add(top, 1), None);
        }
    }
}

#[test]
fn the_top_of_the_space_is_ordinary() {
    let last = Frame::MAX;
    assert_eq!(last.start().as_u64(), 0xffff_ffff_ffff_f000);
    let top = FrameRange::new(last, 1).unwrap();
    assert_eq!((top.end_number(), top.last()), (1 << 52, Some(last)));
    assert_eq!(top.iter().count(), 1);
    assert_eq!(
        top.blocks(Order::MAX).collect::<Vec<_>>(),
        [(last, Order::ZERO)]
    );
    let all = FrameRange::from_numbers(0, 1 << 52).unwrap();
    assert_eq!(all.blocks(Order::MAX).count(), 2);
    assert_eq!(all.split_at(u64::MAX).0, all);
    assert!(FrameRange::from_numbers(0, (1 << 52) + 1).is_none());
    let pages = PageRange::ALL;
    assert_eq!((pages.count(), pages.last()), (1 << 52, Page::MAX));
    assert_eq!(pages.iter().next_back(), Some(Page::MAX));
}

#[test]
fn a_map_over_a_range_reaches_no_frame_before_it() {
    let range = FrameRange::from_numbers(0x10_0000, 0x10_0040).unwrap();
    // SAFETY: nothing is accessed through the map.
    let map = unsafe { OffsetMap::over(0x7000_0000, range) };
    assert_eq!(map.reach(), range);
    // SAFETY: as above.
    unsafe { map.set(0x7000_0000, 0x10_0080) };
    assert_eq!(
        map.reach(),
        FrameRange::from_numbers(0x10_0000, 0x10_0080).unwrap()
    );
    let address = range.first().start();
    assert_eq!(map.to_phys(map.to_ptr(address)), address);
}

#[test]
fn an_offset_map_grows_and_never_shrinks() {
    let map = OffsetMap::unset();
    assert!(map.reach().is_empty());
    assert_eq!(map.map_temporary(Frame::ZERO), None);
    // SAFETY: the test reaches no memory through the map.
    unsafe {
        map.set(0x1000_0000, 100);
        assert_eq!(map.reach().count(), 100);
        map.set(0x1000_0000, 50);
        assert_eq!(map.reach().count(), 100, "P4");
        map.set(0x1000_0000, u64::MAX);
    }
    assert_eq!(map.reach().end_number(), Frame::LIMIT);
    let address = kmem_hal::PhysAddr::new(0x1234);
    assert_eq!(map.to_ptr(address).addr(), 0x1000_1234);
    assert_eq!(map.to_phys(map.to_ptr(address)), address);
}

#[test]
fn blocks_have_heads_that_their_tails_find() {
    use kmem_hal::{FrameTag, SECTION_FRAMES};
    let first = Frame::from_number(SECTION_FRAMES + 8);
    let frames = FrameRange::new(first, 16).unwrap();
    let table = kmem_testkit::SlotArena::new(frames);
    let order = Order::new(3).unwrap();
    assert!(
        table.slot(Frame::ZERO).is_none(),
        "a section that was not asked for"
    );
    assert!(!table.claim_tails(Frame::from_number(0), order));
    assert!(table.claim_tails(first, order));
    table.slot(first).unwrap().claim(FrameTag::Large, order);
    for frame in FrameRange::of_order(first, order).unwrap().iter() {
        let (head, slot) = table.head(frame).unwrap();
        assert_eq!(
            (head, slot.tag(), slot.order()),
            (first, FrameTag::Large, order)
        );
    }
    let after = Frame::from_number(first.number() + 8);
    assert_eq!(table.head(after).unwrap().0, after);
    assert!(table.release_tails(first, order));
    let tail = Frame::from_number(first.number() + 1);
    assert_eq!(table.slot(tail).unwrap().tag(), FrameTag::Free);
}
