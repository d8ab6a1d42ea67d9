//! Backing objects: files and shared memory, and the cache of their pages.
//!
//! A VMA with a backing object maps pages of the object. The object keeps one frame per page that was touched; every
//! mapping of that page, in whatever space, maps that frame, so that all see each other's writes.
//!
//! ```text
//!   Vma.file ──> FileRef { object, open } ──> Object ── page 7 ──> frame ── slot: 1 reference of the cache,
//!   Vma.file ──┘                                                              1 of all mappings together
//! ```
//!
//! Two opens of one file share the object and its pages, and never merge: they are different [`FileRef`]s, as they
//! are different `struct file`s in Linux.
//!
//! Invariants
//! - `I1`: an object lives while its reference count is not 0: one for each open handle and for each VMA.
//! - `I2`: a page in the cache holds one reference of its frame; it leaves the cache only when the object ends.
//! - `I3`: a page whose slot does not say `UP_TO_DATE` is on its way from the provider; its ticket is in the slot's
//!   word of links, and nobody maps it.

use core::fmt;
use core::ptr::NonNull;

use kmem_hal::sync::{AtomicU32, Ordering};
use kmem_hal::{
    AllocError, Frame, FrameRequest, FrameTag, IoState, IoTicket, Mobility, ObjectAlloc, Order,
    Page, PageProvider, PageRange, RawSleepLock, SleepLock, SlotFlags,
};
use kmem_vma_tree::{Node, RangeTree};

use crate::env::Env;
use crate::errno::Errno;
use crate::handle::Handle;
use crate::mm::Mm;

/// An allocator somewhere else, for as long as the environment lives (`E3` of [`Env`]).
#[derive(Debug)]
pub struct Borrowed<A>(NonNull<A>);

// SAFETY: a shared reference to an allocator that is shared anyway.
unsafe impl<A: Sync> Send for Borrowed<A> {}
// SAFETY: as above.
unsafe impl<A: Sync> Sync for Borrowed<A> {}

impl<A> Borrowed<A> {
    fn get(&self) -> &A {
        // SAFETY: `E3` of `Env`: the allocator outlives the objects that hold this.
        unsafe { self.0.as_ref() }
    }
}

// SAFETY: forwards to an allocator that keeps the contract.
unsafe impl<T, A: ObjectAlloc<T>> ObjectAlloc<T> for Borrowed<A> {
    const TYPE_STABLE: bool = A::TYPE_STABLE;

    fn alloc(&self) -> Result<NonNull<T>, AllocError> {
        self.get().alloc()
    }

    unsafe fn free(&self, object: NonNull<T>) {
        // SAFETY: the caller's promise is passed on.
        unsafe { self.get().free(object) }
    }
}

/// In place of a ticket: the provider refused or failed, and the next look-up asks again.
const NOT_STARTED: u64 = u64::MAX;

/// Which object a mapping maps, and through which open of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileRef {
    object: NonNull<()>,
    open: u32,
}

// SAFETY: an address and a number; what is behind the address is reached through `Mm`, whose objects are shareable.
unsafe impl Send for FileRef {}
// SAFETY: as above.
unsafe impl Sync for FileRef {}

/// What an object's pages come from.
#[derive(Clone, Copy)]
enum Backing {
    /// Shared memory of so many pages: zero until written.
    Shared(u64),
    /// A file.
    File(NonNull<dyn PageProvider + Sync>),
}

/// A file or shared memory, with the cache of its pages.
#[doc(alias = "address_space")]
pub struct Object<N: ObjectAlloc<Node>, L: RawSleepLock> {
    references: AtomicU32,
    opens: AtomicU32,
    number: u32,
    inode: u64,
    /// Pages that are charged for it while it lives (see `commit.rs`).
    promised: u64,
    name: Option<NonNull<str>>,
    backing: Backing,
    pages: SleepLock<RangeTree<Handle, Borrowed<N>>, L>,
}

/// What a look-up of an object's page found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ObjectPage {
    /// The page is here; the cache holds a reference for as long as the object lives.
    Ready(Frame),
    /// The page is on its way.
    NeedIo(IoTicket),
    /// Beyond the end: a bus error.
    Beyond,
}

/// What of an object `maps` prints.
#[derive(Clone, Copy, Debug)]
pub struct ObjectInfo<'a> {
    /// The path, or `/dev/zero (deleted)` for shared memory.
    pub name: &'a str,
    /// The inode number.
    pub inode: u64,
    /// Whether it is shared memory without a file.
    pub is_shared_memory: bool,
    /// Bytes.
    pub size: u64,
}

impl<'m, E: Env> Mm<'m, E> {
    /// Makes an object for a file; the handle returned holds a reference.
    ///
    /// `name` and `inode` are what `maps` prints.
    ///
    /// # Errors
    ///
    /// [`Errno::ENOMEM`].
    pub fn open_file(
        &self,
        provider: &'m (dyn PageProvider + Sync),
        name: &'m str,
        inode: u64,
    ) -> Result<FileRef, Errno> {
        let provider = NonNull::from(provider);
        // SAFETY: only the lifetime is erased: 'm outlives this `Mm`, and `Mm`'s users cannot outlive it.
        let provider = unsafe {
            core::mem::transmute::<
                NonNull<dyn PageProvider + Sync + 'm>,
                NonNull<dyn PageProvider + Sync + 'static>,
            >(provider)
        };
        self.new_object(Backing::File(provider), Some(NonNull::from(name)), inode)
    }

