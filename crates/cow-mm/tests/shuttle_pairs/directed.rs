//! Schedules of chosen operations: what went wrong only where one of them came all the way while the other stood still.

use std::sync::Arc;

use kmem_cow_mm::{Advice, Layout, MapFlags, MapRequest, PinError, RemapFlags};
use kmem_hal::{Access, FrameRequest, FrameSink, FrameSource, Migrate, Page, VirtAddr};

use super::kernel::{Kernel, Space};
use super::{ANON, ELSEWHERE, PAGE, RW, access, exit, run_schedules};

fn kernel() -> Kernel {
    let kernel = Kernel::get();
    kernel.disk.set_latency(0);
    if kernel.mm.meminfo().swap.total == 0 {
        kernel.mm.swap_on(kernel.disk, kernel.slots).unwrap();
    }
    kernel
}

fn end(kernel: Kernel, space: Arc<Space>) {
    exit(kernel, Arc::into_inner(space).unwrap());
    while kernel.mm.poll_swap().is_some() {}
    let swap = kernel.mm.meminfo().swap;
    assert_eq!(swap.free, swap.total, "slots of swap leak");
}

fn map(space: &Space, at: u64, pages: u64, flags: MapFlags) {
    let request = MapRequest {
        flags: flags | MapFlags::ANONYMOUS,
        ..MapRequest::anonymous(pages * PAGE, RW)
    };
    space.mmap(&request.at(at)).unwrap();
}

/// A page that is pinned while reclaim looks at it stays its owner's: the device and the program see each other's writes.
#[test]
fn shuttle_a_page_that_is_pinned_under_reclaim_stays_its_owners() {
    let body = || {
        let kernel = kernel();
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
        let kernel = kernel();
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
