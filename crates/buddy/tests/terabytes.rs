//! Terabytes: tables that follow memory and not the highest address, and the largest zone.

mod common;

use common::machine::{MIB, exhaust, machine, map, one_zone, start};
use common::window::Window;
use kmem_buddy::{Config, InitError, RegionKind, ZoneKind, ZoneLimits};
use kmem_hal::{FrameRequest, FrameSink, FrameSource, Order, PhysAddr};

/// 16 TiB of addresses with a GiB in every 256: the tables follow memory, never the highest address.
#[test]
fn tables_are_sized_by_memory_and_not_by_the_highest_address() {
    const TOP: u64 = 16 << 40;
    const GIB: u64 = 1 << 30;
    let window = Window::new(TOP, 64 * MIB);
    let regions: Vec<_> = (0..64u64)
        .map(|node| (node * 256 * GIB, node * 256 * GIB + GIB))
        .chain([(TOP - GIB, TOP)])
        .collect();
    let mut map = map(&regions);
    // What firmware lists beside it: a reserved range of terabytes, and devices at the top of 52 bits.
    map.push(PhysAddr::new(20 << 40), 100 << 40, RegionKind::Reserved)
        .unwrap();
    map.push(PhysAddr::new((1 << 52) - 4096), 4096, RegionKind::Reserved)
        .unwrap();
    let present = map.present_frames();
    let buddy = start(&window, &mut map, &Config::new().min_free_kib(0));
    let metadata = buddy.metadata().count() << 12;
    assert!(
        metadata <= present * 15 / 100 + 32 * 1024,
        "{metadata} for {present} frames"
    );
    let info = buddy.mem_info();
    assert_eq!(info.total, present - buddy.metadata().count());
    let zone = buddy.zones().last().unwrap();
    assert_eq!(
        (zone.kind, zone.start + zone.spanned),
        (ZoneKind::Normal, TOP >> 12)
    );
    let gibibyte = FrameRequest::new(Order::HUGE_1G);
    let top = buddy.alloc(&gibibyte).unwrap();
    assert!(top.first().number() >= 256 << 18);
    buddy.free(top);
    buddy.check().unwrap();
    assert_eq!(buddy.recount().free, info.total);
}

/// All of 16 TiB is memory: 2^32 frames, more than half a GiB of tables.
#[test]
#[cfg_attr(debug_assertions, ignore = "a minute in a debug build")]
fn sixteen_tebibytes() {
    const TOP: u64 = 16 << 40;
    let window = Window::new(TOP, 768 * MIB);
    let mut map = map(&[(0, TOP)]);
    let present = map.present_frames();
    let buddy = start(&window, &mut map, &Config::new().min_free_kib(0));
    let metadata = buddy.metadata().count() << 12;
    assert!(metadata <= present * 15 / 100 + 32 * 1024);
    let order = Order::new(30).unwrap();
    let tebibytes = buddy.alloc(&FrameRequest::new(order)).unwrap();
    assert!(tebibytes.first().is_aligned(order));
    let page = buddy.alloc(&FrameRequest::ONE).unwrap();
    buddy.free(tebibytes);
    buddy.free(page);
    buddy.drain_all();
    assert_eq!(buddy.mem_info().free, buddy.mem_info().total);
}

#[test]
fn a_zone_of_16_tebibytes_is_served_to_its_last_frame() {
    let (base, size) = (MIB, 16 << 40);
    let window = Window::new(base + size, 4 * MIB);
    let mut map = map(&[(base, 2 * MIB), (base + size - 4 * MIB, base + size)]);
    let buddy = start(&window, &mut map, &one_zone());
    assert_eq!(buddy.zones().next().unwrap().spanned, 1 << 32);
    exhaust(&buddy);
    buddy.check().unwrap();
}

#[test]
fn a_zone_of_more_than_16_tebibytes_is_refused() {
    let window = Window::new(40 << 40, MIB);
    let mut map = map(&[(0, MIB), ((40 << 40) - MIB, 40 << 40)]);
    let buddy = machine(&window);
    let config = Config::new().limits(ZoneLimits::NORMAL_ONLY);
    // SAFETY: X1: the test's own memory, which only this allocator has.
    let result = unsafe { buddy.init(&mut map, &config) };
    let Err(InitError::ZoneTooLarge { frames }) = result else {
        panic!("accepted");
    };
    assert_eq!(frames, ((40 << 40) >> 12) - 1);
    assert_eq!(map.reservations().count(), 0);
}
