//! A lock in each VMA, released for all of them by one increment.
//!
//! A page fault needs one VMA to stay as it is; it should not wait for an `mmap` elsewhere in the space. So every VMA
//! carries a small lock: faults hold it shared, and whoever changes the VMA write-locks it first. A writer that changed
//! many VMAs does not unlock each: a VMA is write-locked while its sequence number equals the space's, and one increment
//! of the space's number at the end releases them all.
//!
//! ```text
//!   space.seq = 7        vma a: seq 5  free        vma b: seq 7  write-locked        vma c: seq 7  write-locked
//!   space.seq = 8        all free
//! ```
//!
//! A fault never waits: if the VMA is write-locked, or has changed since it was found, [`ReadSection::lookup_locked`]
//! says so, and the fault goes on under the space's own lock (the fallback).
//!
//! Invariants
//! - `L1`: a VMA is write-locked exactly while its `seq` equals the space's; only the space's writer changes either.
//! - `L2`: a reader counts itself in before it looks at `seq`; the writer closes the count before it waits for the
//!   readers inside and sets `seq`. One of the two sees the other.
//! - `L3`: a VMA is unmapped, resized or freed only while it is write-locked. So an entry that is found again after the
//!   reader is counted in stays until the guard is dropped.
//! - `L4`: no number of the space comes twice: 64 bits count changes for longer than a machine runs. With 32 a VMA that was locked once
//!   would look locked 2^32 changes later, and the writer would not wait for the readers inside.
//!
//! Cost: 16 bytes a VMA; two locked instructions a fault, on the VMA's own line. Two faults in the same VMA share that line; lookups
//! without the lock share nothing.
//!
//! Source: Linux `include/linux/mmap_lock.h` (`vma_start_read`, `vma_end_write_all`), per-VMA locks since 6.4.

use core::fmt;

use kmem_hal::sync::{AtomicU32, AtomicU64, Ordering};
use kmem_hal::{Grace, ObjectAlloc, Page};

use crate::node::Node;
use crate::plant::{LockPlant, Planted};
use crate::shared::ReadSection;
use crate::value::{Entry, Value};

/// The bit of the count that says: no reader may enter.
const CLOSED: u32 = 1 << 31;

/// The space's side of the locks of its VMAs.
#[derive(Debug)]
#[doc(alias = "mm_lock_seq")]
pub struct SpaceSeq {
    seq: AtomicU64,
    planted: Planted<LockPlant>,
}

impl SpaceSeq {
    kmem_hal::const_new! {
        /// A space whose VMAs are all free.
        pub fn new() -> Self {
            Self {
                seq: AtomicU64::new(1),
                planted: Planted::<LockPlant>::NOTHING,
            }
        }
    }

    /// A space with a bug on purpose.
    #[cfg(loom)]
    #[doc(hidden)]
    pub fn with_bug(bug: LockPlant) -> Self {
        Self {
            planted: Planted::bug(bug),
            ..Self::new()
        }
    }

    /// Releases every VMA that was write-locked: one store.
    ///
    /// Only for the space's writer, at the end of its change.
    #[doc(alias = "vma_end_write_all")]
    pub fn end_write_all(&self) {
        // L4: no number comes twice. 0 is that of a VMA that was never locked.
        let next = self.seq.load(Ordering::Relaxed) + 1;
        // Release: whoever sees the new number sees what was written under the locks.
        let end = self
            .planted
            .order(LockPlant::NoEndRelease, Ordering::Release);
        self.seq.store(next, end);
    }
}

impl Default for SpaceSeq {
    fn default() -> Self {
        Self::new()
    }
}

/// A VMA's lock.
#[derive(Debug)]
#[doc(alias = "vma_lock")]
pub struct VmaLock {
    /// Readers inside, and [`CLOSED`].
    readers: AtomicU32,
    seq: AtomicU64,
    planted: Planted<LockPlant>,
}

impl VmaLock {
    kmem_hal::const_new! {
        /// A free lock.
        pub fn new() -> Self {
            Self {
                readers: AtomicU32::new(0),
                seq: AtomicU64::new(0),
                planted: Planted::<LockPlant>::NOTHING,
            }
        }
    }

    /// A lock with a bug on purpose.
    #[cfg(loom)]
    #[doc(hidden)]
    pub fn with_bug(bug: LockPlant) -> Self {
        Self {
            planted: Planted::bug(bug),
            ..Self::new()
        }
    }

