//! Files that end while somebody looks at them without a reference: whoever gives a file up ends it, and nobody else does.

use std::sync::{Arc, Mutex};

use kmem_cow_mm::replacement::Fifo;
use kmem_cow_mm::{FileRef, Layout, MapFlags, Reclaimer};
use kmem_hal::{Frame, IoError, IoState, IoTicket, PageProvider};
use kmem_mock_x86::DiskImage;
use shuttle::scheduler::TaskId;

use super::directed::{kernel, map};
use super::kernel::{Kernel, SLOTS, Space, forever};
use super::stops::Stops;
use super::{ANON, PAGE, exit, run};

const PAGES: u64 = 2;

/// A file that knows which threads wrote its pages.
struct Watched {
    image: DiskImage<'static>,
    writers: Mutex<Vec<TaskId>>,
}

// SAFETY: W1 to W4: forwards to an image that keeps them.
unsafe impl PageProvider for Watched {
    fn size(&self) -> u64 {
        PAGES * PAGE
    }
    fn read(&self, index: u64, frame: Frame) -> Result<IoState, IoError> {
        self.image.read(index, frame)
    }
    fn write(&self, index: u64, frame: Frame) -> Result<IoState, IoError> {
        let me = shuttle::current::me();
        self.writers.lock().unwrap().push(me);
        self.image.write(index, frame)
    }
    fn poll(&self, ticket: IoTicket) -> Result<IoState, IoError> {
        self.image.poll(ticket)
    }
}

impl Watched {
    fn writers(&self) -> Vec<TaskId> {
        self.writers.lock().unwrap().clone()
    }
}

/// A file whose pages are all dirty in the cache, and that nobody maps.
fn dirty_file(kernel: Kernel) -> (&'static Watched, FileRef) {
    let bytes = [7; (PAGES * PAGE) as usize];
    let provider = forever(Watched {
        image: DiskImage::from_bytes(kernel.hardware.0, &bytes),
        writers: Mutex::default(),
    });
    let mm = kernel.mm;
    let file = mm.open_file(provider, "/watched", 0).unwrap();
    for page in 0..PAGES {
        while mm.write_file(file, page * PAGE, &[9; 8]).unwrap().bytes < 8 {}
    }
    (provider, file)
}

/// The provider has all bytes when the last handle is given back, though a reclaim was at the file meanwhile.
#[test]
fn shuttle_who_gives_a_file_up_waits_for_a_reclaim_that_is_at_it() {
    let body = || {
        let kernel = kernel(SLOTS);
        let before = kernel.used_frames();
        let (provider, file) = dirty_file(kernel);
        let evictor = shuttle::thread::spawn(move || {
            let _ = Reclaimer::new(Fifo).reclaim(kernel.mm, 1);
        });
        let closer = shuttle::thread::spawn(move || {
            assert!(kernel.mm.close(file));
            provider.writers().len()
        });
        evictor.join().unwrap();
        let written = closer.join().unwrap();
        assert_eq!(written as u64, PAGES, "closed, and not written");
        assert_eq!(kernel.mm.events().write_errors, 0);
        assert_eq!(kernel.used_frames(), before, "frames leak");
    };
    assert!(run(Stops::default(), body) > 20);
}

/// Whoever prints a file's name holds the lock of a space, under which no file may be written.
#[test]
fn shuttle_who_looks_at_a_file_under_a_lock_does_not_end_it() {
    let body = || {
        let kernel = kernel(SLOTS);
        let space = Arc::new(Space::new(kernel.mm, Layout::x86_64()).unwrap());
        map(&space, ANON, 1, MapFlags::PRIVATE);
        let (provider, file) = dirty_file(kernel);
        let other = space.clone();
        let reader = shuttle::thread::spawn(move || {
            other.for_each_vma(|_| {
                let _ = kernel.mm.object_info(file);
                let _ = kernel.mm.cached_pages(file);
                true
            });
            shuttle::current::me()
        });
        let closer = shuttle::thread::spawn(move || assert!(kernel.mm.close(file)));
        let reader = reader.join().unwrap();
        closer.join().unwrap();
        let writers = provider.writers();
        assert_eq!(writers.len() as u64, PAGES);
        assert!(!writers.contains(&reader), "written with the lock held");
        exit(kernel, Arc::into_inner(space).unwrap());
    };
    assert!(run(Stops::default(), body) > 5);
}
