//! The files of the content oracle: on slow disks that fail, and of a size that changes.

use std::sync::atomic::{AtomicU64, Ordering};

use kmem_cow_mm::{Errno, Mm, OpenFile};
use kmem_hal::{FrameRequest, FrameSink, FrameSource, IoState, PageProvider, PhysMap};
use kmem_mock_x86::DiskImage;
use kmem_paging::Env as _;
use kmem_testkit::processes::{FILE_PAGES, FILES, first_word};

use super::changing_file::ChangingFile;
use super::kept::keep;
use super::{PAGE, World};
use kmem_cow_mm::Env as _;

/// An open file.
#[derive(Debug)]
pub struct OracleFile {
    provider: &'static ChangingFile,
    pub open: OpenFile,
    latency: AtomicU64,
}

/// The page of a file that a step means.
pub fn index_of(index: u8) -> u64 {
    u64::from(index % FILE_PAGES)
}

/// The world's files, made at the first call, with their first words, and nothing of them in memory.
pub fn fresh(
    world: &'static World,
    mm: &'static Mm<'static, World>,
) -> &'static [OracleFile; FILES] {
    let files = world.oracle_files.get_or_init(|| {
        keep(Box::new(std::array::from_fn(|_| {
            let bytes = vec![0; usize::from(FILE_PAGES) * PAGE as usize];
            let provider = keep(Box::new(ChangingFile {
                image: DiskImage::from_bytes(world.machine, &bytes),
                size: AtomicU64::new(0),
            }));
            let file = mm.open_file(provider, "/data", 0).unwrap();
            OracleFile {
                provider,
                open: OpenFile {
                    file,
                    readable: true,
                    writable: true,
                },
                latency: AtomicU64::new(0),
            }
        })))
    });
    for (number, file) in files.iter().enumerate() {
        // A request that an earlier run told to fail and never made is far away now.
        file.fail_at(u64::from(u32::MAX));
        file.set_latency(0);
        for index in 0..FILE_PAGES {
            file.put(world, u64::from(index), first_word(number, index));
        }
        let size = u64::from(FILE_PAGES) * PAGE;
        file.provider.size.store(size, Ordering::SeqCst);
    }
    files
}

impl OracleFile {
    pub fn set_latency(&self, polls: u32) {
        self.latency.store(polls.into(), Ordering::Relaxed);
        self.provider.image.set_latency(polls);
    }

    pub fn fail_at(&self, number: u64) {
        self.provider.image.fail_at(number);
    }

    /// Changes the size; the disk forgets what is cut off.
    ///
    /// # Errors
    ///
    /// As [`Mm::truncate_file`]; the size has changed.
    pub fn truncate(&self, mm: &'static Mm<'static, World>, pages: u64) -> Result<(), Errno> {
        self.provider.size.store(pages * PAGE, Ordering::SeqCst);
        mm.truncate_file(self.open.file)?;
        for index in pages..u64::from(FILE_PAGES) {
            self.put(mm.env(), index, 0);
        }
        Ok(())
    }

    /// The first word of a page as the disk has it.
    pub fn on_disk(&self, world: &World, index: u8) -> u64 {
        self.with_frame(world, |frame| {
            self.at_once(|| self.provider.image.read(index.into(), frame));
            let pointer = world.paging().map().to_ptr(frame.start()).cast::<u64>();
            // SAFETY: the frame is the caller's.
            unsafe { pointer.read() }
        })
    }

    /// A page on the disk: a word, and zeros.
    fn put(&self, world: &World, index: u64, word: u64) {
        self.with_frame(world, |frame| {
            let pointer = world.paging().map().to_ptr(frame.start()).cast::<u64>();
            // SAFETY: the frame is the caller's.
            unsafe { pointer.write(word) };
            self.at_once(|| self.provider.image.write(index, frame));
        });
    }

    fn with_frame<R>(&self, world: &World, f: impl FnOnce(kmem_hal::Frame) -> R) -> R {
        // The test's own, which never fails.
        let frames = world.frames().inner().inner();
        let frame = frames.alloc(&FrameRequest::ONE.zeroed()).unwrap();
        let result = f(frame.first());
        frames.free(frame);
        result
    }

    /// A transfer of the test's own, which neither waits nor stays failed.
    fn at_once(&self, transfer: impl Fn() -> Result<IoState, kmem_hal::IoError>) {
        let image = &self.provider.image;
        image.set_latency(0);
        while transfer().is_err() {}
        let latency = self.latency.load(Ordering::Relaxed);
        image.set_latency(latency as u32);
    }
}
