//! Replays a fuzz file: after every call the result, the errno, the loaded bytes and the whole list must be Linux's.
//!
//! The recorder filled everything outside its window with one shared mapping of a file without pages, so that a search for
//! a free range can only end inside. The run does the same, through the manager's own mmap, and then leaves every choice of
//! an address to the manager.
//!
//! Invariants
//! - I1: the list is compared after every call, after a fork (the child's) and after an exit (the parent's again).
//! - I2: the N-th successful shared anonymous mapping of a history is `sN`; an exit takes the count back to what it was at
//!   the fork, as the recorder does.

use super::Outcome;
use super::compare::{Names, difference, line_of};
use super::mm::{
    Access, Backing, Content, FileHandle, FileSpec, MADV_DOFORK, MADV_DONTFORK, MADV_DONTNEED,
    MAP_32BIT, MAP_ANONYMOUS, MAP_FIXED, MAP_FIXED_NOREPLACE, MAP_PRIVATE, MAP_SHARED,
    MREMAP_FIXED, MREMAP_MAYMOVE, MmUnderTest, VmaSeen, Whose,
};
use crate::input::InputError;
use crate::input::fuzz::{Advice, Call, FileArg, Heading, MapLetters, Reader};
use crate::input::oracle::{Errno, Recorded, VmaLine, show};

/// The lowest address that the recorder filled (`vm.mmap_min_addr`).
const LOWEST: u64 = 0x1_0000;
/// The end of user space with four levels of page tables, without the guard page (Linux: `TASK_SIZE`).
const TASK_SIZE: u64 = 0x7fff_ffff_f000;

/// What differed.
type Difference = (String, String);

struct Run<M> {
    /// The parents that wait, with the count of shared mappings at their fork.
    waiting: Vec<(M, usize)>,
    mm: M,
    heading: Heading,
    writable: Vec<FileHandle>,
    read_only: Vec<FileHandle>,
    names: Names,
    shared_made: usize,
}

/// Replays a whole file.
///
/// # Errors
/// A file that is malformed.
pub fn run<M: MmUnderTest>(mut reader: Reader, mm: M) -> Result<Outcome, InputError> {
    let mut run = match Run::start(mm, reader.heading()) {
        Ok(run) => run,
        Err(e) => {
            let (expected, got) = ("a-window".to_string(), e.to_string());
            return Ok(Outcome::Fail {
                line: 1,
                expected,
                got,
            });
        }
    };
    let mut calls = 0;
    while let Some(step) = reader.next_step()? {
        calls += 1;
        let differs = run.make(&step.call).err().or_else(|| {
            let got = run.window();
            difference(reader.expected().values(), &got)
        });
        if let Some((expected, got)) = differs {
            return Ok(Outcome::Fail {
                line: step.line,
                expected,
                got,
            });
        }
    }
    Ok(Outcome::Pass { calls })
}

impl<M: MmUnderTest> Run<M> {
    /// Opens the files and fills everything outside the window.
    fn start(mut mm: M, heading: Heading) -> Result<Self, Errno> {
        let mut writable = Vec::new();
        let mut read_only = Vec::new();
        for n in 0..heading.files {
            let mut spec = FileSpec {
                name: format!("f{n}"),
                inode: n.into(),
                writable: true,
                pages: heading.pages.into(),
                content: Content::Pattern(n),
            };
            writable.push(mm.open(&spec)?);
            spec.writable = false;
            read_only.push(mm.open(&spec)?);
        }
        let fill = FileSpec {
            name: "fill".into(),
            inode: heading.files.into(),
            writable: true,
            pages: 0,
            content: Content::Zeros,
        };
        let fill = Backing::File(mm.open(&fill)?);
        for (start, end) in [(LOWEST, heading.low), (heading.high, TASK_SIZE)] {
            if start < end {
                mm.mmap(start, end - start, 0, MAP_SHARED | MAP_FIXED, fill, 0)?;
            }
        }
        Ok(Self {
            waiting: Vec::new(),
            mm,
            heading,
            writable,
            read_only,
            names: Names::default(),
            shared_made: 0,
        })
    }

