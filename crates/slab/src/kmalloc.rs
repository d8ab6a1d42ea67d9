//! kmalloc, kfree, krealloc, ksize; and the same calls in the shape of `GlobalAlloc`.
//!
//! A free that knows the layout needs no look-up at all: the class is a function of size and alignment. A free by pointer alone
//! finds the slab through the frame table.
//!
//! The calls with a layout are inlined always: where it is known when the program is built, so is the class, and a compiler that finds a policy's
//! checks too large to be inlined leaves a table's look-up and three tests in each call.

use core::alloc::Layout;
use core::panic::Location;
use core::ptr::{self, NonNull};

use kmem_hal::sync::Ordering;
use kmem_hal::{
    AllocError, Context, Cpu, FrameRequest, LargeSource, NodePolicy, Order, PAGE_SIZE, PhysAddr,
};

use crate::class::{CLASSES, class_of, class_size};
use crate::head::COLUMNS;
use crate::misuse::Misuse;
use crate::platform::Platform;
use crate::policy::{Features, Policy};
use crate::raw::RawCache;
use crate::registry::GUARD;
use crate::slab::Slab;
use crate::system::SlabSystem;

bitflags::bitflags! {
    /// How an allocation may be served. No flag: from any context, never waiting (`GFP_ATOMIC`).
    #[doc(alias = "gfp_t")]
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
    pub struct Flags: u16 {
        /// The page source may wait and reclaim for a new slab (`GFP_KERNEL`).
        #[doc(alias = "GFP_KERNEL")]
        const MAY_WAIT = 1 << 0;
        /// As `MAY_WAIT`, without starting I/O (`GFP_NOIO`).
        #[doc(alias = "GFP_NOIO")]
        const NO_IO = 1 << 1;
        /// As `MAY_WAIT`, without reclaim: the caller is part of it.
        const NO_RECLAIM = 1 << 2;
        /// Every byte is zero (`__GFP_ZERO`).
        #[doc(alias = "__GFP_ZERO")]
        #[doc(alias = "kzalloc")]
        const ZERO = 1 << 3;
        /// The caller is prepared for a refusal: count it, and do not tell [`Platform::refused`] (`__GFP_NOWARN`).
        #[doc(alias = "__GFP_NOWARN")]
        const NO_WARN = 1 << 4;
        /// Below 16 MiB; served in whole pages (`GFP_DMA`).
        #[doc(alias = "GFP_DMA")]
        const DMA = 1 << 5;
        /// Below 4 GiB; served in whole pages (`GFP_DMA32`).
        #[doc(alias = "GFP_DMA32")]
        const DMA32 = 1 << 6;
        /// From the last reserves: for code whose success frees memory (`__GFP_MEMALLOC`).
        #[doc(alias = "__GFP_MEMALLOC")]
        const RESERVE = 1 << 7;
    }
}

impl Flags {
    pub(crate) fn request(self) -> FrameRequest {
        let mut request =
            FrameRequest::new(Order::ZERO).context(if self.contains(Self::NO_RECLAIM) {
                Context::NoReclaim
            } else if self.contains(Self::NO_IO) {
                Context::NoIo
            } else if self.contains(Self::MAY_WAIT) {
                Context::MayWait
            } else {
                Context::Atomic
            });
        if self.contains(Self::RESERVE) {
            request = request.with_reserve();
        }
        if self.contains(Self::ZERO) {
            request = request.zeroed();
        }
        if self.contains(Self::DMA) {
            request = request.below(PhysAddr::new(16 << 20));
        } else if self.contains(Self::DMA32) {
            request = request.below(PhysAddr::new(4 << 30));
        }
        request
    }

    /// Whether only memory below some address will do.
    #[inline(always)]
    pub(crate) fn limited(self) -> bool {
        self.intersects(Self::DMA.union(Self::DMA32))
    }
}

/// What a pointer turned out to be.
enum Found<'s, L> {
    Object(&'s RawCache<L>, &'s Slab),
    Pages(kmem_hal::Frame, u64),
    Large,
    Stranger,
}

/// The value of a zero-sized allocation: aligned, never read.
fn dangling(align: usize) -> NonNull<u8> {
    NonNull::new(ptr::without_provenance_mut(align)).unwrap_or(NonNull::dangling())
}

