//! The running binary as an ELF image: which bytes of the file go where when it is executed.
//!
//! ```text
//!    file:   | headers | text ...... | data ... |
//!                 PT_LOAD r-x   PT_LOAD rw- (file part)
//!    memory: ...[ r-x ]....[ rw- file part | zeros ]
//!                                     ^ file_end   ^ end
//! ```
//! A segment's file part is mapped from the file by whole pages; what its last page holds behind the file part is the next
//! bytes of the file, which exec overwrites with zeros where the segment is writable and longer in memory; further pages
//! are anonymous. (System V ABI, chapter 5; Linux `fs/binfmt_elf.c`, `elf_load`.)
//!
//! Invariants
//! - I1: segments ascend, do not overlap by whole pages, and stay inside the file and inside 2^47.
//! - I2: of each segment, address and file offset are equal modulo 4096.
//!
//! Not handled: other machines than x86-64, 32-bit files, and the dynamic loader that a dynamic binary names: its segments
//! are another file's.

use crate::input::InputError;
use object::elf::{ET_DYN, FileHeader64, PF_R, PF_W, PF_X, PT_LOAD, ProgramFlags};
use object::read::elf::{FileHeader, ProgramHeader};
use object::{Endianness, elf};

const PAGE: u64 = 4096;
/// Where Linux puts a position-independent binary when addresses are not randomised (`ELF_ET_DYN_BASE`).
pub const PIE_BASE: u64 = 0x5555_5555_4000;

/// One loadable segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// The first address in memory, not aligned.
    pub address: u64,
    /// Where its bytes start in the file, in bytes.
    pub offset: u64,
    /// How many bytes come from the file.
    pub file_len: u64,
    /// How many bytes it has in memory.
    pub len: u64,
    /// PROT_READ (1), PROT_WRITE (2), PROT_EXEC (4).
    pub prot: u32,
}

impl Segment {
    /// Returns the address of the first page.
    pub fn first_page(&self) -> u64 {
        self.address & !(PAGE - 1)
    }

    /// Returns the file offset of the first page.
    pub fn page_offset(&self) -> u64 {
        self.offset & !(PAGE - 1)
    }

    /// Returns the address behind the last byte that comes from the file.
    pub fn file_end(&self) -> u64 {
        self.address + self.file_len
    }

    /// Returns the address behind the last byte.
    pub fn end(&self) -> u64 {
        self.address + self.len
    }

    /// Returns the address behind the last page that holds bytes of the file.
    pub fn file_pages_end(&self) -> u64 {
        self.file_end().next_multiple_of(PAGE)
    }

    /// Returns the address behind the last page.
    pub fn pages_end(&self) -> u64 {
        self.end().next_multiple_of(PAGE)
    }
}

/// A program's file and its loadable segments.
#[derive(Debug, Clone)]
pub struct Image {
    /// The file's name.
    pub name: String,
    /// The file's bytes.
    pub bytes: Vec<u8>,
    /// The segments, ascending, at the addresses where they run.
    pub segments: Vec<Segment>,
    /// The address of the first instruction.
    pub entry: u64,
    /// What was added to the file's addresses: 0 for a binary that runs where it was linked.
    pub base: u64,
}

impl Image {
    /// Reads the running binary.
    ///
    /// # Errors
    /// If the file cannot be read or is no ELF image that this module handles.
    pub fn running() -> Result<Self, InputError> {
        let path = std::env::current_exe()
            .map_err(|e| InputError::new("running binary", 0, "file", "", e.to_string()))?;
        let name = path.display().to_string();
        let bytes = std::fs::read(&path)
            .map_err(|e| InputError::new(&name, 0, "file", &name, e.to_string()))?;
        Self::parse(&name, bytes)
    }

    /// Reads an image from its bytes.
    ///
    /// # Errors
    /// As [`running`](Self::running); nothing in the bytes makes it panic.
    pub fn parse(name: &str, bytes: Vec<u8>) -> Result<Self, InputError> {
        let bad =
            |field: &str, value: String, what: &str| InputError::new(name, 0, field, value, what);
        let odd = |e: object::read::Error| bad("ELF header", String::new(), &e.to_string());
        let header = FileHeader64::<Endianness>::parse(&bytes[..]).map_err(odd)?;
        let endian = header.endian().map_err(odd)?;
        let machine = header.e_machine(endian);
        if machine != elf::EM_X86_64 {
            return Err(bad("machine", format!("{machine:?}"), "is not x86-64"));
        }
        let base = if header.e_type(endian) == ET_DYN {
            PIE_BASE
        } else {
            0
        };
        let mut segments: Vec<Segment> = Vec::new();
        for ph in header.program_headers(endian, &bytes[..]).map_err(odd)? {
            let kind = ph.p_type(endian);
            if kind != PT_LOAD || ph.p_memsz(endian) == 0 {
                continue;
            }
            let flags = ph.p_flags(endian);
            let bit = |flag: ProgramFlags, prot: u32| if (flags & flag).0 != 0 { prot } else { 0 };
            let (vaddr, offset) = (ph.p_vaddr(endian), ph.p_offset(endian));
            let (file_len, len) = (ph.p_filesz(endian), ph.p_memsz(endian));
            let shown = format!("{vaddr:#x}+{len:#x}");
            let address = vaddr
                .checked_add(base)
                .filter(|a| a.checked_add(len).is_some_and(|e| e <= (1 << 47) - PAGE));
            let Some(address) = address else {
                return Err(bad("segment", shown, "leaves user space"));
            };
            if offset
                .checked_add(file_len)
                .is_none_or(|end| end > bytes.len() as u64)
                || file_len > len
            {
                return Err(bad("segment", shown, "leaves the file"));
            }
            if address % PAGE != offset % PAGE {
                return Err(bad(
                    "segment",
                    shown,
                    "address and offset differ within a page",
                ));
            }
            let segment = Segment {
                address,
                offset,
                file_len,
                len,
                prot: bit(PF_R, 1) | bit(PF_W, 2) | bit(PF_X, 4),
            };
            if segments
                .last()
                .is_some_and(|last| last.pages_end() > segment.first_page())
            {
                return Err(bad(
                    "segment",
                    shown,
                    "overlaps the one before it, or stands before it",
                ));
            }
            segments.push(segment);
        }
        if segments.is_empty() {
            return Err(bad("segments", "0".into(), "nothing to load"));
        }
        let entry = header.e_entry(endian).wrapping_add(base);
        Ok(Self {
            name: name.into(),
            segments,
            entry,
            base,
            bytes,
        })
    }

