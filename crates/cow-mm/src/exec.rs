//! exec: an ELF image becomes the contents of a new space.
//!
//! ```text
//!   file  [ headers | text | data ]        space  text  r-x  file   (image base for position-independent images)
//!                                                 data  rw-  file, private; the rest of its last page zeroed
//!                                                 bss   rw-  anonymous
//!                                                 heap  brk, empty
//!                                                 ...
//!                                                 stack: strings, auxiliary vector, envp, argv, argc <- stack pointer
//! ```
//!
//! Segments are mapped, not read: pages come by faults. Headers are read and checked before anything is changed, so a
//! malformed image leaves the space empty.
//!
//! Source: System V ABI, chapters 4 and 5, and its x86-64 supplement, 3.4; Linux `fs/binfmt_elf.c`.

use core::fmt;

use kmem_hal::{IoTicket, PAGE_SIZE, Page, PageRange, VirtAddr};

use crate::brk::heap_flags;
use crate::env::Env;
use crate::errno::Errno;
use crate::flags::{MapFlags, Prot, VmFlags};
use crate::merge::Candidate;
use crate::mmap::{MapRequest, OpenFile};
use crate::page_cache::ObjectPage;
use crate::space::AddressSpace;
use crate::vma::Label;

/// Segments that an image may have.
const MAX_SEGMENTS: usize = 16;
/// Pages of the stack that exec maps at once; it grows from there.
const STACK_PAGES: u64 = 33;
const HEADER_SIZE: usize = 64;
const SEGMENT_SIZE: usize = 56;

/// What is to be executed, and with what.
#[derive(Clone, Copy, Debug)]
pub struct Image<'a> {
    /// The file.
    pub file: OpenFile,
    /// The path that the program is told (`AT_EXECFN`).
    pub path: &'a [u8],
    /// Arguments, without terminating zeros.
    pub arguments: &'a [&'a [u8]],
    /// Environment, without terminating zeros.
    pub environment: &'a [&'a [u8]],
    /// Sixteen random bytes for the program (`AT_RANDOM`).
    pub random: [u8; 16],
}

/// Where the program begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// The first instruction.
    pub entry: VirtAddr,
    /// The stack pointer: argc lies there.
    pub stack: VirtAddr,
    /// What was added to the image's addresses.
    pub bias: u64,
}

/// Why nothing is executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExecError {
    /// A page of the file is on its way: call again when it is there. Nothing was changed.
    NeedIo(IoTicket),
    /// Linux's error number.
    Errno(Errno),
}

impl fmt::Display for ExecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NeedIo(_) => f.write_str("a page of the image is on its way"),
            Self::Errno(errno) => fmt::Display::fmt(errno, f),
        }
    }
}

impl core::error::Error for ExecError {}

impl From<Errno> for ExecError {
    fn from(errno: Errno) -> Self {
        Self::Errno(errno)
    }
}

/// A loadable segment.
#[derive(Clone, Copy, Debug, Default)]
struct Segment {
    offset: u64,
    address: u64,
    file_size: u64,
    memory_size: u64,
    prot: Prot,
}

/// What the headers say.
#[derive(Default)]
struct Headers {
    entry: u64,
    position_independent: bool,
    table_address: u64,
    count: u64,
    segments: [Segment; MAX_SEGMENTS],
    used: usize,
}

impl<'m, E: Env> AddressSpace<'m, E> {
    /// Maps an image into this space, which is empty, and makes its stack.
    ///
    /// # Errors
    ///
    /// [`ExecError::NeedIo`] while the headers are being read. [`Errno::ENOEXEC`] for what is no ELF64 image for x86-64;
    /// [`Errno::EINVAL`] for segments that contradict themselves, or where the space is not empty; [`Errno::ENOMEM`].
    /// After an error of the last kind the space may hold part of the image: drop it, as Linux kills the program.
    #[doc(alias = "load_elf_binary")]
    pub fn exec(&self, image: &Image<'_>) -> Result<Start, ExecError> {
        if self.map_count() != 0 {
            return Err(Errno::EINVAL.into());
        }
        let mut headers = Headers::default();
        self.read_headers(image, &mut headers)?;
        let bias = if headers.position_independent {
            self.image_base()
        } else {
            0
        };
        let mut end = 0;
        for segment in headers.segments.iter().take(headers.used) {
            self.map_segment(image.file, segment, bias)?;
            end = end.max(bias + segment.address + segment.memory_size);
        }
        self.set_heap(end.next_multiple_of(PAGE_SIZE));
        let stack = self.make_stack(image, &headers, bias)?;
        Ok(Start {
            entry: VirtAddr::new(bias + headers.entry),
            stack,
            bias,
        })
    }