impl<P: Platform> SlabSystem<P> {
    /// `size` bytes, aligned to 8, and to `size` itself where that is a power of two up to a page.
    ///
    /// Zero bytes are served as one. Sizes above 8 KiB may come from the large source, if that works in any context or the flags say that
    /// the caller may wait; those above 4 MiB come from nowhere else.
    ///
    /// # Errors
    ///
    /// [`AllocError`]; out of memory is an ordinary answer.
    #[doc(alias = "kzalloc")]
    #[inline]
    #[track_caller]
    pub fn kmalloc(&self, size: usize, flags: Flags) -> Result<NonNull<u8>, AllocError> {
        self.serve(size.max(1), Self::natural(size), flags)
    }

    /// What `kmalloc` aligns so many bytes to where the class would not do it.
    ///
    /// A power of two is a class whose objects lie at multiples of it; with a policy's bytes beside the object, it is another.
    #[inline(always)]
    fn natural(size: usize) -> usize {
        if Self::FEATURES.check && size.is_power_of_two() && size as u64 <= PAGE_SIZE {
            size.max(8)
        } else {
            8
        }
    }

    /// Memory for `layout`. A size of zero costs nothing and gives an aligned pointer.
    ///
    /// # Errors
    ///
    /// [`AllocError`].
    #[inline(always)]
    #[track_caller]
    pub fn kmalloc_layout(&self, layout: Layout, flags: Flags) -> Result<NonNull<u8>, AllocError> {
        if layout.size() == 0 {
            return Ok(dangling(layout.align()));
        }
        self.serve(layout.size(), layout.align(), flags)
    }

    /// The class that serves so many bytes and what the policy adds to them.
    #[inline(always)]
    fn class_for(size: usize, align: usize) -> Option<usize> {
        // A sum beyond the address space is beyond every class too.
        class_of(size.saturating_add(Self::FEATURES.extra(align)), align)
    }

    const FEATURES: Features = P::Policy::FEATURES;

    #[inline(always)]
    #[track_caller]
    fn serve(&self, size: usize, align: usize, flags: Flags) -> Result<NonNull<u8>, AllocError> {
        let class = match Self::class_for(size, align) {
            Some(class) if !flags.limited() => class,
            _ => {
                return self
                    .alloc_large(size, align, &flags.request())
                    .map_err(|error| self.tell_refused(size, error, flags));
            }
        };
        if Self::FEATURES.sample > 0
            && let Some(object) = self.alloc_guarded(size, align, flags)
        {
            return Ok(object);
        }
        let row = self.first_row();
        if row.is_null() {
            return Err(AllocError::NotInitialised);
        }
        const { assert!(CLASSES < COLUMNS) };
        // SAFETY: the first row, not null; class `i` has index `i`, so its column in that row is `i`.
        let object = match unsafe { self.pop_local(row, class as u32) } {
            Some(object) => object,
            None => self.serve_slow(class, size, flags)?,
        };
        Ok(self.hand_out(class, object, size, align, flags))
    }

    /// What is done to a slot of a class before a user has the object in it.
    #[inline(always)]
    #[track_caller]
    fn hand_out(
        &self,
        class: usize,
        slot: NonNull<u8>,
        size: usize,
        align: usize,
        flags: Flags,
    ) -> NonNull<u8> {
        let object = self.on_alloc(
            Self::FEATURES,
            || self.class(class).map(NonNull::from),
            class as u32,
            Self::FEATURES.front(align),
            slot,
            size,
            Location::caller(),
        );
        if flags.contains(Flags::ZERO) {
            // All that may be used, since `krealloc` may let the object grow in place.
            let usable = match class_size(class) {
                Some(slot) if !Self::FEATURES.keeps_size() => slot - Self::FEATURES.front(align),
                _ => size,
            };
            // SAFETY: the object has at least `size` bytes, and all behind its tag where there is no record, and belongs to this call.
            unsafe { object.write_bytes(0, usable) };
        }
        object
    }

    /// Counts an allocation for [`Guard`](crate::Guard); answers whether it is one in so many of the calling CPU. A word of that CPU's alone: a count for all would cost each call
    /// a locked instruction.
    fn is_turn(&self, platform: &P) -> bool {
        let pin = platform.cpu().pin();
        // SAFETY: the first row, not null where there is a platform, has a place for every CPU (hal C3).
        let page = unsafe { &*self.first_row().add(pin.id().index()) }.load(Ordering::Acquire);
        // SAFETY: pages in a row live as long as the system.
        let Some(page) = (unsafe { page.as_ref() }) else {
            return false;
        };
        let turns = &page.head(GUARD).allocs;
        let turn = turns.get();
        turns.set(turn.wrapping_add(1));
        turn.is_multiple_of(u64::from(Self::FEATURES.sample))
    }

