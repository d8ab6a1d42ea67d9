//! One CPU's own translation caches, by tag: the instructions below [`Mmu`](crate::Mmu).
//!
//! `Mmu` speaks of spaces and of all CPUs. A kernel whose processor has tags (PCID on x86, ASID elsewhere) would have to deal them out, keep
//! generations, and find out who needs an interrupt; `kmem_paging::AsidMmu` does all that over the few instructions here, and so is an
//! `Mmu` for whoever implements `Tlb`, [`Cpu`](crate::Cpu) and [`CpuCall`](crate::CpuCall).
//!
//! | call | x86 | without `INVPCID` | without tags |
//! |---|---|---|---|
//! | `load` | `MOV CR3`, bit 63 to keep | the same | `MOV CR3` |
//! | `drop_page` | `INVLPG` | the same | the same |
//! | `drop_page_of` | `INVPCID` type 0 | refused | refused |
//! | `drop_current` | `MOV CR3` with the tag that it has | the same | the same |
//! | `drop_tag` | `INVPCID` type 1 | refused | refused |
//! | `drop_all` | `INVPCID` type 2 | CR4.PGE off and on | the same |
//!
//! What is refused (`false`) the caller does later, when it loads the tag again.
//!
//! Source: Intel SDM volume 3A, 4.10.4.1; volume 2A, `INVLPG`, `INVPCID`; volume 2B, `MOV CR`.

use crate::mmu::{Asid, Root};
use crate::page::Page;

/// The translation caches of the CPU that runs the call: TLB and paging-structure caches.
///
/// # Safety
///
/// - `T1`: after `load(root, false)` the CPU translates through `root` and holds nothing under its tag but global entries and what it
///   loaded since. After `load(root, true)` it translates through `root`; what it held stays, or some of it.
/// - `T2`: after `drop_page(page)` it holds no translation of `page` under the current tag, no global one, and no
///   paging-structure entry of the current tag.
/// - `T3`: where `drop_page_of(tag, page)` gives `true` it holds no translation of `page` under `tag` but a global one.
/// - `T4`: after `drop_current`, and where `drop_tag(tag)` gives `true`, it holds nothing under the tag but global entries and what it
///   loaded since.
/// - `T5`: after `drop_all` it holds nothing that it held before, whatever the tag.
/// - `T6`: each call is ordered like a full fence: walks after it see the stores before it.
pub unsafe trait Tlb {
    /// How many tags the processor has: they are the numbers below this one. 1 where it has none, and every tag is 0.
    fn tags(&self) -> u16;

    /// Translates through `root.frame` under the tag `root.asid`.
    ///
    /// # Safety
    ///
    /// As [`Mmu::load_root`](crate::Mmu::load_root). With `keep`, what the CPU holds under the tag is of this root.
    #[doc(alias = "write_cr3")]
    unsafe fn load(&self, root: Root, keep: bool);

    /// Drops one page under the current tag.
    #[doc(alias = "invlpg")]
    fn drop_page(&self, page: Page);

    /// Drops one page under another tag; `false` where the processor cannot.
    #[doc(alias = "invpcid_flush_one")]
    fn drop_page_of(&self, tag: Asid, page: Page) -> bool {
        let _ = (tag, page);
        false
    }

    /// Drops everything under the current tag.
    #[doc(alias = "flush_tlb_local")]
    fn drop_current(&self);

    /// Drops everything under a tag, the current one or not; `false` where the processor cannot.
    #[doc(alias = "invpcid_flush_single_context")]
    fn drop_tag(&self, tag: Asid) -> bool {
        let _ = tag;
        false
    }

    /// Drops everything, global entries included.
    #[doc(alias = "flush_tlb_global")]
    fn drop_all(&self);
}

// SAFETY: a reference forwards to an implementation that keeps the contract.
unsafe impl<T: Tlb + ?Sized> Tlb for &T {
    fn tags(&self) -> u16 {
        (**self).tags()
    }
    unsafe fn load(&self, root: Root, keep: bool) {
        // SAFETY: the caller's promise is passed on.
        unsafe { (**self).load(root, keep) }
    }
    fn drop_page(&self, page: Page) {
        (**self).drop_page(page);
    }
    fn drop_page_of(&self, tag: Asid, page: Page) -> bool {
        (**self).drop_page_of(tag, page)
    }
    fn drop_current(&self) {
        (**self).drop_current();
    }
    fn drop_tag(&self, tag: Asid) -> bool {
        (**self).drop_tag(tag)
    }
    fn drop_all(&self) {
        (**self).drop_all();
    }
}
