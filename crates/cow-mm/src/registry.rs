//! Every address space of an [`Mm`](crate::Mm), in one list: `mmlist`.
//!
//! Whoever wants to know which spaces map a page walks this list. A space's family tells most of them apart at a glance: spaces that fork
//! made from one another, the only way in which an anonymous page gets into two.
//!
//! ```text
//!   Registry ── lock ── first ──> Core ⇄ Core ⇄ Core      family 7: a shell and its children
//!                                  7      7      12
//! ```
//!
//! Invariants
//! - `I1`: a core is in the list from before its tables hold a leaf until after they were last looked at; it stays where it is
//!   meanwhile.
//! - `I2`: the links of a core are read and written under the list's lock.
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

/// Where the list begins.
pub(crate) struct First(Link);

// SAFETY: addresses of cores, which are shareable, and which are read under the list's lock (`I1`, `I2`).
unsafe impl Send for First {}
// SAFETY: as above.
unsafe impl Sync for First {}

impl<L: RawSleepLock> Registry<L> {
    pub(crate) fn new() -> Self {
        Self {
            first: SleepLock::new(First(None)),
        }
    }

    /// Adds a space to the end that is searched first.
    pub(crate) fn add<E: Env>(&self, core: NonNull<Core<'_, E>>) {
        let core = core.cast::<Entry>();
        let mut first = self.first.write();
        // SAFETY: `I1`: cores in the list live, and this one was just made.
        unsafe {
            core.as_ref().next.set(first.0);
            core.as_ref().previous.set(None);
            if let Some(next) = first.0 {
                next.as_ref().previous.set(Some(core));
            }
        }
        first.0 = Some(core);
    }

    /// Takes a space out. When this returns nobody looks at it any more.
    pub(crate) fn remove<E: Env>(&self, core: NonNull<Core<'_, E>>) {
        let core = core.cast::<Entry>();
        let mut first = self.first.write();
        // SAFETY: `I1`: the core and its neighbours are in the list, so they live.
        unsafe {
            let (next, previous) = (core.as_ref().next.get(), core.as_ref().previous.get());
            match previous {
                Some(previous) => previous.as_ref().next.set(next),
                None => first.0 = next,
            }
            if let Some(next) = next {
                next.as_ref().previous.set(previous);
            }
        }
    }

    /// Keeps every space where it is, and everybody else out of the list.
    pub(crate) fn lock(&self) -> SleepWriteGuard<'_, First, L> {
        self.first.write()
    }
}

impl First {
    /// The spaces, the youngest first.
    pub(crate) fn iter<'a, 'm, E: Env>(
        &'a self,
        mm: &'a Mm<'m, E>,
    ) -> impl Iterator<Item = NonNull<Core<'m, E>>> + 'a {
        core::iter::successors(self.0, |link| {
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