    /// Where in its page a guarded object of up to a page lies: at the end.
    #[inline(always)]
    fn guarded_at(size: usize, align: usize) -> usize {
        (PAGE_SIZE as usize).saturating_sub(size) & !(align - 1)
    }

    /// One in so many allocations, at the end of a page of its own, where the large source has room and a guard page behind.
    #[cold]
    fn alloc_guarded(&self, size: usize, align: usize, flags: Flags) -> Option<NonNull<u8>> {
        let (platform, page) = (self.platform()?, PAGE_SIZE as usize);
        if !self.is_turn(platform) || size > page || align > page {
            return None;
        }
        if !self.may_ask_large(platform, flags.request().context) {
            return None;
        }
        let memory = platform.large().alloc_large(page, page).ok()?;
        // SAFETY: inside the page, which belongs to this call.
        let object = unsafe { memory.add(Self::guarded_at(size, align)) };
        if flags.contains(Flags::ZERO) {
            // SAFETY: as above.
            unsafe { memory.write_bytes(0, page) };
        }
        Some(object)
    }

    #[cold]
    #[inline(never)]
    fn serve_slow(
        &self,
        class: usize,
        size: usize,
        flags: Flags,
    ) -> Result<NonNull<u8>, AllocError> {
        let cache = self.class(class).ok_or(AllocError::NotInitialised)?;
        self.alloc_slow(cache, &flags.request())
            .map_err(|error| self.tell_refused(size, error, flags))
    }

    /// Tells the platform of a refusal, if the caller did not ask for silence; gives the error on.
    #[cold]
    pub(crate) fn tell_refused(&self, bytes: usize, error: AllocError, flags: Flags) -> AllocError {
        if let Some(platform) = self.platform()
            && !flags.contains(Flags::NO_WARN)
        {
            platform.refused(bytes, error);
        }
        error
    }

    /// `size` bytes from the memory of a node: an object of its slabs, or whole pages where `kmalloc` would give such.
    ///
    /// [`NodePolicy::Local`] is [`kmalloc`](Self::kmalloc), which is faster: it gives what was freed on this CPU last, wherever that came from, and
    /// otherwise memory of the CPU's node. This call takes the lock of the node's depot. The memory is freed as any other.
    ///
    /// # Errors
    ///
    /// [`AllocError`]; with [`NodePolicy::Strict`] also where another node has memory.
    #[track_caller]
    pub fn kmalloc_node(
        &self,
        size: usize,
        flags: Flags,
        node: NodePolicy,
    ) -> Result<NonNull<u8>, AllocError> {
        if node == NodePolicy::Local {
            return self.kmalloc(size, flags);
        }
        let (size, align) = (size.max(1), Self::natural(size));
        let served = match Self::class_for(size, align).filter(|_| !flags.limited()) {
            Some(class) => {
                let cache = self.class(class).ok_or(AllocError::NotInitialised)?;
                let request = flags.request().node(self.depot_policy(node));
                let served = match request.node {
                    NodePolicy::Local => self.alloc_object(cache, &request),
                    _ => self.alloc_slow(cache, &request),
                };
                // Not in a closure, which would be the caller that `Owner` remembers.
                match served {
                    Ok(slot) => Ok(self.hand_out(class, slot, size, align, flags)),
                    Err(error) => Err(error),
                }
            }
            None => self.alloc_large(size, align, &flags.request().node(node)),
        };
        served.map_err(|error| self.tell_refused(size, error, flags))
    }

    fn find<'s>(&'s self, platform: &'s P, memory: NonNull<u8>) -> Found<'s, P::Lock> {
        if let Some(slab) = Self::slab_of(platform, memory.as_ptr()) {
            // SAFETY: a descriptor's cache lives as long as the descriptor; the owner word tells whether it is ours.
            let cache = unsafe { slab.cache().cast::<RawCache<P::Lock>>().as_ref() };
            return match cache {
                Some(cache) if ptr::eq(cache.owner, self.token()) => Found::Object(cache, slab),
                _ => Found::Stranger,
            };
        }
        if let Some((frame, count)) = self.page_count(platform, memory.as_ptr()) {
            return Found::Pages(frame, count);
        }
        if platform.large().contains(memory.as_ptr()) {
            return Found::Large;
        }
        Found::Stranger
    }

