//! Permanent mappings of high memory: a frame for as long as somebody needs it, seen by every CPU.
//!
//! ```text
//!   vacant ── map ──> filling ──> mapped, n users ── last unmap ──> idle: still mapped, found again by its frame
//!     ^                                                              │ no page is vacant
//!     └──────────── flushing: no access any more, one shootdown <────┘
//! ```
//!
//! A frame is mapped once, however many users it has. When the last one has gone the mapping stays: the next user of the
//! frame needs no store and no flush. Only when every page is taken are all idle ones unmapped, with one shootdown.
//!
//! Invariants
//! - `K1`: a frame is in at most one slot, and that slot is in the chain of its hash.
//! - `K2`: an entry changes only while its slot is filling or flushing, by the call that set that state.
//! - `K3`: a slot becomes vacant only after its page has been flushed on every CPU.
//!
//! An idle mapping may lead to a frame that was freed meanwhile, as in Linux; nobody uses it. An owner who needs it gone
//! (a frame that leaves the kernel) calls [`Kmap::flush`] first.
//!
//! Context: [`Kmap::map`] may wait for a page, not in interrupts; [`Kmap::unmap`] anywhere with interrupts on.
//!
//! Source: Linux `mm/highmem.c` (`map_new_virtual`, `flush_all_zero_pkmaps`).

use core::fmt;

use kmem_hal::sync::{AtomicU32, Ordering};
use kmem_hal::{Frame, Lock, Page, PageRange, RawLock, VirtAddr, Wait};
use kmem_paging::format::Format;
use kmem_paging::{Attributes, Env, MapError, PageTable, Rights};

use crate::page::KernelPage;
use crate::window::Window;

/// Pages that a window may have at most; Linux has 512 or 1024.
#[doc(alias = "LAST_PKMAP")]
pub const KMAP_PAGES: usize = 1024;

const NONE: u16 = u16::MAX;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Vacant,
    Filling,
    Mapped,
    Flushing,
}

/// What is known of one page of the window. The kernel keeps an array of them, one for each page.
#[derive(Clone, Copy, Debug)]
pub struct KmapSlot {
    frame: Frame,
    users: u32,
    state: State,
    /// The next slot of the same hash; of the vacant ones where it is vacant.
    next: u16,
    /// The first slot of the hash that is this slot's index.
    head: u16,
}

impl KmapSlot {
    /// A page that maps nothing.
    pub const VACANT: Self = Self {
        frame: Frame::ZERO,
        users: 0,
        state: State::Vacant,
        next: NONE,
        head: NONE,
    };
}

/// Why a frame was not mapped, or a mapping not ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum KmapError {
    /// The window has no page, more than [`KMAP_PAGES`], or not as many as there are slots.
    BadWindow,
    /// The table refused the window.
    Table(MapError),
    /// The format cannot express the frame.
    Unencodable,
    /// The call would have to wait.
    WouldWait,
    /// Nothing is mapped at that address.
    NotMapped,
    /// A frame has 2^32 - 1 users.
    TooManyUsers,
}

impl fmt::Display for KmapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BadWindow => f.write_str("the window and its slots do not fit each other"),
            Self::Table(error) => fmt::Display::fmt(error, f),
            Self::Unencodable => f.write_str("the page-table format cannot express the frame"),
            Self::WouldWait => f.write_str("every page of the window is in use"),
            Self::NotMapped => f.write_str("nothing is mapped there"),
            Self::TooManyUsers => f.write_str("the frame has too many users"),
        }
    }
}

impl core::error::Error for KmapError {}

struct Pool<'a> {
    slots: &'a mut [KmapSlot],
    vacant: u16,
    idle: usize,
    flushing: bool,
}

/// What a look at the pool came to.
enum Turn {
    Found(usize),
    Fill(usize),
    Flush,
    Wait,
}

impl Pool<'_> {
    fn hash(&self, frame: Frame) -> usize {
        let mixed = frame.number().wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        mixed as usize % self.slots.len()
    }

    fn find(&self, frame: Frame) -> Option<usize> {
        let mut at = self.slots[self.hash(frame)].head;
        while at != NONE {
            let slot = &self.slots[usize::from(at)];
            if slot.frame == frame {
                return Some(usize::from(at));
            }
            at = slot.next;
        }
        None
    }

    /// One user more, a page to fill, or why not.
    fn take(&mut self, frame: Frame) -> Result<Turn, KmapError> {
        if let Some(index) = self.find(frame) {
            let slot = &mut self.slots[index];
            if slot.state != State::Mapped {
                return Ok(Turn::Wait);
            }
            if slot.users == 0 {
                self.idle -= 1;
            }
            slot.users = slot.users.checked_add(1).ok_or(KmapError::TooManyUsers)?;
            return Ok(Turn::Found(index));
        }
        if self.vacant != NONE {
            let index = usize::from(self.vacant);
            let bucket = self.hash(frame);
            self.vacant = self.slots[index].next;
            let head = self.slots[bucket].head;
            self.slots[bucket].head = index as u16;
            let slot = &mut self.slots[index];
            (slot.frame, slot.users, slot.state, slot.next) = (frame, 1, State::Filling, head);
            return Ok(Turn::Fill(index));
        }
        Ok(if self.idle > 0 && !self.flushing {
            Turn::Flush
        } else {
            Turn::Wait
        })
    }

    /// Takes a slot out of the chain of its hash.
    fn unhash(&mut self, index: usize) {
        let (bucket, next) = (self.hash(self.slots[index].frame), self.slots[index].next);
        let mut at = self.slots[bucket].head;
        if usize::from(at) == index {
            self.slots[bucket].head = next;
            return;
        }
        while at != NONE {
            let following = self.slots[usize::from(at)].next;
            if usize::from(following) == index {
                self.slots[usize::from(at)].next = next;
                return;
            }
            at = following;
        }
    }
}

