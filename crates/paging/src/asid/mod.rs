//! Spaces on CPUs: address-space tags, generations, lazy mode. An [`Mmu`] over [`Tlb`], [`Cpu`] and [`CpuCall`].
//!
//! A flush that a commit asks for reaches at once only the CPUs that run the space. All others are marked by a counter and catch up when
//! they load the root again.
//!
//! ```text
//!  commit:  entry stores ── generation + 1 ──┐ fence ┌── who has the root loaded? ── one interrupt each
//!                                            ╳       ╳
//!  switch:  loaded = SWITCHING ──────────────┘ fence └── generation > the slot's? ── load and drop | load and keep
//! ```
//!
//! Either the committing CPU sees the switching one, or that one sees the new generation.
//!
//! | switch to | costs |
//! |---|---|
//! | the space that is loaded (threads of one space; out of lazy mode) | a fence; a flush where the space changed meanwhile |
//! | a kernel thread ([`enter_lazy`](AsidMmu::enter_lazy)) | one store: the last space stays loaded |
//! | one of the last six spaces, unchanged | `load` with `keep`: nothing is dropped |
//! | another space | `load` without `keep`, under the tag that was dealt out longest ago |
//!
//! Invariants, beside `A1` to `A3` of `area.rs`
//! - `S1`: generations only grow. Several roots may share a counter (it is found by the root's frame), which costs flushes and
//!   never correctness; a frame that becomes another root finds a counter that moved on when the old one was taken down.
//! - `S2`: a flush of one generation is served in part only by a CPU that misses that one alone; whoever misses more drops all.
//! - `S3`: where tables are freed, a lazy CPU goes over to the kernel's root; so a space that is taken down is lazy nowhere.
//! - `S4`: an interrupt inside of `load_root` cannot know which root is loaded: it drops everything, and what it interrupted starts again.
//! - `S5`: a global entry serves every tag: a request that names some goes to every CPU.
//! - `S6`: with isolation CR4.PGE is clear, so that no entry is global whatever its G bit says: the kernel's pages are under the tags of all
//!   spaces, and a flush of some spoils all tags but the current one.
//! - `S7`: a flush may be interrupted by another, and that one may take a lazy CPU to the kernel's root (`S3`). So a flush keeps to the slot that
//!   was the current one before it looked which root is loaded: where the CPU left meanwhile, that slot is nobody's, and what is noted in it means
//!   nothing; the kernel's slot never gets a space's generation.
//!
//! Page-table isolation ([`PageTable::isolated`](crate::PageTable::isolated)): each space has a second root for user mode, in the frame
//! after its own, under a tag of its own; [`enter_user`](AsidMmu::enter_user) and [`enter_kernel`](AsidMmu::enter_kernel) are what the
//! trampoline does. A flush drops pages under both tags.
//!
//! Does not handle: tags that other CPUs understand (Arm's broadcast); more than one address space loaded on a CPU at once.
//!
//! Source: Linux arch/x86/mm/tlb.c (generations, six tags, lazy CPUs, user tags): the ideas. Intel SDM volume 3A, 4.10.

mod area;
#[cfg(target_arch = "x86_64")]
mod x86;

use core::fmt;

use kmem_hal::sync::{AtomicU64, Ordering, compiler_fence, fence};
use kmem_hal::{
    Asid, CachePadded, Completion, Cpu, CpuCall, CpuId, CpuSet, FlushRequest, FlushScope, Mmu,
    Page, PerCpu, Root, Tlb,
};

pub use area::AsidArea;
use area::{Name, SPACES, SWITCHING, Slot, USER_TAG, tag_of};
#[cfg(target_arch = "x86_64")]
pub use x86::X86Tlb;

use crate::gather::FLUSH_CEILING;
use crate::mutants::mutant;

