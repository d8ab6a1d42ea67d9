//! Loads a real program: the running binary, mapped segment by segment, faulted in page by page and compared with its file.
//!
//! ```text
//!   segment      file part: mapped from the file, private
//!   [ first_page ........ file_end | zeros ][ anonymous pages .. pages_end )
//!                                   ^ cleared by exec where the segment is writable: the first write fault
//! ```
//! Every byte of every page is read through the MMU and held against the file, so that a page in the wrong place, a lost
//! page or a tail that is not clean is found. (Linux `fs/binfmt_elf.c`, `elf_load` and `padzero`.)

use crate::elf::Image;
use crate::input::oracle::show;
use crate::replay::mm::{
    Backing, Content, FileSpec, MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE, MmUnderTest, PROT_WRITE,
};

const PAGE: u64 = 4096;

/// What loading did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Loaded {
    /// Segments that were mapped.
    pub segments: u64,
    /// Pages that were read through the MMU.
    pub pages: u64,
    /// Bytes that were compared.
    pub bytes: u64,
}

/// Maps the image's segments into an empty address space.
///
/// # Errors
/// What a call answered instead of what it should.
pub fn map<M: MmUnderTest>(mm: &mut M, image: &Image, inode: u64) -> Result<(), String> {
    let spec = FileSpec {
        name: crate::replay::short_name(&image.name).to_string(),
        inode,
        writable: false,
        pages: (image.bytes.len() as u64).div_ceil(PAGE),
        content: Content::Bytes(image.bytes.clone().into()),
    };
    let file = Backing::File(
        mm.open(&spec)
            .map_err(|e| format!("the file cannot be opened: {e}"))?,
    );
    let place = |what: &str, wanted: u64, got| match got {
        Ok(at) if at == wanted => Ok(()),
        other => Err(format!(
            "{what} of the segment at {wanted:#x} went to {}",
            show(&other)
        )),
    };
    for s in &image.segments {
        let first = s.first_page();
        if s.file_len > 0 {
            let len = s.file_pages_end() - first;
            let got = mm.mmap(
                first,
                len,
                s.prot,
                MAP_PRIVATE | MAP_FIXED,
                file,
                s.page_offset(),
            );
            place("the file part", first, got)?;
        }
        let zeros = if s.file_len > 0 {
            s.file_pages_end()
        } else {
            first
        };
        if zeros < s.pages_end() {
            let flags = MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS;
            let got = mm.mmap(
                zeros,
                s.pages_end() - zeros,
                s.prot,
                flags,
                Backing::None,
                0,
            );
            place("the anonymous part", zeros, got)?;
        }
        if s.prot & PROT_WRITE != 0 && s.len > s.file_len && s.file_len > 0 {
            let tail = vec![0; (s.file_pages_end() - s.file_end()) as usize];
            mm.write(s.file_end(), &tail)
                .map_err(|e| format!("clearing the tail at {:#x}: {e}", s.file_end()))?;
        }
    }
    Ok(())
}

/// Reads every page of every segment and holds it against the file; `progress` hears the number of pages so far.
///
/// # Errors
/// The first byte that is not the file's, or the signal that a read got.
pub fn compare<M: MmUnderTest>(
    mm: &mut M,
    image: &Image,
    progress: &mut dyn FnMut(u64),
) -> Result<Loaded, String> {
    let mut loaded = Loaded::default();
    let mut page = vec![0u8; PAGE as usize];
    for s in &image.segments {
        let mut at = s.first_page();
        // A segment that cannot be read cannot be compared by a program; none of a real binary is like that.
        while at < s.pages_end() && s.prot != 0 {
            mm.read(at, &mut page)
                .map_err(|e| format!("reading {at:#x}: {e}"))?;
            let differs = page
                .iter()
                .zip(at..)
                .find(|(byte, address)| **byte != image.expected(s, *address));
            if let Some((byte, address)) = differs {
                return Err(format!(
                    "at {address:#x} stands {byte:#04x}, the file has {:#04x}",
                    image.expected(s, address)
                ));
            }
            loaded.pages += 1;
            loaded.bytes += PAGE;
            progress(loaded.pages);
            at += PAGE;
        }
        loaded.segments += 1;
    }
    Ok(loaded)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elf::Segment;
    use crate::replay::flat::{Bug, Flat};

    /// A program with text, and with data that end inside a page and go on in memory.
    fn image() -> Image {
        let segment = |address, offset, file_len, len, prot| Segment {
            address,
            offset,
            file_len,
            len,
            prot,
        };
        Image {
            name: "/bin/tiny".into(),
            bytes: (0..0x3000u32).map(|i| (i % 251) as u8 | 1).collect(),
            segments: vec![
                segment(0x1_0000, 0, 0x1800, 0x1800, 5),
                segment(0x1_2900, 0x1900, 0x1000, 0x4000, 3),
                segment(0x2_0000, 0x2000, 0, 0x2000, 3),
            ],
            entry: 0x1_0000,
            dynamic: false,
        }
    }

    fn run(bug: Bug) -> Result<Loaded, String> {
        let (image, mut mm) = (image(), Flat::new(bug));
        map(&mut mm, &image, 7)?;
        compare(&mut mm, &image, &mut |_| {})
    }

    #[test]
    fn an_image_is_its_file() {
        assert_eq!(
            run(Bug::None),
            Ok(Loaded {
                segments: 3,
                pages: 2 + 5 + 2,
                bytes: 9 * 4096
            })
        );
    }

    #[test]
    fn wrong_bytes_are_found() {
        assert!(run(Bug::WrongPage(1)).unwrap_err().contains("the file has"));
        assert!(
            run(Bug::DirtyTail)
                .unwrap_err()
                .contains("stands 0x01, the file has 0x00")
        );
    }
}
