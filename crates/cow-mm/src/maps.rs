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
    ///
    /// What is printed to is called under the space's lock, as a visitor of [`for_each_vma`](Self::for_each_vma): it is no memory of a
    /// program's, in which it would fault.
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

pub(crate) fn line<E: Env>(
    f: &mut fmt::Formatter<'_>,
    space: &AddressSpace<'_, E>,
    vma: &Vma,
    heap: Brk,
) -> fmt::Result {
    let (start, end) = vma.bounds();
    let letters = permissions(vma.flags);
    let letters = core::str::from_utf8(&letters).unwrap_or("----");
    let info = vma.file.map(|file| space.mm().info(file));
    let offset = info.map_or(0, |_| vma.offset * kmem_hal::PAGE_SIZE);
    let (minor, inode) = info.map_or((0, 0), |info| (1, info.inode));
    let prefix =
        format_args!("{start:08x}-{end:08x} {letters} {offset:08x} 00:{minor:02x} {inode} ");
    let is_heap =
        vma.is_anonymous() && start < heap.end && end > heap.start && heap.start != heap.end;
    match (vma.label, info) {
        (Label::Named(name), info) => {
            let kind = if info.is_some() { "anon_shmem" } else { "anon" };
            let name = space.mm().names().text(name);
            padded(f, prefix, format_args!("[{kind}:{}]", name.as_str()))
        }
        (_, Some(info)) => padded(f, prefix, format_args!("{}", info.name)),
        (Label::None, None) if is_heap => {
            padded(f, prefix, format_args!("{}", Label::Heap.as_str()))
        }
        (label, None) => padded(f, prefix, format_args!("{}", label.as_str())),
    }
}

/// Prints a line: what comes first, and from column 73 on the name, if there is one.
pub(crate) fn padded(
    f: &mut fmt::Formatter<'_>,
    prefix: fmt::Arguments<'_>,
    name: fmt::Arguments<'_>,
) -> fmt::Result {
    use fmt::Write as _;
    let mut counter = Counter { f, width: 0 };
    counter.write_fmt(prefix)?;
    let width = counter.width;
    let mut late = Late {
        f,
        spaces: Some(73usize.saturating_sub(width)),
    };
    late.write_fmt(name)?;
    f.write_str("\n")
}

/// Writes some spaces before the first text that is not empty.
struct Late<'a, 'f> {
    f: &'a mut fmt::Formatter<'f>,
    spaces: Option<usize>,
}

impl fmt::Write for Late<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if text.is_empty() {
            return Ok(());
        }
        for _ in 0..self.spaces.take().unwrap_or(0) {
            self.f.write_str(" ")?;
        }
        self.f.write_str(text)
    }
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