    /// Frees memory by its pointer alone. Null is nothing.
    ///
    /// In any context, except for what a large source gave that is for tasks only, as vmalloc is: only sizes above 8 KiB that were allocated
    /// with a flag that allows waiting (and, under [`Guard`](crate::Guard), any size) can lie there.
    ///
    /// # Safety
    ///
    /// `memory` is null or came from this system and is not freed twice; it is no object of a cache that was dropped or destroyed. (A pointer that the system never gave, or that is free
    /// already, is reported where that is found out, and nothing is corrupted by it as far as the allocator goes.)
    pub unsafe fn kfree(&self, memory: *mut u8) {
        // SAFETY: the caller's promise.
        unsafe { self.free_found(memory, None) }
    }

    /// As [`kfree`](Self::kfree); `beyond` is the layout that the caller says it asked for, where no class serves that.
    ///
    /// # Safety
    ///
    /// As [`kfree`](Self::kfree).
    unsafe fn free_found(&self, memory: *mut u8, beyond: Option<Layout>) {
        let (Some(memory), Some(platform)) = (NonNull::new(memory), self.platform()) else {
            return;
        };
        match self.find(platform, memory) {
            Found::Object(cache, slab) => {
                if !cache.setup.features.check {
                    // SAFETY: the caller gives the object up.
                    return unsafe { self.free_object(cache, memory) };
                }
                if let Some(layout) = beyond {
                    return self.refuse(cache, memory, layout.align(), Some(layout.size()));
                }
                let Some(front) = self.front_of(cache, slab, memory) else {
                    return self.refuse(cache, memory, 0, None);
                };
                let (features, cache_of) = (cache.setup.features, || Some(NonNull::from(cache)));
                // SAFETY: the caller gives the object up; what `on_free` leaves belongs to that cache.
                unsafe {
                    let left = self.on_free(features, cache_of, cache.index, front, memory, None);
                    if let Some(slot) = left {
                        self.free_object(cache, slot);
                    }
                }
            }
            // SAFETY: the numbers are those of the allocation that the caller gives up.
            Found::Pages(frame, count) => unsafe { self.free_pages(platform, frame, count) },
            // SAFETY: the large source says that the memory is its own.
            Found::Large => unsafe {
                platform
                    .large()
                    .free_large(area_of(platform.large(), memory))
            },
            Found::Stranger => {
                self.foreign.fetch_add(1, Ordering::Relaxed);
                platform.misuse(&Misuse::ForeignFree {
                    address: memory.as_ptr().addr(),
                });
            }
        }
    }

    /// Frees memory whose layout the caller knows: the fast way.
    ///
    /// # Safety
    ///
    /// `memory` came from [`kmalloc_layout`](Self::kmalloc_layout) of this system with this layout, without an address limit, and is
    /// not freed twice.
    #[inline(always)]
    pub unsafe fn kfree_layout(&self, memory: NonNull<u8>, layout: Layout) {
        if layout.size() == 0 {
            // No memory stands behind it, however it is aligned.
            return;
        }
        let Some(class) = Self::class_for(layout.size(), layout.align()) else {
            // SAFETY: the caller's promise.
            return unsafe { self.free_found(memory.as_ptr(), Some(layout)) };
        };
        let row = self.first_row();
        if row.is_null() {
            return;
        }
        if Self::FEATURES.sample > 0
            && memory.as_ptr().addr() % PAGE_SIZE as usize
                == Self::guarded_at(layout.size(), layout.align())
            && self.is_guarded(memory)
        {
            // SAFETY: the caller's promise.
            return unsafe { self.kfree(memory.as_ptr()) };
        }
        // SAFETY: the caller gives the object up.
        let left = unsafe {
            self.on_free(
                Self::FEATURES,
                || self.class(class).map(NonNull::from),
                class as u32,
                Self::FEATURES.front(layout.align()),
                memory,
                Some(layout.size()),
            )
        };
        let Some(memory) = left else { return };
        // SAFETY: the first row, not null; the object's class follows from its layout, and the caller gives it up.
        if !unsafe { self.push_local(row, class as u32, memory) } {
            self.free_class_slow(class, memory);
        }
    }

