//! Zeroed host memory that costs nothing until it is touched: `mmap` with `MAP_NORESERVE`.
//!
//! Physical memory and the per-frame side arrays are such arenas, so a machine of 128 GiB starts in microseconds and
//! takes as much of the host's memory as its program touches.
//!
//! Invariants
//! - `I1` `base` is page-aligned and valid for reads and writes of `bytes` bytes until the arena is dropped; it starts as zeros.
//! - `I2` an arena hands out pointers and atomics only, never `&mut` or plain references to its bytes.

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

/// A lazily committed, zeroed stretch of memory.
#[derive(Debug)]
pub(crate) struct Arena {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: I2: the arena is plain memory; whoever reads or writes through its pointers answers for races.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

impl Arena {
    /// Reserves `bytes` bytes (at least one page) of zeros.
    pub(crate) fn new(bytes: u64) -> io::Result<Self> {
        let bytes = usize::try_from(bytes.max(1).next_multiple_of(4096))
            .map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        // SAFETY: an anonymous mapping at an address of the kernel's choice touches nothing of ours.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // Host huge pages would commit 2 MiB for one touched frame. Advice only: a refusal does not matter.
        // SAFETY: the range is the mapping just made.
        unsafe { libc::madvise(base, bytes, libc::MADV_NOHUGEPAGE) };
        let base = NonNull::new(base.cast::<u8>())
            .expect("mmap never returns null for an address of its choice");
        Ok(Self { base, bytes })
    }

    pub(crate) fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The `index`-th 64-bit word.
    ///
    /// # Panics
    ///
    /// If `index` is outside of the arena.
    #[inline]
    pub(crate) fn word(&self, index: usize) -> &AtomicU64 {
        assert!(
            index < self.bytes / 8,
            "word {index} is outside of an arena of {} bytes",
            self.bytes
        );
        // SAFETY: I1 and the check above: in bounds and aligned; I2: only atomics and raw pointers reach it.
        unsafe { AtomicU64::from_ptr(self.base.as_ptr().cast::<u64>().add(index)) }
    }

    /// Gives `count` pages from page `first` on back to the host; they read as zeros afterwards.
    pub(crate) fn discard(&self, first: usize, count: usize) {
        assert!(
            first
                .checked_add(count)
                .is_some_and(|end| end <= self.bytes / 4096),
            "pages outside of the arena"
        );
        // SAFETY: I1: the pages lie inside of the mapping; dropping private anonymous pages makes them zeros.
        unsafe {
            libc::madvise(
                self.base.as_ptr().add(first * 4096).cast(),
                count * 4096,
                libc::MADV_DONTNEED,
            );
        }
    }

    /// Bytes that the host has really committed, page by page.
    pub(crate) fn committed_bytes(&self) -> u64 {
        const CHUNK: usize = 1 << 20;
        let pages = self.bytes / 4096;
        let mut seen = vec![0u8; CHUNK.min(pages)];
        let mut committed = 0;
        let mut first = 0;
        while first < pages {
            let count = CHUNK.min(pages - first);
            // SAFETY: I1: the range lies in the mapping; `seen` has a byte for each of its pages.
            let failed = unsafe {
                libc::mincore(
                    self.base.as_ptr().add(first * 4096).cast(),
                    count * 4096,
                    seen.as_mut_ptr().cast(),
                )
            };
            if failed == 0 {
                committed += seen[..count].iter().filter(|&&byte| byte & 1 != 0).count() as u64;
            }
            first += count;
        }
        committed * 4096
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: I1: this is the mapping of `new`, and the borrow rules end every use of `word` before.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}
