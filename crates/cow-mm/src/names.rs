//! Names that programs give to anonymous memory: `prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, ..)`.
//!
//! ```text
//!   frame  [ next | 48 entries: uses, length, 80 bytes ] ──> frame ...     equal names are one entry, so ids compare as names do
//! ```
//!
//! A name is part of what a VMA says of itself: neighbours with other names never merge. Entries are counted by the VMAs that
//! bear them; a frame whose last name is gone is given back.
//!
//! Invariants
//! - `I1`: an entry with uses has text that does not change.
//! - `I2`: each VMA whose label is a name holds one use of it.
//!
//! Source: prctl(2); Linux `mm/madvise.c` (`set_anon_vma_name`, `is_valid_name_char`), `fs/proc/task_mmu.c`.

use core::fmt;
use core::ptr::NonNull;

use kmem_hal::{
    Frame, FrameRequest, FrameSink, FrameSource, Order, OwnedFrame, PAGE_SIZE, PhysMap,
    RawSleepLock, SleepLock,
};
use kmem_paging::Env as PagingEnv;

use crate::env::Env;
use crate::errno::Errno;
use crate::madvise::modify_as_advised;
use crate::mm::Mm;
use crate::space::AddressSpace;
use crate::vma::Label;

/// Bytes of a name, the terminating zero included (`ANON_VMA_NAME_MAX_LEN`).
const NAME_MAX: usize = 80;
/// Entries of a frame.
const ENTRIES: usize = 48;

#[repr(C)]
#[derive(Clone, Copy)]
struct Entry {
    uses: u32,
    length: u8,
    text: [u8; NAME_MAX - 1],
}

/// A frame of names; all zero is an empty one.
#[repr(C)]
struct Block {
    /// The next frame's number; 0 for none: the first frame of a machine is nobody's.
    next: u64,
    entries: [Entry; ENTRIES],
}

const _: () = assert!(size_of::<Block>() <= PAGE_SIZE as usize);

/// A name's place: equal for equal names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NameId {
    frame: Frame,
    entry: u8,
}

/// A name's text.
#[derive(Clone, Copy)]
pub(crate) struct NameText {
    text: [u8; NAME_MAX],
    length: usize,
}

impl NameText {
    pub fn as_str(&self) -> &str {
        core::str::from_utf8(&self.text[..self.length]).unwrap_or("?")
    }
}

/// Where the blocks begin.
pub(crate) struct NameLock<L: RawSleepLock>(SleepLock<Option<Frame>, L>);

impl<L: RawSleepLock> NameLock<L> {
    pub fn new() -> Self {
        Self(SleepLock::new(None))
    }
}

impl<L: RawSleepLock> fmt::Debug for NameLock<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NameLock")
    }
}

/// The names of all spaces.
pub(crate) struct Names<'a, 'm, E: Env>(pub &'a Mm<'m, E>);

impl<E: Env> Names<'_, '_, E> {
    /// The block in a frame. The list's lock is held for as long as it is used, so nobody frees it, and only one changes it.
    fn block(&self, frame: Frame) -> NonNull<Block> {
        let pointer = self.0.env().paging().map().to_ptr(frame.start());
        match NonNull::new(pointer.cast::<Block>()) {
            Some(block) => block,
            None => unreachable!("P1: the map's pointers are valid"),
        }
    }

    /// One more use of a name; a new entry where it has none.
    fn intern(&self, name: &[u8]) -> Result<NameId, Errno> {
        let mut first = self.0.name_lock().0.write();
        let mut vacancy = None;
        let mut at = *first;
        while let Some(frame) = at {
            // SAFETY: the list is locked, and its frames hold blocks.
            let block = unsafe { self.block(frame).as_mut() };
            for (number, entry) in block.entries.iter_mut().enumerate() {
                let id = NameId {
                    frame,
                    entry: number as u8,
                };
                if entry.uses == 0 {
                    vacancy = vacancy.or(Some(id));
                } else if entry.bytes() == name {
                    entry.uses += 1;
                    return Ok(id);
                }
            }
            at = (block.next != 0).then(|| Frame::from_number(block.next));
        }
        let id = match vacancy {
            Some(id) => id,
            None => {
                let frames = self.0.env().paging().frames();
                let (frame, _) = frames.alloc(&FrameRequest::ONE.zeroed())?.into_raw();
                // SAFETY: the frame is new, zero, and in reach (E2): an empty block.
                let block = unsafe { self.block(frame).as_mut() };
                block.next = first.map_or(0, Frame::number);
                *first = Some(frame);
                NameId { frame, entry: 0 }
            }
        };
        // SAFETY: as above.
        let block = unsafe { self.block(id.frame).as_mut() };
        let entry = &mut block.entries[usize::from(id.entry)];
        entry.uses = 1;
        entry.length = name.len() as u8;
        entry.text[..name.len()].copy_from_slice(name);
        Ok(id)
    }