/// An [`Mmu`] that deals out tags, keeps generations, and lets kernel threads borrow the space that is loaded.
///
/// # Examples
///
/// The parts of a machine with one CPU (its `Tlb` does nothing here; [`X86Tlb`](crate::X86Tlb) is a real one):
///
/// ```
/// # use kmem_hal::{Asid, Page, Root, Tlb, SingleCpu, CachePadded, sync::AtomicU64};
/// use kmem_paging::{AsidArea, AsidMmu};
/// # #[derive(Clone, Copy)] struct MyTlb;
/// # // SAFETY: no processor.
/// # unsafe impl Tlb for MyTlb {
/// #     fn tags(&self) -> u16 { 4096 }
/// #     unsafe fn load(&self, _: Root, _: bool) {}
/// #     fn drop_page(&self, _: Page) {}
/// #     fn drop_current(&self) {}
/// #     fn drop_all(&self) {}
/// # }
/// static AREAS: [CachePadded<AsidArea>; 1] = [CachePadded::new(AsidArea::new())];
/// static GENERATIONS: [AtomicU64; 64] = [const { AtomicU64::new(0) }; 64];
/// // SAFETY: one CPU runs this; the areas and generations are used by nobody else.
/// let mmu = unsafe { AsidMmu::new(MyTlb, SingleCpu::new(), &AREAS, &GENERATIONS) };
/// # let _ = mmu;
/// ```
pub struct AsidMmu<'m, T, C> {
    tlb: T,
    cpus: C,
    areas: PerCpu<'m, AsidArea>,
    generations: &'m [AtomicU64],
    /// The kernel's root by its name; 0 where there is none.
    kernel: AtomicU64,
    isolated: bool,
}

/// The kernel's root was not named: [`AsidMmu::enter_lazy`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoKernelRoot;

impl fmt::Display for NoKernelRoot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no root of the kernel's own was named, to which a lazy CPU could go")
    }
}

impl core::error::Error for NoKernelRoot {}

impl<'m, T: Tlb, C: Cpu + CpuCall> AsidMmu<'m, T, C> {
    kmem_hal::const_new! {
        /// Puts an MMU together.
        ///
        /// More `generations` let fewer spaces share a counter: as many as there are spaces is plenty.
        ///
        /// # Safety
        ///
        /// - There is an area for each CPU that `cpus` may name, and a counter at least. Nobody else uses them.
        /// - `tlb` and `cpus` are of the same machine, and nothing else loads roots on it from the first
        ///   [`load_root`](Mmu::load_root) on.
        pub unsafe fn new(
            tlb: T,
            cpus: C,
            areas: &'m [CachePadded<AsidArea>],
            generations: &'m [AtomicU64]
        ) -> Self {
            Self {
                tlb,
                cpus,
                areas: PerCpu::new(areas),
                generations,
                kernel: AtomicU64::new(0),
                isolated: false,
            }
        }
    }

    /// With a user root beside each space's own ([`PageTable::isolated`](crate::PageTable::isolated)).
    ///
    /// The kernel leaves CR4.PGE clear then: a global entry of the kernel's would serve user mode as well.
    #[must_use]
    pub fn with_isolation(mut self) -> Self {
        self.isolated = true;
        self
    }

    /// Names the kernel's own root, which lazy CPUs fall back to. Called once, before a space is loaded.
    ///
    /// # Safety
    ///
    /// The tables at `root` map what every CPU needs in the kernel, and are never freed.
    #[doc(alias = "init_mm")]
    pub unsafe fn set_kernel_root(&self, root: Root) {
        self.kernel.store(Name::of(root.frame).0, Ordering::Release);
    }

