//! Schedules of chosen operations: what went wrong only where one of them came all the way while the other stood still.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kmem_cow_mm::replacement::{Replacement, Verdict};
use kmem_cow_mm::{Advice, Layout, MapFlags, MapRequest, PinError, Reclaimer, RemapFlags};
use kmem_hal::{Access, FrameRequest, FrameSink, FrameSource, Migrate, Page, VirtAddr};
use shuttle::sync::mpsc::{Sender, channel};

use super::kernel::{Kernel, SLOTS, Space};
use super::stops::Stops;
use super::{ANON, ELSEWHERE, PAGE, RW, SHARED, access, exit, run, run_schedules};

/// The kernel, with that many slots of swap: with one, a slot that is given up is the next page's at once.
pub fn kernel(slots: usize) -> Kernel {
    let kernel = Kernel::get();
    kernel.disk.set_latency(0);
    if kernel.mm.meminfo().swap.total == 0 {
        let slots = &kernel.slots[..slots];
        kernel.mm.swap_on(kernel.disk, slots).unwrap();
    }
    kernel
}

fn end(kernel: Kernel, space: Arc<Space>) {
    exit(kernel, Arc::into_inner(space).unwrap());
    while kernel.mm.poll_swap().is_some() {}
    let swap = kernel.mm.meminfo().swap;
    assert_eq!(swap.free, swap.total, "slots of swap leak");
}

pub fn map(space: &Space, at: u64, pages: u64, flags: MapFlags) {
    let request = MapRequest {
        flags: flags | MapFlags::ANONYMOUS,
        ..MapRequest::anonymous(pages * PAGE, RW)
    };
    space.mmap(&request.at(at)).unwrap();
}

/// A slot that a page got for its way out is another page's as soon as the page is wanted back. Who was about to write the first page there
/// looks again with the slot counted.
#[test]
fn shuttle_a_page_of_shared_memory_is_not_written_to_a_slot_that_is_anothers() {
    let body = || {
        let kernel = kernel(1);
        let space = Arc::new(Space::new(kernel.mm, Layout::x86_64()).unwrap());
        map(&space, SHARED, 1, MapFlags::SHARED);
        map(&space, ANON, 1, MapFlags::PRIVATE);
        access(kernel, &space, SHARED, Some(1)).unwrap();
        access(kernel, &space, ANON, Some(2)).unwrap();
        let other = space.clone();
        let done = Arc::new(AtomicBool::new(false));
        let says_so = done.clone();
        let evictor = shuttle::thread::spawn(move || {
            other.madvise(SHARED, PAGE, Advice::PageOut).unwrap();
            says_so.store(true, Ordering::SeqCst);
        });
        let file = space.vma_at(VirtAddr::new(SHARED)).and_then(|vma| vma.file);
        while kernel.mm.cached_pages(file.unwrap()) > 0 && !done.load(Ordering::SeqCst) {
            shuttle::thread::yield_now();
        }
        access(kernel, &space, SHARED, Some(3)).unwrap();
        space.madvise(ANON, PAGE, Advice::PageOut).unwrap();
        evictor.join().unwrap();
        assert_eq!(access(kernel, &space, ANON, None), Ok(2));
        assert_eq!(access(kernel, &space, SHARED, None), Ok(3));
        end(kernel, space);
    };
    run_schedules("shared, slot of another".into(), 4001, 500, body);
}

/// A page that is pinned while reclaim looks at it stays its owner's: the device and the program see each other's writes.
#[test]
fn shuttle_a_page_that_is_pinned_under_reclaim_stays_its_owners() {
    let body = || {
        let kernel = kernel(SLOTS);
        let space = Arc::new(Space::new(kernel.mm, Layout::x86_64()).unwrap());
        map(&space, ANON, 1, MapFlags::PRIVATE);
        access(kernel, &space, ANON, Some(1)).unwrap();
        let other = space.clone();
        let evictor = shuttle::thread::spawn(move || {
            other.madvise(ANON, PAGE, Advice::PageOut).unwrap();
        });
        let pin = loop {
            match space.pin(VirtAddr::new(ANON), Access::Write) {
                Err(PinError::NeedIo(_)) => shuttle::thread::yield_now(),
                other => break other.unwrap(),
            }
        };
        evictor.join().unwrap();
        access(kernel, &space, ANON, Some(2)).unwrap();
        let mut bytes = [0; 8];
        pin.read(0, &mut bytes);
        assert_eq!(u64::from_le_bytes(bytes), 2, "the device has another page");
        drop(pin);
        end(kernel, space);
    };
    run_schedules("pinned under reclaim".into(), 1, 600, body);
}