/// A window of pages for frames that the linear map does not hold.
///
/// `W` is how the kernel's threads wait for a page.
pub struct Kmap<'a, F: Format, E: Env, L: RawLock, W: Wait> {
    table: &'a PageTable<F, E, KernelPage>,
    window: Window<F>,
    wait: W,
    pool: Lock<Pool<'a>, L>,
    /// Goes up whenever a waiter should look again.
    changes: AtomicU32,
}

impl<'a, F: Format, E: Env, L: RawLock, W: Wait> Kmap<'a, F, E, L, W> {
    /// A window of `pages`, with one slot for each.
    ///
    /// # Errors
    ///
    /// [`KmapError::BadWindow`], [`KmapError::Table`]; nothing changed.
    pub fn new(
        table: &'a PageTable<F, E, KernelPage>,
        pages: PageRange,
        slots: &'a mut [KmapSlot],
        wait: W,
    ) -> Result<Self, KmapError> {
        if pages.count() > KMAP_PAGES as u64 || pages.count() != slots.len() as u64 {
            return Err(KmapError::BadWindow);
        }
        let window = Window::new(table, pages).map_err(KmapError::Table)?;
        let last = slots.len() - 1;
        for (index, slot) in slots.iter_mut().enumerate() {
            *slot = KmapSlot::VACANT;
            slot.next = if index == last {
                NONE
            } else {
                index as u16 + 1
            };
        }
        Ok(Self {
            table,
            window,
            wait,
            pool: Lock::new(Pool {
                slots,
                vacant: 0,
                idle: 0,
                flushing: false,
            }),
            changes: AtomicU32::new(0),
        })
    }

    /// Maps `frame`, or counts one user more where it is mapped; waits for a page where all have users.
    ///
    /// # Errors
    ///
    /// [`KmapError::Unencodable`], [`KmapError::TooManyUsers`].
    #[doc(alias = "kmap_high")]
    pub fn map(&self, frame: Frame) -> Result<VirtAddr, KmapError> {
        loop {
            let seen = self.changes.load(Ordering::Acquire);
            match self.try_map(frame) {
                Err(KmapError::WouldWait) => self.wait_for_change(seen),
                done => return done,
            }
        }
    }

    /// As [`map`](Self::map), but never waits for a user to go. A flush of idle pages still waits for other CPUs.
    ///
    /// # Errors
    ///
    /// As [`map`](Self::map), and [`KmapError::WouldWait`].
    pub fn try_map(&self, frame: Frame) -> Result<VirtAddr, KmapError> {
        let attributes = Attributes::new(Rights::KERNEL_DATA.union(Rights::GLOBAL));
        if !F::can_encode(1, frame, &attributes) {
            return Err(KmapError::Unencodable);
        }
        loop {
            let turn = self.pool.lock().take(frame)?;
            match turn {
                Turn::Found(index) => return Ok(self.address(index)),
                Turn::Fill(index) => {
                    let page = Page::containing(self.address(index));
                    let word = F::leaf(1, frame, &attributes);
                    self.window.set(self.table.env().map(), page, word);
                    if F::CACHES_ABSENT {
                        self.flush_absent(page);
                    }
                    self.pool.lock().slots[index].state = State::Mapped;
                    self.changed();
                    return Ok(page.start());
                }
                // Where another call flushes meanwhile, the next look at the pool says what to do.
                Turn::Flush => {
                    self.flush_idle();
                }
                Turn::Wait => return Err(KmapError::WouldWait),
            }
        }
    }

    /// Ends one use of the mapping at `address`.
    ///
    /// # Errors
    ///
    /// [`KmapError::NotMapped`].
    #[doc(alias = "kunmap_high")]
    pub fn unmap(&self, address: VirtAddr) -> Result<(), KmapError> {
        let index = self
            .window
            .index(Page::containing(address))
            .ok_or(KmapError::NotMapped)? as usize;
        let mut pool = self.pool.lock();
        let slot = &mut pool.slots[index];
        if slot.state != State::Mapped || slot.users == 0 {
            return Err(KmapError::NotMapped);
        }
        slot.users -= 1;
        if slot.users == 0 {
            pool.idle += 1;
            drop(pool);
            self.changed();
        }
        Ok(())
    }

