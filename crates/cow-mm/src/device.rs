//! Device memory: registers and frame buffers in a program's space.
//!
//! ```text
//!   Vma (IO | PFNMAP) ── offset ──> DeviceMemory { frames, memory type } ──> leaf: frame, UC or WC, nothing counted
//! ```
//!
//! The frames are no pages of anybody: most have no slot in the frame table, none is counted, none is ever freed, moved, written out or
//! pinned. So a leaf of device memory is told from every other one by its frame alone: its slot is no user page's, or there is none
//! ([`Mm::counted`]). That holds as long as anybody may map it, which is the contract of [`Mm::open_device`].
//!
//! What Linux's drivers do by `remap_pfn_range`, all at once, happens here at faults, sixteen pages each: the object says the frame of every page
//! at any time. So a child of fork needs no copies of the entries and finds the pages again; where they lie in one table with anonymous pages, they
//! come along and are counted no more than before.
//!
//! | call | answer |
//! |---|---|
//! | `mmap` beyond the device's end; private and writable | EINVAL |
//! | `mlock`, `MAP_LOCKED`, `mlockall` | passes over it |
//! | `mremap` | may move it and shorten it; EFAULT to make it longer; EINVAL with `DONTUNMAP` |
//! | `MADV_DONTNEED`, `FREE`, `COLD`, `PAGEOUT`, `POPULATE_*`, `DOFORK`, `DODUMP`, guards | EINVAL |
//! | `MADV_REMOVE` | ENODEV |
//! | a pin; `read_memory`, `write_memory` | EFAULT |
//!
//! Invariants
//! - `I1`: a VMA of a device object has `IO`, `PFNMAP`, `DONTEXPAND` and `DONTDUMP`, lies within the device whole, and is not private and
//!   writable, nor can become so: nobody needs a copy of a register.
//! - `I2`: no frame of it is a user page's while the object lives.
//!
//! Not handled: leaves larger than a page.
//!
//! Source: Linux `mm/memory.c` (`remap_pfn_range`, `vm_iomap_memory`, `vm_normal_page`), `mm/gup.c` (`check_vma_flags`), `mm/madvise.c`;
//! for private mappings `drivers/gpu/drm/ttm/ttm_bo_vm.c`.

use core::ptr::NonNull;

use kmem_hal::{Frame, FrameRange, Page, PageRange, UserSlot, VirtAddr};
use kmem_paging::{Entry, Env as _, MemoryType};

use crate::env::Env;
use crate::errno::Errno;
use crate::fault::{Outcome, Signal, Stop};
use crate::flags::VmFlags;
use crate::mm::{Mm, PageRef};
use crate::mutants::mutant;
use crate::object::{Backing, FileRef};
use crate::space::AddressSpace;
use crate::tables::attributes;
use crate::vma::Vma;

/// Pages that a fault maps at most, itself included.
const AROUND: u64 = 16;

/// A device's memory: where it is, and how processors may cache it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Its frames.
    pub frames: FrameRange,
    /// [`MemoryType::Uncached`] for registers, [`MemoryType::WriteCombining`] for frame buffers.
    #[doc(alias = "pgprot_noncached")]
    #[doc(alias = "pgprot_writecombine")]
    pub memory_type: MemoryType,
}

impl DeviceMemory {
    /// What every mapping of a device is.
    const FLAGS: VmFlags = VmFlags::IO
        .union(VmFlags::PFNMAP)
        .union(VmFlags::DONTEXPAND)
        .union(VmFlags::DONTDUMP);

    /// The flags of a mapping of `pages` pages from the device's page `offset` on (`I1`).
    ///
    /// # Errors
    ///
    /// [`Errno::EINVAL`] where it would not lie in the device, or would be private and writable.
    pub(crate) fn admit(self, flags: VmFlags, offset: u64, pages: u64) -> Result<VmFlags, Errno> {
        let room = self.frames.count().checked_sub(offset);
        let beyond = room.is_none_or(|room| pages > room);
        if beyond && !mutant!("device-is-mapped-beyond-its-end") {
            return Err(Errno::EINVAL);
        }
        if flags.contains(VmFlags::MAYSHARE) {
            return Ok(flags | Self::FLAGS);
        }
        match flags.contains(VmFlags::WRITE) {
            true if !mutant!("device-memory-is-copied") => Err(Errno::EINVAL),
            _ => Ok((flags | Self::FLAGS) - VmFlags::MAYWRITE),
        }
    }

    /// The frame of a page of the device.
    fn frame(self, index: u64) -> Option<Frame> {
        let frame = self.frames.first().checked_add(index)?;
        self.frames.contains(frame).then_some(frame)
    }
}