    /// Opens the same file again: the same pages, another `struct file`. Holds a reference of its own.
    #[must_use]
    pub fn reopen(&self, file: FileRef) -> FileRef {
        let object = self.object(file);
        object.references.fetch_add(1, Ordering::Relaxed);
        FileRef {
            open: object.opens.fetch_add(1, Ordering::Relaxed),
            ..file
        }
    }

    /// Gives an open handle back. Mappings keep the object alive.
    pub fn close(&self, file: FileRef) {
        self.put_object(file);
    }

    /// Makes an object of shared memory, `pages` long, of which `promised` are charged already and given back with it.
    #[doc(alias = "shmem_zero_setup")]
    pub(crate) fn new_shared(&self, pages: u64, promised: u64) -> Result<FileRef, Errno> {
        let file = self.new_object(Backing::Shared(pages), None, 0)?;
        // SAFETY: as in `object`; nobody else has seen the object yet.
        unsafe {
            let mut object = file.object.cast::<Object<E::Nodes, E::Lock>>();
            object.as_mut().promised = promised;
        }
        Ok(file)
    }

    fn new_object(
        &self,
        backing: Backing,
        name: Option<NonNull<str>>,
        inode: u64,
    ) -> Result<FileRef, Errno> {
        let memory = self.env().objects().alloc()?;
        let number = self.next_number();
        let inode = if inode == 0 { u64::from(number) } else { inode };
        let nodes = Borrowed(NonNull::from(self.env().nodes()));
        let object = Object {
            references: AtomicU32::new(1),
            opens: AtomicU32::new(1),
            number,
            inode,
            promised: 0,
            name,
            backing,
            pages: SleepLock::new(RangeTree::new_in(nodes)),
        };
        // SAFETY: the allocator gave memory for one object.
        unsafe { memory.as_ptr().write(object) };
        Ok(FileRef {
            object: memory.cast(),
            open: 0,
        })
    }

    pub(crate) fn object(&self, file: FileRef) -> &Object<E::Nodes, E::Lock> {
        // SAFETY: `I1`: whoever has a `FileRef` holds a reference, so the object lives.
        unsafe { file.object.cast::<Object<E::Nodes, E::Lock>>().as_ref() }
    }

