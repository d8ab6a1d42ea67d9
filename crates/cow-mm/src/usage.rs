//! What of a mapping is in memory, and whose: the numbers behind `smaps`.
//!
//! A page counts in full for `Rss` and by its share for `Pss`: a page that three spaces see is a third of a page for each. Who sees
//! a page is the number of its mappings, times the spaces that share the tables which lead to it. The zero page counts as
//! nothing, as in Linux, and so does device memory.
//!
//! Source: proc_pid_smaps(5); Linux `fs/proc/task_mmu.c` (`smaps_account`, `mem_size_stats`).

use kmem_hal::{FrameTag, PAGE_SIZE, SlotFlags};
use kmem_paging::{Entry, Leaf};

use crate::absent::Absent;
use crate::env::Env;
use crate::flags::VmFlags;
use crate::reclaim::LAZY_FREE;
use crate::space::AddressSpace;
use crate::vma::Vma;

/// Fractions of a byte that shares are counted in: `1 << 12` to a byte.
const SHARE_BITS: u32 = 12;

/// What of some mappings is in memory, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resident {
    /// Present.
    pub rss: u64,
    /// Present and shared with nobody.
    pub private: Pages,
    /// Present and seen by others as well.
    pub shared: Pages,
    /// Present and accessed.
    pub referenced: u64,
    /// Present and anonymous.
    pub anonymous: u64,
    /// Anonymous, given up by `MADV_FREE`, and not written since.
    pub lazy_free: u64,
    /// Written out to swap.
    pub swap: u64,
    pss: u64,
    pss_dirty: u64,
    pss_anon: u64,
    pss_file: u64,
    pss_shmem: u64,
    pss_locked: u64,
    swap_pss: u64,
}

/// Bytes of pages, by whether they were changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pages {
    /// As they came from their file, or zero.
    pub clean: u64,
    /// Changed.
    pub dirty: u64,
}

impl Resident {
    /// The share of all pages, in bytes (`Pss`).
    #[must_use]
    pub const fn pss(&self) -> u64 {
        self.pss >> SHARE_BITS
    }

    /// The share of changed pages.
    #[must_use]
    pub const fn pss_dirty(&self) -> u64 {
        self.pss_dirty >> SHARE_BITS
    }

    /// The share of anonymous pages.
    #[must_use]
    pub const fn pss_anon(&self) -> u64 {
        self.pss_anon >> SHARE_BITS
    }

    /// The share of files' pages.
    #[must_use]
    pub const fn pss_file(&self) -> u64 {
        self.pss_file >> SHARE_BITS
    }

    /// The share of shared memory.
    #[must_use]
    pub const fn pss_shmem(&self) -> u64 {
        self.pss_shmem >> SHARE_BITS
    }

    /// The share of locked mappings' pages (`Locked`).
    #[must_use]
    pub const fn locked(&self) -> u64 {
        self.pss_locked >> SHARE_BITS
    }

    /// The share of what is in swap.
    #[must_use]
    pub const fn swap_pss(&self) -> u64 {
        self.swap_pss >> SHARE_BITS
    }

    fn add(&mut self, other: &Self) {
        for (sum, more) in [
            (&mut self.rss, other.rss),
            (&mut self.private.clean, other.private.clean),
            (&mut self.private.dirty, other.private.dirty),
            (&mut self.shared.clean, other.shared.clean),
            (&mut self.shared.dirty, other.shared.dirty),
            (&mut self.referenced, other.referenced),
            (&mut self.anonymous, other.anonymous),
            (&mut self.lazy_free, other.lazy_free),
            (&mut self.swap, other.swap),
            (&mut self.pss, other.pss),
            (&mut self.pss_dirty, other.pss_dirty),
            (&mut self.pss_anon, other.pss_anon),
            (&mut self.pss_file, other.pss_file),
            (&mut self.pss_shmem, other.pss_shmem),
            (&mut self.pss_locked, other.pss_locked),
            (&mut self.swap_pss, other.swap_pss),
        ] {
            *sum += more;
        }
    }
}

