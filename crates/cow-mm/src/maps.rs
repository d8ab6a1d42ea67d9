//! `/proc/PID/maps`, in Linux's format.
//!
//! Source: proc_pid_maps(5); Linux `fs/proc/task_mmu.c` (`show_map_vma`): fields, and the name at column 73.

use core::fmt;

use crate::env::Env;
use crate::flags::VmFlags;
use crate::space::{AddressSpace, Brk};
use crate::vma::{Label, Vma};

/// Prints a space's mappings, a line each; see [`AddressSpace::maps`].
pub struct Maps<'s, 'm, E: Env>(&'s AddressSpace<'m, E>);

impl<'m, E: Env> AddressSpace<'m, E> {
    /// The mappings as `/proc/PID/maps` prints them.
    #[doc(alias = "show_map")]
    #[must_use]
    pub fn maps(&self) -> Maps<'_, 'm, E> {
        Maps(self)
    }
}

/// The four letters of a mapping's rights, such as `r-xp`.
#[must_use]
pub fn permissions(flags: VmFlags) -> [u8; 4] {
    let letter = |flag, letter| if flags.contains(flag) { letter } else { b'-' };
    [
        letter(VmFlags::READ, b'r'),
        letter(VmFlags::WRITE, b'w'),
        letter(VmFlags::EXEC, b'x'),
        if flags.contains(VmFlags::MAYSHARE) {
            b's'
        } else {
            b'p'
        },
    ]
}

impl<E: Env> fmt::Display for Maps<'_, '_, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let heap = self.0.heap();
        let mut outcome = Ok(());
        self.0.for_each_vma(|vma| {
            outcome = line(f, self.0, vma, heap);
            outcome.is_ok()
        });
        outcome
    }
}

impl<E: Env> fmt::Debug for Maps<'_, '_, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

fn line<E: Env>(
    f: &mut fmt::Formatter<'_>,
    space: &AddressSpace<'_, E>,
    vma: &Vma,
    heap: Brk,
) -> fmt::Result {
    let start = vma.range.start().as_u64();
    let end = start + vma.range.count() * kmem_hal::PAGE_SIZE;
    let letters = permissions(vma.flags);
    let letters = core::str::from_utf8(&letters).unwrap_or("----");
    let info = vma.file.map(|file| space.mm().object_info(file));
    let offset = info.map_or(0, |_| vma.offset * kmem_hal::PAGE_SIZE);
    let (minor, inode) = info.map_or((0, 0), |info| (1, info.inode));
    let mut counter = Counter { f, width: 0 };
    {
        use fmt::Write as _;
        write!(
            counter,
            "{start:08x}-{end:08x} {letters} {offset:08x} {:02x}:{minor:02x} {inode} ",
            0
        )?;
    }
    let width = counter.width;
    let is_heap =
        vma.is_anonymous() && start < heap.end && end > heap.start && heap.start != heap.end;
    let name = match info {
        Some(info) => info.name,
        None if vma.label == Label::None && is_heap => Label::Heap.as_str(),
        None => vma.label.as_str(),
    };
    if !name.is_empty() {
        for _ in width..73 {
            f.write_str(" ")?;
        }
        f.write_str(name)?;
    }
    f.write_str("\n")
}

/// Counts what it passes on.
struct Counter<'a, 'f> {
    f: &'a mut fmt::Formatter<'f>,
    width: usize,
}

impl fmt::Write for Counter<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.width += text.len();
        self.f.write_str(text)
    }
}
