//! A range of the address space as physical memory.
//!
//! Reserved with `mmap` and committed by the host page by page as it is touched. Physical address `4 GiB + n` is byte `n` of the
//! range, so that all of it lies in one zone and no address below 4 GiB is ever given.

use std::fmt;
use std::io;
use std::ptr;

use kmem_hal::FrameRange;

/// The physical address of the first byte.
pub const BASE: u64 = 4 << 30;

/// The range starts at a multiple of this: the largest block of the page-frame allocator.
const ALIGN: usize = 4 << 20;

/// A reserved range.
#[derive(Debug)]
pub struct Arena {
    start: *mut u8,
    bytes: usize,
    mapped: *mut libc::c_void,
    mapped_bytes: usize,
}

// SAFETY: the arena is an address range; who may access which byte of it is the allocators' business.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

/// The host did not give the address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArenaError {
    /// Bytes that were asked for.
    pub bytes: usize,
    /// The host's error number.
    pub errno: i32,
}

impl fmt::Display for ArenaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let error = io::Error::from_raw_os_error(self.errno);
        write!(
            f,
            "cannot reserve {} bytes of address space: {error}",
            self.bytes
        )
    }
}

impl std::error::Error for ArenaError {}

impl Arena {
    /// Reserves `bytes` bytes, rounded up to 4 MiB. Allocates nothing on the heap.
    ///
    /// # Errors
    ///
    /// [`ArenaError`] where the host refuses.
    pub fn new(bytes: usize) -> Result<Self, ArenaError> {
        let refused = |errno| ArenaError { bytes, errno };
        let rounded = bytes
            .max(1)
            .checked_next_multiple_of(ALIGN)
            .ok_or(refused(libc::ENOMEM))?;
        let mapped_bytes = rounded.checked_add(ALIGN).ok_or(refused(libc::ENOMEM))?;
        // SAFETY: an anonymous mapping at an address of the host's choice touches nothing that exists.
        let mapped = unsafe {
            libc::mmap(
                ptr::null_mut(),
                mapped_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if mapped == libc::MAP_FAILED {
            // SAFETY: the host's thread-local error number.
            return Err(refused(unsafe { *libc::__errno_location() }));
        }
        let skip = mapped.cast::<u8>().align_offset(ALIGN);
        Ok(Self {
            start: mapped.cast::<u8>().wrapping_add(skip),
            bytes: rounded,
            mapped,
            mapped_bytes,
        })
    }

    /// The first byte.
    #[must_use]
    pub fn start(&self) -> *mut u8 {
        self.start
    }

    /// Bytes in the range.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// What to add to a physical address for the pointer to it (wrapping).
    #[must_use]
    pub fn offset(&self) -> usize {
        self.start.expose_provenance().wrapping_sub(BASE as usize)
    }

    /// The number of the first frame behind the range.
    #[must_use]
    pub fn end_frame(&self) -> u64 {
        (BASE + self.bytes as u64) >> 12
    }

    /// The range as frames.
    #[must_use]
    pub fn frames(&self) -> FrameRange {
        FrameRange::from_numbers(BASE >> 12, self.end_frame()).unwrap_or(FrameRange::EMPTY)
    }

    /// Commits every page now, so that no page fault is measured later.
    pub fn touch(&self) {
        for at in (0..self.bytes).step_by(4096) {
            // SAFETY: inside the range; adding zero changes no byte that somebody has written.
            unsafe {
                self.start
                    .add(at)
                    .cast::<std::sync::atomic::AtomicU8>()
                    .as_ref()
            }
            .map(|byte| byte.fetch_or(0, std::sync::atomic::Ordering::Relaxed));
        }
    }

    /// Asks the host to map the range in pages of 2 MiB where it can: fewer page faults and fewer misses of the TLB, for memory
    /// that is committed 2 MiB at a time.
    ///
    /// Advice: a host that does not have such pages, or not now, maps the range as before.
    pub fn map_huge(&self) {
        // SAFETY: advice on the own mapping; it changes no byte.
        unsafe { libc::madvise(self.start.cast(), self.bytes, libc::MADV_HUGEPAGE) };
    }

    /// Leaves the range out of processes that this one forks; they must not use what lies in it.
    pub fn keep_from_children(&self) {
        // SAFETY: advice on the own mapping; it changes nothing in this process.
        unsafe { libc::madvise(self.start.cast(), self.bytes, libc::MADV_DONTFORK) };
    }

    /// Bytes of memory that the host has committed to the range.
    ///
    /// # Errors
    ///
    /// The host's error.
    pub fn resident(&self) -> io::Result<usize> {
        let mut pages = [0u8; 4096];
        let mut resident = 0;
        for at in (0..self.bytes).step_by(pages.len() * 4096) {
            let length = (self.bytes - at).min(pages.len() * 4096);
            // SAFETY: the range is mapped, and the array holds a byte for each of its pages.
            let failed = unsafe {
                libc::mincore(self.start.add(at).cast(), length, pages.as_mut_ptr().cast())
            };
            if failed != 0 {
                return Err(io::Error::last_os_error());
            }
            resident += pages[..length / 4096]
                .iter()
                .filter(|&&page| page & 1 == 1)
                .count()
                * 4096;
        }
        Ok(resident)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's, and whoever has pointers into it outlived it wrongly.
        unsafe { libc::munmap(self.mapped, self.mapped_bytes) };
    }
}
