//! [`Tlb`] of a real x86-64 processor: the instructions.
//!
//! Runs in the kernel (ring 0) alone. What the processor has is asked once, when the value is made; the order at boot, on every CPU:
//!
//! 1. Long mode, through tables whose root stands in CR3 with the low 12 bits clear (they are the tag from step 2 on).
//! 2. [`X86Tlb::enable`]: CPUID says whether there are tags, and CR4.PCIDE is set where there are.
//! 3. The first [`load`](Tlb::load).
//!
//! CR4.PGE stays the kernel's to set: with page-table isolation it is clear. CR4.PCIDE must be clear again before a CPU leaves long mode.
//!
//! What has run: all of it under Bochs, which checks that each instruction is legal and drops what it is told to drop, and which forgets everything at
//! each load of CR3, so that nothing is seen there of a tag that should have been dropped: that is proven on the mock machine. Under QEMU's emulation
//! all that needs no tags. Not on a processor that keeps tags (record 014 of the repository's `docs/decisions`).
//!
//! Source: Intel SDM volume 3A, 4.10.1 and 4.10.4.1; volume 2A, CPUID; Linux arch/x86/include/asm/tlbflush.h (which instruction for what).

use core::arch::asm;
use core::arch::x86_64::{__cpuid, __cpuid_count};

use kmem_hal::{Asid, Page, Root, Tlb};

/// Bit 63 of what is written to CR3: keep what is cached under the tag.
const KEEP: u64 = 1 << 63;
/// CR4.PGE.
const PGE: u64 = 1 << 7;
/// CR4.PCIDE.
const PCIDE: u64 = 1 << 17;

/// The translation caches of the x86-64 CPU that runs the code.
///
/// # Examples
///
/// A kernel that found PCID and INVPCID in CPUID, and has set CR4.PCIDE:
///
/// ```
/// use kmem_paging::X86Tlb;
///
/// // SAFETY: ring 0 alone calls the value's methods, and CR4.PCIDE is set.
/// let tlb = unsafe { X86Tlb::new(true, true) };
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct X86Tlb {
    pcid: bool,
    invpcid: bool,
}

impl X86Tlb {
    /// The caches of a CPU on which CR4.PCIDE is set (`pcid`), and which has the instruction INVPCID (`invpcid`; CPUID leaf 7, EBX
    /// bit 10).
    ///
    /// # Safety
    ///
    /// That is so on every CPU, and the methods are called in ring 0 only.
    #[must_use]
    pub const unsafe fn new(pcid: bool, invpcid: bool) -> Self {
        Self { pcid, invpcid }
    }

    /// Asks CPUID what this CPU has, and sets CR4.PCIDE where it has PCID.
    ///
    /// On some processors (Intel's Alder Lake and Raptor Lake before new microcode; Linux calls the list `invlpg_miss_ids`) INVLPG leaves global
    /// entries while CR4.PCIDE is set, against `T2`, and CPUID does not tell. A kernel with global entries calls [`new`](Self::new) with `false` there
    /// instead.
    ///
    /// Every CPU must give the same value: the kernel compares it with the first one's.
    ///
    /// # Safety
    ///
    /// Ring 0 in long mode, on each CPU before its first load with a tag; the low 12 bits of CR3 are clear, and an interrupt loads no other root
    /// and leaves CR4 alone meanwhile. The value's methods are called in ring 0 only, on CPUs that gave an equal one.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use kmem_paging::X86Tlb;
    ///
    /// // SAFETY: the boot code loaded a root without flags, and this is ring 0 with interrupts off.
    /// let tlb = unsafe { X86Tlb::enable() };
    /// ```
    #[doc(alias = "cr4_set_bits")]
    #[doc(alias = "setup_pcid")]
    #[must_use]
    pub unsafe fn enable() -> Self {
        // Safe in newer toolchains than the oldest that this crate is for.
        #[allow(unused_unsafe)]
        // SAFETY: every processor with long mode has CPUID; leaf 7 is asked for where leaf 0 says that there is one.
        let (pcid, invpcid) = unsafe {
            let features = || __cpuid_count(7, 0).ebx;
            let has_features = __cpuid(0).eax >= 7;
            (
                __cpuid(1).ecx & 1 << 17 != 0,
                has_features && features() & 1 << 10 != 0,
            )
        };
        if pcid {
            // SAFETY: the caller's promise: long mode, and the tag that CR3 then names is 0. What is cached is under that tag already.
            unsafe {
                asm!("mov {0}, cr4", "or {0}, {pcide}", "mov cr4, {0}",
                    out(reg) _, pcide = const PCIDE, options(nostack));
            }
        }
        Self { pcid, invpcid }
    }

    fn invpcid(kind: u64, tag: Asid, page: u64) {
        let descriptor = [u64::from(tag.get()), page];
        // SAFETY: `new`: the instruction exists and this is ring 0; it drops cached translations and reads the descriptor.
        unsafe {
            asm!("invpcid {}, [{}]", in(reg) kind, in(reg) descriptor.as_ptr(), options(nostack));
        }
    }
}

// SAFETY: T1 to T5: by the manual, each instruction drops that much (4.10.4.1); INVLPG drops the paging-structure entries of the
// current PCID too. T6: all of them are serialising.
unsafe impl Tlb for X86Tlb {
    fn tags(&self) -> u16 {
        if self.pcid { 4096 } else { 1 }
    }

    unsafe fn load(&self, root: Root, keep: bool) {
        let mut value = root.frame.start().as_u64();
        if self.pcid {
            value |= u64::from(root.asid.get());
            if keep {
                value |= KEEP;
            }
        }
        // SAFETY: the caller's promise: the tables map what runs.
        unsafe { asm!("mov cr3, {}", in(reg) value, options(nostack)) };
    }

    fn drop_page(&self, page: Page) {
        // SAFETY: drops cached translations; no effect on memory.
        unsafe { asm!("invlpg [{}]", in(reg) page.start().as_u64(), options(nostack)) };
    }

    fn drop_page_of(&self, tag: Asid, page: Page) -> bool {
        if self.invpcid && self.pcid {
            Self::invpcid(0, tag, page.start().as_u64());
        }
        self.invpcid && self.pcid
    }

    fn drop_current(&self) {
        // SAFETY: the same root and tag again; CR3 reads without bit 63. Interrupts are off in between: one could load another root (a lazy
        // CPU leaves a space that goes), which the second move would undo.
        unsafe { asm!("pushfq", "cli", "mov {0}, cr3", "mov cr3, {0}", "popfq", out(reg) _) };
    }

    fn drop_tag(&self, tag: Asid) -> bool {
        if self.invpcid && self.pcid {
            Self::invpcid(1, tag, 0);
        }
        self.invpcid && self.pcid
    }

    fn drop_all(&self) {
        if self.invpcid {
            Self::invpcid(2, Asid::ZERO, 0);
            return;
        }
        // SAFETY: CR4 as it was, after a moment with PGE the other way round: each change of it drops everything, and so the second does with
        // what an interrupt cached in between.
        unsafe {
            asm!("mov {0}, cr4", "mov {1}, {0}", "xor {1}, {pge}", "mov cr4, {1}", "mov cr4, {0}",
                out(reg) _, out(reg) _, pge = const PGE, options(nostack));
        }
    }
}
