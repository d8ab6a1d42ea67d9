//! The heap, stacks, and where mappings go that say not where. The answers are those of Linux 6.18.

mod common;

use common::{PAGE, Program, RW, World, signal};
use kmem_cow_mm::{Errno, Limits, MapFlags, MapRequest, Prot, Signal};
use kmem_hal::VirtAddr;

#[test]
fn the_heap_grows_and_shrinks_and_a_stack_grows_down() {
    let world = World::new();
    let program = Program::new(world.mm());
    let space = &program.space;
    space.set_heap(0x60_0000);
    assert_eq!(space.brk(0), 0x60_0000);
    assert_eq!(space.brk(0x60_3001), 0x60_3001);
    program.store(0x60_3000, 1).unwrap();
    assert_eq!(space.brk(0x60_1000), 0x60_1000);
    assert_eq!(
        program.load(0x60_3000),
        Err(signal(Signal::MapError, 0x60_3000))
    );
    let stack = MapFlags::GROWSDOWN | MapFlags::PRIVATE | MapFlags::ANONYMOUS | MapFlags::FIXED;
    let request = MapRequest {
        address: 0x7000_0000,
        flags: stack,
        ..MapRequest::anonymous(PAGE, RW)
    };
    space.mmap(&request).unwrap();
    program.store(0x7000_0000 - 64 * PAGE, 3).unwrap();
    assert_eq!(
        space
            .vma_at(VirtAddr::new(0x7000_0000))
            .unwrap()
            .range
            .count(),
        65
    );
    let deep = 0x7000_0000 - (9 << 20);
    assert_eq!(program.store(deep, 3), Err(signal(Signal::MapError, deep)));
    program.exit();
}

/// As Linux 6.18: a break that would go back over nothing stays where it is.
#[test]
fn the_heap_goes_back_only_over_what_is_mapped() {
    let program = Program::new(World::new().mm());
    let space = &program.space;
    space.set_heap(0x60_0000);
    assert_eq!(space.brk(0x60_4000), 0x60_4000);
    space.munmap(0x60_2000, 2 * PAGE).unwrap();
    assert_eq!(space.brk(0x60_2000), 0x60_4000);
    // Within a page nothing has to go.
    assert_eq!(space.brk(0x60_3800), 0x60_3800);
    assert_eq!(space.brk(0x60_1000), 0x60_1000);
    assert_eq!(space.vma_at(VirtAddr::new(0x60_1000)), None);
    program.exit();
}

/// As Linux 6.18: a heap that begins where something ends is a mapping of its own, and one that begins in that one's last page is not.
#[test]
fn the_heap_joins_what_has_the_page_that_it_begins_in() {
    for (start, mappings) in [(0x60_1000, 2), (0x60_0120, 1)] {
        let program = Program::new(World::new().mm());
        let space = &program.space;
        space
            .mmap(&MapRequest::anonymous(PAGE, RW).at(0x60_0000))
            .unwrap();
        space.set_heap(start);
        assert_eq!(space.brk(0x60_3000), 0x60_3000);
        assert_eq!(space.map_count(), mappings, "{start:#x}");
        program.exit();
    }
}

#[test]
fn a_stack_keeps_its_gap_only_to_memory_that_can_be_accessed() {
    let world = World::new();
    let program = Program::new(world.mm());
    let space = &program.space;
    let stack = MapFlags::GROWSDOWN | MapFlags::PRIVATE | MapFlags::ANONYMOUS | MapFlags::FIXED;
    for (at, prot, gap, error) in [
        (0x7000_0000, Prot::empty(), 0, Signal::AccessError),
        (0x7100_0000, Prot::READ, 256, Signal::MapError),
    ] {
        let below = at - 300 * PAGE;
        let request = MapRequest {
            address: at,
            flags: stack,
            ..MapRequest::anonymous(PAGE, RW)
        };
        space.mmap(&request).unwrap();
        space
            .mmap(&MapRequest::anonymous(PAGE, prot).at(below))
            .unwrap();
        let nearest = below + (1 + gap) * PAGE;
        program.store(nearest, 3).unwrap();
        let vma = space.vma_at(VirtAddr::new(at)).unwrap();
        assert_eq!(vma.range.first().start(), VirtAddr::new(nearest));
        let beyond = nearest - PAGE;
        assert_eq!(program.store(beyond, 3), Err(signal(error, beyond)));
    }
    program.exit();
}

