//! Every address space of an [`Mm`](crate::Mm), in one list: `mmlist`.
//!
//! Whoever wants to know which spaces map a page walks this list. A space's family tells most of them apart at a glance: spaces that fork
//! made from one another, the only way in which an anonymous page gets into two.
//!
//! ```text
//!   Registry ── lock ── first ──> Core ⇄ Core ⇄ Core <── last      family 7: a shell and its children
//!                                  7      7      12
//! ```
//!
//! Invariants
//! - `I1`: a core is in the list from before its tables hold a leaf until after they were last looked at; it stays where it is
//!   meanwhile.
//! - `I2`: the links of a core are read and written under the list's lock.
//! - `I3`: a parent comes before its children. A fork copies to a child that is in the list already, and a walk waits for the parent's lock
//!   until that is done: so it looks at the child after the copies are there, or the fork copies what the walk has left in the parent.
//!
//! Addresses are kept without their type, so that an `Mm` may be borrowed for less than its life; a space that was forgotten
//! stays in the list with the `Mm` it was made with, which [`First::iter`] compares.
//!
//! Locks: the list's comes before every space's.

use core::cell::Cell;
use core::fmt;
use core::ptr::NonNull;

use kmem_hal::lock::SleepWriteGuard;
use kmem_hal::sync::{AtomicBool, Ordering};
use kmem_hal::{RawSleepLock, SleepLock};

use crate::env::Env;
use crate::mm::Mm;
use crate::space::Core;

/// The address of a core, as that of its first field.
type Link = Option<NonNull<Entry>>;

/// A space's part of the list.
pub(crate) struct Entry {
    family: u32,
    /// Whether accessed bits were cleared that CPUs may still remember as set.
    aged: AtomicBool,
    next: Cell<Link>,
    previous: Cell<Link>,
}

impl Entry {
    pub(crate) fn new(family: u32) -> Self {
        Self {
            family,
            aged: AtomicBool::new(false),
            next: Cell::new(None),
            previous: Cell::new(None),
        }
    }

    /// Notes that accessed bits of the space's tables were cleared.
    pub(crate) fn note_aged(&self) {
        if !self.aged.load(Ordering::Relaxed) {
            self.aged.store(true, Ordering::Relaxed);
        }
    }

    /// Whether they were since the last call.
    pub(crate) fn take_aged(&self) -> bool {
        self.aged.swap(false, Ordering::Relaxed)
    }

    /// The number that spaces share which fork made from one another.
    pub(crate) fn family(&self) -> u32 {
        self.family
    }
}

/// The list.
pub(crate) struct Registry<L> {
    first: SleepLock<First, L>,
}

/// Where the list begins, and where it ends.
pub(crate) struct First {
    first: Link,
    last: Link,
}

// SAFETY: addresses of cores, which are shareable, and which are read under the list's lock (`I1`, `I2`).
unsafe impl Send for First {}
// SAFETY: as above.
unsafe impl Sync for First {}

impl<L: RawSleepLock> Registry<L> {
    pub(crate) fn new() -> Self {
        Self {
            first: SleepLock::new(First {
                first: None,
                last: None,
            }),
        }
    }

    /// Adds a space at the end, after its parent (`I3`).
    pub(crate) fn add<E: Env>(&self, core: NonNull<Core<'_, E>>) {
        let core = core.cast::<Entry>();
        let mut list = self.first.write();
        // SAFETY: `I1`: cores in the list live, and this one was just made.
        unsafe {
            core.as_ref().next.set(None);
            core.as_ref().previous.set(list.last);
            match list.last {
                Some(last) => last.as_ref().next.set(Some(core)),
                None => list.first = Some(core),
            }
        }
        list.last = Some(core);
    }

    /// Takes a space out. When this returns nobody looks at it any more.
    pub(crate) fn remove<E: Env>(&self, core: NonNull<Core<'_, E>>) {
        let core = core.cast::<Entry>();
        let mut list = self.first.write();
        // SAFETY: `I1`: the core and its neighbours are in the list, so they live.
        unsafe {
            let (next, previous) = (core.as_ref().next.get(), core.as_ref().previous.get());
            match previous {
                Some(previous) => previous.as_ref().next.set(next),
                None => list.first = next,
            }
            match next {
                Some(next) => next.as_ref().previous.set(previous),
                None => list.last = previous,
            }
        }
    }

    /// Keeps every space where it is, and everybody else out of the list.
    pub(crate) fn lock(&self) -> SleepWriteGuard<'_, First, L> {
        self.first.write()
    }
}

impl First {
    /// The spaces, parents before their children (`I3`).
    pub(crate) fn iter<'a, 'm, E: Env>(
        &'a self,
        mm: &'a Mm<'m, E>,
    ) -> impl Iterator<Item = NonNull<Core<'m, E>>> + 'a {
        core::iter::successors(self.first, |link| {
            // SAFETY: `I1`, and the borrow keeps the lock.
            unsafe { link.as_ref() }.next.get()
        })
        .map(NonNull::cast::<Core<'m, E>>)
        .filter(move |core| {
            // SAFETY: as above; the address of the `Mm` is compared and not followed.
            let of = unsafe { (&raw const (*core.as_ptr()).mm).cast::<*const ()>().read() };
            core::ptr::eq(of, core::ptr::from_ref(mm).cast())
        })
    }
}

impl<L> fmt::Debug for Registry<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Registry(..)")
    }
}
