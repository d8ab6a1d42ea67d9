//! Reserved runs: across nodes, many in a zone, and the list that is full.

mod common;

use common::machine::{MIB, map, one_zone, start};
use common::window::Window;
use kmem_buddy::{Config, FreeError, Reservation, ZoneLimits};
use kmem_hal::{Frame, FrameRange, NodeId, Order, OwnedFrame, PhysAddr};

/// A reserved run may lie across many nodes: no part of it is forgotten.
#[test]
fn a_reserved_run_across_many_nodes_comes_back_whole() {
    const RUN: (u64, u64) = (16 * MIB, 240 * MIB);
    let window = Window::new(256 * MIB, 256 * MIB);
    let mut map = map(&[(0, 256 * MIB)]);
    for part in 0..50u16 {
        let base = PhysAddr::new(RUN.0 + u64::from(part) * 4 * MIB);
        map.assign_node(base, MIB, NodeId::new(1 + part % 2))
            .unwrap();
    }
    map.reserve(PhysAddr::new(RUN.0), RUN.1 - RUN.0, Reservation::Initrd)
        .unwrap();
    let buddy = start(&window, &mut map, &one_zone());
    for first in (RUN.0 >> 12..RUN.1 >> 12).step_by(64) {
        // SAFETY: the wrong free is what is tested.
        let wrong = unsafe { OwnedFrame::from_raw(Frame::new(first).unwrap(), Order::ZERO) };
        assert!(buddy.try_free(wrong).is_err(), "frame {first:#x}");
    }
    // SAFETY: nobody uses the simulated initrd.
    let freed = unsafe { buddy.release(Reservation::Initrd) };
    assert_eq!(freed, (RUN.1 - RUN.0) >> 12);
    buddy.check().unwrap();
    assert_eq!(buddy.recount().free, buddy.mem_info().total);
}

/// As may many runs in one zone.
#[test]
fn many_reserved_runs_come_back_whole() {
    let window = Window::new(64 * MIB, 64 * MIB);
    let mut map = map(&[(0, 64 * MIB)]);
    let runs = || (1..50u64).map(|run| run * MIB);
    for base in runs() {
        map.reserve(PhysAddr::new(base), 0x2000, Reservation::InitSections)
            .unwrap();
    }
    let config = Config::new().limits(ZoneLimits::NORMAL_ONLY);
    let buddy = start(&window, &mut map, &config);
    for base in runs() {
        let first = Frame::new(base >> 12).unwrap();
        // SAFETY: the wrong free is what is tested.
        let wrong = unsafe { OwnedFrame::from_raw(first, Order::ZERO) };
        assert!(buddy.try_free(wrong).is_err(), "{base:#x}");
    }
    // SAFETY: nobody uses the simulated sections.
    let freed = unsafe { buddy.release(Reservation::InitSections) };
    assert_eq!(freed, 2 * runs().count() as u64);
    buddy.check().unwrap();
}

/// Each release from the middle of a run cuts it, as often as the list has room; what lies at its ends needs none.
#[test]
fn a_full_list_of_reserved_runs_lets_ends_go() {
    let window = Window::new(64 * MIB, 64 * MIB);
    let mut map = map(&[(0, 64 * MIB)]);
    map.reserve(PhysAddr::new(16 * MIB), 16 * MIB, Reservation::Initrd)
        .unwrap();
    let config = Config::new().limits(ZoneLimits::NORMAL_ONLY);
    let buddy = start(&window, &mut map, &config);
    let (first, end) = (16 << 8, 32 << 8);
    // SAFETY: nobody uses the simulated initrd.
    let release = |frame: u64| unsafe {
        buddy.release_range(FrameRange::from_numbers(frame, frame + 1).unwrap())
    };
    let mut cut = first + 1;
    let refused = loop {
        match release(cut) {
            Ok(_) => cut += 2,
            Err(error) => break error,
        }
    };
    assert_eq!(refused, FreeError::ListFull);
    assert_eq!(
        release(cut - 2),
        Err(FreeError::Foreign),
        "it is released already"
    );
    assert!((first + 24..first + 64).contains(&cut), "{cut:#x}");
    for frame in [end - 1, end - 2, cut - 1, first] {
        assert_eq!(release(frame), Ok(1), "{frame:#x}");
    }
    // A place has become free.
    assert_eq!(release(cut + 1), Ok(1));
    buddy.check().unwrap();
}
