//! Making tables: empty ones, and ones whose upper part is another's.
//!
//! ```text
//!   kernel's root   0 ............... 255 | 256 ................. 511      lend_from: every entry here gets a table that stays for ever
//!                                          │ copied, entry by entry
//!   space's root    0 ............... 255 | 256 ................. 511      sharing: borrowed (`P3`), so what the kernel maps later is seen too
//!                   its own
//! ```
//!
//! A table that is to stay though it is empty has a *hold*: one more in its live count (`N1` of `node.rs`).

use core::marker::PhantomData;

use kmem_hal::lock::Lock;
use kmem_hal::sync::{AtomicBool, AtomicUsize, Ordering};
use kmem_hal::{AllocError, Asid, Frame, FrameHandle, Order, OwnedFrame, Page, Trace, TraceEvent};

use super::PageTable;
use crate::cache::{self, Chain};
use crate::env::Env;
use crate::error::TableError;
use crate::format::{Format, Kind, is_sound, level};
use crate::mutants::mutant;
use crate::node::Node;

impl<F: Format, E: Env, H: FrameHandle> PageTable<F, E, H> {
    /// Makes an empty table with as many levels as the format has.
    ///
    /// Context: as everything that makes a table: where memory is short it may wait for a grace period, so not inside a read section of the
    /// environment's [`Grace`](kmem_hal::Grace).
    ///
    /// # Errors
    ///
    /// [`TableError::Memory`] where there is no frame for the root.
    #[doc(alias = "pgd_alloc")]
    pub fn new(env: E) -> Result<Self, TableError> {
        Self::with_levels(env, F::LEVELS.len())
    }

    /// Makes an empty table of `levels` levels: for formats whose number of levels is known at run time.
    ///
    /// # Errors
    ///
    /// [`TableError`].
    pub fn with_levels(env: E, levels: usize) -> Result<Self, TableError> {
        if !(F::MIN_LEVELS..=F::LEVELS.len()).contains(&levels) {
            return Err(TableError::BadLevels);
        }
        let root = Self::make_root(&env, levels).map_err(TableError::Memory)?;
        let table = Self::with_root(env, root, levels, level::<F>(levels).entries());
        if F::FIXED_TOP
            && let Err(error) = table.hold_top_from(0)
        {
            table.destroy(|_, _| {}, |_, _| {});
            return Err(error);
        }
        Ok(table)
    }

    /// A table of this root, whose top entries from `borrowed_from` on are another table's.
    pub(crate) fn with_root(env: E, root: Frame, levels: usize, borrowed_from: usize) -> Self {
        const {
            let word = core::mem::size_of::<F::Word>();
            assert!(
                is_sound(F::LEVELS, F::MIN_LEVELS, word),
                "the levels of this page-table format do not fit together"
            );
        }
        Self {
            root,
            env,
            levels,
            asid: Asid::ZERO,
            borrowed_from,
            lent_from: AtomicUsize::new(usize::MAX),
            unflushed: AtomicUsize::new(0),
            tables: AtomicUsize::new(1),
            exposed: AtomicBool::new(false),
            global: AtomicBool::new(false),
            huge: AtomicBool::new(false),
            isolated: false,
            spares: Lock::new(Chain::EMPTY),
            handles: PhantomData,
        }
    }