    /// Where `frame` is mapped now, and how many use it.
    #[doc(alias = "kmap_high_get")]
    #[must_use]
    pub fn lookup(&self, frame: Frame) -> Option<(VirtAddr, u32)> {
        let pool = self.pool.lock();
        let index = pool.find(frame)?;
        let slot = &pool.slots[index];
        (slot.state == State::Mapped && slot.users > 0).then(|| (self.address(index), slot.users))
    }

    /// Unmaps every page without users, with one shootdown.
    ///
    /// When it returns, every mapping whose last use ended before the call is gone on every CPU: it waits for a flush under way, which
    /// may have begun with some of them, and flushes the others.
    ///
    /// Context: waits for other CPUs; not in interrupts.
    #[doc(alias = "kmap_flush_unused")]
    pub fn flush(&self) {
        loop {
            let seen = self.changes.load(Ordering::Acquire);
            if self.flush_idle() {
                return;
            }
            self.wait_for_change(seen);
        }
    }

    /// Unmaps every page without users; `false`, and nothing is done, where somebody else is doing it.
    fn flush_idle(&self) -> bool {
        let mut marked = [0u64; KMAP_PAGES / 64];
        let mut pool = self.pool.lock();
        if pool.flushing {
            return false;
        }
        if pool.idle == 0 {
            return true;
        }
        pool.flushing = true;
        for index in 0..pool.slots.len() {
            let slot = pool.slots[index];
            if slot.state == State::Mapped && slot.users == 0 {
                pool.unhash(index);
                pool.slots[index].state = State::Flushing;
                marked[index / 64] |= 1 << (index % 64);
            }
        }
        pool.idle = 0;
        drop(pool);
        self.forbid(&marked);
        let mut pool = self.pool.lock();
        for index in 0..pool.slots.len() {
            if pool.slots[index].state == State::Flushing {
                let next = pool.vacant;
                let slot = &mut pool.slots[index];
                (slot.state, slot.next) = (State::Vacant, next);
                pool.vacant = index as u16;
            }
        }
        pool.flushing = false;
        drop(pool);
        self.changed();
        true
    }

    /// Takes every access from the marked pages, on every CPU (`K3`). The entries stay, so the table does.
    fn forbid(&self, marked: &[u64; KMAP_PAGES / 64]) {
        let pages = self.window.pages();
        let Ok(mut cursor) = self.table.cursor(pages) else {
            return;
        };
        let mut gather = self.table.gather::<1>();
        let changed = cursor.update(pages, &mut gather, |leaf| {
            let index = self.window.index(leaf.page)? as usize;
            (marked[index / 64] >> (index % 64) & 1 != 0)
                .then(|| leaf.attributes.rights(Rights::empty()))
        });
        debug_assert!(changed.is_ok(), "small leaves are never split");
        drop(cursor);
        gather.commit(|page| {
            let _ = page;
        });
    }

    /// Drops what CPUs remember of an entry that granted nothing, where the format's processors do.
    #[cold]
    fn flush_absent(&self, page: Page) {
        let Ok(mut cursor) = self.table.cursor(PageRange::single(page)) else {
            return;
        };
        let mut gather = self.table.gather::<1>();
        // Touching the rights of a leaf notes a flush where the format needs one for that.
        let _ = cursor.protect(PageRange::single(page), Rights::empty(), &mut gather);
        let rights = Rights::KERNEL_DATA.union(Rights::GLOBAL);
        let _ = cursor.protect(PageRange::single(page), rights, &mut gather);
        drop(cursor);
        gather.commit(|page| {
            let _ = page;
        });
    }

    fn address(&self, index: usize) -> VirtAddr {
        self.window
            .page(index as u64)
            .map_or(VirtAddr::ZERO, Page::start)
    }

    fn key(&self) -> usize {
        core::ptr::from_ref(&self.changes).addr()
    }

    /// Waits until something in the pool is not as it was when `changes` was `seen`.
    fn wait_for_change(&self, seen: u32) {
        self.wait
            .wait_until(self.key(), &|| self.changes.load(Ordering::Acquire) != seen);
    }

    fn changed(&self) {
        self.changes.fetch_add(1, Ordering::AcqRel);
        self.wait.wake(self.key());
    }
}

impl<F: Format, E: Env, L: RawLock, W: Wait> Drop for Kmap<'_, F, E, L, W> {
    /// Unmaps everything, flushed.
    fn drop(&mut self) {
        Window::clear(self.table, self.window.pages());
    }
}

impl<F: Format, E: Env, L: RawLock, W: Wait> fmt::Debug for Kmap<'_, F, E, L, W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pool = self.pool.lock();
        f.debug_struct("Kmap")
            .field("pages", &self.window.pages())
            .field("idle", &pool.idle)
            .finish_non_exhaustive()
    }
}