    /// Where position-independent images go without randomness: two thirds up (`ELF_ET_DYN_BASE`).
    fn image_base(&self) -> u64 {
        (self.layout().task_size / 3 * 2) & !(PAGE_SIZE - 1)
    }

    /// Fills `headers` in place: returned by value they would stand on the stack more than once.
    #[inline(never)]
    fn read_headers(&self, image: &Image<'_>, headers: &mut Headers) -> Result<(), ExecError> {
        let mut header = [0; HEADER_SIZE];
        self.read_file(image.file, 0, &mut header)?;
        let half = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        // Magic, 64 bits, little endian, version 1; executable or shared object; x86-64.
        let kind = half(16);
        if header[..7] != *b"\x7fELF\x02\x01\x01"
            || !matches!(kind, 2 | 3)
            || half(18) != 62
            || usize::from(half(54)) != SEGMENT_SIZE
            || half(56) == 0
            || usize::from(half(56)) > 65536 / SEGMENT_SIZE
        {
            return Err(Errno::ENOEXEC.into());
        }
        let (entry, table) = (word(&header, 24), word(&header, 32));
        headers.entry = entry;
        headers.position_independent = kind == 3;
        headers.count = u64::from(half(56));
        for index in 0..headers.count {
            let mut bytes = [0; SEGMENT_SIZE];
            let at = table
                .checked_add(index * SEGMENT_SIZE as u64)
                .ok_or(Errno::ENOEXEC)?;
            self.read_file(image.file, at, &mut bytes)?;
            if bytes[..4] == [1, 0, 0, 0] {
                let segment = self.check_segment(&bytes)?;
                let place = headers
                    .segments
                    .get_mut(headers.used)
                    .ok_or(Errno::ENOEXEC)?;
                *place = segment;
                headers.used += 1;
                if segment.offset <= table && table - segment.offset < segment.file_size {
                    headers.table_address = segment.address + (table - segment.offset);
                }
            }
        }
        if headers.used == 0 {
            return Err(Errno::EINVAL.into());
        }
        Ok(())
    }

    fn check_segment(&self, bytes: &[u8; SEGMENT_SIZE]) -> Result<Segment, Errno> {
        let bits = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
        let mut prot = Prot::empty();
        prot.set(Prot::EXEC, bits & 1 != 0);
        prot.set(Prot::WRITE, bits & 2 != 0);
        prot.set(Prot::READ, bits & 4 != 0);
        let segment = Segment {
            offset: word(bytes, 8),
            address: word(bytes, 16),
            file_size: word(bytes, 32),
            memory_size: word(bytes, 40),
            prot,
        };
        let task_size = self.layout().task_size;
        let bias = self.image_base();
        let wrong = segment.file_size > segment.memory_size
            || segment.memory_size > task_size
            || segment.address > task_size - segment.memory_size
            || segment.address.saturating_add(bias) > task_size
            || segment.offset % PAGE_SIZE != segment.address % PAGE_SIZE
            || segment.offset.checked_add(segment.file_size).is_none();
        if wrong {
            Err(Errno::EINVAL)
        } else {
            Ok(segment)
        }
    }

    /// Reads bytes of a file through its page cache.
    fn read_file(&self, file: OpenFile, offset: u64, to: &mut [u8]) -> Result<(), ExecError> {
        let mut done = 0;
        while done < to.len() {
            let at = offset.checked_add(done as u64).ok_or(Errno::ENOEXEC)?;
            let frame = match self.mm().object_page(file.file, at / PAGE_SIZE)? {
                ObjectPage::Ready(frame) => frame,
                ObjectPage::NeedIo(ticket) => return Err(ExecError::NeedIo(ticket)),
                ObjectPage::Beyond => return Err(Errno::ENOEXEC.into()),
            };
            let start = (at % PAGE_SIZE) as usize;
            let part = (to.len() - done).min(PAGE_SIZE as usize - start);
            self.mm()
                .read_frame(frame, start, &mut to[done..done + part]);
            self.mm().put_reference(frame);
            done += part;
        }
        Ok(())
    }