    /// Enters as a reader; `None` where the VMA is write-locked, or about to be.
    #[doc(alias = "vma_start_read")]
    pub fn try_read<'v>(&'v self, space: &SpaceSeq) -> Option<VmaReadGuard<'v>> {
        // A guess, which spares the count a store: what counts is asked below.
        if self.seq.load(Ordering::Relaxed) == space.seq.load(Ordering::Relaxed) {
            return None;
        }
        // Acquire: a writer that came first has set `seq` before it opened the count again (L2).
        let enter = self
            .planted
            .order(LockPlant::NoEnterAcquire, Ordering::Acquire);
        let entered = self
            .readers
            .fetch_update(enter, Ordering::Relaxed, |readers| {
                (readers & CLOSED == 0 && readers + 1 < CLOSED).then_some(readers + 1)
            });
        if entered.is_err() {
            return None;
        }
        let guard = VmaReadGuard { lock: self };
        // Acquire: what the last writer did before its `end_write_all` is seen.
        let check = self
            .planted
            .order(LockPlant::NoCheckAcquire, Ordering::Acquire);
        if self.seq.load(Ordering::Relaxed) == space.seq.load(check) {
            return None;
        }
        Some(guard)
    }

    /// Write-locks the VMA until [`SpaceSeq::end_write_all`], waiting for the readers inside with `wait`.
    ///
    /// Only for the space's writer; at once where it holds the VMA already.
    #[doc(alias = "vma_start_write")]
    pub fn start_write(&self, space: &SpaceSeq, wait: &mut dyn FnMut()) {
        let now = space.seq.load(Ordering::Relaxed);
        if self.seq.load(Ordering::Relaxed) == now {
            return;
        }
        if self.planted.is(LockPlant::StaysOpen) {
            while self.readers.load(Ordering::Acquire) != 0 {
                wait();
            }
            return self.seq.store(now, Ordering::Relaxed);
        }
        self.readers.fetch_or(CLOSED, Ordering::Relaxed);
        // Acquire: what the readers did happens before the change. Their leaving and the closing are one sequence of exchanges, so that this
        // holds for whoever left before the closing too.
        let inside = self
            .planted
            .order(LockPlant::NoWaitAcquire, Ordering::Acquire);
        while self.readers.load(inside) != CLOSED {
            wait();
        }
        self.seq.store(now, Ordering::Relaxed);
        // Release: a reader that enters from now on sees `seq` (L2).
        let open = self
            .planted
            .order(LockPlant::NoOpenRelease, Ordering::Release);
        self.readers.fetch_and(!CLOSED, open);
    }

    /// Whether the space's writer holds the VMA.
    #[must_use]
    pub fn is_write_locked(&self, space: &SpaceSeq) -> bool {
        self.seq.load(Ordering::Relaxed) == space.seq.load(Ordering::Relaxed)
    }

    /// Readers inside.
    #[must_use]
    pub fn readers(&self) -> u32 {
        self.readers.load(Ordering::Relaxed) & !CLOSED
    }
}

impl Default for VmaLock {
    fn default() -> Self {
        Self::new()
    }
}

/// A reader inside a VMA: the VMA stays as it is until the guard is dropped.
#[must_use = "the VMA is unlocked when the guard is dropped"]
pub struct VmaReadGuard<'v> {
    lock: &'v VmaLock,
}

impl Drop for VmaReadGuard<'_> {
    #[doc(alias = "vma_end_read")]
    fn drop(&mut self) {
        // Release: what the reader did happens before the writer's change.
        let leave = self
            .lock
            .planted
            .order(LockPlant::NoLeaveRelease, Ordering::Release);
        self.lock.readers.fetch_sub(1, leave);
    }
}

impl fmt::Debug for VmaReadGuard<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("VmaReadGuard")
    }
}

/// A value that leads to a VMA with a lock.
///
/// # Safety
///
/// - `LV1`: the lock stays readable and writable memory for a grace period after the value was taken out of the tree.
/// - `LV2`: `L3` is kept: whoever takes the value out of the tree, or changes its range, has write-locked it.
pub unsafe trait Lockable: Value {
    /// The lock of the VMA.
    ///
    /// # Safety
    ///
    /// The caller is inside a read section in which it found the value, or holds the lock, for all of `'v`.
    unsafe fn lock<'v>(self) -> &'v VmaLock;
}

/// Why a VMA could not be locked; the caller takes the space's own lock instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LookupError {
    /// No VMA covers the page.
    NotMapped,
    /// The VMA is being changed.
    WriteLocked,
    /// The VMA changed between being found and being locked.
    Changed,
}

impl fmt::Display for LookupError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotMapped => "no range covers the page",
            Self::WriteLocked => "the range is being changed",
            Self::Changed => "the range changed while it was locked",
        })
    }
}

impl core::error::Error for LookupError {}

