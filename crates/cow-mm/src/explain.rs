//! Why an access faulted, in a paragraph for people.
//!
//! ```text
//!   A write to 0x7ffff7ff1008 from user mode found the page present and not writable (error code 0x7). It lies in page 1 of 4 of
//!   7ffff7ff0000-7ffff7ff4000 rw-p, anonymous memory. Level 4 (table 0x3f, entry 255): 0x41027, a table; ...
//!   level 1 (table 0x44, entry 497): 0x8000000000046025, frame 0x46 r--. The mapping allows the write and the
//!   page is not this process's alone: the fault handler copies it and the write is made again. If it faults again at once, look for
//!   a translation that was not flushed.
//! ```
//!
//! A look that changes nothing: it may be made from a handler, a debugger's stub or a panic. What it says of a space that others change
//! meanwhile may be old.

use core::fmt;

use kmem_hal::{Access, FaultCode, PAGE_SIZE, Page, VirtAddr};
use kmem_paging::format::Kind;
use kmem_paging::{Entry, Path, Rights};

use crate::absent::Absent;
use crate::env::Env;
use crate::fault::{allows, needed};
use crate::flags::VmFlags;
use crate::maps::permissions;
use crate::space::AddressSpace;
use crate::tables::rights;
use crate::vma::Vma;

/// Why an access faulted; prints as a paragraph. See [`AddressSpace::explain_fault`].
#[derive(Debug)]
pub struct Explanation<'m> {
    address: VirtAddr,
    code: FaultCode,
    task_size: u64,
    stack_limit: u64,
    vma: Option<Vma>,
    /// The path of the mapping's file.
    file: Option<&'m str>,
    /// Whether that is a device's memory.
    is_device: bool,
    /// Whether the page of the file or shared memory lies beyond its end.
    beyond: bool,
    below: Option<Vma>,
    above: Option<Vma>,
    path: Path,
    /// Whether the page that is mapped is the page of zeros.
    is_zero_page: bool,
}

impl<'m, E: Env> AddressSpace<'m, E> {
    /// Says of an access that faulted, or would: which mapping it is about, what each level's entry is, why the
    /// processor refused it, what the fault handler does, and what to check.
    ///
    /// Context: as [`vma_at`](Self::vma_at): it takes the space's lock for reading.
    #[must_use]
    pub fn explain_fault(&self, address: VirtAddr, code: FaultCode) -> Explanation<'m> {
        let page = Page::containing(address);
        let mm = self.mm();
        let path = self.tables().path(page);
        let (mut vma, mut below, mut above) = (None, None, None);
        let mut file = None;
        let (mut beyond, mut is_device) = (false, false);
        // All that is said of a mapping's file is read while the mapping is there.
        self.for_each_vma(|found| {
            if found.range.last() < page {
                below = Some(*found);
            } else if found.range.first() > page {
                above = Some(*found);
                return false;
            } else {
                vma = Some(*found);
                if let Some(info) = found.file.map(|file| mm.info(file)) {
                    file = Some(info.name);
                    is_device = found.file.is_some_and(|file| mm.device(file).is_some());
                    beyond = found.object_page(page) >= info.size.div_ceil(PAGE_SIZE);
                }
            }
            true
        });
        Explanation {
            address,
            code,
            task_size: self.layout().task_size,
            stack_limit: self.limits().stack,
            vma,
            file,
            is_device,
            beyond,
            below,
            above,
            path,
            is_zero_page: path
                .found()
                .leaf()
                .is_some_and(|leaf| leaf.frame == mm.zero_page()),
        }
    }
}

impl fmt::Display for Explanation<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.what(f)?;
        self.mapping(f)?;
        self.entries(f)?;
        self.why(f)
    }
}

