//! Replays a trace: one real program's calls, with the list of VMAs held against Linux's at every checkpoint.
//!
//! Addresses are the recorded ones (a program's later calls depend on them), so a mapping call is made at the place where
//! Linux put it, and a move of mremap goes where Linux moved to.
//!
//! What the recording's rules leave out
//! - Calls that failed for the recorded machine's own reasons (its files, limits, kernel configuration) are not made:
//!   failed mmap other than EEXIST, failed mremap with MAYMOVE, mprotect that failed with anything but ENOMEM or EINVAL,
//!   madvise with anything but ENOMEM, munmap with anything but EINVAL.
//! - `x` calls (mlock and others) and `n` (names of anonymous memory) change no line of the lists; they are counted.
//! - `[vsyscall]` lies above user space and belongs to no address space.
//! - The stack grows by faults that a trace does not hold, so its start is not compared.
//! - Offsets are compared for files only.
//!
//! Invariants
//! - I1: every call that succeeded on Linux must succeed.
//! - I2: `t` marks a VMA that has had a write fault. The run makes a real one: it loads 8 bytes at the VMA's start and
//!   stores them again, through the MMU. A VMA that is not writable any more has had its fault while it was.

use super::Outcome;
use super::compare::{Names, difference, line_of};
use super::mm::{
    Backing, Content, FileHandle, FileSpec, MAP_ANONYMOUS, MAP_FIXED, MAP_FIXED_NOREPLACE,
    MAP_PRIVATE, MAP_SHARED, MREMAP_FIXED, MREMAP_MAYMOVE, MmUnderTest, PROT_WRITE, VmaSeen, Whose,
};
use crate::input::InputError;
use crate::input::oracle::{Errno, Recorded, VmaLine, show};
use crate::input::trace::{Event, Reader};
use std::collections::HashMap;

/// The length of a trace's files, in pages: recordings do not tell it, and no program of theirs maps beyond an end.
const FILE_PAGES: u64 = 1 << 20;
/// Where user space ends with four levels of page tables.
const USER_END: u64 = 1 << 47;

type Difference = (String, String);

/// A trace on its way.
pub struct TraceRun<M> {
    reader: Reader,
    mm: M,
    files: HashMap<String, FileHandle>,
    names: Names,
    initial: Vec<VmaLine>,
    /// Where the initial list ended, while it has not been compared yet.
    initial_line: Option<usize>,
    broken: bool,
    calls: usize,
    checkpoints: usize,
    line: usize,
}

impl<M: MmUnderTest> TraceRun<M> {
    /// Starts a run on an empty manager.
    pub fn new(reader: Reader, mm: M) -> Self {
        Self {
            reader,
            mm,
            files: HashMap::new(),
            names: Names::default(),
            initial: Vec::new(),
            initial_line: None,
            broken: false,
            calls: 0,
            checkpoints: 0,
            line: 1,
        }
    }

    /// Returns the name of the recorded program.
    pub fn program(&self) -> &str {
        self.reader.program()
    }

    /// Returns how many calls have been made.
    pub fn calls(&self) -> usize {
        self.calls
    }

    /// Returns how many lists have been compared.
    pub fn checkpoints(&self) -> usize {
        self.checkpoints
    }

    /// Returns the line that was replayed last.
    pub fn line(&self) -> usize {
        self.line
    }

    /// Returns the manager that the run is made on.
    pub fn mm(&mut self) -> &mut M {
        &mut self.mm
    }

    /// Returns the manager that the run is made on, to be looked at.
    pub fn process(&self) -> &M {
        &self.mm
    }

    /// Replays everything that is left.
    ///
    /// # Errors
    /// A trace that is malformed.
    pub fn finish(&mut self) -> Result<Outcome, InputError> {
        loop {
            if let Some(outcome) = self.step()? {
                return Ok(outcome);
            }
        }
    }

