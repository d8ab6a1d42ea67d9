//! Holds a loaded program against its file: every byte of every page is read through the MMU.
//!
//! ```text
//!   segment      file part: mapped from the file, private
//!   [ first_page ........ file_end | zeros ][ anonymous pages .. pages_end )
//!                                   ^ cleared by exec where the segment is writable: the first write fault
//! ```
//! A page in the wrong place, a lost page or a tail that is not clean is found. (Linux `fs/binfmt_elf.c`, `elf_load` and
//! `padzero`.)

use crate::elf::Image;
use crate::replay::mm::MmUnderTest;

const PAGE: u64 = 4096;

/// What was compared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Compared {
    /// Segments.
    pub segments: u64,
    /// Pages that were read through the MMU.
    pub pages: u64,
    /// Bytes that were compared.
    pub bytes: u64,
}

/// Reads every page of every segment and holds it against the file; `progress` hears the number of pages so far.
///
/// # Errors
/// The first byte that is not the file's, or the signal that a read got.
pub fn compare<M: MmUnderTest>(
    mm: &mut M,
    image: &Image,
    progress: &mut dyn FnMut(u64),
) -> Result<Compared, String> {
    let mut done = Compared::default();
    let mut page = vec![0u8; PAGE as usize];
    let mut wanted = vec![0u8; PAGE as usize];
    for s in &image.segments {
        let mut at = s.first_page();
        // A segment that cannot be read cannot be compared by a program; none of a real binary is like that.
        while at < s.pages_end() && s.prot != 0 {
            mm.read(at, &mut page)
                .map_err(|e| format!("reading {at:#x}: {e}"))?;
            image.expected_page(s, at, &mut wanted);
            if page != wanted {
                let i = page.iter().zip(&wanted).take_while(|(a, b)| a == b).count();
                let address = at + i as u64;
                return Err(format!(
                    "at {address:#x} stands {:#04x}, the file has {:#04x}",
                    page[i], wanted[i]
                ));
            }
            done.pages += 1;
            done.bytes += PAGE;
            progress(done.pages);
            at += PAGE;
        }
        done.segments += 1;
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elf::Segment;
    use crate::replay::flat::{Bug, Flat};
    use crate::replay::mm::{Backing, Content, FileSpec, MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE};

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
            base: 0,
        }
    }

    fn run(bug: Bug) -> Result<Compared, String> {
        let (image, mut mm) = (image(), Flat::new(bug));
        let content = Content::Bytes(image.bytes.clone().into());
        let file = mm
            .open(&FileSpec {
                name: "tiny".into(),
                inode: 7,
                writable: false,
                pages: 3,
                content,
            })
            .unwrap();
        let flags = MAP_PRIVATE | MAP_FIXED;
        for s in &image.segments {
            let first = s.first_page();
            let mut zeros = first;
            if s.file_len > 0 {
                zeros = s.file_pages_end();
                mm.mmap(
                    first,
                    zeros - first,
                    s.prot,
                    flags,
                    Backing::File(file),
                    s.page_offset(),
                )
                .unwrap();
            }
            if zeros < s.pages_end() {
                mm.mmap(
                    zeros,
                    s.pages_end() - zeros,
                    s.prot,
                    flags | MAP_ANONYMOUS,
                    Backing::None,
                    0,
                )
                .unwrap();
            }
            if s.prot & 2 != 0 && s.len > s.file_len && s.file_len > 0 {
                let tail = vec![0; (s.file_pages_end() - s.file_end()) as usize];
                mm.write(s.file_end(), &tail).unwrap();
            }
        }
        compare(&mut mm, &image, &mut |_| {})
    }

    #[test]
    fn an_image_is_its_file() {
        assert_eq!(
            run(Bug::None),
            Ok(Compared {
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