    /// One more use of a name that has one.
    pub fn get(&self, id: NameId) {
        let _first = self.0.name_lock().0.write();
        // SAFETY: `I2`: the name has a use, so its block is in the list, which is locked.
        let block = unsafe { self.block(id.frame).as_mut() };
        block.entries[usize::from(id.entry)].uses += 1;
    }

    /// One use less; the last one of a frame gives the frame back.
    pub fn put(&self, id: NameId) {
        let mut first = self.0.name_lock().0.write();
        // SAFETY: as in `get`.
        let block = unsafe { self.block(id.frame).as_mut() };
        block.entries[usize::from(id.entry)].uses -= 1;
        if block.entries.iter().any(|entry| entry.uses != 0) {
            return;
        }
        let next = (block.next != 0).then(|| Frame::from_number(block.next));
        if *first == Some(id.frame) {
            *first = next;
        } else {
            let mut at = *first;
            while let Some(frame) = at {
                // SAFETY: as in `intern`; `frame` is another block than `block`.
                let other = unsafe { self.block(frame).as_mut() };
                if other.next == id.frame.number() {
                    other.next = next.map_or(0, Frame::number);
                    break;
                }
                at = (other.next != 0).then(|| Frame::from_number(other.next));
            }
        }
        // SAFETY: O1: the list has let the frame go; O2: it was allocated as one; O3: it was never mapped.
        let owned = unsafe { OwnedFrame::from_raw(id.frame, Order::ZERO) };
        self.0.env().paging().frames().free(owned);
    }

    /// A name's text. The caller keeps a use of it.
    pub fn text(&self, id: NameId) -> NameText {
        let _first = self.0.name_lock().0.read();
        // SAFETY: as in `get`; only read.
        let block = unsafe { self.block(id.frame).as_ref() };
        let entry = &block.entries[usize::from(id.entry)];
        let mut name = NameText {
            text: [0; NAME_MAX],
            length: entry.bytes().len(),
        };
        name.text[..name.length].copy_from_slice(entry.bytes());
        name
    }
}

impl Entry {
    fn bytes(&self) -> &[u8] {
        &self.text[..usize::from(self.length).min(self.text.len())]
    }
}

impl<'m, E: Env> AddressSpace<'m, E> {
    /// Names a range of anonymous memory, as `maps` shows it; `None` takes the names away.
    ///
    /// # Errors
    ///
    /// [`Errno::EINVAL`] for a name that is too long (79 bytes at most) or has a character that may not be in one, for an unaligned
    /// address, a range that wraps and a part of what the kernel put there; [`Errno::EBADF`] at a file's mapping; [`Errno::ENOMEM`] where there was a hole (the
    /// rest is named) or no memory is left for the name; [`Errno::EAGAIN`] where none is left for the mappings, or there are too many.
    #[doc(alias = "PR_SET_VMA_ANON_NAME")]
    pub fn set_anon_name(
        &self,
        address: u64,
        length: u64,
        name: Option<&[u8]>,
    ) -> Result<(), Errno> {
        if name.is_some_and(|name| name.len() >= NAME_MAX || !name.iter().all(may_be_in_a_name)) {
            return Err(Errno::EINVAL);
        }
        let Some(range) = self.advised_range(address, length)? else {
            return Ok(());
        };
        let label = match name {
            Some(name) => Label::Named(self.mm().names().intern(name)?),
            None => Label::None,
        };
        let mut state = self.lock();
        let outcome = self.for_each_part(&mut state, range, |state, vma, part| {
            let is_file = |file| !self.mm().info(file).is_shared_memory;
            if vma.file.is_some_and(is_file) {
                return Err(Errno::EBADF);
            }
            if label != Label::None && !vma.may_cut(part) {
                return Err(Errno::EINVAL);
            }
            if vma.label != label && matches!(vma.label, Label::None | Label::Named(_)) {
                modify_as_advised(state, part, |new| new.label = label)?;
            }
            Ok(())
        });
        drop(state);
        if let Label::Named(id) = label {
            // The mappings hold uses of their own; this was the call's.
            self.mm().names().put(id);
        }
        outcome
    }
}

/// Printable, and nothing that a reader of `maps` would stumble over (`is_valid_name_char`).
fn may_be_in_a_name(byte: &u8) -> bool {
    matches!(byte, b' '..=b'~') && !br"\`$[]".contains(byte)
}