    #[cold]
    #[inline(never)]
    fn free_class_slow(&self, class: usize, memory: NonNull<u8>) {
        if let Some(cache) = self.class(class) {
            self.free_slow(cache, memory);
        }
    }

    /// Whether the memory lies in an area of the large source.
    #[cold]
    fn is_guarded(&self, memory: NonNull<u8>) -> bool {
        self.platform()
            .is_some_and(|platform| platform.large().contains(memory.as_ptr()))
    }

    /// The usable size in bytes of memory from this system.
    ///
    /// `None` for what the system finds out not to be such memory: a pointer that it never gave, one into the middle of an object and, under
    /// [`Check`](crate::Check), an object that is free. Without that policy a free object's size is that of its class.
    ///
    /// # Safety
    ///
    /// Memory of this system that `memory` points to is not freed during the call, nor was its cache dropped or destroyed.
    #[must_use]
    pub unsafe fn ksize(&self, memory: NonNull<u8>) -> Option<usize> {
        self.look(memory).map(|(_, had)| had)
    }

    /// What is at `memory`, and its usable size in bytes.
    fn look(&self, memory: NonNull<u8>) -> Option<(Found<'_, P::Lock>, usize)> {
        let platform = self.platform()?;
        let found = self.find(platform, memory);
        let had = match found {
            Found::Object(cache, slab) => self.usable(cache, slab, memory)?,
            Found::Pages(_, count) => (count * PAGE_SIZE) as usize,
            Found::Large => {
                let area = area_of(platform.large(), memory);
                let before = memory.as_ptr().addr() - area.as_ptr().addr();
                platform.large().size_of(area)?.saturating_sub(before)
            }
            Found::Stranger => return None,
        };
        Some((found, had))
    }

    /// Changes the size of memory from [`kmalloc`](Self::kmalloc): in place where its class, its pages or its large area allow it.
    ///
    /// Null allocates. The bytes up to the smaller size are kept. Where the memory was allocated with `ZERO`, and each change of its size asks for that too,
    /// all beyond them are zero (Linux, mm/slub.c, krealloc); else with `ZERO` those beyond the old usable size are. Flags that limit the
    /// address move the memory always, as it may have been allocated without them.
    ///
    /// # Errors
    ///
    /// [`AllocError`]; the old memory is as it was then.
    ///
    /// # Safety
    ///
    /// `memory` is null or came from this system, and is not used afterwards where the call succeeds.
    #[track_caller]
    pub unsafe fn krealloc(
        &self,
        memory: *mut u8,
        size: usize,
        flags: Flags,
    ) -> Result<NonNull<u8>, AllocError> {
        let Some(old) = NonNull::new(memory) else {
            return self.kmalloc(size, flags);
        };
        let (found, had) = self.look(old).ok_or(AllocError::Unsatisfiable)?;
        let (bytes, align) = (size.max(1), Self::natural(size));
        // SAFETY: the caller's promise; the memory stays the caller's.
        if !flags.limited() && unsafe { self.resize_in_place(&found, old, had, bytes, align) } {
            if flags.contains(Flags::ZERO) && size < had {
                // SAFETY: the caller's memory has `had` usable bytes, of which it keeps `size`.
                unsafe { old.add(size).write_bytes(0, had - size) };
            }
            return Ok(old);
        }
        let new = self.kmalloc(size, flags)?;
        // SAFETY: both are valid for the smaller size, and the new one belongs to this call; the old one is the caller's to free.
        unsafe {
            ptr::copy_nonoverlapping(old.as_ptr(), new.as_ptr(), had.min(size));
            self.kfree(memory);
        }
        Ok(new)
    }

    /// `GlobalAlloc::alloc`: memory for `layout`, null where there is none or before `init`.
    ///
    /// As without flags, from any context: above 4 MiB only from a large source that works in any.
    #[inline(always)]
    #[track_caller]
    pub fn alloc(&self, layout: Layout) -> *mut u8 {
        match self.kmalloc_layout(layout, Flags::empty()) {
            Ok(memory) => memory.as_ptr(),
            Err(_) => ptr::null_mut(),
        }
    }