    /// Makes a table that shares the upper part of `kernel`, from page `from` to the top.
    ///
    /// What `kernel` maps there later is seen here as well. Pages from `from` on cannot be changed through the new
    /// table, whose own leaves may stand for another kind of handle. The lender must have called [`lend_from`](Self::lend_from) for that part.
    ///
    /// # Errors
    ///
    /// [`TableError`].
    ///
    /// # Examples
    ///
    /// ```
    /// # mod example { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/example.rs")); }
    /// # use example::*;
    /// use kmem_hal::{DeviceFrame, Page};
    /// use kmem_paging::{PageTable, Rights, format::{Format, X86_64}};
    ///
    /// // The upper half is the kernel's in every space.
    /// let kernel = table();
    /// let half = Page::containing(X86_64::canonical(4).upper_start().unwrap());
    /// kernel.lend_from(half)?;
    /// let space = PageTable::<X86_64, _, DeviceFrame>::sharing(*kernel.env(), &kernel, half)?;
    /// let range = kmem_hal::PageRange::single(half);
    /// kernel.cursor(range)?.map(half, frame(0x8000), Rights::KERNEL_DATA).map_err(|(error, _)| error)?;
    /// assert_eq!(space.query(half), kernel.query(half));
    /// assert!(space.cursor(range).is_err(), "it is changed through the kernel's table");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn sharing<G: Env, K: FrameHandle>(
        env: E,
        kernel: &PageTable<F, G, K>,
        from: Page,
    ) -> Result<Self, TableError> {
        let index = kernel.top_index(from);
        if !kernel.lends(index) {
            return Err(TableError::CannotShare);
        }
        Self::borrowing(env, kernel, index)
    }

    /// Makes an empty table with as many levels as `other`, which shares what `other` shares: a fork's child.
    ///
    /// # Errors
    ///
    /// [`TableError::Memory`] where there is no frame for the root.
    pub fn empty_like(env: E, other: &Self) -> Result<Self, TableError> {
        if other.isolated {
            Self::paired(
                env,
                &other.root_node(),
                &other.user_node(),
                other.borrowed_from,
            )
        } else if other.borrowed_from < level::<F>(other.levels).entries()
            && !mutant!("empty-like-borrows-nothing")
        {
            // What was borrowed stays as it is for ever (P3), so it can be passed on.
            Self::borrowing(env, other, other.borrowed_from)
        } else {
            Self::with_levels(env, other.levels)
        }
    }

    /// Makes a table whose top entries from `index` on are `lender`'s, which never change.
    fn borrowing<G: Env, K: FrameHandle>(
        env: E,
        lender: &PageTable<F, G, K>,
        index: usize,
    ) -> Result<Self, TableError> {
        let root = Self::make_root(&env, lender.levels).map_err(TableError::Memory)?;
        let table = Self::with_root(env, root, lender.levels, index);
        {
            let own = table.root_node();
            let levels = lender.levels;
            let lender = lender.root_node();
            for index in index..level::<F>(levels).entries() {
                if mutant!("sharing-forgets-the-top") && index % 256 == 0 {
                    continue;
                }
                own.store(index, lender.load(index));
            }
        }
        if F::FIXED_TOP
            && let Err(error) = table.hold_top_from(0)
        {
            table.destroy(|_, _| {}, |_, _| {});
            return Err(error);
        }
        Ok(table)
    }

    /// Fills every top entry from the one of page `from` to the last with a table that stays for ever, so that other
    /// tables can share them.
    ///
    /// A boot-time call for the kernel's table: the upper half of x86-64 takes 256 tables, the upper gigabyte of two-level x86 as many. A table that
    /// was lent from cannot be destroyed. Where top entries can be leaves, what was lent has none any more: a block of that size finds the page
    /// [`Occupied`](crate::MapError::Occupied), and takes smaller leaves ([`map_divided`](crate::Cursor::map_divided)).
    ///
    /// # Errors
    ///
    /// [`TableError::Memory`], and [`TableError::CannotShare`] where a leaf or a payload comes to a top entry meanwhile: the tables made so far
    /// stay. [`TableError::CannotShare`] where a top entry is a leaf or a payload, or belongs to another table.
    pub fn lend_from(&self, from: Page) -> Result<(), TableError> {
        let index = self.top_index(from);
        if self.borrowed_from < level::<F>(self.levels).entries() {
            return Err(TableError::CannotShare);
        }
        let root = self.root_node();
        let is_taken = |index| {
            let word = root.load(index);
            word != 0 && root.kind(word) != Kind::Table
        };
        if (index..level::<F>(self.levels).entries()).any(is_taken) {
            return Err(TableError::CannotShare);
        }
        if !F::FIXED_TOP {
            self.hold_top_from(index)?;
        }
        if mutant!("lent-from-is-raised") {
            self.lent_from.store(index, Ordering::Release);
        }
        self.lent_from.fetch_min(index, Ordering::AcqRel);
        Ok(())
    }

    /// Makes a table below every own top entry from `first` on, with a hold that keeps it attached.
    fn hold_top_from(&self, first: usize) -> Result<(), TableError> {
        let entries = level::<F>(self.levels).entries().min(self.borrowed_from);
        for index in first..entries {
            let (frame, _) = cache::take_waiting(&self.env, F::TABLE_FRAME_LIMIT)
                .map_err(TableError::Memory)?
                .into_raw();
            let page = Page::from_number((index as u64) << level::<F>(self.levels).shift);
            // SAFETY: the frame is private, zero, in reach and has a slot (T1).
            unsafe { Node::<F>::new(&self.env, frame, self.levels - 1) }.claim(page, self.root);
            let root = self.root_node();
            root.lock(&self.env);
            let word = root.load(index);
            let mut outcome = Ok(());
            let held = if root.kind(word) == Kind::Table {
                // SAFETY: an entry of the locked root points to an attached table.
                let node =
                    unsafe { Node::<F>::new(&self.env, F::table_frame(word), self.levels - 1) };
                node.lock(&self.env);
                node.add_live(1);
                node.unlock();
                false
            } else if word != 0 {
                // Somebody mapped a leaf meanwhile.
                outcome = Err(TableError::CannotShare);
                false
            } else {
                // SAFETY: the table was made above and is private.
                unsafe { Node::<F>::new(&self.env, frame, self.levels - 1) }.add_live(1);
                root.store(index, F::table(self.levels, frame));
                root.add_live(1);
                true
            };
            root.unlock();
            if held {
                self.tables.fetch_add(1, Ordering::Relaxed);
                self.env
                    .trace()
                    .event(TraceEvent::TableMade(frame, self.levels as u8 - 1));
            } else {
                // SAFETY: O1 to O3: made above, private, never attached.
                cache::give(&self.env, unsafe {
                    OwnedFrame::from_raw(frame, Order::ZERO)
                });
            }
            outcome?;
        }
        Ok(())
    }

    /// Makes a private, empty root table.
    fn make_root(env: &E, levels: usize) -> Result<Frame, AllocError> {
        let (frame, _) = cache::take_waiting(env, F::ROOT_FRAME_LIMIT)?.into_raw();
        // SAFETY: the frame is private, zero, in reach and has a slot (T1).
        unsafe { Node::<F>::new(env, frame, levels) }.claim(Page::ZERO, frame);
        Ok(frame)
    }
}
