//! mmap: a new mapping.
//!
//! ```text
//!  arguments ── checks in Linux's order ── place ── clear what is there (FIXED) ── account ── merge or insert
//! ```
//!
//! The order of the checks is visible: a call that is wrong in two ways answers the first of Linux's errors. Nothing is
//! changed before the last check passes and all memory for the change is in hand.
//!
//! Source: mmap(2); Linux `mm/mmap.c` (`do_mmap`), `mm/vma.c` (`mmap_region`).

use kmem_hal::{PAGE_SIZE, Page, PageRange, VirtAddr};

use crate::commit::Overcommit;
use crate::counters::Counters;
use crate::elf::Class;
use crate::env::Env;
use crate::errno::Errno;
use crate::flags::{MapFlags, Prot, VmFlags};
use crate::madvise::Populate;
use crate::merge::Candidate;
use crate::mutants::mutant;
use crate::object::FileRef;
use crate::place::Placement;
use crate::space::{AddressSpace, State};
use crate::vma::Label;
use crate::vma_edit::{STORES_TO_ADD, STORES_TO_CLEAR};

/// The arguments of an mmap call.
#[derive(Clone, Copy, Debug)]
pub struct MapRequest {
    /// The hint, or with `FIXED` the address.
    pub address: u64,
    /// Bytes.
    pub length: u64,
    /// What the mapping may be used for.
    pub prot: Prot,
    /// How it is made.
    pub flags: MapFlags,
    /// The file; ignored with `ANONYMOUS`.
    pub file: Option<OpenFile>,
    /// Offset in the file, in bytes.
    pub offset: u64,
}

/// An open file as mmap sees it: which, and what its mode allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenFile {
    /// The file and the open.
    pub file: FileRef,
    /// Opened for reading.
    pub readable: bool,
    /// Opened for writing; counts for nothing where the file [is read-only](kmem_hal::PageProvider::is_read_only), which Linux opens for nobody
    /// so (EROFS).
    pub writable: bool,
}

impl MapRequest {
    /// Private memory without a file, placed by the kernel.
    #[must_use]
    pub const fn anonymous(length: u64, prot: Prot) -> Self {
        let flags = MapFlags::PRIVATE.union(MapFlags::ANONYMOUS);
        Self {
            address: 0,
            length,
            prot,
            flags,
            file: None,
            offset: 0,
        }
    }

    /// The same, exactly at `address`.
    #[must_use]
    pub const fn at(mut self, address: u64) -> Self {
        self.address = address;
        self.flags = self.flags.union(MapFlags::FIXED);
        self
    }
}

/// A request after its checks.
struct Checked {
    range: PageRange,
    flags: VmFlags,
    offset: u64,
    file: Option<FileRef>,
    shared_anonymous: bool,
    /// Whether its pages come at once, as those of locked memory do.
    brought_in: bool,
    /// Pages to be promised for it.
    charge: u64,
}

impl<'m, E: Env> AddressSpace<'m, E> {
    /// Maps memory or a file; gives the address of its first byte.
    ///
    /// Context: task context; as [`Mm::close`](crate::Mm::close) where the last mapping of a file goes.
    ///
    /// # Errors
    ///
    /// Those of mmap(2), checked in Linux's order; nothing is changed then, but for what a `FIXED` mapping cuts (docs/spec/partial-effects.md).
    ///
    /// # Examples
    ///
    /// See the crate's front page.
    #[doc(alias = "do_mmap")]
    pub fn mmap(&self, request: &MapRequest) -> Result<VirtAddr, Errno> {
        if !request.offset.is_multiple_of(PAGE_SIZE) {
            return Err(Errno::EINVAL);
        }
        // So that a handle that outlived its file is an error, and the file lives until the mapping holds it.
        let is_used = !request.flags.contains(MapFlags::ANONYMOUS);
        let file = request.file.filter(|_| is_used);
        let _held = file.map(|open| self.mm().hold(open.file));
        let _held = _held.transpose()?;
        let (start, brought_in) = self.mmap_without_pages(request)?;
        let populate = MapFlags::POPULATE | MapFlags::NONBLOCK;
        if brought_in || request.flags & populate == MapFlags::POPULATE {
            // As in Linux, a page that cannot be populated now is no error of mmap.
            let _ = self.populate(start.as_u64(), request.length, Populate::AsMapped);
        }
        Ok(start)
    }

