//! One address space: `mm_struct`.
//!
//! ```text
//!   AddressSpace ── lock ── State { vmas, brk, limits }          what the program was promised
//!        └──────── tables ── leaves ── frames                    what is there
//! ```
//!
//! Calls change the VMAs under the space's lock, with all memory for the change in hand, and then the tables. Faults
//! bring in pages one by one. A page-table entry never grants more than its VMA does.
//!
//! Invariants
//! - `I1`: every leaf of the tables lies in a VMA, and its rights are at most the VMA's.
//! - `I2`: a leaf that may be written in a private VMA, all levels of its path considered, maps an anonymous page that is this space's
//!   alone.
//! - `I3`: every counter equals a recount from the VMAs and leaves ([`AddressSpace::recount`]).

use core::fmt;
use core::mem::{ManuallyDrop, MaybeUninit};
use core::ops::{Deref, DerefMut};
use core::ptr::NonNull;

use kmem_hal::lock::{SleepReadGuard, SleepWriteGuard};
use kmem_hal::sync::{AtomicBool, AtomicU32, Ordering};
use kmem_hal::{ObjectAlloc, Page, PageRange, Root, SleepLock, VirtAddr};
use kmem_paging::{PageTable, TableError};

use crate::counters::Counters;
use crate::env::Env;
use crate::errno::Errno;
use crate::flags::VmFlags;
use crate::keys::Keys;
use crate::layout::Layout;
use crate::limits::Limits;
use crate::mm::{Mm, PageRef};
use crate::mutants::mutant;
use crate::object::Ending;
use crate::registry;
use crate::vma::Vma;
use crate::vma_set::{VmaIndex, VmaSet};

/// The heap of brk: `[start, end)`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Brk {
    /// Where the heap begins (`start_brk`).
    pub start: u64,
    /// The break (`brk`).
    pub end: u64,
}

/// Where the parts of the image that runs lie, as exec found them: ends are exclusive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segments {
    /// The code (`start_code`, `end_code`).
    pub code: (u64, u64),
    /// The data in the file (`start_data`, `end_data`).
    pub data: (u64, u64),
    /// The stack pointer at the start (`start_stack`).
    pub stack: u64,
    /// The arguments' strings (`arg_start`, `arg_end`).
    pub arguments: (u64, u64),
    /// The environment's strings (`env_start`, `env_end`).
    pub environment: (u64, u64),
}

impl Segments {
    /// Bytes of the whole pages that the code touches.
    pub(crate) const fn code_pages(&self) -> u64 {
        let page = kmem_hal::PAGE_SIZE - 1;
        ((self.code.1.saturating_add(page)) & !page).saturating_sub(self.code.0 & !page)
    }
}

/// What the lock of a space guards.
pub struct State<'m, E: Env> {
    pub(crate) vmas: VmaSet<'m, E>,
    pub(crate) brk: Brk,
    pub(crate) limits: Limits,
    /// What every new mapping has as well (`def_flags`): `mlockall(MCL_FUTURE)`.
    pub(crate) default_flags: VmFlags,
    pub(crate) segments: Segments,
    pub(crate) keys: Keys,
    /// Whether there may be guard regions: once true, true for ever.
    pub(crate) guards: bool,
    /// The most memory that a look at the status found (`hiwater_rss`).
    pub(crate) rss_peak: u64,
}

/// A process's memory: mappings, page tables, heap and stack.
///
/// Calls take `&self` and lock what they need; none may be made in interrupts. The value may be moved: what others point to
/// lies in memory of its own ([`SpaceMemory`]).
#[doc(alias = "mm_struct")]
pub struct AddressSpace<'m, E: Env> {
    core: NonNull<Core<'m, E>>,
}

// SAFETY: the core is owned, and shared access to it is by locks and atomics.
unsafe impl<E: Env> Send for AddressSpace<'_, E> {}
// SAFETY: as above.
unsafe impl<E: Env> Sync for AddressSpace<'_, E> {}

/// What stays where it is: the registry of all spaces points to it.
#[repr(C)]
pub(crate) struct Core<'m, E: Env> {
    /// What reverse maps need: first, so that its address is the core's.
    pub(crate) entry: registry::Entry,
    /// Values of `AddressSpace` that are this space (`mm_users`).
    users: AtomicU32,
    pub(crate) mm: &'m Mm<'m, E>,
    pub(crate) layout: Layout,
    /// `None` only while the space is dropped.
    pub(crate) tables: Option<PageTable<E::Format, &'m E::Paging, PageRef>>,
    pub(crate) sharing: Sharing,
    /// What is done with the space's lock held.
    state: SleepLock<State<'m, E>, E::Lock>,
    /// Where a fault finds a VMA without it. Dropped after the state, which points to it.
    pub(crate) vmas: VmaIndex<'m, E>,
}

