//! What one CPU has cached of the page tables: TLBs by page size and paging-structure caches. Nothing leaves them by itself.
//!
//! ```text
//!            4 KiB       2 or 4 MiB      1 GiB                    walk cache
//!   key   (page, tag)   (page, tag)   (page, tag)          (level, prefix, tag)
//!   value   frame, rights, G, D, key                         next table, rights so far
//!           + root, fill step, fill event, tables walked     + the same
//! ```
//!
//! A tag is a PCID, or [`GLOBAL`] for a global page, whose entry serves every PCID.
//!
//! Invariants (SDM 3A 4.10.2 to 4.10.4)
//! - `I1` an entry is only made from a walk that was complete and whose entries had A = 1.
//! - `I2` an entry leaves by a flush that *must* drop it, by replacement when its array is full, or by the adversary. A flush drops
//!   exactly what the manual says it must; what it merely may drop stays.
//! - `I3` each entry remembers when it was filled and through which root and tables: that is the evidence.
//!
//! The arrays are larger than any real processor's, so that a missing flush finds its victim.

use crate::slots::Slots;
use crate::walker::{MAX_LEVELS, Position, Rights, Translation};

/// The tag of global entries: no PCID has this number (they have 12 bits).
pub(crate) const GLOBAL: u16 = 0xffff;

const CAPACITIES: [usize; 3] = [65_536, 8192, 1024];
const WALK_CAPACITY: usize = 8192;
const ABSENT_CAPACITY: usize = 8192;

/// When, and through what, a cached entry was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Origin {
    /// The root table of the walk.
    pub root: u64,
    /// The machine's step of the oldest thing the entry rests on (of a cached table it went through, if any).
    pub step: u64,
    /// Number of the frame-event counter at the same moment.
    pub event: u64,
    /// Number of the frame-event counter when the last entry of the walk was read from memory.
    pub read: u64,
    /// Frame numbers of the tables walked.
    pub tables: [u64; MAX_LEVELS],
    /// Number of the frame-event counter when the pointer to each of them was read.
    pub reached: [u64; MAX_LEVELS],
    /// How many of them.
    pub table_count: u8,
}

impl Origin {
    /// A walk from this root that begins now.
    pub(crate) fn new(root: u64, step: u64, event: u64) -> Self {
        Self {
            root,
            step,
            event,
            read: event,
            tables: [0; MAX_LEVELS],
            reached: [0; MAX_LEVELS],
            table_count: 0,
        }
    }

    pub(crate) fn tables(&self) -> &[u64] {
        &self.tables[..usize::from(self.table_count)]
    }

    /// The tables walked, each with the moment at which the pointer to it was read.
    pub(crate) fn reached(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let tables = self.tables().iter();
        tables.zip(&self.reached).map(|(&table, &at)| (table, at))
    }

    /// Adds a table that the walk read.
    pub(crate) fn pass(&mut self, table: u64, reached: u64) {
        let at = usize::from(self.table_count);
        (self.tables[at], self.reached[at]) = (table, reached);
        self.table_count += 1;
    }
}

/// A cached translation.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TlbEntry {
    /// Linear address of the first byte it covers.
    pub linear: u64,
    /// What it says. `shift` is what this entry covers, less than the page's if it is a fracture.
    pub translation: Translation,
    /// log2 of the page in the tables.
    pub whole_shift: u32,
    pub tag: u16,
    pub origin: Origin,
}

impl TlbEntry {
    /// Whether the page it was made from contains `linear`.
    fn of_page(&self, linear: u64) -> bool {
        linear >> self.whole_shift == self.linear >> self.whole_shift
    }
}

/// A cached paging-structure entry: where a walk may start.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WalkEntry {
    /// Linear address of the first byte below it.
    pub linear: u64,
    /// log2 of the bytes below it.
    pub shift: u32,
    /// The table it leads to.
    pub position: Position,
    pub tag: u16,
    pub origin: Origin,
}

/// Where an entry sits, for the adversary's choice among several that fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hit {
    array: usize,
    page: u64,
    tag: u16,
}

