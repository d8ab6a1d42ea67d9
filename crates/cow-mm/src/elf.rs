//! What an ELF image's headers say: both classes, checked and put into words of 64 bits.
//!
//! ```text
//!   header   magic, class, type, machine, entry, where the table is ──> table  [ LOAD | LOAD | INTERP | GNU_STACK | .. ]
//! ```
//!
//! Pure: bytes in, numbers out. Nothing here trusts a number; whoever adds two of them checks for the wrap.
//!
//! Source: System V ABI, chapters 4 and 5; its supplements for Intel386 and x86-64; Linux `fs/binfmt_elf.c`.

use crate::errno::Errno;
use crate::flags::Prot;

/// Bytes of the longer header.
pub(crate) const HEADER_SIZE: usize = 64;
/// Bytes of the longer entry of the program header table.
pub(crate) const ENTRY_SIZE: usize = 56;
/// Bytes that the table may have at most: a page (`load_elf_phdrs`).
const TABLE_MAX: u64 = 4096;

const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const PT_LOAD: u32 = 1;
const PT_INTERP: u32 = 3;
const PT_GNU_STACK: u32 = 0x6474_e551;

/// Which kind of image a space runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// 32 bits, Intel386.
    Elf32,
    /// 64 bits, x86-64.
    Elf64,
}

impl Class {
    /// Bytes of an address, of a word of the auxiliary vector.
    pub const fn word_size(self) -> u64 {
        match self {
            Self::Elf32 => 4,
            Self::Elf64 => 8,
        }
    }

    pub const fn header_size(self) -> usize {
        match self {
            Self::Elf32 => 52,
            Self::Elf64 => HEADER_SIZE,
        }
    }

    pub const fn entry_size(self) -> usize {
        match self {
            Self::Elf32 => 32,
            Self::Elf64 => ENTRY_SIZE,
        }
    }
}

/// What the header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub position_independent: bool,
    pub entry: u64,
    /// Where the table of program headers is in the file.
    pub table: u64,
    pub count: u64,
}

impl Header {
    /// Reads the header of an image of this class; `bytes` has as many as such a header.
    ///
    /// # Errors
    ///
    /// [`Errno::ENOEXEC`] for what is none.
    pub fn parse(class: Class, bytes: &[u8]) -> Result<Self, Errno> {
        let (ident, machine) = match class {
            Class::Elf32 => (b"\x7fELF\x01\x01", 3),
            Class::Elf64 => (b"\x7fELF\x02\x01", 62),
        };
        let (entry, table, entry_size, count) = match class {
            Class::Elf32 => (word32(bytes, 24)?, word32(bytes, 28)?, 42, 44),
            Class::Elf64 => (word64(bytes, 24)?, word64(bytes, 32)?, 54, 56),
        };
        let kind = half(bytes, 16)?;
        let count = u64::from(half(bytes, count)?);
        let size = count * class.entry_size() as u64;
        if !bytes.starts_with(ident)
            || !matches!(kind, ET_EXEC | ET_DYN)
            || half(bytes, 18)? != machine
            || usize::from(half(bytes, entry_size)?) != class.entry_size()
            || size == 0
            || size > TABLE_MAX
        {
            return Err(Errno::ENOEXEC);
        }
        Ok(Self {
            position_independent: kind == ET_DYN,
            entry,
            table,
            count,
        })
    }
}

/// A part of the file that is put into memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Segment {
    pub offset: u64,
    pub address: u64,
    pub file_size: u64,
    pub memory_size: u64,
    /// Bytes; a power of two, or nothing that anybody must follow.
    pub alignment: u64,
    pub prot: Prot,
}

/// What an entry of the table is about, as far as exec is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    Load(Segment),
    /// Where in the file the interpreter's path is, and its length with the zero.
    Interpreter {
        offset: u64,
        length: u64,
    },
    /// What the stack may be used for.
    Stack(Prot),
    Other,
}

impl Entry {
    /// Reads an entry; `bytes` has as many as one of this class.
    ///
    /// # Errors
    ///
    /// [`Errno::ENOEXEC`] where they are too few.
    pub fn parse(class: Class, bytes: &[u8]) -> Result<Self, Errno> {
        let [offset, address, file_size, memory_size, alignment] = match class {
            Class::Elf32 => [
                word32(bytes, 4)?,
                word32(bytes, 8)?,
                word32(bytes, 16)?,
                word32(bytes, 20)?,
                word32(bytes, 28)?,
            ],
            Class::Elf64 => [
                word64(bytes, 8)?,
                word64(bytes, 16)?,
                word64(bytes, 32)?,
                word64(bytes, 40)?,
                word64(bytes, 48)?,
            ],
        };
        let bits = match class {
            Class::Elf32 => word32(bytes, 24)?,
            Class::Elf64 => word32(bytes, 4)?,
        };
        let mut prot = Prot::empty();
        prot.set(Prot::EXEC, bits & 1 != 0);
        prot.set(Prot::WRITE, bits & 2 != 0);
        prot.set(Prot::READ, bits & 4 != 0);
        Ok(match word32(bytes, 0)? as u32 {
            PT_LOAD => Self::Load(Segment {
                offset,
                address,
                file_size,
                memory_size,
                alignment,
                prot,
            }),
            PT_INTERP => Self::Interpreter {
                offset,
                length: file_size,
            },
            PT_GNU_STACK => Self::Stack(prot),
            _ => Self::Other,
        })
    }
}

fn half(bytes: &[u8], at: usize) -> Result<u16, Errno> {
    let bytes = bytes.get(at..at + 2).ok_or(Errno::ENOEXEC)?;
    Ok(u16::from_le_bytes([bytes[0], bytes[1]]))
}

fn word32(bytes: &[u8], at: usize) -> Result<u64, Errno> {
    let bytes = bytes.get(at..at + 4).ok_or(Errno::ENOEXEC)?;
    let mut word = [0; 4];
    word.copy_from_slice(bytes);
    Ok(u64::from(u32::from_le_bytes(word)))
}

fn word64(bytes: &[u8], at: usize) -> Result<u64, Errno> {
    let bytes = bytes.get(at..at + 8).ok_or(Errno::ENOEXEC)?;
    let mut word = [0; 8];
    word.copy_from_slice(bytes);
    Ok(u64::from_le_bytes(word))
}