/// The space's lock. Whoever lets it go releases the VMAs that he write-locked, and then ends the objects that nobody maps any more.
pub(crate) struct StateGuard<'a, 'm, E: Env> {
    state: SleepWriteGuard<'a, State<'m, E>, E::Lock>,
    /// Dropped after the lock.
    ending: Ending<'m, E>,
}

impl<'m, E: Env> Deref for StateGuard<'_, 'm, E> {
    type Target = State<'m, E>;

    fn deref(&self) -> &State<'m, E> {
        &self.state
    }
}

impl<'m, E: Env> DerefMut for StateGuard<'_, 'm, E> {
    fn deref_mut(&mut self) -> &mut State<'m, E> {
        &mut self.state
    }
}

impl<E: Env> Drop for StateGuard<'_, '_, E> {
    fn drop(&mut self) {
        self.state.vmas.end_write();
        self.ending.objects = self.state.vmas.take_ended();
    }
}

/// Memory for one address space, from [`Env::Spaces`].
///
/// Opaque, so that an allocator need not know an environment to serve it.
#[repr(C, align(64))]
pub struct SpaceMemory([MaybeUninit<u64>; 128]);

impl fmt::Debug for SpaceMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SpaceMemory(..)")
    }
}

/// Whether the space's tables may be another space's too (once true, true for ever), and what keeps them from it.
#[derive(Debug)]
pub(crate) struct Sharing {
    /// Some table.
    pub tables: AtomicBool,
    /// A table of tables.
    pub level2: AtomicBool,
    /// Pins of the space's anonymous pages, which keep their tables from being shared.
    pub pins: AtomicU32,
}

/// Pages of a space, by kind: recounted, not remembered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// VMAs (`map_count`).
    pub mappings: u64,
    /// Pages in VMAs (`total_vm`).
    pub total: u64,
    /// Pages in locked VMAs (`locked_vm`).
    pub locked: u64,
    /// Pages in private writable VMAs other than stacks (`data_vm`).
    pub data: u64,
    /// Pages in mappings that may be executed and not written (`exec_vm`).
    pub exec: u64,
    /// Pages in stacks (`stack_vm`).
    pub stack: u64,
    /// Pages that count against the commit limit.
    pub accounted: u64,
    /// Present pages of anonymous memory (`MM_ANONPAGES`).
    #[doc(alias = "RssAnon")]
    pub rss_anon: u64,
    /// Present pages of files (`MM_FILEPAGES`).
    #[doc(alias = "RssFile")]
    pub rss_file: u64,
    /// Present pages of shared memory (`MM_SHMEMPAGES`).
    #[doc(alias = "RssShmem")]
    pub rss_shmem: u64,
    /// Frames used as page tables. Remembered, unlike the rest.
    #[doc(alias = "VmPTE")]
    pub tables: u64,
}

impl<'m, E: Env> AddressSpace<'m, E> {
    /// Makes an empty space without a kernel's half: for hosts and tests, whose kernel does not run in it.
    ///
    /// # Errors
    ///
    /// [`Errno::ENOMEM`].
    #[doc(alias = "mm_alloc")]
    pub fn new(mm: &'m Mm<'m, E>, layout: Layout) -> Result<Self, Errno> {
        let tables = PageTable::new(mm.env().paging()).map_err(|_| Errno::ENOMEM)?;
        Self::with_tables(mm, layout, tables, mm.next_number())
    }

    /// Makes an empty space that shares the kernel's half, from page `from` to the top, with `kernel`: what a CPU that
    /// runs the kernel can load.
    ///
    /// The kernel's table has lent that part ([`PageTable::lend_from`]); what it maps there later is seen in every space.
    ///
    /// # Errors
    ///
    /// [`Errno::ENOMEM`]; [`Errno::EINVAL`] where that part was not lent.
    #[doc(alias = "pgd_ctor")]
    pub fn with_kernel<G: kmem_paging::Env, K: kmem_hal::FrameHandle>(
        mm: &'m Mm<'m, E>,
        layout: Layout,
        kernel: &PageTable<E::Format, G, K>,
        from: Page,
    ) -> Result<Self, Errno> {
        let tables =
            PageTable::sharing(mm.env().paging(), kernel, from).map_err(|error| match error {
                TableError::Memory(_) => Errno::ENOMEM,
                _ => Errno::EINVAL,
            })?;
        Self::with_tables(mm, layout, tables, mm.next_number())
    }

    /// An empty space for a child: the same layout, the same kernel's half, and of the same family.
    pub(crate) fn empty_child(&self) -> Result<Self, Errno> {
        let core = self.core();
        let tables = PageTable::empty_like(core.mm.env().paging(), self.tables())
            .map_err(|_| Errno::ENOMEM)?;
        Self::with_tables(core.mm, core.layout, tables, core.entry.family())
    }