/// The caches of one CPU.
#[derive(Debug)]
pub(crate) struct Caches {
    pages: [Slots<(u64, u16), TlbEntry>; 3],
    /// Page size of each array, set by its first entry.
    shifts: [u32; 3],
    walks: Slots<(u8, u64, u16), WalkEntry>,
    /// log2 of the bytes below a cached walk entry, by the index of the level it leads to; 64 while there is none.
    walk_shifts: [u32; MAX_LEVELS],
    /// Entries that were not present: (log2 of the bytes below, prefix, tag). Empty on x86.
    absent: Slots<(u8, u64, u16), ()>,
    /// Set by the first fractured entry: flushes of a page must then look at all of them.
    fractured: bool,
}

impl Caches {
    pub(crate) fn new() -> Self {
        Self {
            pages: CAPACITIES.map(Slots::new),
            shifts: [12, 21, 30],
            walks: Slots::new(WALK_CAPACITY),
            walk_shifts: [64; MAX_LEVELS],
            absent: Slots::new(ABSENT_CAPACITY),
            fractured: false,
        }
    }

    /// Entries that would translate `linear` under `tag`, smallest pages first, at most six.
    #[inline]
    pub(crate) fn hits(&self, linear: u64, tag: u16) -> ([Option<Hit>; 6], usize) {
        let mut found = [None; 6];
        let mut count = 0;
        for (array, slots) in self.pages.iter().enumerate() {
            if slots.len() == 0 {
                continue;
            }
            let page = linear >> self.shifts[array];
            for tag in [tag, GLOBAL] {
                if slots.get(&(page, tag)).is_some() {
                    found[count] = Some(Hit { array, page, tag });
                    count += 1;
                }
            }
        }
        (found, count)
    }

    #[inline]
    pub(crate) fn entry(&self, hit: Hit) -> &TlbEntry {
        self.pages[hit.array]
            .get(&(hit.page, hit.tag))
            .expect("a hit is used before the arrays change")
    }

    pub(crate) fn drop_hit(&mut self, hit: Hit) {
        self.pages[hit.array].remove(&(hit.page, hit.tag));
    }

    pub(crate) fn fill(&mut self, entry: TlbEntry) {
        let shift = entry.translation.shift;
        let array = match shift {
            12 => 0,
            30 => 2,
            _ => 1,
        };
        if self.shifts[array] != shift {
            // 4 MiB after 2 MiB: the mode changed, and CR4.PAE cannot change without a flush.
            self.pages[array].clear();
            self.shifts[array] = shift;
        }
        self.fractured |= entry.whole_shift != shift;
        self.pages[array].insert((entry.linear >> shift, entry.tag), entry);
    }

    pub(crate) fn fill_walk(&mut self, entry: WalkEntry) {
        if self.walk_shifts[entry.position.index] != entry.shift {
            // The mode changed: entries of the old one lead nowhere in the new one.
            self.walks.clear();
            self.walk_shifts[entry.position.index] = entry.shift;
        }
        let key = (
            entry.position.index as u8,
            entry.linear >> entry.shift,
            entry.tag,
        );
        self.walks.insert(key, entry);
    }

    /// Remembers that the entry of `linear` at a level of `shift` was not present.
    pub(crate) fn fill_absent(&mut self, linear: u64, shift: u32, tag: u16) {
        self.absent.insert((shift as u8, linear >> shift, tag), ());
    }

    /// Whether an entry on the way to `linear` is remembered as not present.
    pub(crate) fn holds_absent(&self, linear: u64, tag: u16) -> bool {
        self.absent.len() > 0
            && (12..=48u8).any(|shift| self.absent.get(&(shift, linear >> shift, tag)).is_some())
    }

    /// Forgets absent entries on the way to `linear`, and those of upper levels whatever the address.
    fn drop_absent(&mut self, linear: u64, tag: u16) {
        if self.absent.len() > 0 {
            self.absent.retain(|&(shift, prefix, of), _| {
                of != tag || (shift == 12 && prefix != linear >> 12)
            });
        }
    }

