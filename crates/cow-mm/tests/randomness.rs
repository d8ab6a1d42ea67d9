//! Layouts with randomness: how far parts move, that all of them fit, and that a program runs in one.

mod common;

use std::cell::Cell;

use common::elf::{Builder, Part};
use common::{PAGE, Program, RW, World};
use kmem_cow_mm::{ExecError, Image, Layout, MapRequest, STACK_GUARD_PAGES, mmap_base};
use kmem_hal::{NoRng, Page, PageRange, Rng};

/// SplitMix64.
struct Seeded(Cell<u64>);

impl Seeded {
    fn new(seed: u64) -> Self {
        Self(Cell::new(seed))
    }
}

impl Rng for Seeded {
    fn next_u64(&self) -> u64 {
        self.0.set(self.0.get().wrapping_add(0x9e37_79b9_7f4a_7c15));
        let mut z = self.0.get();
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
}

/// The same bits again and again.
struct Always(u64);

impl Rng for Always {
    fn next_u64(&self) -> u64 {
        self.0
    }
}

/// A layout, bits of randomness of mappings and images, bits of the stack's, and pages that the heap moves by.
type Mode = (fn() -> Layout, u32, u32, u64);

const MODES: [Mode; 2] = [
    (Layout::x86_64, 28, 22, 1 << 18),
    (Layout::x86_32_legacy, 8, 11, 1 << 13),
];

/// How far the parts of a layout lie from where they are without randomness, in pages: mappings down, mappings up, image, stack, heap.
fn moved(layout: &Layout, fixed: &Layout) -> [u64; 5] {
    let down = |from: Option<u64>, to: Option<u64>| from.unwrap_or(0) - to.unwrap_or(0);
    [
        down(fixed.mmap_base, layout.mmap_base),
        layout.bottom_up_base - fixed.bottom_up_base,
        layout.image_base - fixed.image_base,
        fixed.stack_top - layout.stack_top,
        layout.heap_gap - fixed.heap_gap,
    ]
    .map(|bytes| {
        assert!(bytes.is_multiple_of(PAGE), "{layout:?}");
        bytes / PAGE
    })
}

#[test]
fn each_part_moves_as_far_as_linux_moves_it() {
    for (layout, mappings, stack, heap) in MODES {
        // What is the mappings' lowest place without randomness: below the lowest stack.
        let fixed = layout().randomised(&NoRng);
        let (first, again) = (Seeded::new(1), Seeded::new(1));
        let mut highest = [0; 5];
        for _ in 0..4096 {
            let random = layout().randomised(&first);
            assert_eq!(random, layout().randomised(&again), "the seed says it all");
            let pages = moved(&random, &fixed);
            for (most, pages) in highest.iter_mut().zip(pages) {
                *most = pages.max(*most);
            }
            assert!(random.mmap_base.is_none() || pages[0] == pages[1]);
        }
        let down = if fixed.mmap_base.is_some() {
            1 << mappings
        } else {
            0
        };
        let ranges = [down, 1 << mappings, 1 << mappings, 1 << stack, heap];
        for (part, (most, range)) in highest.into_iter().zip(ranges).enumerate() {
            assert!(most < range.max(1), "part {part}: {most} of {range}");
            assert!(most >= range / 16 * 15, "part {part}: {most} of {range}");
        }
    }
}

/// Sv39 has 256 GiB for programs: less than mappings move by elsewhere.
#[test]
fn every_part_stays_in_a_space_that_is_narrower_than_linux_moves_parts() {
    let task_size = 1u64 << 38;
    let narrow = Layout {
        task_size,
        search: PageRange::new(
            Page::new(16).unwrap(),
            Page::new(task_size / PAGE - 1).unwrap(),
        )
        .unwrap(),
        mmap_base: Some(mmap_base(task_size, 8 << 20)),
        bottom_up_base: (task_size / 3) & !(PAGE - 1),
        stack_top: task_size,
        image_base: (task_size / 3 * 2) & !(PAGE - 1),
        ..Layout::x86_64()
    };
    for rng in [Always(u64::MAX), Always(0), Always(u64::MAX / 3)] {
        let layout = narrow.randomised(&rng);
        let base = layout.mmap_base.unwrap();
        assert!(
            base > task_size / 2 && base < layout.stack_top,
            "{layout:x?}"
        );
        assert!(layout.bottom_up_base < task_size / 2);
        assert!(layout.image_base + layout.heap_gap < task_size);
        assert!(layout.stack_top > task_size / 4 * 3);
    }
}

#[test]
fn mappings_stay_in_a_window() {
    let (low, high) = (0x5000_0000, 0x6000_0000);
    let window = Layout::window(low, high).unwrap();
    let layout = window.with_stack_limit(1 << 20).randomised(&Seeded::new(3));
    assert_eq!((layout.mmap_base, layout.bottom_up_base), (Some(high), low));
    assert!(layout.stack_top < window.stack_top);
}

#[test]
fn without_randomness_only_room_for_a_moved_stack_is_left() {
    let (fixed, random) = (Layout::x86_64(), Layout::x86_64().randomised(&NoRng));
    assert_eq!(random.stack_top, fixed.stack_top);
    assert_eq!(random.image_base, fixed.image_base);
    assert_eq!(
        random.heap_gap, PAGE,
        "a heap begins a page behind the image"
    );
    // What the stack's randomness moves it by at most (`__STACK_RND_MASK`), its limit, and the guard.
    let gap = 0x3f_ffff * PAGE + (8 << 20) + STACK_GUARD_PAGES * PAGE;
    assert_eq!(random.mmap_base, Some(fixed.task_size - gap));
}

#[test]
fn every_part_has_room_at_the_ends_of_every_range() {
    for (layout, ..) in MODES {
        for limit in [0, 8 << 20, 1 << 30, u64::MAX] {
            // Highest remainders of every count of pages, and lowest ones.
            for bits in [0, u64::MAX] {
                let layout = layout().with_stack_limit(limit).randomised(&Always(bits));
                let top = layout.mmap_base.unwrap_or(layout.bottom_up_base);
                assert!(layout.stack_top > top, "{layout:?}");
                assert!(layout.search.first().start().as_u64() < top);
                if let Some(base) = layout.mmap_base
                    && limit < layout.task_size / 2
                {
                    let room = layout.stack_top - base;
                    assert!(room >= limit + STACK_GUARD_PAGES * PAGE, "{layout:?}");
                    let heap = layout.image_base + layout.heap_gap;
                    assert!(heap + (1 << 40) < base, "an image and a heap of 1 TiB fit");
                }
            }
        }
    }
}

#[test]
fn mappings_leave_room_for_the_stack_that_the_limit_allows() {
    let fixed = Layout::x86_64();
    let large = fixed.with_stack_limit(1 << 30);
    let gap = (1 << 30) + STACK_GUARD_PAGES * PAGE;
    assert_eq!(large.mmap_base, Some(fixed.task_size - gap));
    assert_eq!(fixed.with_stack_limit(8 << 20), fixed);
    let world = World::new();
    let program = Program::with_layout(world.mm(), large);
    assert_eq!(program.space.limits().stack, 1 << 30);
    program.exit();
}

#[test]
fn a_layout_that_is_random_stays_so_with_another_limit() {
    for (layout, ..) in MODES {
        for limit in [1 << 20, 8 << 20, 1 << 30] {
            let before = layout().with_stack_limit(limit);
            let first = before.randomised(&Seeded::new(5));
            let last = layout().randomised(&Seeded::new(5)).with_stack_limit(limit);
            assert_eq!(first, last);
        }
    }
}

/// `ELF_ET_DYN_BASE` of x86.
#[test]
fn images_go_where_linux_puts_them() {
    assert_eq!(Layout::x86_64().image_base, 0x5555_5555_4000);
    assert_eq!(Layout::x86_32_legacy().image_base, 0x40_0000);
}

const TEXT: Part = Part {
    offset: 0,
    address: 0,
    file_size: 0x1800,
    memory_size: 0x1800,
    rights: 5,
};
const DATA: Part = Part {
    offset: 0x1800,
    address: 0x2800,
    file_size: 0x900,
    memory_size: 0x3000,
    rights: 6,
};

/// Runs an image with an interpreter, or without, in a layout; where it is, where the heap and the stack begin, and where memory is mapped.
fn run(world: &'static World, layout: Layout, wide: bool, interpreted: bool) -> [u64; 4] {
    let mm = world.mm();
    let image = Builder {
        position_independent: true,
        interpreter: interpreted.then_some("/lib/ld.so"),
        ..Builder::new(wide, &[TEXT, DATA])
    };
    let loader = Builder {
        position_independent: true,
        ..Builder::new(wide, &[TEXT])
    };
    let (_, file) = world.file(mm, &image.build());
    let (_, interpreter) = world.file(mm, &loader.build());
    let program = Program::with_layout(mm, layout);
    let image = Image {
        interpreter: Some(interpreter),
        ..Image::new(file, b"/bin/random")
    };
    let start = loop {
        match program.space.exec(&image) {
            Err(ExecError::NeedIo(_)) => {}
            started => break started.unwrap(),
        }
    };
    assert!(program.execute(start.entry.as_u64()).is_ok());
    program.store(start.stack.as_u64() - 64 * 1024, 1).unwrap();
    // All that the limit allows, down to the guard.
    let lowest = layout.stack_top - layout.stack_limit;
    program.store(lowest, 2).unwrap();
    let heap = program.space.heap().start;
    assert_eq!(program.space.brk(heap + PAGE), heap + PAGE);
    program.store(heap, 3).unwrap();
    let request = MapRequest::anonymous(PAGE, RW);
    let mapped = program.space.mmap(&request).unwrap().as_u64();
    program.store(mapped, 4).unwrap();
    let found = [start.bias, heap, start.stack.as_u64(), mapped];
    program.exit();
    assert!(mm.close(file.file) && mm.close(interpreter.file));
    found
}

#[test]
fn a_program_runs_where_chance_puts_it() {
    let world = World::new();
    let before = world.used_frames();
    for (layout, ..) in MODES {
        let wide = layout().task_size > 1 << 32;
        for interpreted in [true, false] {
            let rng = Seeded::new(7);
            let mut seen: [Vec<u64>; 4] = Default::default();
            for _ in 0..8 {
                let random = layout().randomised(&rng);
                let found = run(world, random, wide, interpreted);
                let again = run(world, random, wide, interpreted);
                assert_eq!(found, again, "one layout, one place");
                let [bias, heap, ..] = found;
                if interpreted {
                    assert_eq!(bias, random.image_base);
                    assert_eq!(heap, bias + 0x6000 + random.heap_gap);
                }
                for (seen, found) in seen.iter_mut().zip(found) {
                    seen.push(found);
                }
            }
            for seen in &mut seen {
                seen.sort_unstable();
                seen.dedup();
                assert!(seen.len() > 4, "{seen:x?}");
            }
        }
    }
    // What `World::mm` made: a zero page for each program.
    assert_eq!(world.used_frames() - before, 2 * 2 * 8 * 2);
}
