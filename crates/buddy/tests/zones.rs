//! Zones of real machines, with the page counts that Linux found there.

mod common;

use common::machine::{MIB, Machine, machine, map, one_zone, start};
use common::window::Window;
use kmem_buddy::{
    BootMap, Config, InitError, RegionKind, Reservation, ZoneFree, ZoneKind, ZoneLimits,
};
use kmem_hal::{
    AllocError, Frame, FrameRange, FrameRequest, FrameSink, FrameSource, NodeId, NodePolicy, Order,
    PhysAddr,
};

fn top(map: &BootMap) -> u64 {
    map.present().last().unwrap().end_number() << 12
}

fn boot<'a>(map: &mut BootMap, window: &'a Window, config: &Config) -> Machine<'a> {
    let buddy = start(window, map, config);
    buddy.check().unwrap();
    buddy
}

fn zone(zones: &[ZoneFree], node: u16, kind: ZoneKind) -> ZoneFree {
    *zones
        .iter()
        .find(|z| z.node == NodeId::new(node) && z.kind == kind)
        .unwrap()
}

fn agree(buddy: &Machine<'_>) {
    let recount = buddy.recount();
    let info = buddy.mem_info();
    assert_eq!(info.total, recount.managed);
    assert_eq!(info.free, recount.free);
    assert_eq!(info.cached, recount.cached);
    for zone in buddy.zones() {
        assert_eq!(zone.sum(), zone.free, "{zone:?}");
    }
}

#[test]
fn sun_x4600_has_the_pages_of_linux() {
    let mut map = common::parse(common::SUN);
    let present = map.present_frames();
    let window = Window::new(top(&map), 64 << 20);
    let buddy = boot(&mut map, &window, &Config::new());
    let zones: Vec<_> = buddy.zones().collect();
    assert_eq!(zones.len(), 10);
    assert_eq!(zone(&zones, 0, ZoneKind::Dma).present, 3992);
    assert_eq!(zone(&zones, 0, ZoneKind::Dma).spanned, 4095);
    assert_eq!(zone(&zones, 0, ZoneKind::Dma).start, 1);
    assert_eq!(zone(&zones, 0, ZoneKind::Dma32).present, 880_544);
    assert_eq!(zone(&zones, 0, ZoneKind::Dma32).spanned, 0xff000);
    assert_eq!(zone(&zones, 0, ZoneKind::Normal).present, 3_309_568);
    for node in 1..8 {
        assert_eq!(zone(&zones, node, ZoneKind::Normal).present, 4_194_304);
        assert_eq!(zone(&zones, node, ZoneKind::Normal).spanned, 4_194_304);
    }
    // Metadata follows memory: 0.15 bytes a frame and little else.
    let metadata = buddy.metadata().count() * 4096;
    assert!(
        metadata as f64 <= 0.15 * present as f64 + 10.0 * 4096.0 + 8192.0,
        "{metadata}"
    );
    assert_eq!(buddy.mem_info().total, present - buddy.metadata().count());
    agree(&buddy);
    assert!(
        buddy
            .zone_info()
            .to_string()
            .contains("        present  880544\n")
    );
}

#[test]
fn firecracker_has_the_pages_of_linux() {
    let mut map = common::parse(common::FIRECRACKER);
    let window = Window::new(top(&map), 16 << 20);
    let buddy = boot(&mut map, &window, &Config::new());
    let zones: Vec<_> = buddy.zones().collect();
    let dma = zone(&zones, 0, ZoneKind::Dma);
    assert_eq!((dma.start, dma.spanned, dma.present), (1, 4095, 4096 - 98));
    assert_eq!(zone(&zones, 0, ZoneKind::Dma32).present, 0xc0000 - 0x1000);
    assert_eq!(
        zone(&zones, 0, ZoneKind::Normal).present,
        0x640000 - 0x100000
    );
    agree(&buddy);
}

#[test]
fn other_maps_boot_and_agree() {
    for text in [common::QEMU, common::ASUS, common::DELL] {
        let mut map = common::parse(text);
        let window = Window::new(top(&map), 16 << 20);
        for limits in [
            ZoneLimits::X86_64,
            ZoneLimits::X86_32,
            ZoneLimits::NORMAL_ONLY,
        ] {
            let mut map = map.clone();
            let buddy = boot(&mut map, &window, &Config::new().limits(limits));
            agree(&buddy);
        }
        map.reserve(PhysAddr::new(0x10_0000), 0x123456, Reservation::KernelImage)
            .unwrap();
        let buddy = boot(&mut map, &window, &Config::new());
        agree(&buddy);
    }
}

