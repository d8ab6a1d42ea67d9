//! What a caller did wrong, where the allocator found out.
//!
//! The default build finds these late: a pointer is checked when its array is flushed to the slabs. That costs
//! nothing on the fast path, and what is found is dropped instead of being handed out again. With a policy that checks
//! ([`crate::Check`] and others) a wrong free is found at the call, and changes nothing.

use core::fmt;
use core::ptr::{self, NonNull};

use kmem_hal::RawLock;
use kmem_hal::sync::Ordering;

use crate::grow::object_at;
use crate::platform::Platform;
use crate::raw::RawCache;
use crate::slab::Slab;
use crate::system::SlabSystem;

/// A misuse of the allocator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Misuse {
    /// The object was free already.
    DoubleFree {
        /// The name of the cache.
        cache: &'static str,
        /// The address that was freed.
        address: usize,
    },
    /// The address lies in a slab of the cache and not at the start of an object.
    InvalidFree {
        /// The name of the cache.
        cache: &'static str,
        /// The address that was freed.
        address: usize,
    },
    /// The object belongs to another cache, or to another size class than the layout says.
    WrongCache {
        /// The cache that it was freed to.
        cache: &'static str,
        /// The cache that it belongs to.
        belongs_to: &'static str,
        /// The address that was freed.
        address: usize,
    },
    /// A free object was written to. Found by [`Poison`](crate::Poison).
    UseAfterFree {
        /// The name of the cache.
        cache: &'static str,
        /// The address of the object; of the place that it lies in, where only what is before it changed.
        address: usize,
        /// The first byte that changed, from that address.
        offset: usize,
    },
    /// Bytes behind an object were written to. Found by [`Redzone`](crate::Redzone) at its free; and by every policy that checks at the
    /// free of the object behind it, if there is one, which then stays in use.
    Overrun {
        /// The name of the cache.
        cache: &'static str,
        /// The address of the object; of the place behind it, where it is no longer there.
        address: usize,
        /// The first byte that changed, from the object's start; that of the changed word, where only that is known.
        offset: usize,
    },
    /// The size that an object was freed with is not the one that was asked for. Found by every policy that checks.
    WrongSize {
        /// The name of the cache.
        cache: &'static str,
        /// The address of the object.
        address: usize,
        /// The size that was asked for, in bytes.
        allocated: usize,
        /// The size that it was freed with, in bytes.
        freed: usize,
    },
    /// The alignment that an object was freed with is not the one that was asked for. Found by every policy that checks, where what is in front of
    /// the object depends on it: above 8 bytes.
    WrongAlign {
        /// The name of the cache.
        cache: &'static str,
        /// The address of the object.
        address: usize,
        /// The alignment that was asked for, in bytes; 8 stands for all up to it.
        allocated: usize,
        /// The alignment that it was freed with, in bytes; 8 stands for all up to it.
        freed: usize,
    },
    /// The address is in no slab, in no block of pages and in no large area of this system.
    ForeignFree {
        /// The address that was freed.
        address: usize,
    },
}

impl fmt::Display for Misuse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DoubleFree { cache, address } => {
                write!(f, "{cache}: {address:#x} was freed twice")
            }
            Self::InvalidFree { cache, address } => {
                write!(
                    f,
                    "{cache}: {address:#x} was freed and is not the start of an object"
                )
            }
            Self::WrongCache {
                cache,
                belongs_to,
                address,
            } => write!(
                f,
                "{address:#x} was freed to {cache} and belongs to {belongs_to}"
            ),
            Self::UseAfterFree {
                cache,
                address,
                offset,
            } => write!(
                f,
                "{cache}: byte {offset} of {address:#x} was written after the free"
            ),
            Self::Overrun {
                cache,
                address,
                offset,
            } => write!(
                f,
                "{cache}: byte {offset} of {address:#x} was written, behind the object"
            ),
            Self::WrongSize {
                cache,
                address,
                allocated,
                freed,
            } => write!(
                f,
                "{cache}: {address:#x} was allocated with {allocated} bytes and freed with {freed}"
            ),
            Self::WrongAlign {
                cache,
                address,
                allocated,
                freed,
            } => write!(
                f,
                "{cache}: {address:#x} was allocated at a multiple of {allocated} bytes and freed as at one of {freed}"
            ),
            Self::ForeignFree { address } => {
                write!(f, "{address:#x} was freed and was never allocated here")
            }
        }
    }
}

impl core::error::Error for Misuse {}