impl<'m, E: Env> Mm<'m, E> {
    /// Makes an object of a device's memory, for programs to map; the handle returned holds a reference.
    ///
    /// `name` and `inode` are what `maps` prints.
    ///
    /// # Errors
    ///
    /// [`Errno::EINVAL`] for no frames, and where one of them is a program's page; [`Errno::ENOMEM`].
    ///
    /// # Safety
    ///
    /// Until the object ends, which its last handle and its last mapping keep alive:
    ///
    /// - what programs read and write there is theirs to read and write: no memory that Rust code holds references to;
    /// - no frame of it becomes a page of a program: the environment's frames do not come from there, or these are not given back before;
    /// - no other mapping of a frame has another memory type where the processor forbids that (Intel SDM volume 3A, 12.12.4).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn demo<E: kmem_cow_mm::Env>(
    /// #     mm: &kmem_cow_mm::Mm<'static, E>,
    /// #     space: &kmem_cow_mm::AddressSpace<'static, E>,
    /// # ) -> Result<(), kmem_cow_mm::Errno> {
    /// use kmem_cow_mm::{DeviceMemory, MapFlags, MapRequest, OpenFile, Prot};
    /// use kmem_hal::{FrameRange, PhysAddr};
    /// use kmem_paging::MemoryType;
    ///
    /// let screen = DeviceMemory {
    ///     frames: FrameRange::inside(PhysAddr::new(0xe000_0000), 8 << 20),
    ///     memory_type: MemoryType::WriteCombining,
    /// };
    /// // SAFETY: the frame buffer of the card, from its base register; no memory is there.
    /// let file = unsafe { mm.open_device(screen, "/dev/fb0", 0) }?;
    /// let open = OpenFile { file, readable: true, writable: true };
    /// space.mmap(&MapRequest {
    ///     flags: MapFlags::SHARED,
    ///     file: Some(open),
    ///     ..MapRequest::anonymous(8 << 20, Prot::READ | Prot::WRITE)
    /// })?;
    /// # Ok(())
    /// # }
    /// ```
    #[doc(alias = "remap_pfn_range")]
    #[doc(alias = "io_remap_pfn_range")]
    pub unsafe fn open_device(
        &self,
        memory: DeviceMemory,
        name: &'m str,
        inode: u64,
    ) -> Result<FileRef, Errno> {
        let is_page = |frame| self.counted(frame).is_some();
        if memory.frames.is_empty() || memory.frames.iter().any(is_page) {
            return Err(Errno::EINVAL);
        }
        self.new_object(Backing::Device(memory), Some(NonNull::from(name)), inode)
    }

    /// The device that an object is, whose life the caller knows of.
    pub(crate) fn device(&self, file: FileRef) -> Option<DeviceMemory> {
        match self.object(file).backing {
            Backing::Device(memory) => Some(memory),
            _ => None,
        }
    }

    /// The slot of a frame that a leaf maps; `None` for device memory, which is not counted.
    #[doc(alias = "vm_normal_page")]
    #[inline]
    pub(crate) fn counted(&self, frame: Frame) -> Option<UserSlot<'m>> {
        self.env().paging().slots().slot(frame)?.as_user()
    }
}

impl<E: Env> AddressSpace<'_, E> {
    /// Maps a page of a device, and those around it where nothing is yet.
    #[cold]
    #[doc(alias = "vmf_insert_pfn")]
    pub(crate) fn fault_device(
        &self,
        vma: &Vma,
        device: DeviceMemory,
        page: Page,
        address: VirtAddr,
    ) -> Result<(), Stop> {
        let mut entry = attributes(vma.flags).accessed().dirty();
        if !mutant!("device-memory-is-cached") {
            entry = entry.memory_type(device.memory_type);
        }
        let Some(frame) = device.frame(vma.object_page(page)) else {
            let signal = Signal::BusError;
            return Err(Stop::Outcome(Outcome::Signal { signal, address }));
        };
        self.install(page, PageRef::of_device(frame), entry)?;
        let first = Page::new(page.number() & !(AROUND - 1));
        let window = first.and_then(|first| PageRange::with_count(first, AROUND));
        let window = window.and_then(|window| window.intersection(vma.range));
        for near in window.into_iter().flat_map(PageRange::iter) {
            let Some(frame) = device.frame(vma.object_page(near)) else {
                break;
            };
            if self.tables().query(near) == Entry::Empty {
                // Where there is no memory for a table, the page comes by a fault of its own.
                let _ = self.install(near, PageRef::of_device(frame), entry);
            }
        }
        Ok(())
    }
}