    /// Makes the mapping; says where it is, and whether its pages come at once. Not inlined, so that its memory on the stack is gone before
    /// pages are brought in.
    #[inline(never)]
    fn mmap_without_pages(&self, request: &MapRequest) -> Result<(VirtAddr, bool), Errno> {
        let mut state = self.lock();
        let checked = self.check_mmap(&mut state, request)?;
        let start = checked.range.start();
        let brought_in = checked.brought_in;
        self.map_checked(&mut state, checked)?;
        Ok((start, brought_in))
    }

    /// Makes a mapping that only a kernel makes: the stack of a program that runs already, `[vdso]`, `[vvar]`.
    ///
    /// A [`Label::Stack`] grows down; the others never merge and never grow, and whatever would cut one is EINVAL: a program unmaps, moves,
    /// protects and seals them whole. The range is whole pages and free. As in Linux, the
    /// process's limits on sizes and on the number of mappings are not asked.
    ///
    /// # Errors
    ///
    /// [`Errno::EINVAL`] for a range that is none, or not in user space, and for a name that a program gave ([`Label::Named`]);
    /// [`Errno::EEXIST`] where something is mapped; [`Errno::ENOMEM`], also where it cannot be promised.
    #[doc(alias = "install_special_mapping")]
    pub fn map_special(
        &self,
        address: u64,
        length: u64,
        prot: Prot,
        label: Label,
    ) -> Result<(), Errno> {
        let pages = length / PAGE_SIZE;
        let task_size = self.layout().task_size;
        let fits = length <= task_size && address <= task_size - length;
        let range = self
            .user_range(address, pages)
            .filter(|_| fits && length.is_multiple_of(PAGE_SIZE));
        let range = range.ok_or(Errno::EINVAL)?;
        if matches!(label, Label::Named(_)) {
            // A copy of a label is no use of the name.
            return Err(Errno::EINVAL);
        }
        let mut guard = self.lock();
        let state = &mut *guard;
        if !state.vmas.is_free(range) {
            return Err(Errno::EEXIST);
        }
        let may = VmFlags::MAYREAD | VmFlags::MAYWRITE | VmFlags::MAYEXEC;
        let data = VmFlags::IO | VmFlags::PFNMAP | VmFlags::DONTDUMP;
        // The kernel's pages of time may never be written or executed.
        let mut flags = VmFlags::from_prot(prot);
        flags |= match label {
            Label::Stack => may | VmFlags::GROWSDOWN,
            Label::Vvar | Label::VvarClock => VmFlags::MAYREAD | data | VmFlags::DONTEXPAND,
            _ => may | VmFlags::DONTEXPAND,
        };
        if is_accounted(flags) {
            flags |= VmFlags::ACCOUNT;
        }
        let offset = range.first().number();
        let mut edit = state.vmas.edit()?;
        if flags.contains(VmFlags::ACCOUNT) {
            edit.charge(pages, &state.limits)?;
        }
        edit.add(
            range,
            Candidate {
                flags,
                offset,
                file: None,
                anon: None,
                label,
            },
            true,
        );
        Ok(())
    }

