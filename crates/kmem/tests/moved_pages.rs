//! The page-frame allocator empties ranges, and address spaces move their pages out of them: CMA and compaction with the real mover.

use kmem::buddy::{Buddy, ClaimError, Config};
use kmem::cow_mm::{AddressSpace, Layout, MapRequest, Mm, Outcome, Parts, Prot};
use kmem::hal::lock::SpinWait;
use kmem::hal::{
    FrameRange, FrameSlot, FrameTable, Mmu, NoPressure, Page, PageRange, PhysAddr, SECTION_FRAMES,
    Section, SingleGrace, VirtAddr,
};
use kmem::paging::format::X86_64;
use kmem::{BootMap, RegionKind};
use kmem_mock_x86::{Machine, MachineLock, MemoryKind};
use kmem_testkit::HeapObjects;

type Frames = Buddy<&'static Machine, &'static Machine, MachineLock, &'static Machine, NoPressure>;
type Tables = kmem::paging::Parts<
    'static,
    &'static Machine,
    &'static Frames,
    &'static Machine,
    SingleGrace,
    &'static Machine,
>;
type World = Parts<
    Tables,
    X86_64,
    HeapObjects<kmem::vma_tree::Node>,
    HeapObjects<kmem::cow_mm::VmaMemory>,
    HeapObjects<kmem::cow_mm::Object<HeapObjects<kmem::vma_tree::Node>, SpinWait>>,
    HeapObjects<kmem::cow_mm::SpaceMemory>,
    SpinWait,
>;
type Space = AddressSpace<'static, World>;

const PAGE: u64 = 4096;
const PAGES: u64 = 3000;

fn forever<T>(value: T) -> &'static T {
    Box::leak(Box::new(value))
}

struct Stack {
    machine: &'static Machine,
    frames: &'static Frames,
    mm: &'static Mm<'static, World>,
}

fn stack() -> Stack {
    let machine = forever(Machine::pc(64 << 20, 1));
    let mut map: BootMap = BootMap::new();
    let ranges = machine.memory().map().ranges();
    for ram in ranges.iter().filter(|range| range.kind == MemoryKind::Ram) {
        let length = ram.end - ram.start;
        map.push(PhysAddr::new(ram.start), length, RegionKind::Usable)
            .unwrap();
    }
    let frames = forever(Frames::with(machine, machine, machine, NoPressure));
    // SAFETY: X1: the test's own memory, which only this allocator has.
    unsafe { frames.init(&mut map, &Config::new()) }.unwrap();
    let sections = machine.memory().frame_limit().div_ceil(SECTION_FRAMES);
    let directory: &'static [Section] =
        Box::leak((0..sections).map(|_| Section::absent()).collect());
    for section in directory {
        section.set_ready(Box::leak(
            (0..SECTION_FRAMES).map(|_| FrameSlot::new()).collect(),
        ));
    }
    let table = forever(FrameTable::new());
    table.init(directory);
    // SAFETY: one thread; the table covers the machine's memory, whose MMU walks the tables; the world is never moved.
    let world = forever(unsafe {
        let tables = Tables::new(machine, frames, machine, SingleGrace::new(), machine, table);
        World::new(
            tables,
            HeapObjects::new(),
            HeapObjects::new(),
            HeapObjects::new(),
            HeapObjects::new(),
        )
    });
    let mm = forever(Mm::new(world).unwrap());
    Stack {
        machine,
        frames,
        mm,
    }
}

impl Stack {
    fn store(&self, space: &Space, address: u64, word: u64) {
        // SAFETY: the mock's kernel code does not run in the tables.
        unsafe { self.machine.load_root(space.root(), false) };
        while let Err(fault) = self.machine.cpu(0).user().write_u64(address, word) {
            let fault = fault.as_page_fault().unwrap();
            assert_eq!(space.fault(&fault), Outcome::Handled);
        }
    }

    fn load(&self, space: &Space, address: u64) -> u64 {
        // SAFETY: as above.
        unsafe { self.machine.load_root(space.root(), false) };
        loop {
            match self.machine.cpu(0).user().read_u64(address) {
                Ok(word) => return word,
                Err(fault) => {
                    let fault = fault.as_page_fault().unwrap();
                    assert_eq!(space.fault(&fault), Outcome::Handled);
                }
            }
        }
    }
}

/// The pages of a space that lie in a range of frames.
fn inside(space: &Space, start: u64, range: FrameRange) -> usize {
    let first = Page::containing(VirtAddr::new(start));
    PageRange::with_count(first, PAGES)
        .into_iter()
        .flat_map(PageRange::iter)
        .filter_map(|page| space.frame_at(page))
        .filter(|frame| range.contains(*frame))
        .count()
}

#[test]
fn a_range_full_of_pages_is_claimed_under_the_processes_that_use_them() {
    let stack = stack();
    let parent = Space::new(stack.mm, Layout::x86_64()).unwrap();
    let request = MapRequest::anonymous(PAGES * PAGE, Prot::READ | Prot::WRITE);
    let start = parent.mmap(&request).unwrap().as_u64();
    for page in 0..PAGES {
        stack.store(&parent, start + page * PAGE, page + 1);
    }
    // Tables are shared from here on; the child copies some, and pages in them.
    let child = parent.fork().unwrap();
    for page in (0..PAGES / 2).step_by(3) {
        stack.store(&child, start + page * PAGE, page + 10_000);
    }
    let mut claimed = Vec::new();
    // Each 4 MiB of memory in turn: those with pages of the processes only are emptied.
    for first in (0..stack.machine.memory().frame_limit()).step_by(1024) {
        let range = FrameRange::from_numbers(first, first + 1024).unwrap();
        let before = inside(&parent, start, range) + inside(&child, start, range);
        match stack.frames.claim(range, stack.mm) {
            Ok(owned) => {
                assert_eq!(
                    inside(&parent, start, range) + inside(&child, start, range),
                    0
                );
                claimed.push((owned, before));
            }
            Err(ClaimError::NotMovable(_) | ClaimError::NoRoom | ClaimError::Foreign) => {}
            Err(error) => assert!(
                before == 0 || !matches!(error, ClaimError::Pinned(_)),
                "{error}"
            ),
        }
    }
    let emptied: usize = claimed.iter().map(|(_, pages)| pages).sum();
    assert!(
        emptied > 1000,
        "{emptied} pages were in the ranges that were claimed"
    );
    assert!(stack.mm.events().moved > 1000, "{:?}", stack.mm.events());
    for page in 0..PAGES {
        let address = start + page * PAGE;
        let of_child = page < PAGES / 2 && page % 3 == 0;
        let word = if of_child { page + 10_000 } else { page + 1 };
        assert_eq!(stack.load(&parent, address), page + 1);
        assert_eq!(stack.load(&child, address), word);
    }
    stack.store(&child, start, 5);
    stack.store(&parent, start + PAGE, 6);
    assert_eq!(stack.load(&parent, start), 1);
    assert_eq!(stack.load(&child, start + PAGE), 2);
    for (owned, _) in claimed {
        assert!(stack.frames.free_range(owned).is_ok());
    }
}