/// A page that was moved away and back, by mremap, while it got another frame is found by its entry that says "moving".
#[test]
fn shuttle_a_page_that_goes_home_while_it_moves_arrives() {
    let body = || {
        let kernel = kernel(SLOTS);
        let space = Arc::new(Space::new(kernel.mm, Layout::x86_64()).unwrap());
        map(&space, ANON, 1, MapFlags::PRIVATE);
        access(kernel, &space, ANON, Some(1)).unwrap();
        let flags = RemapFlags::MAYMOVE | RemapFlags::FIXED;
        space.mremap(ANON, PAGE, PAGE, flags, ELSEWHERE).unwrap();
        let at = Page::containing(VirtAddr::new(ELSEWHERE));
        let from = space.frame_at(at).unwrap();
        // A family has more members, whom the walk visits.
        let children = [(); 3].map(|()| space.fork().unwrap());
        for child in &children {
            child.munmap(ELSEWHERE, PAGE).unwrap();
        }
        let mover = shuttle::thread::spawn(move || {
            let frames = &kernel.tables().frames;
            let to = frames.alloc(&FrameRequest::ONE).unwrap();
            match kernel.mm.migrate(from, to) {
                Ok(old) => frames.free(old),
                Err((_, to)) => frames.free(to),
            }
        });
        while space.frame_at(at) == Some(from) {
            shuttle::thread::yield_now();
        }
        space.mremap(ELSEWHERE, PAGE, PAGE, flags, ANON).unwrap();
        mover.join().unwrap();
        for child in children {
            exit(kernel, child);
        }
        let home = Page::containing(VirtAddr::new(ANON));
        assert!(
            space.frame_at(home).is_some(),
            "its entry says that it moves, for ever"
        );
        assert_eq!(access(kernel, &space, ANON, None), Ok(1));
        end(kernel, space);
    };
    run_schedules("home while it moves".into(), 1, 500, body);
}

/// A page of the swap cache that came back is sent out again, while its slot is given up and becomes another page's: it goes there only where the
/// slot, once counted, still names it.
#[test]
fn shuttle_a_page_of_the_swap_cache_does_not_go_to_a_slot_that_is_anothers() {
    let body = || {
        let kernel = kernel(1);
        let space = Arc::new(Space::new(kernel.mm, Layout::x86_64()).unwrap());
        map(&space, ANON, 2, MapFlags::PRIVATE);
        access(kernel, &space, ANON, Some(1)).unwrap();
        space.madvise(ANON, PAGE, Advice::PageOut).unwrap();
        access(kernel, &space, ANON + PAGE, Some(2)).unwrap();
        // The child's entry keeps the slot when the page comes back to its parent.
        let child = space.fork_copying().unwrap();
        assert_eq!(access(kernel, &space, ANON, None), Ok(1));
        assert_eq!(kernel.mm.meminfo().swap.cached, 1);
        let other = space.clone();
        let evictor = shuttle::thread::spawn(move || {
            other.madvise(ANON, PAGE, Advice::PageOut).unwrap();
        });
        let other = space.clone();
        let taker = shuttle::thread::spawn(move || {
            exit(kernel, child);
            other.madvise(ANON + PAGE, PAGE, Advice::PageOut).unwrap();
        });
        evictor.join().unwrap();
        taker.join().unwrap();
        assert_eq!(access(kernel, &space, ANON, None), Ok(1));
        assert_eq!(access(kernel, &space, ANON + PAGE, None), Ok(2));
        end(kernel, space);
    };
    assert!(run(Stops::default(), body) > 50);
}

