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
//! - `I1`: an object lives while its reference count is not 0: one for each open handle, for each VMA, and for each [`Held`].
//! - `I2`: an object is in the list of all from its making until its last reference is gone; whoever finds it there takes a reference only
//!   where one is left.
//! - `I3`: an address in a [`FileRef`] is followed only by whoever knows that the object lives: a mapping of it, a [`Held`] or a [`Visit`]. What
//!   came from outside is held first, which finds the object by its number and compares the address.
//! - `I4`: an object whose last reference went is [`Ended`]: nobody finds it any more. The call that gave the reference up ends it, and no other:
//!   without a lock, and once nobody visits it, so that it has it alone.
//! - `I5`: whoever visits an object waits for no device, and for no lock that is held while an object is ended. It never has the last reference.

use core::fmt;
use core::ptr::NonNull;

use kmem_hal::sync::{AtomicPtr, AtomicU32, Ordering};
use kmem_hal::{AllocError, IoTicket, ObjectAlloc, PageProvider, RawSleepLock, SleepLock};
use kmem_paging::Env as _;
use kmem_vma_tree::{Node, RangeTree};

use crate::device::DeviceMemory;
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

/// Which object a mapping maps, and through which open of it.
///
/// A name, which may be kept longer than what it names: calls of [`Mm`] that take one look first whether its object lives, by a number that no
/// other object gets, and answer [`Errno::EBADF`] where it does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileRef {
    object: NonNull<()>,
    open: u32,
    number: u32,
}

// SAFETY: an address and a number; what is behind the address is reached through `Mm`, whose objects are shareable.
unsafe impl Send for FileRef {}
// SAFETY: as above.
unsafe impl Sync for FileRef {}

/// What an object's pages come from.
#[derive(Clone, Copy)]
pub(crate) enum Backing {
    /// Shared memory of so many pages: zero until written.
    Shared(u64),
    /// A file.
    File(NonNull<dyn PageProvider + Sync>),
    /// A device's memory: no pages, no cache of them.
    Device(DeviceMemory),
}

/// What an object has of its pages, by index: frames, or places in swap.
pub(crate) type Pages<N> = RangeTree<Handle, Borrowed<N>>;

/// A file or shared memory, with the cache of its pages.
#[doc(alias = "address_space")]
pub struct Object<N: ObjectAlloc<Node>, L: RawSleepLock> {
    references: AtomicU32,
    opens: AtomicU32,
    /// Open handles that were not closed: each is one of the references.
    handles: AtomicU32,
    /// Who looks at it without a reference: see [`Visit`].
    visits: AtomicU32,
    pub(crate) number: u32,
    inode: u64,
    /// Pages that are charged for it while it lives (see `commit.rs`).
    promised: u64,
    name: Option<NonNull<str>>,
    pub(crate) backing: Backing,
    pub(crate) pages: SleepLock<Pages<N>, L>,
    /// The next object in the list of all.
    next: AtomicPtr<()>,
}

/// A reference of an object, given back when it is dropped: where no lock is held, as it may be the last.
pub(crate) struct Held<'a, 'm, E: Env> {
    mm: &'a Mm<'m, E>,
    found: FileRef,
}

impl<E: Env> Drop for Held<'_, '_, E> {
    fn drop(&mut self) {
        self.mm.put_object(self.found);
    }
}

/// Keeps an object for a look at it that takes not long (`I5`), under whatever lock: it is no reference, and whoever ends the object waits for it.
pub(crate) struct Visit<'a, 'm, E: Env> {
    mm: &'a Mm<'m, E>,
    pub file: FileRef,
}

impl<E: Env> Drop for Visit<'_, '_, E> {
    fn drop(&mut self) {
        // Release: whoever ends the object sees what was done to it.
        let visits = &self.mm.object(self.file).visits;
        visits.fetch_sub(1, Ordering::Release);
    }
}

/// Objects whose last reference went: a chain through [`Object::next`].
#[derive(Debug)]
pub(crate) struct Ended(*mut ());

