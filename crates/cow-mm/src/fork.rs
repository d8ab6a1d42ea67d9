//! fork: a second space with the same contents.
//!
//! ```text
//!   parent  page A (writable) ──┐                 parent  page A (read only) ──┐
//!                               ├─ fork ─>                                     ├─> frame, two mappings
//!                                                 child   page A (read only) ──┘
//!                                                 first write on either side: fault, copy (or reuse, if alone)
//! ```
//!
//! Private pages are shared read-only until one side writes. Pages of files and shared memory are not copied: the child
//! finds them again by faults, unless the mapping has pages of its own. Before the parent goes on, its write permissions
//! are flushed from every CPU.
//!
//! Source: fork(2); Linux `mm/memory.c` (`copy_page_range`), `kernel/fork.c` (`dup_mmap`).

use crate::env::Env;
use crate::errno::Errno;
use crate::flags::VmFlags;
use crate::space::AddressSpace;
use crate::vma::{AnonLink, Vma};

impl<'m, E: Env> AddressSpace<'m, E> {
    /// Makes a child with the same mappings and contents.
    ///
    /// # Errors
    ///
    /// [`Errno::ENOMEM`]; no child exists then, and the parent is as it was (its pages may fault once more before they
    /// are written again).
    #[doc(alias = "dup_mmap")]
    pub fn fork(&self) -> Result<Self, Errno> {
        let child = self.empty_child()?;
        {
            let parent = self.lock();
            let mut state = child.lock();
            state.brk = parent.brk;
            state.limits = parent.limits;
            for vma in parent.vmas.iter() {
                if vma.flags.contains(VmFlags::DONTCOPY) {
                    continue;
                }
                let inherited = self.inherited(&vma);
                state.vmas.edit()?.insert(inherited);
                let wiped = vma.flags.contains(VmFlags::WIPEONFORK);
                if !wiped && vma.anon.is_some() {
                    self.copy_leaves(&child, &vma)?;
                }
            }
        }
        Ok(child)
    }

    /// The child's VMA: its reverse map is new and hangs below the parent's, so it is not a single one.
    fn inherited(&self, vma: &Vma) -> Vma {
        let wiped = vma.flags.contains(VmFlags::WIPEONFORK);
        let anon = vma.anon.filter(|_| !wiped).map(|_| AnonLink {
            id: self.mm().next_anon_id(),
            singular: false,
        });
        Vma {
            anon,
            flags: vma.flags.difference(VmFlags::LOCKED),
            ..*vma
        }
    }
}
