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
use core::ops::Range;

use kmem_hal::lock::Lock;
use kmem_hal::sync::{AtomicBool, AtomicUsize, Ordering};
use kmem_hal::{AllocError, Asid, Frame, FrameHandle, Order, OwnedFrame, Page};

use super::PageTable;
use crate::cache::{self, Chain};
use crate::cursor::child;
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
        if F::FIXED_TOP {
            table.fix_top()
        } else {
            Ok(table)
        }
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
        if F::FIXED_TOP {
            table.fix_top()
        } else {
            Ok(table)
        }
    }

    /// Fills every top entry from the one of page `from` to the last with a table that stays for ever, so that other
    /// tables can share them. What was lent before stays lent, and costs nothing.
    ///
    /// A boot-time call for the kernel's table: the upper half of x86-64 takes 256 tables, the upper gigabyte of two-level x86 as many. A table that
    /// was lent from cannot be destroyed. Where top entries can be leaves, what was lent has none any more: a block of that size finds the page
    /// [`Occupied`](crate::MapError::Occupied), and takes smaller leaves ([`map_divided`](crate::Cursor::map_divided)).
    ///
    /// Context: task context, interrupts on; waits for tables' locks, and where memory is short for a grace period. So not inside a read section of
    /// the environment's [`Grace`](kmem_hal::Grace), nor with a cursor of this table that holds a table.
    ///
    /// # Errors
    ///
    /// [`TableError::Memory`], and [`TableError::CannotShare`] where a leaf or a payload comes to a top entry meanwhile: nothing is lent, and the
    /// tables made so far stay, empty. [`TableError::CannotShare`] where a top entry is a leaf or a payload, or leads to a table that other spaces
    /// share or have shared ([`unshare`](crate::Cursor::unshare) it first), where the top belongs to another table, and where there is one level alone.
    pub fn lend_from(&self, from: Page) -> Result<(), TableError> {
        let index = self.top_index(from);
        let entries = level::<F>(self.levels).entries();
        if self.levels == 1 || self.borrowed_from < entries {
            return Err(TableError::CannotShare);
        }
        // What was lent before has its holds.
        let lent = self.lent_from().min(entries);
        let root = self.root_node();
        let is_taken = |index| {
            let word = root.load(index);
            // A copy takes the place of a table that spaces share.
            let stays = |word| !F::is_shared_table(self.levels, word);
            word != 0 && !(F::is_table(self.levels, word) && stays(word))
        };
        if (index..lent).any(is_taken) {
            return Err(TableError::CannotShare);
        }
        if !F::FIXED_TOP {
            self.hold_top(index..lent)?;
        }
        if mutant!("lent-from-is-raised") {
            self.lent_from.store(index, Ordering::Release);
        }
        self.lent_from.fetch_min(index, Ordering::AcqRel);
        Ok(())
    }

    /// Makes a table below every own top entry of a new table, which keeps them to its end.
    fn fix_top(self) -> Result<Self, TableError> {
        let own = level::<F>(self.levels).entries().min(self.borrowed_from);
        match self.hold_top(0..own) {
            Ok(()) => Ok(self),
            Err(error) => {
                self.destroy(|_, _| {}, |_, _| {});
                Err(error)
            }
        }
    }

    /// Makes sure of a table below each of these own top entries, with a hold more that keeps it attached. Where one fails, none is held.
    fn hold_top(&self, indices: Range<usize>) -> Result<(), TableError> {
        for index in indices.clone() {
            if let Err(error) = self.hold(index) {
                let root = self.root_node();
                for held in indices.start..index {
                    root.lock(&self.env);
                    let table = child(&self.env, &root, held);
                    table.lock(&self.env);
                    table.sub_live(1);
                    table.unlock();
                    root.unlock();
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Adds a hold to the table below a top entry, which is made where there is none.
    fn hold(&self, index: usize) -> Result<(), TableError> {
        let root = self.root_node();
        let mut made = None;
        let outcome = loop {
            root.lock(&self.env);
            match root.kind(root.load(index)) {
                Kind::Table => {
                    let table = child(&self.env, &root, index);
                    table.lock(&self.env);
                    table.add_live(1);
                    table.unlock();
                    break Ok(());
                }
                Kind::Empty => {}
                // Somebody mapped a leaf meanwhile.
                Kind::Leaf | Kind::Payload => break Err(TableError::CannotShare),
            }
            if let Some((table, page)) = made.take() {
                self.attach_held(&root, index, &table, page);
                break Ok(());
            }
            root.unlock();
            made = Some(self.make_held(index)?);
        };
        root.unlock();
        if let Some((table, _)) = made {
            // Somebody else's came first.
            // SAFETY: O1 to O3: made above, private, never attached.
            cache::give(&self.env, unsafe {
                OwnedFrame::from_raw(table.frame, Order::ZERO)
            });
        }
        outcome
    }

    /// Makes a private, empty table with a hold for a top entry; gives the first page that it covers as well.
    fn make_held(&self, index: usize) -> Result<(Node<'_, F>, Page), TableError> {
        let (frame, _) = cache::take_waiting(&self.env, F::TABLE_FRAME_LIMIT)
            .map_err(TableError::Memory)?
            .into_raw();
        let first = Page::from_number((index as u64) << level::<F>(self.levels).shift);
        let page = Page::containing(F::canonical(self.levels).sign_extend(first.start()));
        // SAFETY: the frame is private, zero, in reach and has a slot (T1).
        let table = unsafe { Node::<F>::new(&self.env, frame, self.levels - 1) };
        table.claim(page, self.root);
        table.add_live(1);
        Ok((table, page))
    }

    /// Puts a table into an empty entry of the locked root, and tells of it as every table that is made (the cursor's `attach.rs`).
    fn attach_held(&self, root: &Node<'_, F>, index: usize, table: &Node<'_, F>, page: Page) {
        if F::CACHES_ABSENT {
            self.announce();
        }
        self.count_table(table.frame, table.level);
        root.add_live(1);
        root.store(index, F::table(self.levels, table.frame));
        if F::CACHES_ABSENT {
            self.tell_made(page);
            self.retract();
        }
    }

    /// Makes a private, empty root table.
    fn make_root(env: &E, levels: usize) -> Result<Frame, AllocError> {
        let (frame, _) = cache::take_waiting(env, F::ROOT_FRAME_LIMIT)?.into_raw();
        // SAFETY: the frame is private, zero, in reach and has a slot (T1).
        unsafe { Node::<F>::new(env, frame, levels) }.claim(Page::ZERO, frame);
        Ok(frame)
    }
}