    /// What `maps` prints of the object.
    #[must_use]
    pub fn object_info(&self, file: FileRef) -> ObjectInfo<'_> {
        let object = self.object(file);
        let (name, is_shared_memory) = match object.name {
            // SAFETY: `open_file` took the name for 'm.
            Some(name) => (unsafe { name.as_ref() }, false),
            None => ("/dev/zero (deleted)", true),
        };
        ObjectInfo {
            name,
            inode: object.inode,
            is_shared_memory,
            size: object.size(),
        }
    }

    /// Adds a reference for a VMA.
    pub(crate) fn get_object(&self, file: FileRef) {
        self.object(file).references.fetch_add(1, Ordering::Relaxed);
    }

    /// Takes a reference away; the last one ends the object and frees its pages.
    pub(crate) fn put_object(&self, file: FileRef) {
        if self.object(file).references.fetch_sub(1, Ordering::AcqRel) != 1 {
            return;
        }
        let memory = file.object.cast::<Object<E::Nodes, E::Lock>>();
        // SAFETY: the last reference is gone, so nobody else reaches the object; it is read out once.
        let object = unsafe { memory.as_ptr().read() };
        self.commit().adjust(object.promised, 0);
        let mut pages = object.pages;
        for entry in pages.get_mut().iter() {
            self.put_reference(entry.value.frame());
        }
        pages.get_mut().clear();
        drop(pages);
        // SAFETY: the value was read out, and the memory came from this allocator.
        unsafe { self.env().objects().free(memory) }
    }

    /// The frame of page `index` of the object, brought in where it must be.
    ///
    /// # Errors
    ///
    /// [`Errno::ENOMEM`], or [`Errno::EIO`] where the provider failed.
    pub(crate) fn object_page(&self, file: FileRef, index: u64) -> Result<ObjectPage, Errno> {
        let object = self.object(file);
        if index >= object.size().div_ceil(kmem_hal::PAGE_SIZE) {
            return Ok(ObjectPage::Beyond);
        }
        let page = Page::new(index).ok_or(Errno::EINVAL)?;
        let mut pages = object.pages.write();
        if let Some(entry) = pages.get(page) {
            return self.finish_read(object, index, entry.value.frame());
        }
        let frame = self.new_page(
            FrameTag::File,
            object.number,
            index,
            &FrameRequest::ONE.mobility(Mobility::Movable).zeroed(),
        )?;
        let range = PageRange::single(page);
        if pages
            .store(range, Some(Handle::of_frame(frame)), &mut |_| {})
            .is_err()
        {
            self.put_reference(frame);
            return Err(Errno::ENOMEM);
        }
        match object.backing {
            Backing::Shared(_) => {
                self.slot(frame).set_flags(SlotFlags::UP_TO_DATE);
                Ok(ObjectPage::Ready(frame))
            }
            Backing::File(provider) => self.start_read(provider, index, frame),
        }
    }

    /// Asks the provider for a page that is in the cache and not up to date.
    fn start_read(
        &self,
        provider: NonNull<dyn PageProvider + Sync>,
        index: u64,
        frame: Frame,
    ) -> Result<ObjectPage, Errno> {
        let slot = self.slot(frame);
        slot.links().store(NOT_STARTED, Ordering::Release);
        // SAFETY: `open_file` took the provider for 'm.
        match unsafe { provider.as_ref() }.read(index, frame) {
            Ok(IoState::Done) => {
                slot.set_flags(SlotFlags::UP_TO_DATE);
                Ok(ObjectPage::Ready(frame))
            }
            Ok(IoState::Pending(ticket)) => {
                slot.links().store(ticket.0, Ordering::Release);
                Ok(ObjectPage::NeedIo(ticket))
            }
            Err(_) => Err(Errno::EIO),
        }
    }

    /// The frame of page `index`, if the cache has it whole.
    pub(crate) fn cached_page(&self, file: FileRef, index: u64) -> Option<Frame> {
        let pages = self.object(file).pages.read();
        let frame = pages.get(Page::new(index)?)?.value.frame();
        self.slot(frame)
            .flags()
            .contains(SlotFlags::UP_TO_DATE)
            .then_some(frame)
    }

    /// Asks after a page that is in the cache (`I3`).
    fn finish_read(
        &self,
        object: &Object<E::Nodes, E::Lock>,
        index: u64,
        frame: Frame,
    ) -> Result<ObjectPage, Errno> {
        let slot = self.slot(frame);
        let Backing::File(provider) = object.backing else {
            return Ok(ObjectPage::Ready(frame));
        };
        if slot.flags().contains(SlotFlags::UP_TO_DATE) {
            return Ok(ObjectPage::Ready(frame));
        }
        let ticket = slot.links().load(Ordering::Acquire);
        if ticket == NOT_STARTED {
            return self.start_read(provider, index, frame);
        }
        // SAFETY: `open_file` took the provider for 'm.
        match unsafe { provider.as_ref() }.poll(IoTicket(ticket)) {
            Ok(IoState::Done) => {
                slot.set_flags(SlotFlags::UP_TO_DATE);
                Ok(ObjectPage::Ready(frame))
            }
            Ok(IoState::Pending(ticket)) => Ok(ObjectPage::NeedIo(ticket)),
            Err(_) => {
                slot.links().store(NOT_STARTED, Ordering::Release);
                Err(Errno::EIO)
            }
        }
    }

    /// Writes the object's dirty pages of a range of page indices to its provider.
    ///
    /// # Errors
    ///
    /// [`Errno::EIO`] where the provider failed; pages written before stay written.
    pub(crate) fn write_back(&self, file: FileRef, indices: PageRange) -> Result<(), Errno> {
        let object = self.object(file);
        let Backing::File(provider) = object.backing else {
            return Ok(());
        };
        // SAFETY: `open_file` took the provider for 'm.
        let provider = unsafe { provider.as_ref() };
        let pages = object.pages.write();
        let mut at = indices.first();
        while let Some(entry) = pages.first_at_or_after(at) {
            if entry.range.first() > indices.last() {
                break;
            }
            let frame = entry.value.frame();
            if self.slot(frame).flags().contains(SlotFlags::DIRTY) {
                let mut state = provider.write(entry.range.first().number(), frame);
                while let Ok(IoState::Pending(ticket)) = state {
                    kmem_hal::sync::spin_loop();
                    state = provider.poll(ticket);
                }
                state.map_err(|_| Errno::EIO)?;
            }
            match entry.range.last().checked_add(1) {
                Some(next) => at = next,
                None => break,
            }
        }
        Ok(())
    }

    /// Frames that the object's cache holds.
    #[must_use]
    pub fn cached_pages(&self, file: FileRef) -> u64 {
        self.object(file)
            .pages
            .read()
            .iter()
            .map(|entry| entry.range.count())
            .sum()
    }

    pub(crate) fn put_reference(&self, frame: Frame) {
        if let Some(page) = self.slot(frame).as_user()
            && page.sub_reference() == Ok(0)
        {
            self.free_page(frame, Order::ZERO);
        }
    }
}

impl<N: ObjectAlloc<Node>, L: RawSleepLock> Object<N, L> {
    fn size(&self) -> u64 {
        match self.backing {
            Backing::Shared(pages) => pages * kmem_hal::PAGE_SIZE,
            // SAFETY: `open_file` took the provider for 'm.
            Backing::File(provider) => unsafe { provider.as_ref() }.size(),
        }
    }
}

impl<N: ObjectAlloc<Node>, L: RawSleepLock> fmt::Debug for Object<N, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Object({}, {} bytes)", self.number, self.size())
    }
}
