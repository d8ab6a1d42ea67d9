//! exec: an ELF image becomes the contents of a new space.
//!
//! ```text
//!   file  [ headers | text | data ]        space  text  r-x  file   (image base for position-independent images)
//!                                                 data  rw-  file, private; the rest of its last page zeroed
//!                                                 bss   rw-  anonymous
//!                                                 heap  brk, empty
//!                                                 ...
//!                                                 interpreter: as any mapping without an address
//!                                                 stack (see `stack.rs`)
//! ```
//!
//! Segments are mapped, not read: pages come by faults. All headers, the interpreter's too, are read once, into a frame for each table
//! ([`ProgramHeaders`]), and checked before anything is changed: up to there a malformed image leaves the space empty. Later errors kill
//! the program, as in Linux.
//!
//! Images are of the class that the space's addresses have room for: up to 4 GiB ELF32 for Intel386, else ELF64 for x86-64.
//!
//! Source: System V ABI, chapters 4 and 5; Linux `fs/binfmt_elf.c` (`load_elf_binary`, `elf_load`, `load_elf_interp`).

use core::fmt;

use kmem_hal::{IoTicket, PAGE_SIZE, VirtAddr};

use crate::elf::{Class, Entry, HEADER_SIZE, Header, Segment};
use crate::env::Env;
use crate::errno::Errno;
use crate::flags::{MapFlags, Prot};
use crate::layout::image_base;
use crate::mmap::{MapRequest, OpenFile};
use crate::page_cache::ObjectPage;
use crate::program_headers::ProgramHeaders;
use crate::space::{AddressSpace, Segments};

/// The longest path of an interpreter, with its zero (`PATH_MAX`).
const PATH_MAX: u64 = 4096;

/// What is to be executed, and with what.
#[derive(Clone, Copy, Debug)]
pub struct Image<'a> {
    /// The file.
    pub file: OpenFile,
    /// The interpreter that the file names ([`AddressSpace::interpreter`]), opened; without it such a program starts at its own entry.
    pub interpreter: Option<OpenFile>,
    /// The path that the program is told (`AT_EXECFN`).
    pub path: &'a [u8],
    /// Arguments, without terminating zeros.
    pub arguments: &'a [&'a [u8]],
    /// Environment, without terminating zeros.
    pub environment: &'a [&'a [u8]],
    /// Entries of the auxiliary vector that the kernel adds, such as `AT_HWCAP`, `AT_CLKTCK`, `AT_UID`; at most 16 are used.
    pub auxiliary: &'a [(u64, u64)],
    /// Sixteen random bytes for the program (`AT_RANDOM`).
    pub random: [u8; 16],
}

impl<'a> Image<'a> {
    /// A program without an interpreter, arguments, and environment.
    #[must_use]
    pub const fn new(file: OpenFile, path: &'a [u8]) -> Self {
        Self {
            file,
            interpreter: None,
            path,
            arguments: &[],
            environment: &[],
            auxiliary: &[],
            random: [0; 16],
        }
    }
}

/// Where the program begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// The first instruction: the interpreter's, if there is one.
    pub entry: VirtAddr,
    /// The stack pointer: argc lies there.
    pub stack: VirtAddr,
    /// What was added to the image's addresses.
    pub bias: u64,
    /// What was added to the interpreter's addresses (`AT_BASE`); 0 without one.
    pub interpreter: u64,
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

/// What the auxiliary vector says of a program, before its place is added to the addresses.
#[derive(Clone, Copy, Default)]
pub(crate) struct Program {
    pub entry: u64,
    /// The address of the table of program headers in memory.
    pub table_address: u64,
    pub count: u64,
}

/// What the headers of an image say, checked.
struct Headers<'m, E: Env> {
    program: Program,
    position_independent: bool,
    table: ProgramHeaders<'m, E>,
    /// The path of the interpreter: where in the file, and how long with its zero.
    interpreter: Option<(u64, u64)>,
    /// What the image says of its stack.
    stack: Option<Prot>,
}