impl<P: Platform> SlabSystem<P> {
    /// The slab of `cache` that an address lies in; `None`, and a report, where it lies in none.
    pub(crate) fn slab_for(&self, cache: &RawCache<P::Lock>, pointer: *mut u8) -> Option<&Slab> {
        // SAFETY: a cache exists, so the system is ready.
        let platform = unsafe { self.platform_unchecked() };
        match Self::slab_of(platform, pointer) {
            Some(slab) if slab.cache() == cache.opaque() => Some(slab),
            other => {
                self.report_stranger(cache, pointer, other);
                None
            }
        }
    }

    /// The slab of a slot of `cache`, as it was at one look, and the number there; `None`, and a report, for any other pointer.
    pub(crate) fn check_object(
        &self,
        cache: &RawCache<P::Lock>,
        pointer: *mut u8,
    ) -> Option<(SlabRange<'_>, u16)> {
        let range = SlabRange::new(cache, self.slab_for(cache, pointer)?);
        let Some(number) = range.number_at(cache, pointer) else {
            self.report(
                cache,
                Misuse::InvalidFree {
                    cache: cache.setup.name,
                    address: pointer.addr(),
                },
            );
            return None;
        };
        Some((range, number))
    }

    /// Counts and tells a misuse.
    #[cold]
    pub(crate) fn report(&self, cache: &RawCache<P::Lock>, misuse: Misuse) {
        cache.misuses.fetch_add(1, Ordering::Relaxed);
        // SAFETY: a cache exists, so the system is ready.
        unsafe { self.platform_unchecked() }.misuse(&misuse);
    }

    #[cold]
    fn report_stranger(&self, cache: &RawCache<P::Lock>, pointer: *mut u8, slab: Option<&Slab>) {
        let address = pointer.addr();
        // SAFETY: a descriptor's cache is a cache of some system with the same lock type as long as the descriptor lives; only
        // the owner word is read before it is known to be ours.
        let other =
            slab.and_then(|slab| unsafe { slab.cache().cast::<RawCache<P::Lock>>().as_ref() });
        let misuse = match other {
            Some(other) if ptr::eq(other.owner, cache.owner) => Misuse::WrongCache {
                cache: cache.setup.name,
                belongs_to: other.setup.name,
                address,
            },
            _ => {
                self.foreign.fetch_add(1, Ordering::Relaxed);
                Misuse::ForeignFree { address }
            }
        };
        self.report(cache, misuse);
    }
}

/// Where a slab's objects lie: to look many pointers up of which one after the other lies in the same slab.
///
/// As they lay when it was made: who frees an object twice may free it in a slab that another CPU is giving back.
#[derive(Clone, Copy)]
pub struct SlabRange<'c> {
    pub slab: &'c Slab,
    from: usize,
    bytes: usize,
}

impl<'c> SlabRange<'c> {
    pub fn new<L: RawLock>(cache: &RawCache<L>, slab: &'c Slab) -> Self {
        Self {
            slab,
            from: slab.base().addr(),
            bytes: slab.objects() * cache.geometry().size(),
        }
    }

    /// Those of the slots that have their bits in word `word`: numbers in it are those of the bits. One of the range's numbers is in that word.
    #[inline(always)]
    pub fn word<L: RawLock>(&self, cache: &RawCache<L>, word: u16) -> Self {
        let bytes = 64 * cache.geometry().size();
        let before = usize::from(word) * bytes;
        Self {
            slab: self.slab,
            from: self.from + before,
            bytes: (self.bytes - before).min(bytes),
        }
    }

    /// Bytes from the first slot to `pointer`; `None` where it lies in no slot.
    #[inline(always)]
    fn offset_of(&self, pointer: *mut u8) -> Option<usize> {
        // What lies in front of the first object, the slab's colour too, wraps to a large offset.
        let offset = pointer.addr().wrapping_sub(self.from);
        (offset < self.bytes).then_some(offset)
    }

    /// The number of the slot that begins at `pointer`; `None` where none of this slab does.
    #[inline(always)]
    pub fn number_at<L: RawLock>(&self, cache: &RawCache<L>, pointer: *mut u8) -> Option<u16> {
        let offset = self.offset_of(pointer)?;
        let number = cache.geometry().index(offset);
        (number * cache.geometry().size() == offset).then_some(number as u16)
    }

    /// The slot that `pointer` lies in.
    pub fn slot_of<L: RawLock>(
        &self,
        cache: &RawCache<L>,
        pointer: *mut u8,
    ) -> Option<NonNull<u8>> {
        let number = cache.geometry().index(self.offset_of(pointer)?);
        NonNull::new(object_at(cache, self.slab, number))
    }
}