    /// Replays one line; `Some` when the run is over.
    ///
    /// # Errors
    /// A trace that is malformed.
    pub fn step(&mut self) -> Result<Option<Outcome>, InputError> {
        let Some((line, event)) = self.reader.next_event()? else {
            return Ok(Some(Outcome::Pass { calls: self.calls }));
        };
        if !matches!(event, Event::File { .. } | Event::Initial(_))
            && let Some(end) = self.initial_line.take()
        {
            let initial = core::mem::take(&mut self.initial);
            if let Err((expected, got)) = self.compare(&initial) {
                return Ok(Some(Outcome::Fail {
                    line: end,
                    expected,
                    got,
                }));
            }
        }
        self.line = line;
        Ok(match self.make(event) {
            Ok(()) => None,
            Err((expected, got)) => Some(Outcome::Fail {
                line,
                expected,
                got,
            }),
        })
    }

    fn make(&mut self, event: Event) -> Result<(), Difference> {
        let is_call = !matches!(
            event,
            Event::File { .. } | Event::Initial(_) | Event::Touch { .. } | Event::Checkpoint { .. }
        );
        self.calls += usize::from(is_call);
        if failed_elsewhere(&event) {
            return Ok(());
        }
        match event {
            Event::File { id, .. } => {
                let spec = FileSpec {
                    name: id.clone(),
                    inode: self.files.len() as u64,
                    writable: true,
                    pages: FILE_PAGES,
                    content: Content::Zeros,
                };
                let handle = self
                    .mm
                    .open(&spec)
                    .map_err(|e| ("an-open-file".to_string(), e.to_string()))?;
                self.files.insert(id, handle);
                Ok(())
            }
            Event::Initial(vma) => {
                self.initial_line = Some(self.line);
                self.install(&vma)?;
                self.initial.push(vma);
                Ok(())
            }
            Event::Mmap {
                addr,
                len,
                prot,
                flags,
                file,
                offset,
                result,
            } => self.mmap(addr, len, prot, flags, file.as_deref(), offset, &result),
            Event::Munmap { addr, len, result } => {
                same(&result, &self.mm.munmap(addr, len).map(|()| 0))
            }
            Event::Mprotect {
                addr,
                len,
                prot,
                result,
            } => same(
                &result,
                &self.mm.mprotect(addr, len, low(prot)?).map(|()| 0),
            ),
            Event::Madvise {
                addr,
                len,
                advice,
                result,
            } => same(
                &result,
                &self.mm.madvise(addr, len, low(advice)?).map(|()| 0),
            ),
            Event::Mremap {
                addr,
                old,
                new,
                flags,
                to,
                result,
            } => self.mremap(addr, old, new, low(flags)?, to, &result),
            Event::Brk { addr, result } => {
                if !self.broken {
                    self.broken = true;
                    self.mm.set_break(result);
                }
                let got = self.mm.brk(addr);
                same(&Ok(result), &Ok(got))
            }
            Event::Touch { start } => self.touch(start),
            Event::Name { .. } | Event::Other { .. } => Ok(()),
            Event::Checkpoint { list, .. } => {
                self.checkpoints += 1;
                self.compare(&list)
            }
        }
    }

    /// Makes a VMA of the initial list.
    fn install(&mut self, vma: &VmaLine) -> Result<(), Difference> {
        if vma.start >= USER_END {
            return Ok(());
        }
        let len = vma.end - vma.start;
        let kind = if vma.perms.shared {
            MAP_SHARED
        } else {
            MAP_PRIVATE
        };
        let got = match vma.id.as_str() {
            "-" | "[heap]" => self.mm.mmap(
                vma.start,
                len,
                vma.perms.prot,
                kind | MAP_FIXED | MAP_ANONYMOUS,
                Backing::None,
                0,
            ),
            name if name.starts_with('[') => self
                .mm
                .special(name, vma.start, vma.end, vma.perms)
                .map(|()| vma.start),
            file => {
                let backing = self.file(file)?;
                self.mm.mmap(
                    vma.start,
                    len,
                    vma.perms.prot,
                    kind | MAP_FIXED,
                    backing,
                    vma.offset,
                )
            }
        };
        same(&Ok(vma.start), &got)
    }

    fn file(&self, id: &str) -> Result<Backing, Difference> {
        match self.files.get(id) {
            Some(handle) => Ok(Backing::File(*handle)),
            None => Err((id.to_string(), "no-such-file".into())),
        }
    }

