//! Views: figures worked out by hand, and Linux's formats to the letter.

mod common;

use common::machine::{MIB, Machine, machine, map, one_zone, start};
use common::window::Window;
use kmem_buddy::{MigrateType, Reservation};
use kmem_hal::{
    Frame, FrameRange, FrameRequest, FrameSink, FrameSource, Order, OwnedFrame, PhysAddr,
};

/// 16 MiB in one zone: a hole at 10 to 11 MiB, 2 to 4 MiB reserved.
fn boot() -> &'static Machine<'static> {
    let mut map = map(&[(0, 10 * MIB), (11 * MIB, 16 * MIB)]);
    map.reserve(PhysAddr::new(2 * MIB), 2 * MIB, Reservation::Initrd)
        .unwrap();
    let window = Window::leaked(16 * MIB, 4 * MIB);
    Box::leak(Box::new(start(window, &mut map, &one_zone())))
}

fn order(order: u8) -> Order {
    Order::new(order).unwrap()
}

/// Takes all of memory frame by frame and frees what `keep` does not want.
fn keep_only(buddy: &Machine<'_>, keep: impl Fn(u64) -> bool) -> Vec<OwnedFrame> {
    let mut all = Vec::new();
    while let Ok(frame) = buddy.alloc(&FrameRequest::ONE.movable()) {
        all.push(frame);
    }
    let mut kept = Vec::new();
    for frame in all {
        if keep(frame.first().number()) {
            kept.push(frame);
        } else {
            buddy.free(frame);
        }
    }
    buddy.drain_all();
    kept
}

#[test]
fn indices_are_those_of_linux() {
    let buddy = boot();
    // Free: 4 blocks of one frame, 2 of 2 frames, 1 of 16: 24 frames in 7 blocks.
    let free: Vec<u64> = [0x601, 0x603, 0x605, 0x607, 0x610, 0x611, 0x614, 0x615]
        .into_iter()
        .chain(0x620..0x630)
        .collect();
    let _kept = keep_only(buddy, |number| !free.contains(&number));
    let zone = buddy.zones().next().unwrap();
    assert_eq!(zone.blocks[..6], [4, 2, 0, 0, 1, 0]);
    let unusable: Vec<u32> = (0..=10).map(|at| zone.unusable_index(order(at))).collect();
    // Order 1: 4 of 24 frames are useless; orders 2 to 4: 8 of them; above: all.
    let high = [1000; 6];
    assert_eq!(unusable[..5], [0, 166, 333, 333, 333]);
    assert_eq!(unusable[5..], high);
    let index: Vec<i32> = (0..=10)
        .map(|at| zone.fragmentation_index(order(at)))
        .collect();
    assert_eq!(index[..5], [-1000; 5]);
    // 1000 - (1000 + 24 * 1000 / 2^order) / 7
    assert_eq!(index[5..], [750, 804, 831, 844, 851, 854]);
    assert_eq!(zone.suitable(order(1)), 2 + 8);
    assert_eq!(zone.suitable(order(20)), 0);
    assert_eq!(
        buddy.unusable_index().to_string(),
        "Node 0, zone   Normal 0.000 0.166 0.333 0.333 0.333 1.000 1.000 1.000 1.000 1.000 1.000 \n"
    );
    assert_eq!(
        buddy.fragmentation_index().to_string(),
        "Node 0, zone   Normal -1.000 -1.000 -1.000 -1.000 -1.000  0.750  0.804  0.831  0.844  0.851  0.854 \n"
    );
}

#[test]
fn a_zone_without_memory_fails_for_lack_of_it() {
    let buddy = boot();
    let _all = keep_only(buddy, |_| true);
    let zone = buddy.zones().next().unwrap();
    assert_eq!(zone.free, 0);
    for at in 0..=10 {
        assert_eq!(zone.unusable_index(order(at)), 1000);
        assert_eq!(zone.fragmentation_index(order(at)), 0);
    }
}

#[test]
fn show_mem_says_what_is_left() {
    let buddy = boot();
    let _kept = keep_only(buddy, |number| {
        !(0x640..0x680).contains(&number) && number != 0x601
    });
    let total = buddy.mem_info().total;
    let present = buddy.zones().next().unwrap().present;
    let expected = format!(
        "Mem-Info:\n\
         free:65 free_pcp:0 free_cma:0\n\
         Node 0 Normal free:260kB min:0kB low:0kB high:0kB present:{}kB managed:{}kB free_pcp:0kB free_cma:0kB\n\
         lowmem_reserve[]: 0 0 0 0 0\n\
         Node 0 Normal: 1*4kB (M) 0*8kB 0*16kB 0*32kB 0*64kB 0*128kB 1*256kB (M) 0*512kB 0*1024kB 0*2048kB 0*4096kB = 260kB\n\
         {present} pages RAM\n\
         0 pages HighMem/MovableOnly\n\
         {} pages reserved\n\
         0 pages cma reserved\n",
        present * 4,
        total * 4,
        present - total,
    );
    assert_eq!(buddy.show_mem().to_string(), expected);
    // What was freed wrongly is told too.
    // SAFETY: the wrong free is what is tested.
    buddy.free(unsafe { OwnedFrame::from_raw(Frame::new(0xa00).unwrap(), Order::ZERO) });
    assert!(
        buddy
            .show_mem()
            .to_string()
            .ends_with("0 pages lost, 1 wrong frees\n")
    );
    assert_eq!(buddy.lost(), 0);
}