    /// Returns how many pages of the file the segments map.
    pub fn file_pages(&self) -> u64 {
        self.segments
            .iter()
            .filter(|s| s.file_len > 0)
            .map(|s| (s.file_pages_end() - s.first_page()) / PAGE)
            .sum()
    }

    /// Returns how many pages the segments have in memory.
    pub fn pages(&self) -> u64 {
        let readable = self.segments.iter().filter(|s| s.prot != 0);
        readable
            .map(|s| (s.pages_end() - s.first_page()) / PAGE)
            .sum()
    }

    /// Fills `page` with what must stand in a page of a segment right after exec.
    ///
    /// Bytes of the segment's first page before its start are the file's, as the whole page is mapped.
    pub fn expected_page(&self, segment: &Segment, address: u64, page: &mut [u8]) {
        page.fill(0);
        if segment.file_len == 0 || address >= segment.file_pages_end() {
            return;
        }
        let offset = segment.page_offset() + (address - segment.first_page());
        let bytes = usize::try_from(offset)
            .ok()
            .and_then(|o| self.bytes.get(o..))
            .unwrap_or(&[]);
        let n = bytes.len().min(page.len());
        page[..n].copy_from_slice(&bytes[..n]);
        let cleared = segment.prot & 2 != 0 && segment.len > segment.file_len;
        if cleared && segment.file_end() < address + page.len() as u64 {
            let keep = segment.file_end().saturating_sub(address);
            page[usize::try_from(keep).unwrap_or(0)..].fill(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_test_binary_itself() {
        let image = Image::running().unwrap();
        assert!(image.segments.len() >= 2);
        assert!(
            image
                .segments
                .iter()
                .any(|s| s.prot == 5 && s.address <= image.entry && image.entry < s.end())
        );
        assert!(image.file_pages() > 10);
        let first = &image.segments[0];
        let byte = |s: &Segment, address: u64| {
            let mut page = [0; 4096];
            image.expected_page(s, address & !4095, &mut page);
            page[(address & 4095) as usize]
        };
        assert_eq!(byte(first, first.first_page() + 1), b'E');
        // What is executing now is what stands in the file.
        let text = image.segments.iter().find(|s| s.prot == 5).unwrap();
        assert!((text.address..text.address + 64).any(|a| byte(text, a) != 0));
    }

    #[test]
    fn behind_the_file_part_stand_zeros() {
        let image = Image {
            name: "t".into(),
            bytes: vec![7; 8192],
            segments: vec![],
            entry: 0,
            base: 0,
        };
        let s = Segment {
            address: 0x10_0100,
            offset: 0x100,
            file_len: 0x200,
            len: 0x2000,
            prot: 3,
        };
        let byte = |s: &Segment, address: u64| {
            let mut page = [0xee; 4096];
            image.expected_page(s, address & !4095, &mut page);
            page[(address & 4095) as usize]
        };
        assert_eq!(byte(&s, 0x10_0000), 7);
        assert_eq!(byte(&s, 0x10_02ff), 7);
        assert_eq!(byte(&s, 0x10_0300), 0);
        assert_eq!(byte(&s, 0x10_1000), 0);
        assert_eq!(s.pages_end(), 0x10_3000);
        // A segment that cannot be written keeps the file's next bytes in its last page.
        let s = Segment {
            prot: 1,
            len: 0x200,
            ..s
        };
        assert_eq!(byte(&s, 0x10_0fff), 7);
    }

    #[test]
    fn damage_is_an_error() {
        let good = Image::running().unwrap().bytes;
        assert!(Image::parse("x", Vec::new()).is_err());
        assert!(Image::parse("x", b"#!/bin/sh".to_vec()).is_err());
        assert!(Image::parse("x", good[..64].to_vec()).is_err());
        let mut wrong = good[..4096.min(good.len())].to_vec();
        assert!(
            Image::parse("x", wrong.clone()).is_err(),
            "segments leave the file"
        );
        wrong[18] = 40;
        assert!(
            Image::parse("x", wrong)
                .unwrap_err()
                .what
                .contains("x86-64")
        );
        // Any byte of the header may be anything.
        for at in 0..512 {
            for value in [0, 0x7f, 0xff] {
                let mut bytes = good[..1024].to_vec();
                bytes[at] = value;
                let _ = Image::parse("x", bytes);
            }
        }
    }
}