/// A stack gets the place of its hint wherever it fits, whether or not it could grow there: asked of Linux 6.18 at 1 to 256 pages above another
/// mapping.
#[test]
fn a_hint_for_a_stack_asks_for_no_gap_below_it() {
    let program = Program::new(World::new().mm());
    let low = 0x1000_0000;
    let below = MapRequest::anonymous(PAGE, RW).at(low);
    program.space.mmap(&below).unwrap();
    for pages in [1, 2, 256, 257] {
        let hint = low + pages * PAGE;
        let mut request = MapRequest::anonymous(PAGE, RW);
        request.address = hint;
        request.flags |= MapFlags::GROWSDOWN;
        let at = program.space.mmap(&request).unwrap().as_u64();
        assert_eq!(at, hint, "{pages} pages above");
        program.space.munmap(at, PAGE).unwrap();
    }
    program.exit();
}

/// How libraries make a stack executable whose lower end they do not know: Linux `mm/mprotect.c` (`do_mprotect_pkey`).
#[test]
fn protection_grows_down_to_the_beginning_of_a_stack() {
    let world = World::new();
    let mm = world.mm();
    let program = Program::new(mm);
    let space = &program.space;
    let stack = MapRequest {
        flags: MapFlags::PRIVATE | MapFlags::ANONYMOUS | MapFlags::FIXED | MapFlags::GROWSDOWN,
        ..MapRequest::anonymous(4 * PAGE, Prot::READ | Prot::WRITE).at(0x2000_0000)
    };
    let at = space.mmap(&stack).unwrap().as_u64();
    let rwx = Prot::READ | Prot::WRITE | Prot::EXEC;
    space
        .mprotect(at + 2 * PAGE, PAGE, rwx | Prot::GROWSDOWN | Prot::SEM)
        .unwrap();
    let maps = space.maps().to_string();
    assert!(maps.starts_with("20000000-20003000 rwxp"), "{maps}");
    assert!(maps.contains("20003000-20004000 rw-p"), "{maps}");
    let other = space
        .mmap(&MapRequest::anonymous(PAGE, Prot::READ))
        .unwrap()
        .as_u64();
    for (address, prot, answer) in [
        (at, Prot::GROWSDOWN | Prot::GROWSUP, Errno::EINVAL),
        (at, Prot::GROWSUP, Errno::EINVAL),
        (at, Prot::from_bits_retain(0x10), Errno::EINVAL),
        (other, Prot::GROWSDOWN, Errno::EINVAL),
        (at - 16 * PAGE, Prot::GROWSDOWN, Errno::ENOMEM),
        (at - PAGE, Prot::GROWSUP, Errno::ENOMEM),
    ] {
        let refused = space.mprotect(address, 2 * PAGE, Prot::READ | prot);
        assert_eq!(refused, Err(answer), "{address:#x} {prot:?}");
    }
    // A range that begins before the stack begins with it.
    let both = space.mprotect(at - PAGE, 2 * PAGE, Prot::READ | Prot::GROWSDOWN);
    assert_eq!(both, Ok(()));
    assert_eq!(program.store(at, 1), Err(signal(Signal::AccessError, at)));
    program.exit();
}

/// As Linux 6.18: memory that will grow down is put where there is room for what it is now, and a gap that the guard of such memory reaches into
/// ends a search from above, whatever else lies below it.
#[test]
fn growing_memory_is_placed_like_any_other_and_its_guard_ends_a_search() {
    let program = Program::new(World::new().mm());
    let space = &program.space;
    let mut stack = MapRequest::anonymous(PAGE, RW);
    stack.flags |= MapFlags::GROWSDOWN;
    let base = space.layout().mmap_base.unwrap();
    let first = space.mmap(&MapRequest::anonymous(PAGE, RW)).unwrap();
    assert_eq!(first.as_u64(), base - PAGE);
    let growing = space.mmap(&stack).unwrap();
    assert_eq!(growing.as_u64(), base - 2 * PAGE);
    // A hint right above something else is taken too.
    let hint = 0x6000_0000;
    space
        .mmap(&MapRequest::anonymous(PAGE, RW).at(hint))
        .unwrap();
    stack.address = hint + PAGE;
    assert_eq!(space.mmap(&stack).unwrap().as_u64(), hint + PAGE);
    // In the guard, with room above it and below it.
    let inside = base - 50 * PAGE;
    space
        .mmap(&MapRequest::anonymous(PAGE, RW).at(inside))
        .unwrap();
    let next = space.mmap(&MapRequest::anonymous(PAGE, RW)).unwrap();
    assert_eq!(next.as_u64(), base - (2 + 256 + 1) * PAGE);
    program.exit();
}