    /// Makes one call and holds its result against Linux's.
    fn make(&mut self, call: &Call) -> Result<(), Difference> {
        match *call {
            Call::Mmap {
                addr,
                len,
                prot,
                letters,
                file,
                offset,
                ref result,
            } => {
                let backing = match file {
                    FileArg::None => Backing::None,
                    FileArg::Writable(n) => Backing::File(self.writable[n as usize]),
                    FileArg::ReadOnly(n) => Backing::File(self.read_only[n as usize]),
                    FileArg::Bad => Backing::BadDescriptor,
                };
                let got = self
                    .mm
                    .mmap(addr, len, prot, flags_of(letters), backing, offset);
                same(result, &got)?;
                if let (true, true, Ok(start)) = (letters.shared, letters.anonymous, got) {
                    self.name_shared(start);
                }
                Ok(())
            }
            Call::Munmap {
                addr,
                len,
                ref result,
            } => same(result, &self.mm.munmap(addr, len).map(|()| 0)),
            Call::Mprotect {
                addr,
                len,
                prot,
                ref result,
            } => same(result, &self.mm.mprotect(addr, len, prot).map(|()| 0)),
            Call::Mremap {
                addr,
                old,
                new,
                may_move,
                fixed,
                to,
                ref result,
            } => {
                let flags =
                    (u32::from(may_move) * MREMAP_MAYMOVE) | (u32::from(fixed) * MREMAP_FIXED);
                same(result, &self.mm.mremap(addr, old, new, flags, to))
            }
            Call::Madvise {
                addr,
                len,
                advice,
                ref result,
            } => {
                let advice = match advice {
                    Advice::DontNeed => MADV_DONTNEED,
                    Advice::DontFork => MADV_DONTFORK,
                    Advice::DoFork => MADV_DOFORK,
                };
                same(result, &self.mm.madvise(addr, len, advice).map(|()| 0))
            }
            Call::Store {
                addr,
                value,
                result,
            } => {
                let got = self
                    .mm
                    .store(addr, value)
                    .map_or_else(|e| e, |()| Access::Ok);
                same_access(result, got)
            }
            Call::Load { addr, result } => {
                let got = self.mm.load(addr).map_or_else(|e| e, Access::Value);
                same_access(result, got)
            }
            Call::Fork => match self.mm.fork() {
                Ok(child) => {
                    let parent = core::mem::replace(&mut self.mm, child);
                    self.waiting.push((parent, self.shared_made));
                    Ok(())
                }
                Err(e) => Err(("a-child".into(), e.to_string())),
            },
            Call::Exit => {
                // The reader has checked that a fork is open.
                if let Some((parent, made)) = self.waiting.pop() {
                    self.mm = parent;
                    self.shared_made = made;
                }
                Ok(())
            }
        }
    }

    /// Gives the object that was just mapped at `start` the recorder's next name (I2).
    fn name_shared(&mut self, start: u64) {
        let mut key = None;
        self.mm.list(&mut |v: VmaSeen| {
            if let (true, Whose::Shared(k)) = (v.start <= start && start < v.end, v.whose) {
                key = Some(k);
            }
        });
        if let Some(key) = key {
            self.names.set(key, format!("s{}", self.shared_made));
        }
        self.shared_made += 1;
    }

    /// Returns the window's part of the list.
    fn window(&mut self) -> Vec<VmaLine> {
        let mut list = Vec::new();
        let (heading, names) = (self.heading, &self.names);
        self.mm.list(&mut |v| {
            if v.start >= heading.low && v.end <= heading.high {
                list.push(line_of(&v, names));
            }
        });
        list
    }
}

fn flags_of(l: MapLetters) -> u32 {
    [
        (l.private, MAP_PRIVATE),
        (l.shared, MAP_SHARED),
        (l.anonymous, MAP_ANONYMOUS),
        (l.fixed, MAP_FIXED),
        (l.noreplace, MAP_FIXED_NOREPLACE),
        (l.low, MAP_32BIT),
    ]
    .iter()
    .filter(|(on, _)| *on)
    .fold(0, |all, (_, flag)| all | flag)
}