    #[allow(clippy::too_many_arguments)] // the call's own
    fn mmap(
        &mut self,
        addr: u64,
        len: u64,
        prot: u64,
        flags: u64,
        file: Option<&str>,
        offset: u64,
        result: &Recorded,
    ) -> Result<(), Difference> {
        let backing = match file {
            Some(id) => self.file(id)?,
            None => Backing::None,
        };
        let (prot, flags) = (low(prot)?, low(flags)?);
        match result {
            Ok(place) => {
                let flags = (flags & !MAP_FIXED_NOREPLACE) | MAP_FIXED;
                same(
                    result,
                    &self.mm.mmap(*place, len, prot, flags, backing, offset),
                )
            }
            Err(Errno::EEXIST) => same(
                result,
                &self.mm.mmap(addr, len, prot, flags, backing, offset),
            ),
            Err(_) => Ok(()),
        }
    }

    fn mremap(
        &mut self,
        addr: u64,
        old: u64,
        new: u64,
        flags: u32,
        to: u64,
        result: &Recorded,
    ) -> Result<(), Difference> {
        let got = match *result {
            Ok(place) if place != addr => {
                self.mm
                    .mremap(addr, old, new, flags | MREMAP_MAYMOVE | MREMAP_FIXED, place)
            }
            Err(_) if flags & MREMAP_MAYMOVE != 0 => return Ok(()),
            _ => self.mm.mremap(addr, old, new, flags, to),
        };
        same(result, &got)
    }

    /// Makes the write fault that a `t` line tells of (I2).
    fn touch(&mut self, start: u64) -> Result<(), Difference> {
        let mut found = None;
        self.mm.list(&mut |v: VmaSeen| {
            if v.start <= start && start < v.end {
                found = Some(v);
            }
        });
        let Some(vma) = found else {
            return Err((format!("a-vma-at-{start:x}"), "no-vma".into()));
        };
        if vma.perms.prot & PROT_WRITE == 0 || vma.perms.shared || start >= USER_END {
            return Ok(());
        }
        let done = self
            .mm
            .load(start)
            .and_then(|value| self.mm.store(start, value));
        done.map_err(|signal| (format!("a-write-at-{start:x}"), signal.to_string()))
    }

    /// Holds the list against a recorded one.
    fn compare(&mut self, recorded: &[VmaLine]) -> Result<(), Difference> {
        let mut got = Vec::new();
        let mut keys = Vec::new();
        self.mm.list(&mut |v| {
            keys.push((v.start, v.whose.clone()));
            got.push(v);
        });
        // Shared anonymous memory has its recorder's name from the first list that shows it.
        for line in recorded {
            let key = keys
                .iter()
                .find(|(start, _)| *start == line.start)
                .map(|(_, whose)| whose);
            if let Some(Whose::Shared(key)) = key
                && self.names.get(*key).is_none()
            {
                self.names.set(*key, line.id.clone());
            }
        }
        let got: Vec<VmaLine> = got
            .iter()
            .map(|v| comparable(&line_of(v, &self.names)))
            .collect();
        let expected: Vec<VmaLine> = recorded
            .iter()
            .filter(|v| v.start < USER_END)
            .map(comparable)
            .collect();
        match difference(&expected, &got) {
            Some(pair) => Err(pair),
            None => Ok(()),
        }
    }
}

/// Whether a call failed for a reason of the recorded machine and not because of its arguments or the list.
fn failed_elsewhere(event: &Event) -> bool {
    match event {
        Event::Mprotect { result: Err(e), .. } => !matches!(e, Errno::ENOMEM | Errno::EINVAL),
        Event::Madvise { result: Err(e), .. } => *e != Errno::ENOMEM,
        Event::Munmap { result: Err(e), .. } => *e != Errno::EINVAL,
        _ => false,
    }
}

/// Takes out what is not compared.
fn comparable(vma: &VmaLine) -> VmaLine {
    let mut v = vma.clone();
    if v.id == "[heap]" {
        v.id = "-".into();
    }
    if v.id == "[stack]" {
        v.start = v.end;
    }
    if !v.id.starts_with('f') {
        v.offset = 0;
    }
    v
}

