//! The way from the root to a page: every entry on it, for people who ask why an access faulted.
//!
//! A look, without a lock: like [`PageTable::query`] it is safe against concurrent changes and may be old when it is read.
//!
//! ```text
//!   level 4, table 0x3f, entry 0    0x0000000000040027  table   (1 share)
//!   level 3, table 0x40, entry 1    0x0000000000041027  table
//!   level 2, table 0x41, entry 511  0x0000000000000000  empty
//! ```

use kmem_hal::{Frame, FrameHandle, Grace, Page};

use crate::env::Env;
use crate::format::{Format, Kind};
use crate::node::Node;
use crate::table::{Entry, MAX_LEVELS, PageTable, decode, index_at, seen_from};

/// One entry on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The level of its table; leaves of single pages have 1.
    pub level: usize,
    /// The table.
    pub table: Frame,
    /// Upper entries that point to that table, in all spaces; 1 for a root.
    pub shares: u32,
    /// Which entry of the table.
    pub index: usize,
    /// The word in memory.
    pub word: u64,
    /// What it is.
    pub kind: Kind,
}

/// The entries on the way to a page, from the root down to the first that is no table.
#[derive(Clone, Copy, Debug)]
pub struct Path {
    steps: [Option<Step>; MAX_LEVELS],
    found: Entry,
}

impl Path {
    /// The entries, from the root on.
    pub fn steps(&self) -> impl Iterator<Item = Step> + '_ {
        self.steps.iter().copied().flatten()
    }

    /// What stands at its end, as [`PageTable::query`] says it.
    #[must_use]
    pub const fn found(&self) -> Entry {
        self.found
    }

    /// How many spaces see what is at its end through these tables: the shares of its tables, multiplied.
    ///
    /// A mapping in a shared leaf table is counted once in its frame, whoever shares the table.
    #[must_use]
    pub fn sharers(&self) -> u64 {
        self.steps()
            .map(|step| u64::from(step.shares.max(1)))
            .fold(1, u64::saturating_mul)
    }
}

impl<F: Format, E: Env, H: FrameHandle> PageTable<F, E, H> {
    /// Every entry on the way to `page`, without a lock.
    ///
    /// Context: any, interrupts included.
    ///
    /// # Examples
    ///
    /// ```
    /// # mod example { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/example.rs")); }
    /// # use example::*;
    /// let table = mapped(pages(0x400, 1));
    /// let path = table.path(page(0x400));
    /// let levels: Vec<_> = path.steps().map(|step| step.level).collect();
    /// assert_eq!(levels, [4, 3, 2, 1]);
    /// assert_eq!(path.found(), table.query(page(0x400)));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn path(&self, page: Page) -> Path {
        let levels = self.levels();
        let mut path = Path {
            steps: [None; MAX_LEVELS],
            found: Entry::Empty,
        };
        if !F::canonical(levels).contains(page.start()) {
            return path;
        }
        // SAFETY: the closure makes no guard and does not panic: an index is below the entries of its table, and there
        // are at most `MAX_LEVELS` levels.
        unsafe {
            self.env().grace().read_with(|| {
                let mut frame = self.root_frame();
                let mut shared = false;
                for (place, level) in path.steps.iter_mut().zip((1..=levels).rev()) {
                    // The root is attached (P1), and a table that an entry pointed to during this read section stays a
                    // table until the section ends. Tables are in reach.
                    let node = Node::<F>::new(self.env(), frame, level);
                    let index = index_at::<F>(page.number(), level);
                    let word = node.load(index);
                    let kind = F::kind(level, word);
                    *place = Some(Step {
                        level,
                        table: frame,
                        shares: if level == levels { 1 } else { node.shares() },
                        index,
                        word,
                        kind,
                    });
                    if kind != Kind::Table {
                        path.found = seen_from(decode::<F>(page, level, word), shared);
                        break;
                    }
                    shared |= F::is_shared_table(level, word);
                    frame = F::table_frame(word);
                }
            });
        }
        path
    }
}
