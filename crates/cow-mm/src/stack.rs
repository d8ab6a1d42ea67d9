//! A new program's stack: strings at the top, below them what the first instructions look for.
//!
//! ```text
//!   stack_top  ── a word of zero
//!                 the path, the environment's strings, the arguments' strings
//!                 sixteen random bytes
//!                 .. aligned to 16 ..
//!                 auxiliary vector: (key, value) .. (0, 0)
//!                 envp[0] .. 0
//!                 argv[0] .. 0
//!   stack pointer ── argc
//! ```
//!
//! Words have the size of the image's class.
//!
//! Source: System V ABI, x86-64 supplement 3.4.1; Linux `fs/exec.c` (`bprm_stack_limits`), `fs/binfmt_elf.c` (`create_elf_tables`).

use kmem_hal::{PAGE_SIZE, Page, PageRange, VirtAddr};

use crate::brk::heap_flags;
use crate::env::Env;
use crate::errno::Errno;
use crate::exec::{Image, Program, Start};
use crate::flags::VmFlags;
use crate::merge::Candidate;
use crate::space::AddressSpace;
use crate::vma::Label;

/// The longest string, with its zero (`MAX_ARG_STRLEN`).
const STRING_MAX: u64 = 32 * PAGE_SIZE;
/// Strings and pointers may always have so much (`ARG_MAX`), and never more than the second.
const STRINGS_LEAST: u64 = 128 << 10;
const STRINGS_MOST: u64 = 6 << 20;
/// Entries of the auxiliary vector: the kernel's own, and those of exec.
const AUXILIARY: usize = 16 + 11;

const AT_PHDR: u64 = 3;
const AT_PHENT: u64 = 4;
const AT_PHNUM: u64 = 5;
const AT_PAGESZ: u64 = 6;
const AT_BASE: u64 = 7;
const AT_FLAGS: u64 = 8;
const AT_ENTRY: u64 = 9;
const AT_SECURE: u64 = 23;
const AT_RANDOM: u64 = 25;
const AT_EXECFN: u64 = 31;

/// Where the strings of a new stack lie.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Strings {
    path: u64,
    random: u64,
    /// The first argument's address; they end where the environment begins.
    pub arguments: u64,
    pub environment: u64,
    pub environment_end: u64,
}

/// What a program without arguments is called with: nobody need check for an empty list (Linux 5.18 and later).
const NO_ARGUMENTS: &[&[u8]] = &[b""];

fn arguments<'a>(image: &Image<'a>) -> &'a [&'a [u8]] {
    match image.arguments {
        [] => NO_ARGUMENTS,
        arguments => arguments,
    }
}

impl<E: Env> AddressSpace<'_, E> {
    /// Maps the stack and writes the strings.
    #[inline(never)]
    pub(crate) fn make_stack(&self, image: &Image<'_>, executable: bool) -> Result<Strings, Errno> {
        self.check_strings(image)?;
        let top = self.layout().stack_top;
        let last = Page::containing(VirtAddr::new(top - 1));
        let room = self.layout().stack_room.min(self.limits().stack) / PAGE_SIZE;
        let first = last.checked_sub(room).ok_or(Errno::ENOMEM)?;
        let range = PageRange::new(first, last).ok_or(Errno::ENOMEM)?;
        let mut flags = heap_flags() | VmFlags::GROWSDOWN;
        flags.set(VmFlags::EXEC, executable);
        let candidate = Candidate {
            flags,
            offset: first.number(),
            file: None,
            anon: None,
            label: Label::Stack,
        };
        {
            let mut state = self.lock();
            if !state.may_expand(range.count(), flags) {
                return Err(Errno::ENOMEM);
            }
            let limits = state.limits;
            let mut edit = state.vmas.edit()?;
            edit.charge(range.count(), &limits)?;
            edit.add(range, candidate, true);
        }
        let mut writer = StackWriter {
            space: self,
            at: top - self.class().word_size(),
        };
        let path = writer.string(image.path)?;
        let environment_end = path;
        let environment = writer.strings(image.environment)?;
        let arguments = writer.strings(arguments(image))?;
        let random = writer.bytes(&image.random)?;
        Ok(Strings {
            path,
            random,
            arguments,
            environment,
            environment_end,
        })
    }

    /// Whether strings and pointers fit into the part of the stack that they may take (`bprm_stack_limits`).
    fn check_strings(&self, image: &Image<'_>) -> Result<(), Errno> {
        let quarter = self.limits().stack / 4;
        let most = quarter.clamp(STRINGS_LEAST, STRINGS_MOST);
        let lists = [arguments(image), image.environment];
        let pointers = lists.iter().map(|list| list.len() as u64).sum::<u64>();
        let mut size = pointers.saturating_mul(self.class().word_size());
        for string in lists.into_iter().flatten().chain([&image.path]) {
            let length = string.len() as u64 + 1;
            if length > STRING_MAX {
                return Err(Errno::E2BIG);
            }
            size = size.saturating_add(length);
        }
        if size > most {
            return Err(Errno::E2BIG);
        }
        Ok(())
    }

    /// Writes argc, the pointers, and the auxiliary vector below the strings; gives the stack pointer.
    #[inline(never)]
    pub(crate) fn write_tables(
        &self,
        image: &Image<'_>,
        program: &Program,
        start: &Start,
        strings: &Strings,
    ) -> Result<VirtAddr, Errno> {
        let word = self.class().word_size();
        let arguments = arguments(image);
        let own = [
            (AT_PHDR, start.bias.wrapping_add(program.table_address)),
            (AT_PHENT, self.class().entry_size() as u64),
            (AT_PHNUM, program.count),
            (AT_PAGESZ, PAGE_SIZE),
            (AT_BASE, start.interpreter),
            (AT_FLAGS, 0),
            (AT_ENTRY, start.bias.wrapping_add(program.entry)),
            (AT_SECURE, 0),
            (AT_RANDOM, strings.random),
            (AT_EXECFN, strings.path),
        ];
        let extra = &image.auxiliary[..image.auxiliary.len().min(AUXILIARY - own.len() - 1)];
        // The last pair, (0, 0), is the end.
        let pairs = own.len() + extra.len() + 1;
        let words = 1 + arguments.len() + 1 + image.environment.len() + 1 + 2 * pairs;
        let size = words as u64 * word;
        let pointer = strings.random.checked_sub(size).ok_or(Errno::ENOMEM)? & !15;
        let mut at = pointer;
        let mut put = |value: u64| {
            let bytes = value.to_le_bytes();
            let outcome = self.write_memory(VirtAddr::new(at), &bytes[..word as usize]);
            at += word;
            outcome.map_err(|_| Errno::EFAULT)
        };
        put(arguments.len() as u64)?;
        for (list, mut address) in [
            (arguments, strings.arguments),
            (image.environment, strings.environment),
        ] {
            for string in list {
                put(address)?;
                address += string.len() as u64 + 1;
            }
            put(0)?;
        }
        for &(key, value) in own.iter().chain(extra).chain(&[(0, 0)]) {
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