impl Default for Ended {
    fn default() -> Self {
        Self(core::ptr::null_mut())
    }
}

// SAFETY: addresses of objects, which are shareable, and which nobody else reaches (`I4`).
unsafe impl Send for Ended {}
// SAFETY: as above; shared access does nothing.
unsafe impl Sync for Ended {}

/// Ends objects when it is dropped: made before a lock is taken, or kept beside it, so that the lock goes first.
///
/// A file that ends is written, and its provider waited for, which may come to need the lock of a space: it reclaims, or is a process itself. So
/// what ends while a space is locked is noted there, and ended by the same call once the lock is free again. By no other: a provider
/// that is a process would wait for itself, if it came by.
///
/// Source: Linux `fs/file_table.c` (`fput`, `____fput`).
#[doc(alias = "task_work")]
pub(crate) struct Ending<'m, E: Env> {
    mm: &'m Mm<'m, E>,
    pub objects: Ended,
}

impl<'m, E: Env> Ending<'m, E> {
    pub fn new(mm: &'m Mm<'m, E>) -> Self {
        let objects = Ended::default();
        Self { mm, objects }
    }
}

impl<E: Env> Drop for Ending<'_, E> {
    fn drop(&mut self) {
        if !self.objects.0.is_null() {
            self.mm.end_objects(core::mem::take(&mut self.objects));
        }
    }
}

/// All objects of a kernel, by number.
pub(crate) struct ObjectList<L>(SleepLock<Heads, L>);

/// Where the lists of objects begin whose numbers are equal modulo their count.
struct Heads([*mut (); OBJECT_LISTS]);

/// How many lists there are.
const OBJECT_LISTS: usize = 64;

// SAFETY: addresses of objects, which are shareable, and which are followed under the lock.
unsafe impl Send for Heads {}
// SAFETY: as above.
unsafe impl Sync for Heads {}

impl<L: RawSleepLock> ObjectList<L> {
    pub(crate) fn new() -> Self {
        let heads = Heads([core::ptr::null_mut(); OBJECT_LISTS]);
        Self(SleepLock::new(heads))
    }
}