    /// Says that this CPU goes on with a kernel thread, which uses no user address: the space that is loaded stays, and need not be told of
    /// changes. [`load_root`](Mmu::load_root) ends it.
    ///
    /// Context: a pinned task, as the scheduler's switch is.
    ///
    /// # Errors
    ///
    /// [`NoKernelRoot`] before [`set_kernel_root`](Self::set_kernel_root): a lazy CPU would have nowhere to go when the space is taken down. The
    /// CPU goes on as one that runs the space: it is told of every change, and must be switched away before the space goes.
    #[doc(alias = "enter_lazy_tlb")]
    pub fn enter_lazy(&self) -> Result<(), NoKernelRoot> {
        if self.kernel().frame().is_none() {
            return Err(NoKernelRoot);
        }
        let pin = self.cpus.pin();
        self.area(pin.id()).lazy.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// Whether this CPU is lazy: it runs a kernel thread in a borrowed space.
    #[must_use]
    pub fn is_lazy(&self) -> bool {
        let pin = self.cpus.pin();
        self.area(pin.id()).is_lazy()
    }

    /// Goes over to the user root of the space that is loaded: the trampoline's way out of the kernel.
    ///
    /// # Safety
    ///
    /// Interrupts are off. The tables are [isolated](crate::PageTable::isolated), and their trampoline range maps the running code and its
    /// stack.
    ///
    /// # Examples
    ///
    /// ```
    /// use kmem_hal::{Cpu, CpuCall, Tlb};
    /// use kmem_paging::AsidMmu;
    ///
    /// /// The end of the trampoline's way out; `iretq` follows.
    /// ///
    /// /// # Safety
    /// ///
    /// /// Interrupts are off, on the trampoline's stack.
    /// unsafe fn leave<T: Tlb, C: Cpu + CpuCall>(mmu: &AsidMmu<'_, T, C>) {
    ///     // SAFETY: the caller's promise; this code lies in the trampoline's range.
    ///     unsafe { mmu.enter_user() }
    /// }
    /// ```
    #[doc(alias = "SWITCH_TO_USER_CR3")]
    pub unsafe fn enter_user(&self) {
        let pin = self.cpus.pin();
        let area = self.area(pin.id());
        let (number, slot) = area.current();
        let Some(root) = self.loaded(area).filter(|_| number > 0) else {
            // The kernel's own root has no user.
            return;
        };
        let keep = !slot.take_user_stale() && self.tagged();
        let root = Root {
            frame: crate::isolation::user_root(root.frame),
            asid: self.user_tag(number),
        };
        // SAFETY: the caller's promise. Under the user's tag is only this root's, or it is dropped (A1).
        unsafe {
            self.tlb
                .load(root, keep || mutant!("asid-user-tag-never-dropped"))
        };
    }

    /// Goes over to the whole root of the space that is loaded: the trampoline's way into the kernel.
    ///
    /// # Safety
    ///
    /// Interrupts are off, and [`enter_user`](Self::enter_user) came before.
    #[doc(alias = "SWITCH_TO_KERNEL_CR3")]
    pub unsafe fn enter_kernel(&self) {
        let pin = self.cpus.pin();
        let area = self.area(pin.id());
        let (number, _) = area.current();
        if let Some(root) = self.loaded(area) {
            let asid = tag_of(number, self.tagged());
            // SAFETY: the root was loaded by `load_root`, whose caller promised; under the tag is only this root's (A1), and flushes
            // while the CPU was in user mode were served in the kernel.
            unsafe { self.tlb.load(Root { asid, ..root }, self.tagged()) };
        }
    }

    fn area(&self, cpu: CpuId) -> &'m AsidArea {
        match self.areas.get_remote(cpu) {
            Some(area) => area,
            // `new` demands one for each CPU.
            None => unreachable!("a CPU without an area"),
        }
    }

    fn loaded(&self, area: &AsidArea) -> Option<Root> {
        let frame = Name(area.loaded.load(Ordering::Relaxed)).frame()?;
        let asid = Asid::ZERO;
        Some(Root { frame, asid })
    }

    fn kernel(&self) -> Name {
        Name(self.kernel.load(Ordering::Acquire))
    }

    fn tagged(&self) -> bool {
        let most = if self.isolated { USER_TAG as usize } else { 0 } + SPACES;
        usize::from(self.tlb.tags()) > most
    }

    /// The tag of the user root, where the CPU has the slot.
    fn user_tag(&self, number: usize) -> Asid {
        if self.tagged() && !mutant!("asid-user-shares-the-tag") {
            Asid::new(number as u16 + USER_TAG)
        } else {
            tag_of(number, self.tagged())
        }
    }