/// Prots, flags and advices fit 32 bits; a recorded one that does not was EINVAL or has no meaning.
fn low(number: u64) -> Result<u32, Difference> {
    u32::try_from(number).map_err(|_| ("a-32-bit-argument".to_string(), format!("{number:x}")))
}

fn same(expected: &Recorded, got: &Recorded) -> Result<(), Difference> {
    if expected == got {
        Ok(())
    } else {
        Err((show(expected), show(got)))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Outcome, echo::Echo, replay};
    use crate::embedded::TRACES;
    use crate::input::lines::Source;

    #[test]
    fn a_manager_that_answers_as_linux_passes_every_trace() {
        for file in TRACES {
            let out = replay(file.open().unwrap(), || Echo::trace(file.open().unwrap())).unwrap();
            assert!(
                matches!(out, Outcome::Pass { calls } if calls > 30),
                "{}: {out:?}",
                file.name
            );
        }
    }

    fn plant(body: &str, wrong: &str) -> Outcome {
        let file = |b: &str| Source::text("x", &format!("# vmatrace 1 prog x linux 6\n{b}"));
        let good = replay(file(body), || Echo::trace(file(body))).unwrap();
        assert!(matches!(good, Outcome::Pass { .. }), "{good:?}");
        replay(file(body), || Echo::trace(file(wrong))).unwrap()
    }

    const BODY: &str = "# file f0 x\nI 1000 2000 r-xp 0 f0\nb 0 = 5000\nm 0 2000 3 22 - 0 = 7000\nt 7000\nb 6000 = 6000\nE\n\
                        = 1000 2000 r-xp 0 f0\n= 5000 6000 rw-p 0 [heap]\n= 7000 9000 rw-p 0 -\n= ffffffffff600000 ffffffffff601000 --xp 0 [vsyscall]\n";

    #[test]
    fn differences_are_found_at_their_line() {
        assert_eq!(
            plant(BODY, &BODY.replace("b 6000 = 6000", "b 6000 = 5000")),
            Outcome::Fail {
                line: 7,
                expected: "6000".into(),
                got: "5000".into()
            }
        );
        assert_eq!(
            plant(BODY, &BODY.replace("= 7000 9000 rw-p", "= 7000 8000 rw-p")),
            Outcome::Fail {
                line: 8,
                expected: "7000-9000:rw-p:0:-".into(),
                got: "7000-8000:rw-p:0:-".into()
            }
        );
        assert_eq!(
            plant(BODY, &BODY.replace("I 1000 2000 r-xp", "I 1000 3000 r-xp")),
            Outcome::Fail {
                line: 3,
                expected: "1000-2000:r-xp:0:f0".into(),
                got: "1000-3000:r-xp:0:f0".into()
            }
        );
    }

    #[test]
    fn failures_of_the_recorded_machine_are_left_out() {
        // The double would answer with an error of its own if it were asked.
        let body = BODY.replace(
            "b 6000 = 6000",
            "p 1000 1000 2 = EACCES\nd 1000 1000 e = EINVAL\nb 6000 = 6000",
        );
        assert!(
            matches!(plant(&body, BODY), Outcome::Pass { calls: 5 }),
            "{:?}",
            plant(&body, BODY)
        );
        // A failure that follows from the list must happen here as well.
        let body = BODY.replace("b 6000 = 6000", "p 9000 1000 1 = ENOMEM\nb 6000 = 6000");
        let wrong = body.replace("ENOMEM", "0");
        let expected = Outcome::Fail {
            line: 7,
            expected: "ENOMEM".into(),
            got: "0".into(),
        };
        assert_eq!(plant(&body, &wrong), expected);
    }

    #[test]
    fn the_stacks_start_is_not_compared_and_its_end_is() {
        let body = "I 1000 2000 rw-p 0 [stack]\nb 0 = 5000\nE\n= 0 2000 rw-p 0 [stack]\n";
        assert!(matches!(plant(body, body), Outcome::Pass { .. }));
        let wrong = body.replace("= 0 2000 rw-p", "= 0 3000 rw-p");
        assert!(matches!(plant(body, &wrong), Outcome::Fail { line: 4, .. }));
    }
}