#[test]
fn classic_split_gives_highmem_to_movable_only() {
    let mut map = map(&[(0, 1024 * MIB)]);
    let window = Window::new(896 << 20, 16 << 20);
    window.set_reach((896 << 20) >> 12);
    let buddy = boot(&mut map, &window, &Config::new().limits(ZoneLimits::X86_32));
    let zones: Vec<_> = buddy.zones().collect();
    assert_eq!(zone(&zones, 0, ZoneKind::Dma).present, 4095);
    assert_eq!(zone(&zones, 0, ZoneKind::Normal).present, 0x38000 - 0x1000);
    assert_eq!(
        zone(&zones, 0, ZoneKind::HighMem).present,
        0x40000 - 0x38000
    );
    let user = buddy.alloc(&FrameRequest::ONE.movable()).unwrap();
    assert!(user.first().number() >= 0x38000);
    let kernel = buddy.alloc(&FrameRequest::ONE).unwrap();
    assert!((0x1000..0x38000).contains(&kernel.first().number()));
    let dma = buddy
        .alloc(&FrameRequest::ONE.below(PhysAddr::new(1 << 24)))
        .unwrap();
    assert!(dma.first().number() < 0x1000);
    assert_eq!(
        buddy
            .alloc(&FrameRequest::ONE.below(PhysAddr::new(1 << 12)))
            .unwrap_err(),
        AllocError::Unsatisfiable
    );
    assert_eq!(
        buddy
            .alloc(&FrameRequest::ONE.below(PhysAddr::new(0)))
            .unwrap_err(),
        AllocError::Unsatisfiable
    );
    // vmalloc maps what it gets, so it takes high memory first although its frames do not move, and low memory after.
    let mapped = buddy.alloc(&FrameRequest::ONE.high()).unwrap();
    assert!(mapped.first().number() >= 0x38000);
    // An array that was filled for such a request serves no other: kernel data needs memory that is always mapped.
    let plain = buddy.alloc(&FrameRequest::ONE).unwrap();
    assert!(plain.first().number() < 0x38000);
    let mut taken = vec![user, kernel, dma, mapped, plain];
    let low = loop {
        match buddy.alloc(&FrameRequest::new(Order::new(9).unwrap()).high()) {
            Ok(block) if block.first().number() < 0x38000 => break block,
            Ok(block) => taken.push(block),
            Err(error) => panic!("low memory was not tried: {error}"),
        }
    };
    taken.push(low);
    for frame in taken {
        buddy.free(frame);
    }
    buddy.drain_all();
    agree(&buddy);
    assert_eq!(buddy.misuse(), None);
}

/// 0.15 bytes a frame, and 4 KiB a CPU and zone, in whole frames.
#[test]
fn tables_stay_small() {
    for (mib, zones) in [(256, 1), (1024, 1), (4096, 1), (65536, 2)] {
        let mut map = BootMap::<8>::new();
        map.push(PhysAddr::new(4 << 30), mib << 20, RegionKind::Usable)
            .unwrap();
        if zones == 2 {
            map.push(PhysAddr::new(1 << 24), 1 << 30, RegionKind::Usable)
                .unwrap();
        }
        let frames = map.present_frames();
        let window = Window::new((4 << 30) + (mib << 20), 16 << 20);
        let buddy = machine(&window);
        // SAFETY: X1: the test's own memory, which only this allocator has.
        unsafe { buddy.init(&mut map, &Config::new()) }.unwrap();
        let allowed = (frames * 15 / 100 + zones * 4096).next_multiple_of(4096);
        let bytes = buddy.metadata().count() * 4096;
        assert!(bytes <= allowed, "{mib} MiB: {bytes} of {allowed} bytes");
        assert_eq!(buddy.zones().count() as u64, zones);
    }
}

/// Every frame of a zone can be had and given back, up to the last one of an odd end: nothing beyond, nothing less.
#[test]
fn zones_end_where_they_end() {
    for end in [0x1000, 0x1001, 0x11ff, 0x1200, 0x1201, 0x13ff] {
        let mut map = map(&[(0x1000, 0xe0_1800), (0xf0_0000, end << 12)]);
        let window = Window::new(end << 12, 1 << 20);
        let config = Config::new().min_free_kib(0).reserve_ratio([0; 5]);
        let buddy = boot(&mut map, &window, &config);
        let managed = buddy.recount().managed;
        let mut frames = Vec::new();
        while let Ok(frame) = buddy.alloc(&FrameRequest::ONE) {
            frames.push(frame);
        }
        assert_eq!(frames.len() as u64, managed, "end {end:#x}");
        let mut numbers: Vec<_> = frames.iter().map(|f| f.first().number()).collect();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len() as u64, managed);
        let metadata = buddy.metadata();
        for number in &numbers {
            let frame = Frame::new(*number).unwrap();
            assert!(!metadata.contains(frame));
            assert!(
                (1..=0xe00).contains(number) || (0xf00..end).contains(number),
                "{number:#x}"
            );
        }
        for frame in frames {
            buddy.free(frame);
        }
        assert!(buddy.drain_all());
        assert_eq!(buddy.recount().free, managed);
        buddy.check().unwrap();
        assert_eq!(buddy.misuse(), None);
        // The frame after the end, the hole and the first frame belong to nobody.
        for foreign in [0, 0xe01, 0xeff, end, end + 1] {
            // SAFETY: the wrong free is what is tested.
            let frame = unsafe {
                kmem_hal::OwnedFrame::from_raw(Frame::new(foreign).unwrap(), Order::ZERO)
            };
            let (error, _) = buddy.try_free(frame).unwrap_err();
            assert_eq!(error, kmem_buddy::FreeError::Foreign, "{foreign:#x}");
        }
    }
}