    #[inline(never)]
    fn map_segment(&self, file: OpenFile, segment: &Segment, bias: u64) -> Result<(), Errno> {
        if segment.memory_size == 0 {
            return Ok(());
        }
        let start = bias + segment.address;
        let lead = start % PAGE_SIZE;
        let (first, file_end) = (start - lead, start + segment.file_size);
        let end = start + segment.memory_size;
        let fixed = MapFlags::PRIVATE | MapFlags::FIXED;
        if segment.file_size > 0 {
            self.mmap(&MapRequest {
                address: first,
                length: file_end - first,
                prot: segment.prot,
                flags: fixed,
                file: Some(file),
                offset: segment.offset - lead,
            })?;
        }
        let bss = if segment.file_size > 0 {
            file_end.next_multiple_of(PAGE_SIZE)
        } else {
            first
        };
        if end > bss {
            self.mmap(&MapRequest {
                address: bss,
                length: end - bss,
                prot: segment.prot,
                flags: fixed | MapFlags::ANONYMOUS,
                file: None,
                offset: 0,
            })?;
        }
        if segment.memory_size > segment.file_size
            && segment.file_size > 0
            && segment.prot.contains(Prot::WRITE)
        {
            // What of the last file page is not the file's, to the page's end even if the segment ends before (`padzero`).
            let tail = bss - file_end;
            self.zero_memory(VirtAddr::new(file_end), tail as usize)
                .map_err(|_| Errno::EFAULT)?;
        }
        Ok(())
    }

    #[inline(never)]
    fn make_stack(
        &self,
        image: &Image<'_>,
        headers: &Headers,
        bias: u64,
    ) -> Result<VirtAddr, Errno> {
        let top = self.layout().stack_top;
        let last = Page::containing(VirtAddr::new(top - 1));
        let first = last.checked_sub(STACK_PAGES - 1).ok_or(Errno::ENOMEM)?;
        let range = PageRange::new(first, last).ok_or(Errno::ENOMEM)?;
        let flags = heap_flags() | VmFlags::GROWSDOWN;
        let candidate = Candidate {
            flags,
            offset: first.number(),
            file: None,
            anon: None,
            label: Label::Stack,
        };
        self.lock().vmas.edit()?.add(range, candidate, true);
        let mut writer = StackWriter {
            space: self,
            at: top - 8,
        };
        let path = writer.string(image.path)?;
        let environment = writer.strings(image.environment)?;
        let arguments = writer.strings(image.arguments)?;
        let random = writer.bytes(&image.random)?;
        let words = 1 + image.arguments.len() + 1 + image.environment.len() + 1;
        let auxiliary = [
            (3, bias + headers.table_address),
            (4, SEGMENT_SIZE as u64),
            (5, headers.count),
            (6, PAGE_SIZE),
            (7, 0),
            (8, 0),
            (9, bias + headers.entry),
            (23, 0),
            (25, random),
            (31, path),
            (0, 0),
        ];
        let size = (words + 2 * auxiliary.len()) as u64 * 8;
        let pointer = (writer.at - size) & !15;
        let mut at = pointer;
        let mut put = |value: u64| {
            let outcome = self.write_memory(VirtAddr::new(at), &value.to_le_bytes());
            at += 8;
            outcome.map_err(|_| Errno::ENOMEM)
        };
        put(image.arguments.len() as u64)?;
        for (list, mut address) in [
            (image.arguments, arguments),
            (image.environment, environment),
        ] {
            for string in list {
                put(address)?;
                address += string.len() as u64 + 1;
            }
            put(0)?;
        }
        for (key, value) in auxiliary {
            put(key)?;
            put(value)?;
        }
        Ok(VirtAddr::new(pointer))
    }
}

/// Writes downwards from the top of a stack.
struct StackWriter<'s, 'm, E: Env> {
    space: &'s AddressSpace<'m, E>,
    at: u64,
}

impl<E: Env> StackWriter<'_, '_, E> {
    fn bytes(&mut self, bytes: &[u8]) -> Result<u64, Errno> {
        self.at = self
            .at
            .checked_sub(bytes.len() as u64)
            .ok_or(Errno::ENOMEM)?;
        self.space
            .write_memory(VirtAddr::new(self.at), bytes)
            .map_err(|_| Errno::ENOMEM)?;
        Ok(self.at)
    }

    fn string(&mut self, string: &[u8]) -> Result<u64, Errno> {
        self.bytes(&[0])?;
        self.bytes(string)
    }

    /// Strings one after the other, ascending; gives the first one's address.
    fn strings(&mut self, strings: &[&[u8]]) -> Result<u64, Errno> {
        for string in strings.iter().rev() {
            self.string(string)?;
        }
        Ok(self.at)
    }
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}