    /// The deepest cached position on the way to `linear`.
    #[inline]
    pub(crate) fn deepest(&self, linear: u64, tag: u16) -> Option<&WalkEntry> {
        if self.walks.len() == 0 {
            return None;
        }
        let levels = self
            .walk_shifts
            .iter()
            .enumerate()
            .rev()
            .filter(|(_, shift)| **shift < 64);
        levels
            .map(|(index, shift)| (index as u8, linear >> shift, tag))
            .find_map(|key| self.walks.get(&key))
    }

    /// INVLPG: the page under this tag and its global entries, and every walk-cache entry of the tag.
    pub(crate) fn invlpg(&mut self, linear: u64, tag: u16) {
        self.drop_page(linear, tag);
        self.drop_page(linear, GLOBAL);
        self.drop_absent(linear, tag);
        self.walks.retain(|_, entry| entry.tag != tag);
    }

    /// A page fault: as INVPCID type 0, and global entries too, since the manual promises that the fault does not come again
    /// from the same stale entry.
    pub(crate) fn page_fault(&mut self, linear: u64, tag: u16) {
        self.drop_address(linear, tag);
        self.drop_page(linear, GLOBAL);
    }

    /// INVPCID type 0: the page under this tag, global entries kept, and the walk-cache entries that would be used for it.
    pub(crate) fn invalidate_address(&mut self, linear: u64, tag: u16) {
        self.drop_absent(linear, tag);
        self.drop_address(linear, tag);
    }

    fn drop_address(&mut self, linear: u64, tag: u16) {
        self.drop_page(linear, tag);
        for (index, shift) in self
            .walk_shifts
            .iter()
            .enumerate()
            .filter(|(_, shift)| **shift < 64)
        {
            self.walks.remove(&(index as u8, linear >> shift, tag));
        }
    }

    fn drop_page(&mut self, linear: u64, tag: u16) {
        for (array, slots) in self.pages.iter_mut().enumerate() {
            slots.remove(&(linear >> self.shifts[array], tag));
        }
        if self.fractured {
            for slots in &mut self.pages {
                slots.retain(|_, entry| entry.tag != tag || !entry.of_page(linear));
            }
        }
    }

    /// Everything of one PCID, global entries kept.
    pub(crate) fn invalidate_tag(&mut self, tag: u16) {
        for slots in &mut self.pages {
            slots.retain(|_, entry| entry.tag != tag);
        }
        self.walks.retain(|_, entry| entry.tag != tag);
        self.absent.retain(|&(_, _, of), _| of != tag);
    }

    /// Everything of every PCID, global entries kept.
    pub(crate) fn invalidate_not_global(&mut self) {
        for slots in &mut self.pages {
            slots.retain(|_, entry| entry.tag == GLOBAL);
        }
        self.walks.clear();
        self.absent.clear();
    }

    /// Everything.
    pub(crate) fn invalidate_all(&mut self) {
        for slots in &mut self.pages {
            slots.clear();
        }
        self.walks.clear();
        self.absent.clear();
        self.fractured = false;
    }

    /// Drops the `number`-th entry of all, counted across the arrays; returns whether there is one.
    pub(crate) fn evict(&mut self, mut number: u64) -> bool {
        for slots in &mut self.pages {
            let len = slots.len() as u64;
            if number < len {
                slots.remove_at(number as usize);
                return true;
            }
            number -= len;
        }
        let found = number < self.walks.len() as u64;
        self.walks.remove_at(number as usize);
        found
    }

    pub(crate) fn len(&self) -> u64 {
        self.pages
            .iter()
            .map(|slots| slots.len() as u64)
            .sum::<u64>()
            + self.walks.len() as u64
    }

    pub(crate) fn entries(&self) -> impl Iterator<Item = &TlbEntry> {
        self.pages
            .iter()
            .flat_map(Slots::iter)
            .map(|(_, entry)| entry)
    }

    pub(crate) fn walk_entries(&self) -> impl Iterator<Item = &WalkEntry> {
        self.walks.iter().map(|(_, entry)| entry)
    }
}

/// What a cached entry allows, in words.
pub(crate) fn rights_text(rights: Rights) -> String {
    let letter = |on, letter| if on { letter } else { '-' };
    format!(
        "r{}{}{}",
        letter(rights.writable, 'w'),
        letter(rights.executable, 'x'),
        letter(rights.user, 'u')
    )
}
