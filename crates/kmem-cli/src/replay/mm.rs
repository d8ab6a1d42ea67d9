//! What a memory manager must offer to be replayed on: Linux's calls with Linux's numbers.
//!
//! The trait is small on purpose: it is where a manager is plugged in, and where a test plugs in a double. Numbers are
//! those of Linux's headers for x86-64 (`prot`, `flags`, `advice`), so that no translation can hide a difference.
//!
//! Contract
//! - M1: a new manager has an empty user half, [0, 2^47).
//! - M2: a call that fails has changed nothing, except where Linux leaves a prefix.
//! - M3: [`MmUnderTest::fork`] gives an independent child that shares files and shared memory with its parent.
//! - M4: [`MmUnderTest::list`] names shared anonymous memory by a key that no two objects of one run share.

use crate::input::oracle::{Errno, Perms, Recorded};

use std::sync::Arc;

pub use crate::input::fuzz::Access;

/// PROT_READ.
pub const PROT_READ: u32 = 1;
/// PROT_WRITE.
pub const PROT_WRITE: u32 = 2;
/// MAP_SHARED.
pub const MAP_SHARED: u32 = 1;
/// MAP_PRIVATE.
pub const MAP_PRIVATE: u32 = 2;
/// MAP_FIXED.
pub const MAP_FIXED: u32 = 0x10;
/// MAP_ANONYMOUS.
pub const MAP_ANONYMOUS: u32 = 0x20;
/// MAP_32BIT.
pub const MAP_32BIT: u32 = 0x40;
/// MAP_GROWSDOWN.
pub const MAP_GROWSDOWN: u32 = 0x100;
/// MAP_FIXED_NOREPLACE.
pub const MAP_FIXED_NOREPLACE: u32 = 0x10_0000;
/// MREMAP_MAYMOVE.
pub const MREMAP_MAYMOVE: u32 = 1;
/// MREMAP_FIXED.
pub const MREMAP_FIXED: u32 = 2;
/// MADV_DONTNEED.
pub const MADV_DONTNEED: u32 = 4;
/// MADV_DONTFORK.
pub const MADV_DONTFORK: u32 = 10;
/// MADV_DOFORK.
pub const MADV_DOFORK: u32 = 11;

/// A file as a run describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileSpec {
    /// The name that lists show.
    pub name: String,
    /// Which file it is: two opens of one file carry the same number.
    pub inode: u64,
    /// Whether this open may write.
    pub writable: bool,
    /// The length in pages.
    pub pages: u64,
    /// What stands in it.
    pub content: Content,
}

/// The content of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// Zeros.
    Zeros,
    /// `f11e << 48 | number << 32 | page` in the first 8 bytes of each page, zeros behind them.
    Pattern(u32),
    /// These bytes, and zeros up to the end of the last page.
    Bytes(Arc<[u8]>),
}

impl Content {
    /// Fills `page` with what stands in page `index`.
    pub fn fill(&self, index: u64, page: &mut [u8]) {
        page.fill(0);
        match self {
            Self::Zeros => {}
            Self::Pattern(number) => {
                let word = (0xf11e << 48) | (u64::from(*number) << 32) | index;
                page[..8].copy_from_slice(&word.to_le_bytes());
            }
            Self::Bytes(bytes) => {
                let start = usize::try_from(index)
                    .ok()
                    .and_then(|i| i.checked_mul(page.len()));
                if let Some(rest) = start.and_then(|s| bytes.get(s..)) {
                    let n = rest.len().min(page.len());
                    page[..n].copy_from_slice(&rest[..n]);
                }
            }
        }
    }
}

/// An open file of a manager, shared by all forks of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileHandle(pub u32);

/// What a mapping call maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// No file (the flags say whether that is legal).
    None,
    /// An open file.
    File(FileHandle),
    /// A descriptor that is not open.
    BadDescriptor,
}

/// Whose pages a VMA maps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Whose {
    /// Private anonymous memory, the heap too.
    Anonymous,
    /// A file, by its [`FileSpec::name`].
    File(String),
    /// Shared anonymous memory, by a key (M4).
    Shared(u64),
    /// A special mapping, by its name in brackets.
    Special(String),
}