    /// The counter of a root (`S1`).
    fn generation(&self, name: Name) -> &'m AtomicU64 {
        // Roots are often in a row.
        let place = name.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        &self.generations[place as usize % self.generations.len()]
    }

    /// Loads a root on this CPU, whose `busy` is set.
    ///
    /// # Safety
    ///
    /// As [`Mmu::load_root`].
    unsafe fn switch(&self, area: &AsidArea, root: Root, keep: bool) {
        let name = Name::of(root.frame);
        let generation = self.generation(name);
        if area.loaded.load(Ordering::Relaxed) == name.0 {
            area.lazy.store(false, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            let now = generation.load(Ordering::SeqCst);
            let (number, slot) = area.current();
            let missed = slot.generation() != now && !mutant!("asid-lazy-never-catches-up");
            if missed || !keep {
                self.drop_space(number, slot);
                slot.set_generation(now);
            }
            return;
        }
        area.loaded.store(SWITCHING, Ordering::Relaxed);
        area.lazy.store(false, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let now = if mutant!("asid-old-generation-is-new") {
            u64::MAX
        } else {
            generation.load(Ordering::SeqCst)
        };
        let (number, known) = if name == self.kernel() {
            (0, area.slots[0].holds(name))
        } else if self.tagged() {
            area.slot_for(name, SPACES)
        } else {
            (1, false)
        };
        let slot = &area.slots[number];
        let upto = slot.generation() == now || mutant!("asid-ignores-generations");
        let same = known && upto || !known && mutant!("asid-takes-a-tag-over");
        let fresh = same && keep && self.tagged();
        if !fresh {
            // Nothing is known of what the tag holds until it was dropped (A1).
            slot.forget();
            slot.spoil_user();
        }
        let asid = tag_of(number, self.tagged());
        let root = Root { asid, ..root };
        // SAFETY: the caller's promise; `fresh` says that the tag holds this root's translations alone (A1, A2).
        unsafe { self.tlb.load(root, fresh) };
        slot.assign(name, now);
        area.set_current(number);
        area.loaded.store(name.0, Ordering::Release);
    }

    /// Drops what this CPU holds of the space under its slot's tags; the slot is the current one.
    fn drop_space(&self, number: usize, slot: &Slot) {
        self.tlb.drop_current();
        self.drop_user(number, slot);
    }

    /// Drops everything under the user's tag, now or before it is used.
    fn drop_user(&self, number: usize, slot: &Slot) {
        if self.isolated
            && number > 0
            && !mutant!("asid-forgets-the-user-tag")
            && !(self.tagged() && self.tlb.drop_tag(self.user_tag(number)))
        {
            slot.spoil_user();
        }
    }

    /// Serves a flush on this CPU; `stamp` is its generation, 0 where it has none.
    fn serve(&self, area: &AsidArea, request: &FlushRequest, stamp: u64) {
        let name = Name::of(request.root.frame);
        if area.busy.load(Ordering::Relaxed) {
            self.serve_busy(area);
            return;
        }
        // In this order (S7).
        let (number, slot) = area.current();
        compiler_fence(Ordering::SeqCst);
        let here = area.loaded.load(Ordering::Relaxed) == name.0;
        if !here && stamp == 0 {
            // Without a generation the tag itself must go.
            for slot in area.slots.iter().filter(|slot| slot.holds(name)) {
                slot.forget();
            }
        }
        let now = self.generation(name).load(Ordering::SeqCst);
        let leaves = here && area.is_lazy() && request.tables_freed && name != self.kernel();
        if leaves {
            self.leave_lazily(area);
            if !request.global {
                return;
            }
        }
        let here = here && !leaves;
        if request.global && self.isolated && !mutant!("asid-kernel-pages-under-one-tag") {
            self.spoil_others(area);
        }
        let (range, stride) = match request.scope {
            FlushScope::Pages { range, stride }
                if range.count().div_ceil(stride.max(1)) <= FLUSH_CEILING =>
            {
                (range, stride.max(1))
            }
            FlushScope::Everything => return self.serve_everything(slot, here, now),
            _ if request.global => return self.serve_everything(slot, here, now),
            _ => {
                if here {
                    self.drop_space(number, slot);
                    slot.set_generation(now);
                }
                return;
            }
        };
        if !here && !request.global {
            return;
        }
        if here && stamp != 0 {
            let had = slot.generation();
            if had >= stamp && !request.global {
                return;
            }
            if had + 1 != stamp && !mutant!("asid-partial-for-several") {
                // Another change was missed as well (S2).
                if request.global {
                    return self.serve_everything(slot, here, now);
                }
                self.drop_space(number, slot);
                slot.set_generation(now);
                return;
            }
        }
        for page in pages(range, stride) {
            self.tlb.drop_page(page);
            if here && self.isolated && number > 0 && !mutant!("asid-forgets-the-user-tag") {
                let gone = !request.tables_freed
                    && self.tagged()
                    && self.tlb.drop_page_of(self.user_tag(number), page);
                if !gone {
                    slot.spoil_user();
                }
            }
        }
        if here && stamp != 0 {
            slot.set_generation(stamp);
        }
    }

    /// Has everything dropped before it is used that is not under the current tag: with isolation CR4.PGE is clear, and the kernel's pages are
    /// cached under every tag (`S6`).
    fn spoil_others(&self, area: &AsidArea) {
        let (current, slot) = area.current();
        slot.spoil_user();
        for (number, slot) in area.slots.iter().enumerate() {
            if number != current {
                slot.forget();
            }
        }
    }

    /// Serves a flush of everything on this CPU.
    fn serve_everything(&self, slot: &Slot, here: bool, now: u64) {
        self.tlb.drop_all();
        if here {
            slot.set_generation(now);
        }
    }

    /// Serves a flush that came in the middle of `load_root` (`S4`).
    fn serve_busy(&self, area: &AsidArea) {
        if mutant!("asid-busy-does-nothing") {
            return;
        }
        area.missed.store(true, Ordering::Relaxed);
        if let Some(frame) = self.kernel().frame() {
            let asid = Asid::ZERO;
            // SAFETY: the kernel's root maps what the kernel needs, for ever (`set_kernel_root`).
            unsafe { self.tlb.load(Root { frame, asid }, false) };
        }
        self.tlb.drop_all();
    }

    /// Leaves a borrowed space for the kernel's root, in an interrupt (`S3`).
    fn leave_lazily(&self, area: &AsidArea) {
        let Some(frame) = self.kernel().frame() else {
            // `enter_lazy` refuses without one.
            return;
        };
        let asid = Asid::ZERO;
        area.current().1.forget();
        area.busy.store(true, Ordering::Relaxed);
        // SAFETY: the kernel's root maps what the kernel needs, for ever (`set_kernel_root`).
        unsafe { self.switch(area, Root { frame, asid }, true) };
        area.lazy.store(true, Ordering::Relaxed);
        area.busy.store(false, Ordering::Relaxed);
    }
}

/// The first page of each leaf in a range.
fn pages(range: kmem_hal::PageRange, stride: u64) -> impl Iterator<Item = Page> {
    let (first, last) = (range.first().number(), range.last().number());
    let count = (last - first) / stride;
    (0..=count).map(move |step| Page::from_number(first + step * stride))
}

// SAFETY: M1: `serve` drops what the request names under the tags that this CPU uses now; what is under other tags it drops before it uses
// them again, for their slots miss the generation that `flush_targets` counted, or are forgotten. M2: `run_on` returns when every CPU has
// served. M3: a CPU that has a root loaded, or is about to, says so (A3); the fence orders the entry stores before the look, and that of
// `switch` the announcement before the look at the generation. Lazy CPUs use no user address, and are told where tables are freed. M4: T6.
// M5: as M3.
unsafe impl<T: Tlb + Sync, C: Cpu + CpuCall + Sync> Mmu for AsidMmu<'_, T, C> {
    unsafe fn load_root(&self, root: Root, keep: bool) {
        let pin = self.cpus.pin();
        let area = self.area(pin.id());
        loop {
            area.missed.store(false, Ordering::Relaxed);
            area.busy.store(true, Ordering::Relaxed);
            compiler_fence(Ordering::SeqCst);
            // SAFETY: the caller's promise is passed on.
            unsafe { self.switch(area, root, keep) };
            compiler_fence(Ordering::SeqCst);
            area.busy.store(false, Ordering::Relaxed);
            compiler_fence(Ordering::SeqCst);
            if !area.missed.load(Ordering::Relaxed) || mutant!("asid-busy-is-not-redone") {
                return;
            }
            // The interrupt may have left another root (S4).
            area.loaded.store(SWITCHING, Ordering::Relaxed);
        }
    }

    fn flush_local(&self, request: &FlushRequest) {
        let pin = self.cpus.pin();
        let area = self.area(pin.id());
        let stamp = area.stamp();
        area.put_stamp(0);
        self.serve(area, request, stamp);
    }

    fn active_cpus(&self, root: Root) -> CpuSet {
        fence(Ordering::SeqCst);
        let name = Name::of(root.frame);
        let may_hold = |area: &AsidArea| {
            area.has_loaded(name) || area.slots.iter().any(|slot| slot.holds(name))
        };
        let cpus = self.areas.iter();
        cpus.filter(|(_, area)| may_hold(area))
            .map(|(cpu, _)| cpu)
            .collect()
    }

    fn flush_targets(&self, request: &FlushRequest) -> CpuSet {
        let name = Name::of(request.root.frame);
        let counter = self.generation(name);
        let stamp = if mutant!("asid-counts-after-the-look") {
            0
        } else {
            1 + counter.fetch_add(1, Ordering::SeqCst)
        };
        let pin = self.cpus.pin();
        self.area(pin.id()).put_stamp(stamp);
        if request.global && !mutant!("asid-global-goes-to-few") {
            return CpuSet::first(self.cpus.count());
        }
        fence(Ordering::SeqCst);
        let lazy_too = request.tables_freed && !mutant!("asid-lazy-keeps-freed-tables");
        let needs = |area: &AsidArea| {
            area.has_loaded(name)
                && (lazy_too || !area.is_lazy())
                && !(mutant!("asid-switching-is-nobody")
                    && area.loaded.load(Ordering::SeqCst) == SWITCHING)
        };
        let cpus = self.areas.iter();
        let targets = cpus
            .filter(|(_, area)| needs(area))
            .map(|(cpu, _)| cpu)
            .collect();
        if stamp == 0 {
            self.area(self.this_cpu())
                .put_stamp(1 + counter.fetch_add(1, Ordering::SeqCst));
        }
        targets
    }

    fn isolates(&self) -> bool {
        self.isolated
    }

    fn is_loaded(&self, root: Root) -> bool {
        fence(Ordering::SeqCst);
        let name = Name::of(root.frame);
        self.areas.iter().any(|(_, area)| area.has_loaded(name))
    }

    fn this_cpu(&self) -> CpuId {
        self.cpus.pin().id()
    }

    /// # Panics
    ///
    /// Where the other CPUs cannot be called: a commit with interrupts off, or CPUs without a [`CpuCall`] (`NoCpuCall`) of which another runs the
    /// space.
    fn shootdown(&self, cpus: &CpuSet, request: &FlushRequest) -> Completion {
        let stamp = {
            let pin = self.cpus.pin();
            self.area(pin.id()).stamp()
        };
        let done = self
            .cpus
            .run_on(cpus, &|cpu| self.serve(self.area(cpu), request, stamp));
        if let Err(error) = done {
            panic!("a flush of other CPUs: {error}");
        }
        Completion::DONE
    }

    fn asid_count(&self) -> u16 {
        // It deals them out itself.
        1
    }
}

impl<T, C> fmt::Debug for AsidMmu<'_, T, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AsidMmu")
            .field("kernel", &Name(self.kernel.load(Ordering::Relaxed)).frame())
            .field("isolated", &self.isolated)
            .finish_non_exhaustive()
    }
}