impl<L> fmt::Debug for ObjectList<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ObjectList(..)")
    }
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
    ///
    /// Of an object that is gone the answer is the handle as it was, of which every call says that it is bad.
    #[must_use]
    pub fn reopen(&self, file: FileRef) -> FileRef {
        let Ok(held) = self.hold(file) else {
            return file;
        };
        let object = self.object(file);
        object.handles.fetch_add(1, Ordering::Relaxed);
        // The reference is the new handle's from here on.
        core::mem::forget(held);
        FileRef {
            open: object.opens.fetch_add(1, Ordering::Relaxed),
            ..file
        }
    }

    /// Gives an open handle back; `false`, and nothing is changed, where there is none to give back. Mappings keep the object alive. Handles are
    /// counted and not told apart: who gives one back twice takes another's.
    ///
    /// With the last of both, whichever it is, the cache goes: pages that are dirty are written first, and transfers waited for, before the call that
    /// gives it up returns; where another call on the same file is under way, before that one does. A write that fails then is only
    /// counted ([`Events::write_errors`](crate::Events)); [`sync_file`](Self::sync_file) before tells of it. What is written through a
    /// [`Pin`](crate::Pin) after that reaches nobody.
    ///
    /// Context: a task that holds no lock of this crate, and is not in a call of the file's provider; waits for devices, and for a reclaim or a
    /// migration that is at work on the file.
    pub fn close(&self, file: FileRef) -> bool {
        let Ok(_held) = self.hold(file) else {
            return false;
        };
        let order = (Ordering::AcqRel, Ordering::Relaxed);
        let handles = &self.object(file).handles;
        let open = handles
            .fetch_update(order.0, order.1, |open| open.checked_sub(1))
            .is_ok();
        if open {
            self.put_object(file);
        }
        open
    }

    /// Keeps the object of a handle alive that came from outside (`I3`).
    ///
    /// # Errors
    ///
    /// [`Errno::EBADF`] where it is gone.
    pub(crate) fn hold(&self, file: FileRef) -> Result<Held<'_, 'm, E>, Errno> {
        // Numbers come again after 2^32 objects, so the place counts as well.
        let wanted = |object: NonNull<_>| object.cast() == file.object;
        let found = self.find(file.number, wanted, |object| {
            let living = |count: u32| (count > 0).then(|| count + 1);
            let order = (Ordering::AcqRel, Ordering::Relaxed);
            let references = &object.references;
            references.fetch_update(order.0, order.1, living).is_ok()
        });
        let found = found.ok_or(Errno::EBADF)?;
        Ok(Held { mm: self, found })
    }

    /// Looks at the object of a handle that came from outside (`I3`), under whatever lock.
    ///
    /// # Errors
    ///
    /// [`Errno::EBADF`] where it is gone.
    pub(crate) fn visit(&self, file: FileRef) -> Result<Visit<'_, 'm, E>, Errno> {
        let wanted = |object: NonNull<_>| object.cast() == file.object;
        let found = self.find(file.number, wanted, visited);
        found
            .map(|file| Visit { mm: self, file })
            .ok_or(Errno::EBADF)
    }

    /// Looks at the object with a number, under whatever lock.
    pub(crate) fn visit_number(&self, number: u32) -> Option<Visit<'_, 'm, E>> {
        let found = self.find(number, |_| true, visited);
        found.map(|file| Visit { mm: self, file })
    }

    /// Makes an object of shared memory, `pages` long, of which `promised` are charged already and given back with it.
    #[doc(alias = "shmem_zero_setup")]
    pub(crate) fn new_shared(&self, pages: u64, promised: u64) -> Result<FileRef, Errno> {
        self.new_promised(Backing::Shared(pages), None, 0, promised)
    }

    pub(crate) fn new_object(
        &self,
        backing: Backing,
        name: Option<NonNull<str>>,
        inode: u64,
    ) -> Result<FileRef, Errno> {
        self.new_promised(backing, name, inode, 0)
    }

    fn new_promised(
        &self,
        backing: Backing,
        name: Option<NonNull<str>>,
        inode: u64,
        promised: u64,
    ) -> Result<FileRef, Errno> {
        let memory = self.env().objects().alloc()?;
        let number = self.next_number();
        let inode = if inode == 0 { u64::from(number) } else { inode };
        let nodes = Borrowed(NonNull::from(self.env().nodes()));
        let object = Object {
            references: AtomicU32::new(1),
            opens: AtomicU32::new(1),
            handles: AtomicU32::new(match backing {
                Backing::Shared(_) => 0,
                Backing::File(_) | Backing::Device(_) => 1,
            }),
            visits: AtomicU32::new(0),
            number,
            inode,
            promised,
            name,
            backing,
            pages: SleepLock::new(RangeTree::new_in(nodes)),
            next: AtomicPtr::new(core::ptr::null_mut()),
        };
        // SAFETY: the allocator gave memory for one object.
        unsafe { memory.as_ptr().write(object) };
        let mut lists = self.objects().0.write();
        let head = &mut lists.0[number as usize % OBJECT_LISTS];
        // SAFETY: the object was just made.
        unsafe { memory.as_ref() }
            .next
            .store(*head, Ordering::Relaxed);
        *head = memory.as_ptr().cast();
        Ok(FileRef {
            object: memory.cast(),
            open: 0,
            number,
        })
    }

    pub(crate) fn object(&self, file: FileRef) -> &Object<E::Nodes, E::Lock> {
        // SAFETY: `I1` and `I3`: the caller knows that the object lives.
        unsafe { file.object.cast::<Object<E::Nodes, E::Lock>>().as_ref() }
    }

    /// What `maps` prints of the object.
    ///
    /// # Errors
    ///
    /// [`Errno::EBADF`] where the object is gone: the last handle was closed and the last mapping went.
    pub fn object_info(&self, file: FileRef) -> Result<ObjectInfo<'_>, Errno> {
        let _visit = self.visit(file)?;
        Ok(self.info(file))
    }

    /// As [`object_info`](Self::object_info), of an object that lives.
    pub(crate) fn info(&self, file: FileRef) -> ObjectInfo<'_> {
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

    /// Takes a reference away; the last one ends the object and frees its pages, once the provider has their bytes and has let go of them.
    ///
    /// Context: no lock is held; waits for devices.
    pub(crate) fn put_object(&self, file: FileRef) {
        let mut ended = Ended::default();
        self.leave_object(file, &mut ended);
        self.end_objects(ended);
    }

    /// As `put_object` where locks are held: the object is the caller's to [end](Self::end_objects) where this was the last reference.
    pub(crate) fn leave_object(&self, file: FileRef, ended: &mut Ended) {
        if self.object(file).references.fetch_sub(1, Ordering::AcqRel) != 1 {
            return;
        }
        let memory = file.object.cast::<Object<E::Nodes, E::Lock>>();
        self.unlist(memory);
        // SAFETY: the object lives until it is ended (`I4`).
        let object = unsafe { memory.as_ref() };
        object.next.store(ended.0, Ordering::Relaxed);
        ended.0 = memory.as_ptr().cast();
    }

    /// Writes and frees objects whose last reference went.
    ///
    /// Context: as [`put_object`](Self::put_object).
    #[cold]
    #[inline(never)]
    pub(crate) fn end_objects(&self, ended: Ended) {
        // Memory first: what it holds, places in swap among it, does not wait for the files' devices.
        let mut files = Ended::default();
        self.each_ended(ended, |memory| {
            // SAFETY: `I4`: it lives until it is ended, here or below.
            let object = unsafe { memory.as_ref() };
            if self.provider(object).is_some() {
                object.next.store(files.0, Ordering::Relaxed);
                files.0 = memory.as_ptr().cast();
            } else {
                self.end_object(memory);
            }
        });
        self.each_ended(files, |memory| {
            // SAFETY: as above.
            self.end_transfers(unsafe { memory.as_ref() });
            self.end_object(memory);
        });
    }

    /// Calls `end` for each object of a chain, once nobody visits it.
    fn each_ended(
        &self,
        Ended(mut at): Ended,
        mut end: impl FnMut(NonNull<Object<E::Nodes, E::Lock>>),
    ) {
        while let Some(memory) = NonNull::new(at.cast::<Object<E::Nodes, E::Lock>>()) {
            // SAFETY: `I4`: only the owner of the chain reaches the object, and those who visit it; it lives until `end` frees it, if that does.
            let object = unsafe { memory.as_ref() };
            at = object.next.load(Ordering::Relaxed);
            // Nobody comes any more. Acquire: what was done there is seen.
            while object.visits.load(Ordering::Acquire) > 0 {
                self.env().paging().relax();
            }
            end(memory);
        }
    }

    /// Frees an object's pages and its memory: nobody else reaches it (I4), and no provider is at work on it.
    fn end_object(&self, memory: NonNull<Object<E::Nodes, E::Lock>>) {
        // SAFETY: the last reference is gone, so nobody else reaches the object; it is read out once.
        let object = unsafe { memory.as_ptr().read() };
        self.commit().adjust(object.promised, 0);
        let mut pages = object.pages;
        for entry in pages.get_mut().iter() {
            match (entry.value.frame(), entry.value.swap()) {
                (Some(frame), _) => self.put_reference(frame),
                (None, Some(entry)) => self.drop_swap(entry),
                (None, None) => {}
            }
        }
        pages.get_mut().clear();
        drop(pages);
        // SAFETY: the value was read out, and the memory came from this allocator.
        unsafe { self.env().objects().free(memory) }
    }

    fn unlist(&self, memory: NonNull<Object<E::Nodes, E::Lock>>) {
        let mut lists = self.objects().0.write();
        // SAFETY: objects in the list live (`I2`), this one included.
        let object = unsafe { memory.as_ref() };
        let next = object.next.load(Ordering::Relaxed);
        let mut at = lists.0[object.number as usize % OBJECT_LISTS];
        if at == memory.as_ptr().cast() {
            lists.0[object.number as usize % OBJECT_LISTS] = next;
            return;
        }
        while let Some(other) = NonNull::new(at.cast::<Object<E::Nodes, E::Lock>>()) {
            // SAFETY: as above.
            let link = unsafe { &(*other.as_ptr()).next };
            at = link.load(Ordering::Relaxed);
            if at == memory.as_ptr().cast() {
                link.store(next, Ordering::Relaxed);
                return;
            }
        }
    }

    /// The object with a number that is `wanted`, if it could be `taken`.
    fn find(
        &self,
        number: u32,
        wanted: impl Fn(NonNull<Object<E::Nodes, E::Lock>>) -> bool,
        taken: impl Fn(&Object<E::Nodes, E::Lock>) -> bool,
    ) -> Option<FileRef> {
        let lists = self.objects().0.read();
        let mut at = lists.0[number as usize % OBJECT_LISTS];
        while let Some(found) = NonNull::new(at.cast::<Object<E::Nodes, E::Lock>>()) {
            // SAFETY: objects in the list live (`I2`).
            let object = unsafe { found.as_ref() };
            if object.number == number && wanted(found) {
                return taken(object).then_some(FileRef {
                    object: found.cast(),
                    open: 0,
                    number,
                });
            }
            at = object.next.load(Ordering::Relaxed);
        }
        None
    }

    /// Brings in every page of shared memory that is in an area of swap; a ticket where one must be read first.
    pub(crate) fn bring_shared_in(&self, area: u8) -> Result<Option<IoTicket>, Errno> {
        let lists = self.objects().0.read();
        for &head in &lists.0 {
            let mut at = head;
            while let Some(object) = NonNull::new(at.cast::<Object<E::Nodes, E::Lock>>()) {
                // SAFETY: objects in the list live, and stay there while it is locked (`I2`).
                let listed = unsafe { object.as_ref() };
                at = listed.next.load(Ordering::Relaxed);
                let file = FileRef {
                    object: object.cast(),
                    open: 0,
                    number: listed.number,
                };
                if let Some(ticket) = self.bring_object_in(file, area)? {
                    return Ok(Some(ticket));
                }
            }
        }
        Ok(None)
    }

    /// Pages that are charged for all objects together.
    pub(crate) fn promised_to_objects(&self) -> u64 {
        let lists = self.objects().0.read();
        let mut pages = 0;
        for &head in &lists.0 {
            let mut at = head;
            while let Some(object) = NonNull::new(at.cast::<Object<E::Nodes, E::Lock>>()) {
                // SAFETY: objects in the list live, and stay there while it is locked (`I2`).
                let listed = unsafe { object.as_ref() };
                pages += listed.promised;
                at = listed.next.load(Ordering::Relaxed);
            }
        }
        pages
    }

    /// An object's number, which its pages' slots name.
    pub(crate) fn object_number(&self, file: FileRef) -> u32 {
        file.number
    }
}

/// Begins a visit, where a reference is left. The object is in the list, which is locked: whoever ends it takes it out first.
fn visited<N: ObjectAlloc<Node>, L: RawSleepLock>(object: &Object<N, L>) -> bool {
    let lives = object.references.load(Ordering::Relaxed) > 0;
    if lives {
        object.visits.fetch_add(1, Ordering::Relaxed);
    }
    lives
}

impl<N: ObjectAlloc<Node>, L: RawSleepLock> Object<N, L> {
    /// Bytes.
    pub(crate) fn size(&self) -> u64 {
        match self.backing {
            Backing::Shared(pages) => pages * kmem_hal::PAGE_SIZE,
            Backing::Device(memory) => memory.frames.count() * kmem_hal::PAGE_SIZE,
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