impl<E: Env> AddressSpace<'_, E> {
    /// What of a mapping is in memory: looks at every page of it.
    ///
    /// Of a copy of a mapping that is gone, what is in its range now.
    #[doc(alias = "smap_gather_stats")]
    #[must_use]
    pub fn resident(&self, vma: &Vma) -> Resident {
        let mut resident = Resident::default();
        // The mapping may be gone, and its object with it.
        let info = vma.file.and_then(|file| self.mm().object_info(file).ok());
        let shared_memory = info.is_some_and(|info| info.is_shared_memory);
        self.for_each_leaf(vma.range, |leaf| {
            self.account(&mut resident, leaf, shared_memory);
        });
        self.account_swap(&mut resident, vma);
        if vma.flags.contains(VmFlags::LOCKED) {
            resident.pss_locked = resident.pss;
        }
        resident
    }

    /// [`resident`](Self::resident) of all mappings together.
    #[must_use]
    pub fn resident_in_all(&self) -> Resident {
        let mut sum = Resident::default();
        self.for_each_vma(|vma| {
            sum.add(&self.resident(vma));
            true
        });
        sum
    }

    fn account_swap(&self, resident: &mut Resident, vma: &Vma) {
        let Some(range) = vma.range.intersection(self.all_pages()) else {
            return;
        };
        let mut next = Some(range.first());
        while let Some((page, payload)) = next.and_then(|from| self.next_payload(from, range)) {
            if let Some(Absent::Swapped(entry)) = Absent::of(payload) {
                let entries = self.mm().swap().slot(entry).count.max(1);
                let viewers = entries.saturating_mul(self.tables().path(page).sharers());
                resident.swap += PAGE_SIZE;
                resident.swap_pss += (PAGE_SIZE << SHARE_BITS) / viewers;
            }
            next = page.checked_add(1).filter(|next| range.contains(*next));
        }
    }

    /// How many mappings of how many spaces see the page of a leaf, at least 1.
    pub(crate) fn viewers(&self, leaf: &Leaf) -> u64 {
        let path = self.tables().path(leaf.page);
        let mappings = match path.found() {
            Entry::Leaf(_) => self
                .mm()
                .counted(leaf.frame)
                .map_or(1, |page| u64::from(page.mappings())),
            _ => 1,
        };
        mappings.max(1).saturating_mul(path.sharers())
    }

    fn account(&self, resident: &mut Resident, leaf: &Leaf, shared_memory: bool) {
        let mm = self.mm();
        if leaf.frame == mm.zero_page() {
            return;
        }
        // Device memory is nobody's.
        let Some(page) = mm.counted(leaf.frame) else {
            return;
        };
        let slot = page.slot();
        let anonymous = slot.tag() == FrameTag::Anon;
        let dirty = leaf.attributes.dirty || slot.flags().contains(SlotFlags::DIRTY);
        let viewers = self.viewers(leaf);
        let share = (PAGE_SIZE << SHARE_BITS) / viewers;
        resident.rss += PAGE_SIZE;
        resident.pss += share;
        let pages = match viewers {
            1 => &mut resident.private,
            _ => &mut resident.shared,
        };
        if dirty {
            pages.dirty += PAGE_SIZE;
            resident.pss_dirty += share;
        } else {
            pages.clean += PAGE_SIZE;
        }
        if leaf.attributes.accessed {
            resident.referenced += PAGE_SIZE;
        }
        if anonymous && !dirty && slot.flags().contains(LAZY_FREE) {
            resident.lazy_free += PAGE_SIZE;
        }
        match (anonymous, shared_memory) {
            (true, _) => {
                resident.anonymous += PAGE_SIZE;
                resident.pss_anon += share;
            }
            (false, true) => resident.pss_shmem += share,
            (false, false) => resident.pss_file += share,
        }
    }
}