    fn with_tables(
        mm: &'m Mm<'m, E>,
        layout: Layout,
        tables: PageTable<E::Format, &'m E::Paging, PageRef>,
        family: u32,
    ) -> Result<Self, Errno> {
        const {
            assert!(
                size_of::<Core<'_, E>>() <= size_of::<SpaceMemory>()
                    && align_of::<Core<'_, E>>() <= align_of::<SpaceMemory>(),
                "a space does not fit its memory"
            );
        }
        let memory = match mm.env().spaces().alloc() {
            Ok(memory) => memory,
            Err(error) => {
                tables.destroy(|_, page| mm.put(page), |_, _| {});
                return Err(error.into());
            }
        };
        let core = memory.cast::<Core<'m, E>>();
        // SAFETY: the allocator gave memory for a space, and a core fits in it; each field is written once, the index before the
        // set that points to it. The core stays there until it is dropped, whose order of fields ends the set first.
        unsafe {
            let core = core.as_ptr();
            (&raw mut (*core).vmas).write(VmaIndex::new(mm));
            let state = State {
                vmas: VmaSet::new(NonNull::from(&(*core).vmas)),
                brk: Brk::default(),
                limits: Limits {
                    stack: layout.stack_limit,
                    ..Limits::default()
                },
                default_flags: VmFlags::empty(),
                segments: Segments::default(),
                keys: Keys::default(),
                guards: false,
                rss_peak: 0,
            };
            (&raw mut (*core).state).write(SleepLock::new(state));
            (&raw mut (*core).entry).write(registry::Entry::new(family));
            (&raw mut (*core).users).write(AtomicU32::new(1));
            (&raw mut (*core).mm).write(mm);
            (&raw mut (*core).layout).write(layout);
            (&raw mut (*core).tables).write(Some(tables));
            (&raw mut (*core).sharing).write(Sharing {
                tables: AtomicBool::new(false),
                level2: AtomicBool::new(false),
                pins: AtomicU32::new(0),
            });
        }
        mm.registry().add(core);
        Ok(Self { core })
    }

    /// The number that spaces share which fork made from one another.
    pub(crate) fn family(&self) -> u32 {
        self.core().entry.family()
    }