    fn check_mmap(&self, state: &mut State<'m, E>, request: &MapRequest) -> Result<Checked, Errno> {
        let anonymous = request.flags.contains(MapFlags::ANONYMOUS);
        let file = if anonymous {
            None
        } else {
            Some(request.file.ok_or(Errno::EBADF)?)
        };
        if request.flags.contains(MapFlags::HUGETLB) || request.length == 0 {
            return Err(Errno::EINVAL);
        }
        let pages = request.length.div_ceil(PAGE_SIZE);
        let offset = request.offset / PAGE_SIZE;
        if request.length > u64::MAX - (PAGE_SIZE - 1) {
            return Err(Errno::ENOMEM);
        }
        if state.vmas.len() > state.limits.mappings {
            return Err(Errno::ENOMEM);
        }
        let range = self.place_request(state, request, pages)?;
        let locked = request.flags.contains(MapFlags::LOCKED);
        if locked && !state.may_lock() {
            return Err(Errno::EPERM);
        }
        let mut lock = state.default_flags & VmFlags::LOCKED_MASK;
        lock.set(VmFlags::LOCKED, locked || !lock.is_empty());
        if !state.may_lock_more(pages, lock) {
            return Err(Errno::EAGAIN);
        }
        let device = file.and_then(|open| self.mm().device(open.file));
        if file.is_some() && device.is_none() && offset > last_offset(pages) {
            return Err(Errno::EOVERFLOW);
        }
        let (mut flags, offset) = self.mmap_flags(request, file, range, offset)?;
        match device {
            // What is no ordinary memory is never locked.
            Some(device) => flags = device.admit(flags, offset, pages)?,
            // Nor is what may go at any time; but it is brought in as if it were.
            None if flags.contains(VmFlags::DROPPABLE) => {}
            None => flags |= lock,
        }
        // What a fixed mapping replaces does not count twice.
        let replaced = match request.flags.contains(MapFlags::FIXED) {
            true => state.vmas.counters_in(range),
            false => Counters::default(),
        };
        if request.flags.contains(MapFlags::FIXED) {
            state.check_clear(range)?;
        }
        if !state.may_expand(pages - replaced.total, flags) {
            cut_edges(state, range);
            return Err(Errno::ENOMEM);
        }
        Ok(Checked {
            range,
            flags,
            offset,
            file: file.map(|open| open.file),
            charge: match flags.contains(VmFlags::ACCOUNT) {
                true => pages - replaced.accounted,
                false => 0,
            },
            shared_anonymous: anonymous && flags.contains(VmFlags::SHARED),
            brought_in: lock.contains(VmFlags::LOCKED),
        })
    }

    fn place_request(
        &self,
        state: &State<'m, E>,
        request: &MapRequest,
        pages: u64,
    ) -> Result<PageRange, Errno> {
        let task_pages = self.layout().task_size / PAGE_SIZE;
        if pages > task_pages {
            return Err(Errno::ENOMEM);
        }
        let fixed = request
            .flags
            .intersects(MapFlags::FIXED | MapFlags::FIXED_NOREPLACE);
        if !fixed {
            let is_private = matches!(request.flags.map_type(), 2 | DROPPABLE);
            let huge_align = request.flags.contains(MapFlags::ANONYMOUS) && is_private;
            let placement = Placement {
                hint: request.address,
                pages,
                low: request.flags.contains(MapFlags::MAP_32BIT),
                huge_align,
            };
            return state.place(self.layout(), &placement).ok_or(Errno::ENOMEM);
        }
        let highest = self.layout().task_size - pages * PAGE_SIZE;
        if request.address > highest && !mutant!("fixed-beyond-the-user") {
            return Err(Errno::ENOMEM);
        }
        let first = Page::starting_at(VirtAddr::new(request.address)).ok_or(Errno::EINVAL)?;
        let range = PageRange::with_count(first, pages).ok_or(Errno::ENOMEM)?;
        if self.layout().is_too_low(first) {
            return Err(Errno::EPERM);
        }
        if request.flags.contains(MapFlags::FIXED_NOREPLACE) && !state.vmas.is_free(range) {
            return Err(Errno::EEXIST);
        }
        Ok(range)
    }