#[test]
fn nodes_serve_their_own_first() {
    let mut map = common::parse(common::SUN);
    let window = Window::new(top(&map), 64 << 20);
    let buddy = boot(&mut map, &window, &Config::new());
    for node in 0..8u16 {
        for policy in [
            NodePolicy::Preferred(NodeId::new(node)),
            NodePolicy::Strict(NodeId::new(node)),
        ] {
            let frame = buddy.alloc(&FrameRequest::ONE.node(policy)).unwrap();
            let address = frame.first().start();
            assert_eq!(map.node_of(address), NodeId::new(node));
            buddy.free(frame);
        }
    }
    let strict = FrameRequest::ONE
        .node(NodePolicy::Strict(NodeId::new(3)))
        .below(PhysAddr::new(1 << 32));
    assert_eq!(buddy.alloc(&strict).unwrap_err(), AllocError::Unsatisfiable);
    let mut nodes: Vec<_> = (0..8)
        .map(|_| {
            buddy
                .alloc(&FrameRequest::ONE.node(NodePolicy::Interleave))
                .unwrap()
        })
        .map(|frame| map.node_of(frame.first().start()).get())
        .collect();
    nodes.sort_unstable();
    assert_eq!(nodes, [0, 1, 2, 3, 4, 5, 6, 7]);
}

#[test]
fn memory_joins_when_it_becomes_mapped() {
    let mut map = map(&[(0, 64 * MIB)]);
    map.reserve(PhysAddr::new(40 << 20), 1 << 20, Reservation::Initrd)
        .unwrap();
    map.reserve(PhysAddr::new(2 << 20), 1 << 20, Reservation::InitSections)
        .unwrap();
    let window = Window::new(32 << 20, 4 << 20);
    window.set_reach((32 << 20) >> 12);
    let buddy = boot(&mut map, &window, &one_zone());
    let total = |buddy: &Machine<'_>| buddy.mem_info().total;
    let start = total(&buddy);
    assert_eq!(start, 8192 - 1 - 256 - buddy.metadata().count());
    // SAFETY: a frame that is not mapped yet: the wrong free is what is tested.
    let unreached =
        unsafe { kmem_hal::OwnedFrame::from_raw(Frame::new(0x3000).unwrap(), Order::ZERO) };
    assert!(buddy.try_free(unreached).is_err());
    window.set_reach((64 << 20) >> 12);
    assert_eq!(buddy.extend(), 8192 - 256);
    assert_eq!(buddy.extend(), 0);
    agree(&buddy);
    // SAFETY: nobody uses the simulated memory.
    unsafe {
        assert_eq!(buddy.release(Reservation::Initrd), 256);
        assert_eq!(buddy.release(Reservation::Initrd), 0);
        let part = FrameRange::from_numbers(0x210, 0x220).unwrap();
        assert_eq!(buddy.release_range(part), Ok(16));
        assert_eq!(
            buddy.release_range(part),
            Err(kmem_buddy::FreeError::Foreign)
        );
        assert_eq!(buddy.release(Reservation::InitSections), 256 - 16);
    }
    agree(&buddy);
    buddy.check().unwrap();
    assert_eq!(total(&buddy), 16384 - 1 - buddy.metadata().count());
    assert_eq!(buddy.recount().free, total(&buddy));
}

#[test]
fn init_fails_whole_or_not_at_all() {
    let window = Window::new(1 << 20, 1 << 20);
    let mut empty: BootMap = BootMap::new();
    let buddy = machine(&window);
    assert_eq!(
        // SAFETY: X1: the test's own memory, which only this allocator has.
        unsafe { buddy.init(&mut empty, &Config::new()) },
        Err(InitError::NoMemory)
    );
    assert_eq!(
        buddy.alloc(&FrameRequest::ONE).unwrap_err(),
        AllocError::NotInitialised
    );
    // All memory reserved: no room for the tables.
    let mut full = map(&[(0, MIB)]);
    full.reserve(PhysAddr::new(0), 1 << 20, Reservation::KernelImage)
        .unwrap();
    assert!(matches!(
        // SAFETY: X1: the test's own memory, which only this allocator has.
        unsafe { buddy.init(&mut full, &Config::new()) },
        Err(InitError::Metadata { .. })
    ));
    assert_eq!(full.reservations().count(), 1);
    // One MiB is enough.
    let mut small = map(&[(0, MIB)]);
    // SAFETY: X1: the test's own memory, which only this allocator has.
    unsafe { buddy.init(&mut small, &Config::new().min_free_kib(0)) }.unwrap();
    assert_eq!(
        // SAFETY: X1: refused before it looks at the map.
        unsafe { buddy.init(&mut small, &Config::new()) },
        Err(InitError::Twice)
    );
    assert!(buddy.alloc(&FrameRequest::ONE).is_ok());
}
