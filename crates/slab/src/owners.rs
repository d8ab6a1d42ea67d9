//! Who holds what: objects in use, added up by the source line that allocated them.
//!
//! The table is the caller's, so that a leak report needs no memory. What finds no place in it is counted all the same.

use core::fmt;
use core::panic::Location;

use crate::platform::Platform;
use crate::system::SlabSystem;

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