impl<E: Env> Headers<'_, E> {
    fn segments(&self) -> impl Iterator<Item = Segment> {
        self.table.entries().filter_map(|entry| match entry {
            Entry::Load(segment) => Some(segment),
            _ => None,
        })
    }

    /// From the first page of the lowest segment to the end of the highest.
    fn span(&self) -> (u64, u64) {
        let low = self.segments().map(|segment| segment.address).min();
        let high = self
            .segments()
            .map(|segment| segment.address + segment.memory_size)
            .max();
        (low.unwrap_or(0) & !(PAGE_SIZE - 1), high.unwrap_or(0))
    }

    /// The largest alignment that a segment asks for (`maximum_alignment`).
    fn alignment(&self) -> u64 {
        self.segments()
            .map(|segment| segment.alignment)
            .filter(|alignment| alignment.is_power_of_two())
            .max()
            .unwrap_or(PAGE_SIZE)
            .max(PAGE_SIZE)
    }
}

impl<'m, E: Env> AddressSpace<'m, E> {
    /// Maps an image into this space, which is empty, and makes its stack.
    ///
    /// # Errors
    ///
    /// [`ExecError::NeedIo`] while the headers are being read. [`Errno::ENOEXEC`] for what is no image of the space's class;
    /// [`Errno::ELIBBAD`] where the interpreter is none; [`Errno::EINVAL`] for segments that contradict themselves, or where the
    /// space is not empty; [`Errno::E2BIG`] for too many arguments; [`Errno::EFAULT`] where the image leaves the stack no room;
    /// [`Errno::ENOMEM`]. After one of the last kinds the space may hold part of the image: drop it, as Linux kills the program.
    #[doc(alias = "load_elf_binary")]
    pub fn exec(&self, image: &Image<'_>) -> Result<Start, ExecError> {
        if self.map_count() != 0 {
            return Err(Errno::EINVAL.into());
        }
        let _held = self.mm().hold(image.file.file)?;
        let headers = self.read_headers(image.file)?;
        let interpreter = image.interpreter.filter(|_| headers.interpreter.is_some());
        let _held = interpreter.map(|file| self.mm().hold(file.file));
        let _held = _held.transpose()?;
        let interpreter = match interpreter {
            Some(file) => Some((file, self.interpreter_headers(file)?)),
            None => None,
        };
        let executable = match headers.stack {
            Some(prot) => prot.contains(Prot::EXEC),
            // Old 32-bit programs say nothing, and may execute their stack.
            None => self.class() == Class::Elf32,
        };
        // From here on the space changes. The stack comes first, so that no segment is mapped where it will be.
        let strings = self.make_stack(image, executable)?;
        let bias = self.map_image(image.file, &headers)?;
        let (_, end) = headers.span();
        let is_static = headers.interpreter.is_none();
        let behind = if headers.position_independent && is_static {
            // The image is where mappings are: its heap gets the place of an image.
            image_base(self.layout().task_size)
        } else {
            bias.wrapping_add(end).next_multiple_of(PAGE_SIZE)
        };
        self.set_heap(behind.saturating_add(self.layout().heap_gap));
        let mut start = Start {
            entry: VirtAddr::new(bias.wrapping_add(headers.program.entry)),
            stack: VirtAddr::new(0),
            bias,
            interpreter: 0,
        };
        let program = headers.program;
        let segments = bounds(&headers, bias);
        if let Some((file, headers)) = interpreter {
            let bias = self.map_image(file, &headers)?;
            start.entry = VirtAddr::new(bias.wrapping_add(headers.program.entry));
            start.interpreter = bias;
        }
        if start.entry.as_u64() >= self.layout().task_size {
            return Err(Errno::EINVAL.into());
        }
        start.stack = self.write_tables(image, &program, &start, &strings)?;
        let mut state = self.lock();
        state.segments = Segments {
            stack: start.stack.as_u64(),
            arguments: (strings.arguments, strings.environment),
            environment: (strings.environment, strings.environment_end),
            ..segments
        };
        Ok(start)
    }