    /// The VMA's flags and offset, or why the file's mode or the type forbids them.
    fn mmap_flags(
        &self,
        request: &MapRequest,
        file: Option<OpenFile>,
        range: PageRange,
        offset: u64,
    ) -> Result<(VmFlags, u64), Errno> {
        let may = VmFlags::MAYREAD | VmFlags::MAYWRITE | VmFlags::MAYEXEC;
        let mut flags = VmFlags::from_prot(request.prot) | may;
        let mut offset = offset;
        let growsdown = request.flags.contains(MapFlags::GROWSDOWN);
        match (request.flags.map_type(), file) {
            (MapFlags::SHARED_VALIDATE, Some(_))
                if !MapFlags::VALIDATED.contains(request.flags) =>
            {
                return Err(Errno::EOPNOTSUPP);
            }
            (1 | MapFlags::SHARED_VALIDATE, Some(open)) => {
                let object = self.mm().object(open.file);
                let writable = open.writable && !self.mm().is_read_only(object);
                if request.prot.contains(Prot::WRITE) && !writable {
                    return Err(Errno::EACCES);
                }
                flags |= VmFlags::SHARED | VmFlags::MAYSHARE;
                if !writable {
                    flags -= VmFlags::MAYWRITE | VmFlags::SHARED;
                }
                if !open.readable {
                    return Err(Errno::EACCES);
                }
                if growsdown {
                    return Err(Errno::EINVAL);
                }
            }
            (2, Some(open)) => {
                if !open.readable {
                    return Err(Errno::EACCES);
                }
                if growsdown {
                    return Err(Errno::EINVAL);
                }
            }
            (1, None) => {
                if growsdown {
                    return Err(Errno::EINVAL);
                }
                flags |= VmFlags::SHARED | VmFlags::MAYSHARE;
                offset = 0;
            }
            (DROPPABLE, None) => {
                if self.class() == Class::Elf32 {
                    // No flag is left for it in 32 bits.
                    return Err(Errno::EOPNOTSUPP);
                }
                if growsdown || request.flags.contains(MapFlags::LOCKED) {
                    return Err(Errno::EINVAL);
                }
                flags |= VmFlags::DROPPABLE | VmFlags::NORESERVE;
                flags |= VmFlags::WIPEONFORK | VmFlags::DONTDUMP;
                offset = range.first().number();
                self.mm().note_droppable();
            }
            (2, None) => offset = range.first().number(),
            _ => return Err(Errno::EINVAL),
        }
        if growsdown {
            flags |= VmFlags::GROWSDOWN;
        }
        if request.flags.contains(MapFlags::NORESERVE)
            && self.mm().commit().mode() != Overcommit::Never
        {
            flags |= VmFlags::NORESERVE;
        }
        if request.flags.contains(MapFlags::STACK) {
            flags |= VmFlags::NOHUGEPAGE;
        }
        if is_accounted(flags) {
            flags |= VmFlags::ACCOUNT;
        }
        Ok((flags, offset))
    }

    /// Shared memory for a mapping; all of it is promised, unless NORESERVE says otherwise.
    fn new_shared(&self, state: &State<'m, E>, checked: &Checked) -> Result<FileRef, Errno> {
        let (pages, commit) = (checked.range.count(), self.mm().commit());
        let promised = match checked.flags.contains(VmFlags::NORESERVE) {
            true => 0,
            false => pages,
        };
        commit.charge(promised, state.vmas.counters().total, state.limits.is_admin)?;
        let made = self.mm().new_shared(pages, promised);
        if made.is_err() {
            commit.adjust(promised, 0);
        }
        made
    }

    fn map_checked(&self, state: &mut State<'m, E>, checked: Checked) -> Result<(), Errno> {
        let made = if checked.shared_anonymous {
            Some(self.new_shared(state, &checked)?)
        } else {
            None
        };
        let stores = STORES_TO_CLEAR + STORES_TO_ADD;
        let outcome = state.vmas.edit_with(stores).and_then(|mut edit| {
            if let Err(error) = edit.charge(checked.charge, &state.limits) {
                edit.split_around(checked.range);
                return Err(error);
            }
            self.own_ends(checked.range)?;
            edit.clear(checked.range, || self.zap(checked.range));
            let file = checked.file.or(made);
            let (flags, offset) = (checked.flags, checked.offset);
            edit.add(
                checked.range,
                Candidate {
                    flags,
                    offset,
                    file,
                    anon: None,
                    label: Label::None,
                },
                true,
            );
            Ok(())
        });
        if let Some(file) = made {
            // The VMA holds a reference of its own; this was the call's.
            state.vmas.leave_object(file);
        }
        outcome
    }
}

/// The type of mappings whose pages may go.
const DROPPABLE: u32 = MapFlags::DROPPABLE.bits();

/// The highest page of a file at which a mapping of `pages` may begin: a file has 2^63 - 1 bytes at most (`file_mmap_ok`).
fn last_offset(pages: u64) -> u64 {
    (i64::MAX as u64).saturating_sub(pages.saturating_mul(PAGE_SIZE)) / PAGE_SIZE
}

/// What a mapping at a fixed address leaves behind when a limit refuses it: the mappings at its edges stay cut, as in Linux
/// (docs/spec/partial-effects.md).
fn cut_edges<E: Env>(state: &mut State<'_, E>, range: PageRange) {
    if let Ok(mut edit) = state.vmas.edit_with(STORES_TO_CLEAR) {
        edit.split_around(range);
    }
}

/// Private writable memory without NORESERVE counts against the commit limit (`accountable_mapping`).
pub(crate) fn is_accounted(flags: VmFlags) -> bool {
    let relevant = flags & (VmFlags::NORESERVE | VmFlags::SHARED | VmFlags::WRITE);
    relevant == VmFlags::WRITE
}