impl<V: Lockable, A: ObjectAlloc<Node<W>>, G: Grace, const W: usize> ReadSection<'_, V, A, G, W> {
    /// The VMA that covers `page`, locked for reading.
    ///
    /// What is given out stays as it is until the guard is dropped: the range, the value, and whatever the VMA's writer
    /// changes only while it has the VMA write-locked (`L3`). The guard may outlive nothing but the section's borrow.
    ///
    /// # Errors
    ///
    /// [`LookupError`]. Never waits: whoever gets one takes the space's own lock and looks again.
    ///
    /// # Examples
    ///
    /// A fault that needs the lock of the space only where its VMA is being changed:
    ///
    /// ```
    /// use kmem_hal::{FixedPool, Page, PageRange, SingleGrace};
    /// use kmem_vma_tree::{Lockable, LookupError, Node, SharedTree, SpaceSeq, Value, VmaLock};
    ///
    /// struct Vma { lock: VmaLock, writable: bool }
    /// static STACK: Vma = Vma { lock: VmaLock::new(), writable: true };
    ///
    /// #[derive(Clone, Copy)]
    /// struct Handle(&'static Vma);
    /// impl Value for Handle {
    ///     fn to_word(self) -> u64 { core::ptr::from_ref(self.0).expose_provenance() as u64 }
    ///     fn from_word(word: u64) -> Self {
    ///         // SAFETY: the word came from `to_word`, and no VMA is freed here.
    ///         Self(unsafe { &*core::ptr::with_exposed_provenance(word as usize) })
    ///     }
    /// }
    /// // SAFETY: LV1: no VMA is freed; LV2: the range stays as it is below.
    /// unsafe impl Lockable for Handle {
    ///     unsafe fn lock<'v>(self) -> &'v VmaLock { &self.0.lock }
    /// }
    ///
    /// let (nodes, space) = (FixedPool::<Node, 32>::new(), SpaceSeq::new());
    /// // SAFETY: one thread runs this example.
    /// let grace = unsafe { SingleGrace::new() };
    /// let mut tree: SharedTree<Handle, _, _> = SharedTree::new_in(&nodes, &grace);
    /// let (mut writer, readers) = tree.split();
    /// writer.store(PageRange::single(Page::ZERO), Some(Handle(&STACK)), &mut |_| ())?;
    ///
    /// let section = readers.read();
    /// let (entry, guard) = section.lookup_locked(&space, Page::ZERO).ok().unwrap();
    /// assert!(entry.value.0.writable);
    /// assert_eq!(STACK.lock.readers(), 1);
    /// drop(guard);
    ///
    /// // `mprotect` on another CPU: faults in this VMA take the slow way until it is done.
    /// STACK.lock.start_write(&space, &mut || ());
    /// assert_eq!(section.lookup_locked(&space, Page::ZERO).err(), Some(LookupError::WriteLocked));
    /// space.end_write_all();
    /// assert!(section.lookup_locked(&space, Page::ZERO).is_ok());
    /// # Ok::<(), kmem_hal::AllocError>(())
    /// ```
    ///
    /// The guard does not outlive its section:
    ///
    /// ```compile_fail,E0505
    /// # use kmem_hal::{Grace, ObjectAlloc, Page};
    /// # use kmem_vma_tree::{Lockable, Node, ReadSection, SpaceSeq};
    /// fn fault<V: Lockable, A: ObjectAlloc<Node>, G: Grace>(section: ReadSection<'_, V, A, G>, space: &SpaceSeq) {
    ///     let (_, guard) = section.lookup_locked(space, Page::ZERO).unwrap();
    ///     drop(section);
    ///     drop(guard);
    /// }
    /// ```
    #[doc(alias = "lock_vma_under_rcu")]
    pub fn lookup_locked(
        &self,
        space: &SpaceSeq,
        page: Page,
    ) -> Result<(Entry<V>, VmaReadGuard<'_>), LookupError> {
        let found = self.get(page).ok_or(LookupError::NotMapped)?;
        // SAFETY: LV1: the value was found in this section, which outlives the guard.
        let lock = unsafe { found.value.lock() };
        let guard = lock.try_read(space).ok_or(LookupError::WriteLocked)?;
        let again = self.get(page).ok_or(LookupError::Changed)?;
        if again.range == found.range && again.value.to_word() == found.value.to_word() {
            Ok((found, guard))
        } else {
            Err(LookupError::Changed)
        }
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    /// A VMA that was locked once, and never again while 32 bits ran over, is not taken for locked.
    #[test]
    fn a_number_of_the_space_does_not_come_twice() {
        let (space, vma) = (SpaceSeq::new(), VmaLock::new());
        vma.start_write(&space, &mut || ());
        space.end_write_all();
        // So many changes later.
        space.seq.store(u32::MAX.into(), Ordering::Relaxed);
        let mut guard = vma.try_read(&space);
        assert!(guard.is_some());
        space.end_write_all();
        assert!(!vma.is_write_locked(&space));
        let mut waited = 0;
        vma.start_write(&space, &mut || {
            waited += 1;
            guard = None;
        });
        assert_eq!(waited, 1, "the writer is inside beside a reader");
    }
}