#[test]
fn the_picture_shows_holes_reservations_and_what_is_taken() {
    let buddy = boot();
    let taken = FrameRange::from_numbers(0x600, 0x740).unwrap();
    let _range = buddy.alloc_range_at(taken).unwrap();
    let all = FrameRange::from_numbers(0x400, 0x600).unwrap();
    let _block = buddy.alloc_range_at(all).unwrap();
    let picture = buddy.picture();
    assert_eq!(picture.frames_per_cell(), 512);
    // 0: 511 of 511; 2 MiB: the initrd; 4 MiB: taken; 6 MiB: 320 of 512; 8 MiB; the hole; 11 MiB: half a cell; 12 and 14 MiB, the tables not
    // counted.
    assert_eq!(
        picture.to_string(),
        "Node 0, zone   Normal: 512 frames a cell\n\
         0x000000001000 .=#6.\n\
         0x000000b00000 ...\n"
    );
    let cells: Vec<_> = picture.cells().collect();
    assert_eq!(
        cells.iter().map(|c| c.range.count()).sum::<u64>(),
        0x1000 - 0x100 - 1
    );
    let info = buddy.mem_info();
    assert_eq!(cells.iter().map(|c| c.free).sum::<u64>(), info.free);
    assert_eq!(cells.iter().map(|c| c.managed).sum::<u64>(), info.total);
    assert_eq!((cells[1].managed, cells[1].taken()), (0, None));
    assert_eq!((cells[3].free, cells[3].taken()), (192, Some(625)));
    assert_eq!(cells[4].migrate, MigrateType::Movable);
    let svg = picture.svg().to_string();
    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
    assert_eq!(
        svg.matches("<rect ").count(),
        cells.len() + MigrateType::ALL.len()
    );
    assert_eq!(
        svg.matches("<rect ").count() - 6,
        svg.matches("</title></rect>").count()
    );
    assert!(svg.contains("192 of 512 free, Movable"), "{svg}");
    assert_eq!(svg.matches("<text").count(), svg.matches("</text>").count());
    // Coarser: everything in a few cells, still all of it.
    let coarse = buddy.picture().at_most(2);
    assert_eq!(coarse.frames_per_cell(), 2048);
    assert_eq!(coarse.cells().map(|c| c.free).sum::<u64>(), info.free);
}

#[test]
fn proc_files_have_the_lines_of_linux() {
    let buddy = boot();
    buddy
        .cma_area("camera", FrameRange::from_numbers(0xc00, 0xe00).unwrap())
        .unwrap();
    let zoneinfo = buddy.zone_info().to_string();
    let names: Vec<&str> = zoneinfo
        .lines()
        .map(|line| line.trim_end_matches(|c: char| c.is_ascii_digit() || c == ' '))
        .collect();
    // /proc/zoneinfo of Linux 6.18, without the counters of other subsystems.
    let expected = [
        "Node 0, zone   Normal",
        "  pages free",
        "        boost",
        "        min",
        "        low",
        "        high",
        "        promo",
        "        spanned",
        "        present",
        "        managed",
        "        cma",
        "        protection: (0, 0, 0, 0, 0)",
        "      nr_free_pages",
        "      nr_free_pages_blocks",
        "      nr_free_cma",
        "  pagesets",
        "    cpu:",
        "              count:",
        "              high:",
        "              batch:",
        "              high_min:",
        "              high_max:",
        "  node_unreclaimable:",
        "  start_pfn:",
    ];
    assert_eq!(names, expected);
    assert!(zoneinfo.contains("        cma      512\n"), "{zoneinfo}");
    assert!(zoneinfo.contains("      nr_free_cma  512\n"), "{zoneinfo}");
    let meminfo = buddy.mem_info().to_string();
    assert!(
        meminfo.contains("CmaTotal:           2048 kB\nCmaFree:            2048 kB\n"),
        "{meminfo}"
    );
    assert!(meminfo.starts_with("MemTotal: "), "{meminfo}");
    let types = buddy.page_type_info().to_string();
    let mut lines = types.lines();
    assert_eq!(lines.next(), Some("Page block order: 9"));
    assert_eq!(lines.next(), Some("Pages per block:  512"));
    assert_eq!(lines.next(), Some(""));
    assert_eq!(
        lines.next(),
        Some(
            "Free pages count per migrate type at order       0      1      2      3      4      5      6      7      8      9     10 "
        )
    );
    assert!(types.contains("Node    0, zone   Normal, type          CMA      0      0      0      0      0      0      0      0      0      1      0 \n"), "{types}");
    assert!(types.contains("Number of blocks type     Unmovable      Movable  Reclaimable   HighAtomic          CMA      Isolate \n"), "{types}");
}

#[test]
fn before_init_views_are_empty() {
    let window = Window::new(MIB, MIB);
    let buddy = machine(&window);
    assert_eq!(buddy.buddy_info().to_string(), "");
    assert_eq!(buddy.fragmentation_index().to_string(), "");
    assert_eq!(buddy.unusable_index().to_string(), "");
    assert_eq!(buddy.picture().to_string(), "");
    assert_eq!(buddy.picture().cells().count(), 0);
    assert!(buddy.picture().svg().to_string().contains("</svg>"));
    assert_eq!(buddy.show_mem().to_string(), "Mem-Info: not initialised\n");
    assert_eq!((buddy.lost(), buddy.mem_info().total), (0, 0));
}
