//! The MMU as kmem asks of it: load a root, flush, shoot down.
//!
//! A translation lives in three places: the tables, each CPU's TLB, each CPU's paging-structure caches. kmem changes
//! the first; this trait reaches the other two. A frame or a table may be reused only after every CPU that may hold
//! a translation to it has answered, which is what a [`Completion`] stands for.
//!
//! ```text
//!   change entries ── flush_local ── shootdown(cpus, request) ──> Completion ── complete ──> frames come free
//!                                        (interrupts sent)            (all have answered)
//! ```
//!
//! A kernel with one CPU implements `load_root` and `flush_local`, and gets the rest for free.
//!
//! Source: Intel SDM volume 3A, 4.10 (caching of translations), 4.10.4 (what must be flushed), 4.10.5 (several CPUs).

use core::fmt;

use crate::addr::VirtAddr;
use crate::cpu::{CpuId, CpuSet};
use crate::frame::Frame;
use crate::page::PageRange;

/// A tag of TLB entries: PCID on x86 (12 bits), ASID elsewhere. 0 where the processor has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct Asid(u16);

impl Asid {
    /// The tag of a processor without tags, and of the kernel's own space.
    pub const ZERO: Self = Self(0);

    /// The tag with this number.
    #[must_use]
    pub const fn new(number: u16) -> Self {
        Self(number)
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u16 {
        self.0
    }
}

/// What CR3 holds: the frame of the root table and the tag of the space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Root {
    /// The frame of the top table.
    pub frame: Frame,
    /// The tag under which the CPU caches this space's translations.
    pub asid: Asid,
}

/// Which translations a flush must drop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FlushScope {
    /// Translations of these pages in one space, one `invlpg` per `stride` pages (1, 512 or 262144).
    Pages {
        /// The pages whose translations changed.
        range: PageRange,
        /// Pages per leaf: 1 for 4 KiB leaves.
        stride: u64,
    },
    /// Everything of one space, its global entries excepted.
    Space,
    /// Everything on the CPU, global entries included.
    Everything,
}

/// One flush, for one or several CPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlushRequest {
    /// The space whose translations changed.
    pub root: Root,
    /// Which translations.
    pub scope: FlushScope,
    /// Whether the changed entries may be global (kernel half).
    pub global: bool,
    /// Whether tables were freed, or made where a CPU remembers absent entries: what is cached of entries above the leaves must go as well (on
    /// RISC-V, an `SFENCE.VMA` without an address), on lazy CPUs too.
    pub tables_freed: bool,
}

/// A shootdown on its way; nothing may be reused before it is completed.
///
/// Dropping it without [`Mmu::complete`] forgets the wait, not the flush.
#[must_use = "nothing may be reused before the shootdown is completed"]
#[derive(Debug, PartialEq, Eq)]
pub struct Completion(u64);

impl Completion {
    /// Nothing to wait for.
    pub const DONE: Self = Self(0);

    /// A wait that the MMU knows by this number; 0 means done.
    pub const fn new(ticket: u64) -> Self {
        Self(ticket)
    }

    /// The number.
    #[must_use]
    pub const fn ticket(&self) -> u64 {
        self.0
    }
}

/// The memory-management unit of this machine, through the eyes of paging.
///
/// # Safety
///
/// - `M1`: when `flush_local` returns, this CPU holds none of the translations named that it might use, neither in a TLB nor in a
///   paging-structure cache, nor one that it began to load before the call.
/// - `M2`: when `complete` returns for what `shootdown` gave, the same is true of every CPU in `cpus`.
/// - `M3`: `active_cpus(root)` contains every CPU that may hold translations of the space: it has the root loaded, also
///   lazily, or kept entries under its tag when it left. It may contain more. `flush_targets(request)` may leave out those that use none
///   of what the request names before they have dropped it.
/// - `M4`: entry stores made before a call are visible to the table walks of the CPUs flushed by it.
/// - `M5`: when `is_loaded(root)` gives `false`, no CPU walks from the root: none has it loaded, lazily or otherwise.
/// - `M6`: where `isolates()` gives `true`, each root stands for its user root too, in the frame after it: `M1` to `M5` hold of both.
pub unsafe trait Mmu {
    /// Makes this CPU translate through `root`.
    ///
    /// `keep` says that entries cached under the root's tag may be kept (x86: bit 63 of the value written to CR3).
    ///
    /// # Safety
    ///
    /// The tables at `root` map the running code, its stack and everything it uses, and stay allocated while loaded. Nobody treats them
    /// as quiescent (`M5`) meanwhile.
    #[doc(alias = "switch_mm")]
    #[doc(alias = "write_cr3")]
    unsafe fn load_root(&self, root: Root, keep: bool);

    /// Drops translations on this CPU.
    #[doc(alias = "invlpg")]
    #[doc(alias = "flush_tlb_local")]
    fn flush_local(&self, request: &FlushRequest);