impl Explanation<'_> {
    fn access(&self) -> &'static str {
        match self.code.access() {
            Access::Read => "read",
            Access::Write => "write",
            Access::Execute => "fetch of an instruction",
        }
    }

    fn what(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mode = if self.code.contains(FaultCode::USER) {
            "user"
        } else {
            "kernel"
        };
        let found = if self.code.contains(FaultCode::RESERVED) {
            "found a reserved bit set in an entry"
        } else if self.code.contains(FaultCode::PROTECTION_KEY) {
            "was forbidden by the page's protection key"
        } else if self.code.contains(FaultCode::PRESENT) {
            "found the page present and the access not allowed"
        } else {
            "found no page"
        };
        write!(
            f,
            "A {} at {:#x} from {mode} mode {found} (error code {:#x}).",
            self.access(),
            self.address.as_u64(),
            self.code.bits()
        )
    }

    fn mapping(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(vma) = &self.vma else {
            f.write_str(" No mapping covers it")?;
            for (side, vma) in [("below", &self.below), ("above", &self.above)] {
                match vma {
                    Some(vma) => {
                        write!(f, "; the next one {side} is ")?;
                        range(f, vma)?;
                    }
                    None => write!(f, "; there is none {side}")?,
                }
            }
            return f.write_str(".");
        };
        let page = Page::containing(self.address).number() - vma.range.first().number();
        write!(f, " It lies in page {page} of {} of ", vma.range.count())?;
        range(f, vma)?;
        match self.file {
            Some(name) => write!(
                f,
                ", page {} of {name}.",
                vma.object_page(Page::containing(self.address))
            ),
            None if vma.flags.contains(VmFlags::GROWSDOWN) => f.write_str(", a stack."),
            None => f.write_str(", anonymous memory."),
        }
    }

    fn entries(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, step) in self.path.steps().enumerate() {
            let start = if number == 0 { " Level" } else { "; level" };
            write!(
                f,
                "{start} {} (table {:#x}, entry {}): {:#x}, ",
                step.level,
                step.table.number(),
                step.index,
                step.word
            )?;
            match step.kind {
                Kind::Table => f.write_str("a table")?,
                Kind::Empty => f.write_str("empty")?,
                Kind::Payload => f.write_str("no page but a note of where it is")?,
                Kind::Leaf => self.leaf(f)?,
            }
            if step.shares > 1 {
                write!(f, " (its table is shared by {})", step.shares)?;
            }
        }
        f.write_str(".")
    }

    fn leaf(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Entry::Leaf(leaf) = self.path.found() else {
            return f.write_str("a page");
        };
        let rights = leaf.attributes.rights;
        let letter = |right, letter| if rights.contains(right) { letter } else { '-' };
        write!(
            f,
            "frame {:#x} {}{}{}",
            leaf.frame.number(),
            letter(Rights::READ, 'r'),
            letter(Rights::WRITE, 'w'),
            letter(Rights::EXECUTE, 'x')
        )?;
        if leaf.attributes.pkey != 0 {
            write!(f, " key {}", leaf.attributes.pkey)?;
        }
        Ok(())
    }

    /// Why, what happens now, and what to check.
    fn why(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(" ")?;
        f.write_str(self.reason())
    }

    fn reason(&self) -> &'static str {
        let user = self.code.contains(FaultCode::USER);
        if self.code.contains(FaultCode::RESERVED) {
            return "No entry that kmem writes has a reserved bit: check who else writes to page tables, and the memory itself.";
        }
        if self.address.as_u64() >= self.task_size {
            return match user {
                true => {
                    "That is above the user addresses: the program gets SIGSEGV (MAPERR). Check the pointer: an \
                    index below zero, or a 32-bit value with its sign extended."
                }
                false => {
                    "That is the kernel's half, which no program's mapping covers: a fault there is the kernel's own. Check \
                    whether the address was mapped in the kernel's table, and since when."
                }
            };
        }
        let Some(vma) = &self.vma else {
            return self.nothing_mapped();
        };
        if self.code.contains(FaultCode::PROTECTION_KEY) {
            return "The thread's register for protection keys (PKRU) forbids it: the program gets SIGSEGV (PKUERR). Check what \
                the thread last wrote to PKRU, and whether a signal handler runs with other keys.";
        }
        if !allows(vma.flags, self.code.access()) {
            return "The mapping does not allow it: the program gets SIGSEGV (ACCERR). Check the protection given to mmap or the last \
                mprotect of the range; a guard page below a stack looks the same.";
        }
        if self.beyond {
            return "The page lies beyond the end of the object behind it: the program gets SIGBUS. Check whether the file was \
                cut shorter after it was mapped.";
        }
        match self.path.found() {
            Entry::Empty => self.first_touch(vma),
            Entry::Payload(payload) => match Absent::of(payload) {
                Some(Absent::Guard) => {
                    "The page is in a guard region (MADV_GUARD_INSTALL): the program gets SIGSEGV (MAPERR). Check whether a stack or a \
                    buffer ran over its end."
                }
                Some(Absent::Moving(_)) => {
                    "The page is being moved to another frame: the access is made again, and finds it there in a moment."
                }
                Some(Absent::Swapped(_)) | None => {
                    "The mapping allows it and the page is in swap: the fault handler brings it back, and the access is made again."
                }
            },
            Entry::Leaf(leaf) => {
                let wanted = needed(self.code.access());
                if leaf.attributes.rights.contains(wanted) {
                    return "The entry allows it by now: another CPU was faster, or the translation is an old one. The access is made \
                        again; if it faults at once again, look for a change of this entry that was not flushed.";
                }
                if self.code.access() != Access::Write || !rights(vma.flags).contains(wanted) {
                    return "The mapping was given more rights since the page came in: the fault handler raises the entry, and the access \
                        is made again.";
                }
                self.write_to_present(vma)
            }
        }
    }

    fn nothing_mapped(&self) -> &'static str {
        let address = self.address.as_u64();
        let stack = self
            .above
            .filter(|vma| vma.flags.contains(VmFlags::GROWSDOWN));
        match stack {
            Some(stack) if stack.bounds().1 - address <= self.stack_limit => {
                "The stack above may grow down to it: the fault handler grows it, unless another mapping is nearer below than the \
                guard gap or a limit is reached."
            }
            Some(_) => {
                "It is deeper below the stack than RLIMIT_STACK allows: the program gets SIGSEGV (MAPERR). Check for recursion \
                without an end and for large local arrays."
            }
            None if address < PAGE_SIZE => {
                "The program gets SIGSEGV (MAPERR). The address is in the first page: check for a null pointer, and which field \
                of what it points to lies at this offset."
            }
            None => {
                "The program gets SIGSEGV (MAPERR). Check whether the memory was unmapped before (use after munmap), or the access \
                ran over the end of the mapping below."
            }
        }
    }

    fn first_touch(&self, vma: &Vma) -> &'static str {
        let write = self.code.access() == Access::Write;
        if self.is_device {
            return "The page of the device is not mapped here yet: the fault handler maps it and those around it, with the device's memory type, \
                and the access is made again.";
        }
        match (vma.file.is_some(), write) {
            (false, false) => {
                "It is the first touch of the page, a read: the fault handler maps the page of zeros, and the access is made again."
            }
            (false, true) => {
                "It is the first touch of the page, a write: the fault handler maps a fresh page of zeros, and the access is made again."
            }
            (true, true) if !vma.is_shared() => {
                "The page of the file is not mapped here yet: the fault handler copies it, because the mapping is private, and the \
                access is made again. It may have to wait for the file."
            }
            (true, _) => {
                "The page of the file is not mapped here yet: the fault handler maps it, and the access is made again. It may have \
                to wait for the file."
            }
        }
    }

    fn write_to_present(&self, vma: &Vma) -> &'static str {
        if vma.is_shared() {
            "It is the first write to a page of a shared mapping: the fault handler notes that the page is dirty, and the write is \
            made again."
        } else if self.is_zero_page {
            "It is the first write to a page that was only read so far: the fault handler maps a fresh page in place of the page \
            of zeros, and the write is made again."
        } else {
            "The mapping is private and the page may be seen by others: the fault handler copies it (copy on write), or lets the process \
            keep it where it is the last one, and the write is made again. If it faults again at once, look for a \
            translation that was not flushed."
        }
    }
}

fn range(f: &mut fmt::Formatter<'_>, vma: &Vma) -> fmt::Result {
    let (start, end) = vma.bounds();
    let letters = permissions(vma.flags);
    let letters = core::str::from_utf8(&letters).unwrap_or("----");
    write!(f, "{start:x}-{end:x} {letters}")
}