    /// The path of the interpreter that an image names: its bytes into `path`, how many as the result; `None` if it names none.
    ///
    /// # Errors
    ///
    /// As [`exec`](Self::exec); [`Errno::ENAMETOOLONG`] where `path` is too short.
    pub fn interpreter(&self, file: OpenFile, path: &mut [u8]) -> Result<Option<usize>, ExecError> {
        let _held = self.mm().hold(file.file)?;
        let headers = self.read_headers(file)?;
        let Some((offset, length)) = headers.interpreter else {
            return Ok(None);
        };
        let length = (length - 1) as usize;
        let path = path.get_mut(..length).ok_or(Errno::ENAMETOOLONG)?;
        self.read_file(file, offset, path)?;
        Ok(Some(length))
    }

    pub(crate) fn class(&self) -> Class {
        match self.layout().is_narrow() {
            true => Class::Elf32,
            false => Class::Elf64,
        }
    }

    #[inline(never)]
    fn read_headers(&self, file: OpenFile) -> Result<Headers<'m, E>, ExecError> {
        let class = self.class();
        let mut bytes = [0; HEADER_SIZE];
        let bytes = &mut bytes[..class.header_size()];
        self.read_file(file, 0, bytes)?;
        let header = Header::parse(class, bytes)?;
        let table = ProgramHeaders::read(self.mm(), class, header.count, |index, bytes| {
            let at = index * class.entry_size() as u64;
            let at = header.table.checked_add(at).ok_or(Errno::ENOEXEC)?;
            self.read_file(file, at, bytes)
        })?;
        let (mut table_address, mut any) = (0, false);
        let (mut interpreter, mut stack) = (None, None);
        for entry in table.entries() {
            match entry {
                Entry::Load(segment) => {
                    self.check_segment(&segment)?;
                    any = true;
                    let inside = header.table.wrapping_sub(segment.offset);
                    if segment.offset <= header.table && inside < segment.file_size {
                        table_address = segment.address + inside;
                    }
                }
                Entry::Interpreter { offset, length } if interpreter.is_none() => {
                    if !(2..=PATH_MAX).contains(&length) {
                        return Err(Errno::ENOEXEC.into());
                    }
                    let mut last = [0];
                    let end = offset.checked_add(length - 1).ok_or(Errno::ENOEXEC)?;
                    self.read_file(file, end, &mut last)?;
                    if last != [0] {
                        return Err(Errno::ENOEXEC.into());
                    }
                    interpreter = Some((offset, length));
                }
                Entry::Stack(prot) => stack = Some(prot),
                Entry::Interpreter { .. } | Entry::Other => {}
            }
        }
        if !any {
            return Err(Errno::EINVAL.into());
        }
        Ok(Headers {
            program: Program {
                entry: header.entry,
                count: header.count,
                table_address,
            },
            position_independent: header.position_independent,
            table,
            interpreter,
            stack,
        })
    }

    /// Whether a segment is one that can be mapped: Linux's own checks, and that what is mapped of the file lies alike inside of a page there and
    /// in memory.
    fn check_segment(&self, segment: &Segment) -> Result<(), Errno> {
        let task_size = self.layout().task_size;
        let wrong = segment.file_size > segment.memory_size
            || segment.memory_size > task_size
            || segment.address > task_size - segment.memory_size
            || segment.file_size > 0 && segment.offset % PAGE_SIZE != segment.address % PAGE_SIZE
            || segment.offset.checked_add(segment.file_size).is_none();
        if wrong { Err(Errno::EINVAL) } else { Ok(()) }
    }

    /// Reads the headers of an image that is an interpreter.
    fn interpreter_headers(&self, file: OpenFile) -> Result<Headers<'m, E>, ExecError> {
        let mut headers = self.read_headers(file).map_err(|error| match error {
            ExecError::Errno(Errno::ENOEXEC) => Errno::ELIBBAD.into(),
            error => error,
        })?;
        // It is placed as a mapping without an address, whatever it asks of an interpreter of its own.
        headers.interpreter = None;
        Ok(headers)
    }

    /// Maps an image's segments; gives what was added to their addresses.
    fn map_image(&self, file: OpenFile, headers: &Headers<'m, E>) -> Result<u64, Errno> {
        let (low, high) = headers.span();
        let bias = if !headers.position_independent {
            0
        } else if headers.interpreter.is_some() {
            (self.layout().image_base & !(headers.alignment() - 1)).wrapping_sub(low)
        } else {
            self.free_place(high - low, headers.alignment())?
                .wrapping_sub(low)
        };
        let mut first = true;
        for segment in headers.segments() {
            let start = bias.wrapping_add(segment.address);
            let task_size = self.layout().task_size;
            if start > task_size || segment.memory_size > task_size - start {
                return Err(Errno::EINVAL);
            }
            self.map_segment(file, &segment, start, first)?;
            first = false;
        }
        Ok(bias)
    }

    /// A free range, as mmap would choose it.
    fn free_place(&self, length: u64, alignment: u64) -> Result<u64, Errno> {
        let more = if alignment > PAGE_SIZE { alignment } else { 0 };
        let length = length.checked_add(more).ok_or(Errno::ENOMEM)?;
        let place = self.mmap(&MapRequest::anonymous(length.max(1), Prot::empty()))?;
        self.munmap(place.as_u64(), length.max(1))?;
        Ok(place.as_u64().next_multiple_of(alignment))
    }

    /// Reads bytes of a file through its page cache.
    fn read_file(&self, file: OpenFile, offset: u64, to: &mut [u8]) -> Result<(), ExecError> {
        let mut done = 0;
        while done < to.len() {
            let at = offset.checked_add(done as u64).ok_or(Errno::ENOEXEC)?;
            let size = self.mm().info(file.file).size;
            let frame = match self.mm().object_page(file.file, at / PAGE_SIZE)? {
                ObjectPage::Ready(frame) => frame,
                ObjectPage::NeedIo(ticket) => return Err(ExecError::NeedIo(ticket)),
                ObjectPage::Beyond => return Err(Errno::ENOEXEC.into()),
            };
            if at >= size {
                self.mm().put_reference(frame);
                return Err(Errno::ENOEXEC.into());
            }
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
    fn map_segment(
        &self,
        file: OpenFile,
        segment: &Segment,
        start: u64,
        first: bool,
    ) -> Result<(), Errno> {
        let lead = start % PAGE_SIZE;
        let (first_page, file_end) = (start - lead, start + segment.file_size);
        let end = start + segment.memory_size;
        // The first segment must not hit the stack; later ones replace what is there, as in Linux.
        let fixed = match first {
            true => MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE,
            false => MapFlags::PRIVATE | MapFlags::FIXED,
        };
        if segment.file_size > 0 {
            self.mmap(&MapRequest {
                address: first_page,
                length: file_end - first_page,
                prot: segment.prot,
                flags: fixed,
                file: Some(file),
                offset: segment.offset - lead,
            })?;
        }
        if segment.memory_size == segment.file_size {
            return Ok(());
        }
        let bss = match segment.file_size {
            0 => first_page,
            _ => file_end.next_multiple_of(PAGE_SIZE),
        };
        if end > bss {
            // Memory of its own may always be written, whatever the segment says.
            let prot = Prot::READ | Prot::WRITE | segment.prot & Prot::EXEC;
            self.mmap(&MapRequest {
                address: bss,
                length: end - bss,
                prot,
                flags: MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::ANONYMOUS,
                file: None,
                offset: 0,
            })?;
        }
        if segment.file_size > 0 && segment.prot.contains(Prot::WRITE) {
            // What of the last file page is not the file's, to the page's end even if the segment ends before (`padzero`).
            let tail = bss - file_end;
            self.zero_memory(VirtAddr::new(file_end), tail as usize)
                .map_err(|_| Errno::EFAULT)?;
        }
        Ok(())
    }
}

/// Where code and data lie (`start_code` and so on).
fn bounds<E: Env>(headers: &Headers<'_, E>, bias: u64) -> Segments {
    let (mut code, mut data) = ((u64::MAX, 0), (0, 0));
    for segment in headers.segments() {
        let start = bias.wrapping_add(segment.address);
        let end = start.wrapping_add(segment.file_size);
        if segment.prot.contains(Prot::EXEC) {
            code = (start.min(code.0), end.max(code.1));
        }
        data = (start.max(data.0), end.max(data.1));
    }
    code.0 = code.0.min(code.1);
    Segments {
        code,
        data,
        ..Segments::default()
    }
}