/// A pinned page is moved, and its table with it. Another thread pins a page of another mapping meanwhile, in the table that came in its place: that
/// pin stays counted there, so that a fork copies the table.
#[test]
fn shuttle_a_move_of_a_pinned_page_takes_no_other_pin_away() {
    let body = || {
        let kernel = kernel(SLOTS);
        let space = Arc::new(Space::new(kernel.mm, Layout::x86_64()).unwrap());
        let beside = ANON + 2 * PAGE;
        for at in [ANON, beside] {
            map(&space, at, 1, MapFlags::PRIVATE);
            access(kernel, &space, at, Some(1)).unwrap();
        }
        space.madvise(beside, PAGE, Advice::DontNeed).unwrap();
        let pin = space.pin(VirtAddr::new(ANON), Access::Write).unwrap();
        let done = Arc::new(AtomicBool::new(false));
        let (other, says_so) = (space.clone(), done.clone());
        let mover = shuttle::thread::spawn(move || {
            let flags = RemapFlags::MAYMOVE | RemapFlags::FIXED;
            other.mremap(ANON, PAGE, PAGE, flags, ELSEWHERE).unwrap();
            says_so.store(true, Ordering::SeqCst);
        });
        let other = space.clone();
        let pinner = shuttle::thread::spawn(move || {
            let pin = other.pin(VirtAddr::new(beside), Access::Write).unwrap();
            while !done.load(Ordering::SeqCst) {
                shuttle::thread::yield_now();
            }
            for at in [beside, ELSEWHERE] {
                let page = Page::containing(VirtAddr::new(at));
                let counted = other.page_tables().pins(page);
                assert!(counted > 0, "the pin at {at:#x} is not counted");
            }
            drop(pin);
        });
        mover.join().unwrap();
        pinner.join().unwrap();
        drop(pin);
        end(kernel, space);
    };
    assert!(run(Stops::default(), body) > 50);
}

/// Evicts every page, and says so before.
struct Announcing(Sender<()>);

impl Replacement for Announcing {
    fn judge(&mut self, _age: u16, _used: bool) -> Verdict {
        let _ = self.0.send(());
        Verdict::Evict
    }
}

/// The kernel reads a page in a table that a fork left shared. Reclaim, which has judged the page before, takes it out of there without a lock of
/// the reader's space; its frame is nobody else's before the bytes are read.
#[test]
fn shuttle_what_the_kernel_reads_stays_its_page_until_it_is_read() {
    let body = || {
        let kernel = kernel(SLOTS);
        let parent = Arc::new(Space::new(kernel.mm, Layout::x86_64()).unwrap());
        map(&parent, ANON, 1, MapFlags::PRIVATE);
        access(kernel, &parent, ANON, Some(1)).unwrap();
        let child = Arc::new(parent.fork().unwrap());
        let frame = parent.frame_at(Page::containing(VirtAddr::new(ANON)));
        let frame = frame.unwrap();
        let stops = &kernel.tables().stops_at_the_map;
        stops.store(true, Ordering::SeqCst);
        let (judged, wait) = channel();
        let space = child.clone();
        let reader = shuttle::thread::spawn(move || {
            wait.recv().unwrap();
            let mut bytes = [0; 8];
            space.read_memory(VirtAddr::new(ANON), &mut bytes).unwrap();
            assert_eq!(u64::from_le_bytes(bytes), 1, "another's page was read");
        });
        let evictor = shuttle::thread::spawn(move || {
            Reclaimer::new(Announcing(judged)).reclaim(kernel.mm, 1);
            // Whoever gets the frame writes to it.
            let frames = &kernel.tables().frames;
            let taken: Vec<_> =
                std::iter::from_fn(|| frames.alloc(&FrameRequest::ONE).ok()).collect();
            if taken.iter().any(|taken| taken.first() == frame) {
                let at = frame.start().as_u64();
                assert!(kernel.hardware.0.memory().write(at, &[0xff; 8]));
            }
            taken.into_iter().for_each(|frame| frames.free(frame));
        });
        reader.join().unwrap();
        evictor.join().unwrap();
        stops.store(false, Ordering::SeqCst);
        assert_eq!(access(kernel, &child, ANON, None), Ok(1));
        exit(kernel, Arc::into_inner(child).unwrap());
        end(kernel, parent);
    };
    assert!(run(Stops::default(), body) > 10);
}