    /// The CPUs that may hold translations of the space, the calling one included (`M3`).
    #[doc(alias = "mm_cpumask")]
    fn active_cpus(&self, root: Root) -> CpuSet {
        let _ = root;
        CpuSet::single(CpuId::BOOT)
    }

    /// The CPUs that `request` must reach at once (`M3`). Called after the entry stores that the request is about, by a CPU that stays pinned
    /// until it has called `shootdown` and `flush_local` with the same request.
    ///
    /// An MMU that keeps generations notes here that the space changed: a CPU that does not run it is left out, and drops what it kept when
    /// it loads the root again. Lazy CPUs are left out likewise, unless tables are freed.
    #[doc(alias = "inc_mm_tlb_gen")]
    fn flush_targets(&self, request: &FlushRequest) -> CpuSet {
        self.active_cpus(request.root)
    }

    /// Whether a CPU may walk from this root now (`M5`). What it left in caches does not count.
    ///
    /// `true` where the MMU cannot tell.
    fn is_loaded(&self, root: Root) -> bool {
        let _ = root;
        true
    }

    /// Whether a root may have a second one for user mode, in the frame after its own, that is meant wherever the root is (`M6`).
    ///
    /// `false` where the MMU knows one root a space.
    fn isolates(&self) -> bool {
        false
    }

    /// The CPU that runs this code, so that a shootdown leaves it out.
    fn this_cpu(&self) -> CpuId {
        CpuId::BOOT
    }

    /// Starts dropping translations on other CPUs: one interrupt each.
    ///
    /// `cpus` does not contain the calling one. A kernel with one CPU leaves this alone.
    #[doc(alias = "flush_tlb_others")]
    fn shootdown(&self, cpus: &CpuSet, request: &FlushRequest) -> Completion {
        let _ = (cpus, request);
        Completion::DONE
    }

    /// Waits until every CPU of a shootdown has answered. Not called under a lock that an interrupts-off path takes.
    fn complete(&self, completion: Completion) {
        let _ = completion;
    }

    /// How many tags the processor has; 1 where it has none.
    fn asid_count(&self) -> u16 {
        1
    }
}

// SAFETY: a reference forwards to an MMU that keeps the contract.
unsafe impl<M: Mmu + ?Sized> Mmu for &M {
    unsafe fn load_root(&self, root: Root, keep: bool) {
        // SAFETY: the caller's promise is passed on.
        unsafe { (**self).load_root(root, keep) }
    }
    fn flush_local(&self, request: &FlushRequest) {
        (**self).flush_local(request);
    }
    fn active_cpus(&self, root: Root) -> CpuSet {
        (**self).active_cpus(root)
    }
    fn flush_targets(&self, request: &FlushRequest) -> CpuSet {
        (**self).flush_targets(request)
    }
    fn is_loaded(&self, root: Root) -> bool {
        (**self).is_loaded(root)
    }
    fn isolates(&self) -> bool {
        (**self).isolates()
    }
    fn this_cpu(&self) -> CpuId {
        (**self).this_cpu()
    }
    fn shootdown(&self, cpus: &CpuSet, request: &FlushRequest) -> Completion {
        (**self).shootdown(cpus, request)
    }
    fn complete(&self, completion: Completion) {
        (**self).complete(completion);
    }
    fn asid_count(&self) -> u16 {
        (**self).asid_count()
    }
}

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Reads data.
    Read,
    /// Writes data.
    Write,
    /// Fetches an instruction.
    Execute,
}

bitflags::bitflags! {
    /// The error code that an x86 page fault pushes.
    ///
    /// Source: Intel SDM volume 3A, 4.7 and figure 4-12.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct FaultCode: u32 {
        /// The page was present: a protection violation. Clear: no translation.
        const PRESENT = 1 << 0;
        /// The access was a write.
        const WRITE = 1 << 1;
        /// The access came from user mode.
        const USER = 1 << 2;
        /// A reserved bit was set in an entry.
        const RESERVED = 1 << 3;
        /// The access was an instruction fetch.
        const FETCH = 1 << 4;
        /// A protection key forbade the access.
        const PROTECTION_KEY = 1 << 5;
        /// A shadow-stack access.
        const SHADOW_STACK = 1 << 6;
    }
}

impl FaultCode {
    /// What the access did.
    #[must_use]
    pub const fn access(self) -> Access {
        if self.contains(Self::FETCH) {
            Access::Execute
        } else if self.contains(Self::WRITE) {
            Access::Write
        } else {
            Access::Read
        }
    }
}

/// A page fault as the processor reports it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PageFault {
    /// The linear address (CR2 on x86).
    pub address: VirtAddr,
    /// The error code.
    pub code: FaultCode,
}

impl fmt::Debug for PageFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "PageFault {{ address: {}, code: {:?} }}",
            self.address, self.code
        )
    }
}