fn same(expected: &Recorded, got: &Recorded) -> Result<(), Difference> {
    if expected == got {
        Ok(())
    } else {
        Err((show(expected), show(got)))
    }
}

fn same_access(expected: Access, got: Access) -> Result<(), Difference> {
    if expected == got {
        Ok(())
    } else {
        Err((expected.to_string(), got.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Outcome, echo::Echo, replay};
    use crate::embedded::FUZZ;
    use crate::input::lines::Source;

    #[test]
    fn a_manager_that_answers_as_linux_passes_every_file() {
        for file in FUZZ {
            let out = replay(file.open().unwrap(), || Echo::fuzz(file.open().unwrap())).unwrap();
            assert!(
                matches!(out, Outcome::Pass { calls } if calls > 190),
                "{}: {out:?}",
                file.name
            );
        }
    }

    fn plant(body: &str, wrong: &str) -> Outcome {
        let head = "# vmagen 1 seed 1 nops 0 linux 6 window 40000000-80000000 files 2 x 64 pages";
        let file = |b: &str| Source::text("x", &format!("{head}\n{b}"));
        assert!(matches!(
            replay(file(body), || Echo::fuzz(file(body))).unwrap(),
            Outcome::Pass { .. }
        ));
        replay(file(body), || Echo::fuzz(file(wrong))).unwrap()
    }

    fn fail(line: usize, expected: &str, got: &str) -> Outcome {
        Outcome::Fail {
            line,
            expected: expected.into(),
            got: got.into(),
        }
    }

    const MAPPED: &str = "m 0 1000 3 sa - 0 = 7ffff000\n+ 7ffff000 80000000 rw-s 0 s0\n";

    #[test]
    fn every_kind_of_difference_is_found_at_its_line() {
        let more = |line: &str| format!("{MAPPED}{line}");
        // A wrong address, a wrong errno, a wrong value, a wrong signal.
        assert_eq!(
            plant(MAPPED, &MAPPED.replace("7ffff", "7fffe")),
            fail(2, "7ffff000", "7fffe000")
        );
        assert_eq!(
            plant(&more("u 1 1 = EINVAL\n"), &more("u 1 1 = ENOMEM\n")),
            fail(4, "EINVAL", "ENOMEM")
        );
        assert_eq!(
            plant(&more("l 7ffff000 = 5\n"), &more("l 7ffff000 = 6\n")),
            fail(4, "5", "6")
        );
        assert_eq!(
            plant(&more("w 1000 1 = segv-maperr\n"), &more("w 1000 1 = ok\n")),
            fail(4, "segv-maperr", "ok")
        );
        // A VMA that did not change, and one too many.
        assert_eq!(
            plant(
                &more("p 7ffff000 1000 1 = 0\n- 7ffff000\n+ 7ffff000 80000000 r--s 0 s0\n"),
                &more("p 7ffff000 1000 1 = 0\n")
            ),
            fail(
                4,
                "7ffff000-80000000:r--s:0:s0",
                "7ffff000-80000000:rw-s:0:s0"
            )
        );
        assert_eq!(
            plant(
                &more("u 7ffff000 1000 = 0\n- 7ffff000\n"),
                &more("u 7ffff000 1000 = 0\n")
            ),
            fail(4, "no-vma", "7ffff000-80000000:rw-s:0:s0")
        );
    }

    #[test]
    fn a_childs_shared_mapping_gives_its_name_back() {
        let body = format!(
            "{MAPPED}f\nm 0 1000 1 sa - 0 = 7fffe000\n+ 7fffe000 7ffff000 r--s 0 s1\nx\n\
             m 0 1000 1 sa - 0 = 7fffe000\n+ 7fffe000 7ffff000 r--s 0 s1\n"
        );
        plant(&body, &body);
        // A parent that shows the child's mapping is found out at the line of the exit.
        let leaky = body.replacen("x\n", "x\n+ 7fffe000 7ffff000 r--s 0 s1\n", 1);
        assert_eq!(
            plant(&body, &leaky),
            fail(
                7,
                "7ffff000-80000000:rw-s:0:s0",
                "7fffe000-7ffff000:r--s:0:s1"
            )
        );
    }
}