    pub(crate) fn core(&self) -> &Core<'m, E> {
        // SAFETY: the core is this value's, which frees it when it is dropped.
        unsafe { self.core.as_ref() }
    }

    /// A space that the registry holds, to be used and not to be dropped.
    ///
    /// # Safety
    ///
    /// The registry is locked for as long as the value is used.
    pub(crate) unsafe fn borrowed(core: NonNull<Core<'m, E>>) -> ManuallyDrop<Self> {
        ManuallyDrop::new(Self { core })
    }

    /// What all spaces share.
    #[must_use]
    pub fn mm(&self) -> &'m Mm<'m, E> {
        self.core().mm
    }

    /// Where things go.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.core().layout
    }

    /// What the MMU loads to run in this space.
    #[must_use]
    pub fn root(&self) -> Root {
        self.tables().root()
    }

    /// The page tables.
    pub(crate) fn tables(&self) -> &PageTable<E::Format, &'m E::Paging, PageRef> {
        match &self.core().tables {
            Some(tables) => tables,
            None => unreachable!("a space that is being dropped is used"),
        }
    }

    /// The VMAs, to be looked at.
    pub(crate) fn read(&self) -> SleepReadGuard<'_, State<'m, E>, E::Lock> {
        self.core().state.read()
    }

    pub(crate) fn lock(&self) -> StateGuard<'_, 'm, E> {
        StateGuard {
            state: self.core().state.write(),
            ending: Ending::new(self.mm()),
        }
    }

    /// Sets the limits of the process.
    #[doc(alias = "setrlimit")]
    pub fn set_limits(&self, limits: Limits) {
        self.lock().limits = limits;
    }

    /// The limits of the process.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.core().state.read().limits
    }

    /// The heap.
    #[must_use]
    pub fn heap(&self) -> Brk {
        self.core().state.read().brk
    }

    /// Where the parts of the image that runs lie.
    #[must_use]
    pub fn segments(&self) -> Segments {
        self.core().state.read().segments
    }

    /// The mapping that covers an address.
    #[doc(alias = "vma_lookup")]
    #[must_use]
    pub fn vma_at(&self, address: VirtAddr) -> Option<Vma> {
        self.core().state.read().vmas.get(Page::containing(address))
    }

    /// The first mapping that ends above an address.
    #[must_use]
    pub fn find_vma(&self, address: VirtAddr) -> Option<Vma> {
        self.core()
            .state
            .read()
            .vmas
            .at_or_after(Page::containing(address))
    }

    /// Visits the mappings in order of address; stops where `visit` says `false`.
    ///
    /// `visit` runs with the space's lock held shared: it must make no call that takes it too, as nearly all do
    /// ([`resident`](Self::resident) does not), and no fault in the space. Calls that change mappings wait for as long as it takes.
    pub fn for_each_vma(&self, mut visit: impl FnMut(&Vma) -> bool) {
        let state = self.core().state.read();
        for vma in state.vmas.iter() {
            if !visit(&vma) {
                break;
            }
        }
    }

    /// How many mappings there are.
    #[must_use]
    pub fn map_count(&self) -> usize {
        self.core().state.read().vmas.len()
    }

    /// Counts everything from scratch: walks every VMA and every leaf.
    #[must_use]
    pub fn recount(&self) -> Usage {
        let state = self.core().state.read();
        let mut counters = Counters::default();
        let mut usage = Usage {
            tables: self.tables().table_count() as u64,
            ..Usage::default()
        };
        for vma in state.vmas.iter() {
            usage.mappings += 1;
            counters.add(&vma);
            let shared_memory = vma
                .file
                .is_some_and(|file| self.mm().info(file).is_shared_memory);
            self.for_each_leaf(vma.range, |leaf| {
                if leaf.frame == self.mm().zero_page() && !mutant!("zero-page-counts") {
                    return;
                }
                let Some(page) = self.mm().counted(leaf.frame) else {
                    // Device memory.
                    usage.rss_file += u64::from(mutant!("device-memory-is-resident"));
                    return;
                };
                let files = vma.file.is_some() && mutant!("copy-counts-as-the-file");
                match page.slot().tag() {
                    kmem_hal::FrameTag::Anon if !files => usage.rss_anon += 1,
                    _ if shared_memory => usage.rss_shmem += 1,
                    _ => usage.rss_file += 1,
                }
            });
        }
        Usage {
            total: counters.total,
            locked: counters.locked,
            data: counters.data,
            exec: counters.exec,
            stack: counters.stack,
            accounted: counters.accounted,
            ..usage
        }
    }

    /// What the space remembers of its mappings' sizes: equal to what [`recount`](Self::recount) counts.
    #[must_use]
    pub fn counters(&self) -> Counters {
        *self.core().state.read().vmas.counters()
    }

    /// The same space once more: for a thread, or a child of vfork (`clone(CLONE_VM)`). The last one that is dropped ends it.
    ///
    /// # Errors
    ///
    /// [`Errno::EAGAIN`] where there are more users than can be counted.
    #[doc(alias = "mmget")]
    pub fn share(&self) -> Result<Self, Errno> {
        let users = &self.core().users;
        let mut now = users.load(Ordering::Relaxed);
        while now < u32::MAX {
            match users.compare_exchange_weak(now, now + 1, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Ok(Self { core: self.core }),
                Err(other) => now = other,
            }
        }
        Err(Errno::EAGAIN)
    }

    /// How many values are this space (`mm_users`).
    #[must_use]
    pub fn users(&self) -> u32 {
        self.core().users.load(Ordering::Relaxed)
    }

    /// Ends every mapping and gives everything back, if nobody else uses the space. The root must not be loaded anywhere any more
    /// then.
    ///
    /// Dropping the space does the same.
    ///
    /// Context: task context; as [`Mm::close`](crate::Mm::close) where the last mapping of a file goes.
    #[doc(alias = "exit_mmap")]
    pub fn exit(self) {
        drop(self);
    }

    /// So many pages from an address on; `None` where none begins there, or they are none or too many.
    pub(crate) fn user_range(&self, start: u64, pages: u64) -> Option<PageRange> {
        let first = Page::starting_at(VirtAddr::new(start))?;
        PageRange::with_count(first, pages)
    }
}

impl<E: Env> Drop for AddressSpace<'_, E> {
    fn drop(&mut self) {
        if self.core().users.fetch_sub(1, Ordering::AcqRel) != 1 {
            return;
        }
        let mm = self.mm();
        mm.registry().remove(self.core);
        // SAFETY: the registry has let the core go, so nobody else reaches it.
        let core = unsafe { self.core.as_mut() };
        if let Some(tables) = core.tables.take() {
            tables.destroy(
                |_, page| mm.put(page),
                |_, payload| mm.drop_payload(payload),
            );
        }
        // SAFETY: as above; it is not used again. In place, as the state points to the index.
        unsafe { core::ptr::drop_in_place(self.core.as_ptr()) };
        // SAFETY: the core was dropped, and the memory came from this allocator.
        unsafe { mm.env().spaces().free(self.core.cast()) }
    }
}

impl<E: Env> fmt::Debug for AddressSpace<'_, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "AddressSpace({:?}, {} mappings)",
            self.root(),
            self.map_count()
        )
    }
}