/// A search's limits do not hide what is above them: asked of Linux 6.18 with stacks above `mmap_base`, and above the window of `MAP_32BIT`.
#[test]
fn the_guard_of_a_stack_reaches_into_the_limits_of_a_search() {
    let program = Program::new(World::new().mm());
    let space = &program.space;
    let stack_at = |address| {
        let mut stack = MapRequest::anonymous(PAGE, RW).at(address);
        stack.flags |= MapFlags::GROWSDOWN;
        space.mmap(&stack).unwrap();
    };
    let base = space.layout().mmap_base.unwrap();
    for (above, below) in [(0, 257), (1, 256), (16, 241), (255, 2), (256, 1), (290, 1)] {
        stack_at(base + above * PAGE);
        let at = space.mmap(&MapRequest::anonymous(PAGE, RW)).unwrap();
        assert_eq!(at.as_u64(), base - below * PAGE, "{above} pages above");
        space.munmap(at.as_u64(), PAGE).unwrap();
        if above > 1 {
            // What lies between takes the guard on itself.
            let between = MapRequest::anonymous(PAGE, Prot::empty()).at(base + PAGE);
            space.mmap(&between).unwrap();
            let at = space.mmap(&MapRequest::anonymous(PAGE, RW)).unwrap();
            assert_eq!(at.as_u64(), base - PAGE, "{above} pages above");
            space.munmap(at.as_u64(), PAGE).unwrap();
            space.munmap(base + PAGE, PAGE).unwrap();
        }
        space.munmap(base + above * PAGE, PAGE).unwrap();
    }
    let window = 0x4000_0000..0x8000_0000;
    stack_at(window.end + 16 * PAGE);
    for (free, pages, fits) in [
        (1, 1, false),
        (240, 1, false),
        (241, 1, true),
        (241, 2, false),
        (242, 2, true),
    ] {
        let first_free = window.end - free * PAGE;
        let mut fill = MapRequest::anonymous(first_free - window.start, Prot::empty());
        fill.flags |= MapFlags::NORESERVE;
        space.mmap(&fill.at(window.start)).unwrap();
        let mut low = MapRequest::anonymous(pages * PAGE, RW);
        low.flags |= MapFlags::MAP_32BIT;
        let answer = space.mmap(&low).map(VirtAddr::as_u64);
        let expected = fits.then_some(first_free).ok_or(Errno::ENOMEM);
        assert_eq!(answer, expected, "{pages} of {free} pages");
        space.munmap(window.start, 1 << 30).unwrap();
    }
    program.exit();
}

/// As Linux 6.18: a stack that grew, or would have but for a limit, has a reverse map, even if no page came of it; and so its parts are no longer one
/// in children of children.
#[test]
fn a_stack_that_grew_is_no_memory_that_nobody_wrote_to() {
    for (below, signalled, mappings) in [
        (1, Signal::AccessError, 3),
        (100, Signal::MapError, 3),
        (0, Signal::AccessError, 2),
    ] {
        let parent = Program::new(World::new().mm());
        let at = 0x7000_0000;
        let mut stack = MapRequest::anonymous(4 * PAGE, Prot::READ).at(at);
        stack.flags |= MapFlags::GROWSDOWN;
        parent.space.mmap(&stack).unwrap();
        parent.space.set_limits(Limits {
            stack: 16 * PAGE,
            ..parent.space.limits()
        });
        let address = at - below * PAGE;
        assert_eq!(parent.store(address, 1), Err(signal(signalled, address)));
        let child = parent.fork().unwrap();
        child.space.mprotect(at + 2 * PAGE, 2 * PAGE, RW).unwrap();
        let grandchild = child.fork().unwrap();
        grandchild.space.mprotect(at + PAGE, PAGE, RW).unwrap();
        assert_eq!(grandchild.space.map_count(), mappings, "{below} below");
        for program in [grandchild, child, parent] {
            program.exit();
        }
    }
}