/// One VMA of a manager.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmaSeen {
    /// The first address.
    pub start: u64,
    /// The address behind the last.
    pub end: u64,
    /// The permissions.
    pub perms: Perms,
    /// The offset into the object in bytes; 0 for private anonymous memory.
    pub offset: u64,
    /// Whose pages.
    pub whose: Whose,
}

/// A memory manager that recorded runs can be replayed on.
pub trait MmUnderTest: Sized {
    /// Opens a file.
    ///
    /// # Errors
    /// The errno that opening ran into.
    fn open(&mut self, file: &FileSpec) -> Result<FileHandle, Errno>;

    /// Maps memory; returns the address.
    ///
    /// # Errors
    /// As mmap(2).
    fn mmap(
        &mut self,
        addr: u64,
        len: u64,
        prot: u32,
        flags: u32,
        backing: Backing,
        offset: u64,
    ) -> Recorded;

    /// Removes mappings.
    ///
    /// # Errors
    /// As munmap(2).
    fn munmap(&mut self, addr: u64, len: u64) -> Result<(), Errno>;

    /// Changes protections.
    ///
    /// # Errors
    /// As mprotect(2).
    fn mprotect(&mut self, addr: u64, len: u64, prot: u32) -> Result<(), Errno>;

    /// Resizes or moves a mapping; returns its address.
    ///
    /// # Errors
    /// As mremap(2).
    fn mremap(&mut self, addr: u64, old: u64, new: u64, flags: u32, to: u64) -> Recorded;

    /// Takes advice.
    ///
    /// # Errors
    /// As madvise(2).
    fn madvise(&mut self, addr: u64, len: u64, advice: u32) -> Result<(), Errno>;

    /// Sets where the heap starts and ends; called once, before the first [`brk`](Self::brk).
    fn set_break(&mut self, addr: u64);

    /// Moves the end of the heap; returns where it is then.
    fn brk(&mut self, addr: u64) -> u64;

    /// Makes a mapping that only a kernel makes, with a name in brackets: the stack, vdso, vvar.
    ///
    /// # Errors
    /// If the range is taken or the manager cannot hold it.
    fn special(&mut self, name: &str, start: u64, end: u64, perms: Perms) -> Result<(), Errno>;

    /// Loads 8 bytes, aligned to 8, through the MMU, faulting pages in.
    ///
    /// # Errors
    /// The signal that the program would get.
    fn load(&mut self, addr: u64) -> Result<u64, Access>;

    /// Stores 8 bytes, aligned to 8, through the MMU, faulting pages in.
    ///
    /// # Errors
    /// The signal that the program would get.
    fn store(&mut self, addr: u64, value: u64) -> Result<(), Access>;

    /// Loads bytes from any address, faulting pages in.
    ///
    /// # Errors
    /// The signal that the program would get.
    fn read(&mut self, addr: u64, into: &mut [u8]) -> Result<(), Access> {
        let mut done = 0;
        while done < into.len() {
            let at = addr + done as u64;
            let word = self.load(at & !7)?.to_le_bytes();
            let skip = (at & 7) as usize;
            let n = (8 - skip).min(into.len() - done);
            into[done..done + n].copy_from_slice(&word[skip..skip + n]);
            done += n;
        }
        Ok(())
    }

    /// Stores bytes at any address, faulting pages in.
    ///
    /// # Errors
    /// The signal that the program would get; what lies before the bad page has been written.
    fn write(&mut self, addr: u64, from: &[u8]) -> Result<(), Access> {
        let mut done = 0;
        while done < from.len() {
            let at = addr + done as u64;
            let skip = (at & 7) as usize;
            let n = (8 - skip).min(from.len() - done);
            let mut word = if n == 8 {
                [0; 8]
            } else {
                self.load(at & !7)?.to_le_bytes()
            };
            word[skip..skip + n].copy_from_slice(&from[done..done + n]);
            self.store(at & !7, u64::from_le_bytes(word))?;
            done += n;
        }
        Ok(())
    }

    /// Copies the address space.
    ///
    /// # Errors
    /// As fork(2).
    fn fork(&mut self) -> Result<Self, Errno>;

    /// Gives the VMAs in ascending order.
    fn list(&mut self, each: &mut dyn FnMut(VmaSeen));
}