    /// `GlobalAlloc::alloc_zeroed`.
    #[inline]
    #[track_caller]
    pub fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        match self.kmalloc_layout(layout, Flags::ZERO) {
            Ok(memory) => memory.as_ptr(),
            Err(_) => ptr::null_mut(),
        }
    }

    /// `GlobalAlloc::dealloc`.
    ///
    /// # Safety
    ///
    /// As [`kfree_layout`](Self::kfree_layout).
    #[inline(always)]
    pub unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        if let Some(memory) = NonNull::new(memory) {
            // SAFETY: the caller's promise.
            unsafe { self.kfree_layout(memory, layout) }
        }
    }

    /// `GlobalAlloc::realloc`: the same pointer where the class or the pages stay the same. Memory of size 0 has no bytes to keep.
    ///
    /// # Safety
    ///
    /// `memory` came from this system with `layout`; `new_size` is not 0 and does not overflow when rounded up to the alignment.
    #[track_caller]
    pub unsafe fn realloc(&self, memory: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        let align = layout.align();
        // SAFETY: the caller vouches for the size; the alignment is a layout's.
        let wanted = unsafe { Layout::from_size_align_unchecked(new_size, align) };
        if layout.size() == 0 {
            // There is no memory behind the old pointer.
            return self.alloc(wanted);
        }
        let old_class = Self::class_for(layout.size(), align);
        let same = match (old_class, Self::class_for(new_size, align)) {
            (Some(old), Some(new)) => {
                old == new
                    && !Self::FEATURES.keeps_size()
                    && Self::FEATURES.sample == 0
                    && (!Self::FEATURES.check
                        // SAFETY: the caller's promise; the object stays the caller's.
                        || NonNull::new(memory).is_some_and(|memory| unsafe {
                            let front = Self::FEATURES.front(align);
                            self.retag(new as u32, front, memory, Some(layout.size()), new_size)
                        }))
            }
            (None, None) => NonNull::new(memory)
                .and_then(|memory| Some((memory, self.look(memory)?)))
                // SAFETY: the caller's promise; the memory stays the caller's.
                .is_some_and(|(memory, (found, had))| unsafe {
                    self.resize_in_place(&found, memory, had, new_size, align)
                }),
            _ => false,
        };
        if same {
            return memory;
        }
        let new = self.alloc(wanted);
        if !new.is_null() {
            // SAFETY: both are valid for the smaller size and differ; the caller gives the old one up.
            unsafe {
                ptr::copy_nonoverlapping(memory, new, layout.size().min(new_size));
                self.dealloc(memory, layout);
            }
        }
        new
    }

    /// Whether memory with `had` usable bytes, found as told, is what `size` bytes at multiples of `align` would get; an object has that size from
    /// now on.
    ///
    /// # Safety
    ///
    /// The memory is in use, and the caller's.
    unsafe fn resize_in_place(
        &self,
        found: &Found<'_, P::Lock>,
        memory: NonNull<u8>,
        had: usize,
        size: usize,
        align: usize,
    ) -> bool {
        let features = Self::FEATURES;
        let is_exact = features.keeps_size() || features.sample > 0;
        if !memory.as_ptr().addr().is_multiple_of(align) || (is_exact && had != size) {
            return false;
        }
        match (found, Self::class_for(size, align)) {
            // A free with a layout takes from it the class, and what is in front of the object.
            (&Found::Object(cache, slab), Some(class)) if cache.index as usize == class => {
                let front = features.front(align);
                !features.check
                    || self.front_of(cache, slab, memory) == Some(front)
                        // SAFETY: the caller's promise.
                        && unsafe { self.retag(cache.index, front, memory, None, size) }
            }
            (Found::Pages(..) | Found::Large, None) => {
                size <= had && size.div_ceil(PAGE_SIZE as usize) == had.div_ceil(PAGE_SIZE as usize)
            }
            // A guarded object.
            (Found::Large, Some(_)) => features.sample > 0,
            _ => false,
        }
    }
}

/// The area of the large source that `memory`, which may be a guarded object at the end of a page, belongs to.
fn area_of(large: &impl LargeSource, memory: NonNull<u8>) -> NonNull<u8> {
    if large.size_of(memory).is_some() {
        return memory;
    }
    let before = memory.as_ptr().addr() % PAGE_SIZE as usize;
    // SAFETY: the page's start is not null: it is inside the area.
    unsafe { memory.sub(before) }
}
