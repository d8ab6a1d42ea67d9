//! Who holds what: objects in use, added up by the source line that allocated them.
//!
//! The table is the caller's, so that a leak report needs no memory. What finds no place in it is counted all the same.

use core::fmt;
use core::panic::Location;
use core::ptr::NonNull;

use crate::grow::object_at;
use crate::harden::{Record, State, front_in};
use crate::platform::Platform;
use crate::system::SlabSystem;

/// An object in use, and who allocated it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owned {
    /// The name of its cache.
    pub cache: &'static str,
    /// Its address.
    pub address: usize,
    /// The bytes asked for.
    pub size: usize,
    /// The source line of the call.
    pub place: Option<&'static Location<'static>>,
}

impl fmt::Display for Owned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {} bytes at {:#x}",
            self.cache, self.size, self.address
        )?;
        match self.place {
            Some(place) => write!(f, " from {place}"),
            None => Ok(()),
        }
    }
}

/// The objects in use of one cache that one source line allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwnerCount {
    /// The name of the cache; empty in an unused place of a table.
    pub cache: &'static str,
    /// The source line; `None` in an unused place of a table.
    pub place: Option<&'static Location<'static>>,
    /// How many objects.
    pub objects: u64,
    /// The bytes asked for, of all of them.
    pub bytes: u64,
}

impl OwnerCount {
    /// An unused place of a table.
    pub const NONE: Self = Self {
        cache: "",
        place: None,
        objects: 0,
        bytes: 0,
    };
}

impl fmt::Display for OwnerCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {} objects, {} bytes",
            self.cache, self.objects, self.bytes
        )?;
        match self.place {
            Some(place) => write!(f, " from {place}"),
            None => Ok(()),
        }
    }
}

impl<P: Platform> SlabSystem<P> {
    /// Calls `each` with every object in use of caches with the [`Owner`](crate::Owner) policy.
    ///
    /// # Safety
    ///
    /// Nobody allocates or frees meanwhile, nor writes behind an object.
    pub unsafe fn owners_shared(&self, mut each: impl FnMut(&Owned)) {
        // On Busy, and before `init`, there is nothing to tell.
        let _ = self.for_each_cache(|cache| {
            let features = cache.setup.features;
            if !features.owner {
                return;
            }
            cache.for_each_slab(|slab| {
                for number in 0..slab.objects() {
                    let Some(slot) = NonNull::new(object_at(cache, slab, number)) else {
                        continue;
                    };
                    // SAFETY: a slot of a live slab, whose tag nobody changes meanwhile.
                    let front = unsafe { front_in(cache, slot, State::InUse, |_| true) };
                    if let Some(front) = front {
                        // SAFETY: inside the slot; an object in use has a record, which nobody changes meanwhile.
                        let (object, record) = unsafe {
                            let object = slot.add(front);
                            let record = object.add(cache.room(front)).cast::<Record>();
                            (object, record.read_unaligned())
                        };
                        each(&Owned {
                            cache: cache.setup.name,
                            address: object.as_ptr().addr(),
                            size: record.size as usize,
                            place: record.place,
                        });
                    }
                }
                true
            });
        });
    }

    /// Calls `each` with every object in use of caches with the [`Owner`](crate::Owner) policy.
    pub fn owners(&mut self, each: impl FnMut(&Owned)) {
        // SAFETY: the exclusive borrow keeps every call away.
        unsafe { self.owners_shared(each) }
    }

    /// Adds up the objects in use of caches with the [`Owner`](crate::Owner) policy by cache and source line, those with most bytes first.
    ///
    /// Gives the part of `table` that was used, and how many objects found no place in it.
    #[doc(alias = "alloc_traces")]
    pub fn owner_counts<'t>(&mut self, table: &'t mut [OwnerCount]) -> (&'t mut [OwnerCount], u64) {
        // SAFETY: the exclusive borrow keeps every call away.
        unsafe { self.owner_counts_shared(table) }
    }

    /// As [`owner_counts`](Self::owner_counts), for a system in a `static`.
    ///
    /// # Safety
    ///
    /// Nobody allocates or frees meanwhile, nor writes behind an object.
    pub unsafe fn owner_counts_shared<'t>(
        &self,
        table: &'t mut [OwnerCount],
    ) -> (&'t mut [OwnerCount], u64) {
        let (mut used, mut others) = (0, 0);
        // SAFETY: the caller's promise.
        unsafe {
            self.owners_shared(|owned| {
                let known = table[..used]
                    .iter()
                    .position(|count| count.cache == owned.cache && count.place == owned.place);
                let at = known.unwrap_or(used);
                let Some(count) = table.get_mut(at) else {
                    others += 1;
                    return;
                };
                if at == used {
                    *count = OwnerCount {
                        cache: owned.cache,
                        place: owned.place,
                        ..OwnerCount::NONE
                    };
                    used += 1;
                }
                count.objects += 1;
                count.bytes += owned.size as u64;
            });
        }
        let (counts, _) = table.split_at_mut(used);
        counts.sort_unstable_by_key(|count| core::cmp::Reverse(count.bytes));
        (counts, others)
    }
}
