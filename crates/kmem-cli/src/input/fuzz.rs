//! Fuzz files: seeded random calls in a window of one address space, each with its result and what changed.
//!
//! ```text
//! # vmagen 1 seed 1 nops 200 linux 6.18.. window 40000000-80000000 files 2 x 64 pages; ..
//! m 500c6000 1000 3 pF f0 a000 = 500c6000        a call and its result
//! + 500c6000 500c7000 rw-p a000 f0               what changed in the list of VMAs
//! f                                              fork: the lines up to x are the child's
//! ..
//! x                                              back to the parent, with its list as it was at f
//! ```
//!
//! Invariants
//! - I1: the reader keeps the list that the file describes; after each [`Step`] it is [`Reader::expected`].
//! - I2: a `-` line names an entry of the list, a `+` line adds one, and when all changes are in, no two overlap; otherwise
//!   the file is broken.
//! - I3: forks are closed, at most [`MAX_DEPTH`] deep, and the file has at least 19 of 20 calls that its heading promises
//!   (the recorder skips a few of its draws), so that a file that was cut off is an error and not a pass.

use super::InputError;
use super::field::At;
use super::lines::Source;
use super::oracle::{PAGE, Recorded, VmaLine, Words};
use std::collections::BTreeMap;

/// How deep forks may nest.
pub const MAX_DEPTH: usize = 16;

/// Which file a mapping call names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileArg {
    /// No file: anonymous.
    None,
    /// File N, opened for reading and writing.
    Writable(u32),
    /// File N in a second open, for reading only.
    ReadOnly(u32),
    /// A file descriptor that is not open.
    Bad,
}

/// The letters of a mapping call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MapLetters {
    /// `p`.
    pub private: bool,
    /// `s`.
    pub shared: bool,
    /// `a`.
    pub anonymous: bool,
    /// `F`: MAP_FIXED.
    pub fixed: bool,
    /// `N`: MAP_FIXED_NOREPLACE.
    pub noreplace: bool,
    /// `B`: MAP_32BIT.
    pub low: bool,
}

/// What an access did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// A store went through.
    Ok,
    /// A load returned this.
    Value(u64),
    /// SIGSEGV, SEGV_MAPERR: no VMA there.
    MapErr,
    /// SIGSEGV, SEGV_ACCERR: the VMA does not allow it.
    AccErr,
    /// SIGBUS: beyond the end of the file.
    Bus,
    /// The manager had no memory for the page; no recording holds this.
    NoMemory,
    /// The access faulted again and again; no recording holds this.
    Endless,
}

impl core::fmt::Display for Access {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Ok => f.write_str("ok"),
            Self::Value(v) => write!(f, "{v:x}"),
            Self::MapErr => f.write_str("segv-maperr"),
            Self::AccErr => f.write_str("segv-accerr"),
            Self::Bus => f.write_str("bus"),
            Self::NoMemory => f.write_str("out-of-memory"),
            Self::Endless => f.write_str("endless-faults"),
        }
    }
}

/// The three advices of fuzz files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Advice {
    /// MADV_DONTNEED.
    DontNeed,
    /// MADV_DONTFORK.
    DontFork,
    /// MADV_DOFORK.
    DoFork,
}

/// One call.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)] // the fields carry the calls' own argument names
pub enum Call {
    /// `m`: mmap.
    Mmap {
        addr: u64,
        len: u64,
        prot: u32,
        letters: MapLetters,
        file: FileArg,
        offset: u64,
        result: Recorded,
    },
    /// `u`: munmap.
    Munmap {
        addr: u64,
        len: u64,
        result: Recorded,
    },
    /// `p`: mprotect.
    Mprotect {
        addr: u64,
        len: u64,
        prot: u32,
        result: Recorded,
    },
    /// `r`: mremap.
    Mremap {
        addr: u64,
        old: u64,
        new: u64,
        may_move: bool,
        fixed: bool,
        to: u64,
        result: Recorded,
    },
    /// `d`: madvise.
    Madvise {
        addr: u64,
        len: u64,
        advice: Advice,
        result: Recorded,
    },
    /// `w`: a store of 8 bytes.
    Store {
        addr: u64,
        value: u64,
        result: Access,
    },
    /// `l`: a load of 8 bytes.
    Load { addr: u64, result: Access },
    /// `f`: what follows is the child's.
    Fork,
    /// `x`: the child is gone.
    Exit,
}

/// One call and where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// The line of the call.
    pub line: usize,
    /// The call.
    pub call: Call,
}

/// What the first line says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heading {
    /// The number of calls that were drawn.
    pub calls: u32,
    /// The window's first address.
    pub low: u64,
    /// The address behind the window.
    pub high: u64,
    /// The number of files.
    pub files: u32,
    /// The length of each file, in pages.
    pub pages: u32,
}

/// A list of VMAs by start address.
pub type List = BTreeMap<u64, VmaLine>;

/// Reads a fuzz file step by step.
pub struct Reader {
    source: Source,
    heading: Heading,
    expected: List,
    saved: Vec<List>,
    ahead: Option<(usize, String)>,
    calls: u32,
}

impl Reader {
    /// Starts after the heading, which has been read from `source` already.
    ///
    /// # Errors
    /// If the heading lacks a field.
    pub fn new(source: Source, heading: &str) -> Result<Self, InputError> {
        let heading = parse_heading(
            At {
                file: source.name(),
                line: 1,
            },
            heading,
        )?;
        Ok(Self {
            source,
            heading,
            expected: List::new(),
            saved: Vec::new(),
            ahead: None,
            calls: 0,
        })
    }

    /// Returns what the first line says.
    pub fn heading(&self) -> Heading {
        self.heading
    }

    /// Returns the list of VMAs that Linux had after the step that was read last.
    pub fn expected(&self) -> &List {
        &self.expected
    }

    /// Reads the next call and the changes after it.
    ///
    /// # Errors
    /// Whatever is wrong with the lines; a file that ends early.
    pub fn next_step(&mut self) -> Result<Option<Step>, InputError> {
        let Some((line, text)) = self.take_line()? else {
            return self.finish();
        };
        let name = self.source.name().to_string();
        let call = parse_call(At { file: &name, line }, &text, self.heading)?;
        match call {
            Call::Fork if self.saved.len() == MAX_DEPTH => {
                return Err(InputError::new(
                    name,
                    line,
                    "fork",
                    "f",
                    format!("forks nest more than {MAX_DEPTH} deep"),
                ));
            }
            Call::Fork => self.saved.push(self.expected.clone()),
            Call::Exit => match self.saved.pop() {
                Some(list) => self.expected = list,
                None => return Err(InputError::new(name, line, "exit", "x", "no fork is open")),
            },
            _ => {}
        }
        if self.saved.is_empty() || (call == Call::Fork && self.saved.len() == 1) {
            self.calls += u32::from(call != Call::Exit);
        }
        self.changes(&name)?;
        Ok(Some(Step { line, call }))
    }

    fn finish(&mut self) -> Result<Option<Step>, InputError> {
        if !self.source.terminated() {
            return Err(self.source.error(
                "line",
                "",
                "the last line has no end: the file is cut off",
            ));
        }
        if !self.saved.is_empty() {
            return Err(self.source.error(
                "fork",
                "f",
                "the file ends inside a child: x is missing",
            ));
        }
        let least = self.heading.calls - self.heading.calls / 20;
        if self.calls < least {
            let what = format!(
                "the heading promises {}: the file is cut off",
                self.heading.calls
            );
            return Err(self.source.error("calls", &self.calls.to_string(), what));
        }
        Ok(None)
    }

    /// Applies the `-` and `+` lines after a call (I1, I2).
    fn changes(&mut self, name: &str) -> Result<(), InputError> {
        let mut added = Vec::new();
        while let Some((line, text)) = self.take_line()? {
            let at = At { file: name, line };
            let mut words = Words::of(&text);
            match words.word(at, "call")? {
                "-" => {
                    let start = words.hex(at, "start")?;
                    words.end(at)?;
                    if self.expected.remove(&start).is_none() {
                        return Err(at.error(
                            "start",
                            &format!("{start:x}"),
                            "no VMA of the list starts there",
                        ));
                    }
                }
                "+" => {
                    let vma = VmaLine::parse(at, &mut words)?;
                    if vma.start < self.heading.low || vma.end > self.heading.high {
                        return Err(at.error(
                            "start",
                            &format!("{:x}", vma.start),
                            "lies outside the window",
                        ));
                    }
                    added.push((line, vma.start));
                    if let Some(old) = self.expected.insert(vma.start, vma) {
                        return Err(at.error(
                            "start",
                            &format!("{:x}", old.start),
                            format!("overlaps {old}"),
                        ));
                    }
                }
                _ => {
                    self.ahead = Some((line, text));
                    break;
                }
            }
        }
        // Changes stand in the order of their addresses, so that an entry may be added before the one in its place goes:
        // overlaps are looked for when all are in.
        for (line, start) in added {
            let Some(vma) = self.expected.get(&start) else {
                continue;
            };
            let below = self
                .expected
                .range(..start)
                .next_back()
                .filter(|(_, v)| v.end > start);
            let above = self
                .expected
                .range(start + 1..)
                .next()
                .filter(|(_, v)| v.start < vma.end);
            if let Some((_, other)) = below.or(above) {
                let what = format!("overlaps {other}");
                return Err(InputError::new(
                    name,
                    line,
                    "start",
                    format!("{start:x}"),
                    what,
                ));
            }
        }
        Ok(())
    }

    fn take_line(&mut self) -> Result<Option<(usize, String)>, InputError> {
        if let Some(line) = self.ahead.take() {
            return Ok(Some(line));
        }
        loop {
            let Some(text) = self.source.next_strict()? else {
                return Ok(None);
            };
            if !text.trim().is_empty() && !text.starts_with('#') {
                return Ok(Some((self.source.line(), text)));
            }
        }
    }
}

fn parse_heading(at: At<'_>, line: &str) -> Result<Heading, InputError> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let after = |key: &str| {
        let place = words.iter().position(|w| *w == key);
        place
            .and_then(|p| words.get(p + 1).copied())
            .ok_or_else(|| at.error(key, "", "is missing in the heading"))
    };
    let calls = at.decimal("nops", after("nops")?)?;
    let window = after("window")?;
    let Some((low, high)) = window.split_once('-') else {
        return Err(at.error("window", window, "is not LOW-HIGH"));
    };
    let (low, high) = (at.hex("window", low)?, at.hex("window", high)?);
    if low >= high || low % PAGE != 0 || high % PAGE != 0 || high > 1 << 47 {
        return Err(at.error("window", window, "is no range of whole user pages"));
    }
    let files = at.decimal("files", after("files")?)?;
    let pages = at.decimal("pages", after("x")?)?;
    if files > 16 || pages == 0 || pages > 1 << 20 {
        return Err(at.error(
            "files",
            &format!("{files} x {pages}"),
            "at most 16 files of 1 to 1048576 pages are taken",
        ));
    }
    Ok(Heading {
        calls,
        low,
        high,
        files,
        pages,
    })
}

fn parse_call(at: At<'_>, text: &str, heading: Heading) -> Result<Call, InputError> {
    let mut w = Words::of(text);
    Ok(match w.word(at, "call")? {
        "m" => {
            let (addr, len) = (w.hex(at, "addr")?, w.hex(at, "len")?);
            let prot = prot(at, w.word(at, "prot")?)?;
            let letters = letters(at, w.word(at, "flags")?)?;
            let file = file(at, w.word(at, "file")?, heading.files)?;
            let offset = w.hex(at, "off")?;
            Call::Mmap {
                addr,
                len,
                prot,
                letters,
                file,
                offset,
                result: w.result(at)?,
            }
        }
        "u" => Call::Munmap {
            addr: w.hex(at, "addr")?,
            len: w.hex(at, "len")?,
            result: w.result(at)?,
        },
        "p" => Call::Mprotect {
            addr: w.hex(at, "addr")?,
            len: w.hex(at, "len")?,
            prot: prot(at, w.word(at, "prot")?)?,
            result: w.result(at)?,
        },
        "r" => {
            let (addr, old, new) = (
                w.hex(at, "old")?,
                w.hex(at, "oldlen")?,
                w.hex(at, "newlen")?,
            );
            let flags = w.word(at, "flags")?;
            if flags != "0" && flags.chars().any(|c| c != 'M' && c != 'F') {
                return Err(at.error("flags", flags, "is none of 0, M, F, MF"));
            }
            Call::Mremap {
                addr,
                old,
                new,
                may_move: flags.contains('M'),
                fixed: flags.contains('F'),
                to: w.hex(at, "newaddr")?,
                result: w.result(at)?,
            }
        }
        "d" => {
            let (addr, len) = (w.hex(at, "addr")?, w.hex(at, "len")?);
            let advice = match w.word(at, "advice")? {
                "N" => Advice::DontNeed,
                "F" => Advice::DontFork,
                "G" => Advice::DoFork,
                other => return Err(at.error("advice", other, "is none of N, F, G")),
            };
            Call::Madvise {
                addr,
                len,
                advice,
                result: w.result(at)?,
            }
        }
        "w" => Call::Store {
            addr: page_address(at, &mut w)?,
            value: w.hex(at, "val")?,
            result: access(at, &mut w, true)?,
        },
        "l" => Call::Load {
            addr: page_address(at, &mut w)?,
            result: access(at, &mut w, false)?,
        },
        "f" => {
            w.end(at)?;
            Call::Fork
        }
        "x" => {
            w.end(at)?;
            Call::Exit
        }
        other => return Err(at.error("call", other, "is none of m u p r d w l f x, + or -")),
    })
}

fn page_address(at: At<'_>, w: &mut Words<'_>) -> Result<u64, InputError> {
    let addr = w.hex(at, "addr")?;
    if addr % PAGE != 0 {
        return Err(at.error(
            "addr",
            &format!("{addr:x}"),
            "accesses are at the start of a page",
        ));
    }
    Ok(addr)
}

fn access(at: At<'_>, w: &mut Words<'_>, store: bool) -> Result<Access, InputError> {
    let word = w.equals(at)?;
    w.end(at)?;
    Ok(match word {
        "segv-maperr" => Access::MapErr,
        "segv-accerr" => Access::AccErr,
        "bus" => Access::Bus,
        "ok" if store => Access::Ok,
        _ if store => {
            return Err(at.error(
                "result",
                word,
                "is none of ok, segv-maperr, segv-accerr, bus",
            ));
        }
        _ => Access::Value(at.hex("result", word)?),
    })
}

fn prot(at: At<'_>, text: &str) -> Result<u32, InputError> {
    let prot = at.decimal("prot", text)?;
    if prot > 7 {
        return Err(at.error(
            "prot",
            text,
            "is made of other bits than 1 (r), 2 (w), 4 (x)",
        ));
    }
    Ok(prot)
}

fn letters(at: At<'_>, text: &str) -> Result<MapLetters, InputError> {
    let mut l = MapLetters::default();
    for c in text.chars() {
        match c {
            'p' => l.private = true,
            's' => l.shared = true,
            'o' => {}
            'a' => l.anonymous = true,
            'F' => l.fixed = true,
            'N' => l.noreplace = true,
            'B' => l.low = true,
            _ => return Err(at.error("flags", text, format!("{c:?} is none of p s o a F N B"))),
        }
    }
    Ok(l)
}

fn file(at: At<'_>, text: &str, files: u32) -> Result<FileArg, InputError> {
    let number = |t: &str| {
        let n = at.decimal("file", t)?;
        if n >= files {
            return Err(at.error("file", text, format!("the heading names {files} files")));
        }
        Ok(n)
    };
    match text {
        "-" => Ok(FileArg::None),
        "bad" => Ok(FileArg::Bad),
        _ if text.starts_with('f') => Ok(FileArg::Writable(number(&text[1..])?)),
        _ if text.starts_with('g') => Ok(FileArg::ReadOnly(number(&text[1..])?)),
        _ => Err(at.error("file", text, "is none of fN, gN, bad, -")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str =
        "# vmagen 1 seed 1 nops 2 linux 6 window 40000000-80000000 files 2 x 64 pages; word";

    fn all(body: &str) -> Result<(Vec<Step>, List), String> {
        let text = format!("{HEAD}\n{body}");
        let mut source = Source::text("f", &text);
        let head = source.next_strict().unwrap().unwrap();
        let mut reader = Reader::new(source, &head).map_err(|e| e.to_string())?;
        let mut steps = Vec::new();
        while let Some(step) = reader.next_step().map_err(|e| e.to_string())? {
            steps.push(step);
        }
        Ok((steps, reader.expected().clone()))
    }

    #[test]
    fn calls_and_the_list_they_leave() {
        let (steps, list) = all("m 500c6000 1000 3 pF f0 a000 = 500c6000\n+ 500c6000 500c7000 rw-p a000 f0\nl 500c6000 = f11e00000000000a\n").unwrap();
        assert_eq!(steps.len(), 2);
        assert_eq!(steps[1].line, 4);
        assert_eq!(
            steps[1].call,
            Call::Load {
                addr: 0x500c_6000,
                result: Access::Value(0xf11e_0000_0000_000a)
            }
        );
        assert_eq!(list.len(), 1);
    }

    #[test]
    fn a_child_leaves_the_parents_list() {
        let (steps, list) = all("m 0 1000 3 pa - 0 = 7ffff000\n+ 7ffff000 80000000 rw-p 0 -\nf\nu 7ffff000 1000 = 0\n- 7ffff000\nx\n").unwrap();
        assert_eq!(steps.len(), 4);
        assert!(list.contains_key(&0x7fff_f000));
    }

    #[test]
    fn broken_files_are_errors() {
        for (body, what) in [
            ("", "cut off"),
            ("u 40000000 1000 = 0\n", "promises 2"),
            ("u 40000000 1000 = 0\nu 40000000 1000 = 0", "cut off"),
            (
                "f\nu 40000000 1000 = 0\nu 40000000 1000 = 0\n",
                "inside a child",
            ),
            ("x\n", "no fork is open"),
            ("u 40000000 1000 = 0\n- 40000000\n", "no VMA of the list"),
            (
                "u 40000000 1000 = 0\n+ 30000000 30001000 rw-p 0 -\n",
                "outside the window",
            ),
            (
                "u 40000000 1000 = 0\n+ 40000000 40002000 rw-p 0 -\n+ 40001000 40003000 rw-p 0 -\n",
                "overlaps",
            ),
            ("q 1 2 = 0\n", "none of m u p"),
            ("m 0 1000 8 pa - 0 = 0\n", "other bits"),
            ("m 0 1000 3 pz - 0 = 0\n", "'z'"),
            ("m 0 1000 3 p f7 0 = 0\n", "2 files"),
            ("w 40000008 1 = ok\n", "start of a page"),
            ("w 40000000 1 = 0\n", "none of ok"),
            ("r 40000000 1000 1000 Q 0 = 0\n", "none of 0, M"),
            ("d 40000000 1000 Z = 0\n", "none of N, F, G"),
        ] {
            let e = all(body).unwrap_err();
            assert!(e.contains(what), "{body:?}: {e}");
        }
    }

    #[test]
    fn headings_are_checked() {
        for (head, what) in [
            ("# vmagen 1 seed 1", "nops"),
            ("# vmagen 1 nops 2 window 8-4 files 2 x 64", "no range"),
            (
                "# vmagen 1 nops 2 window 40000000-80000000 files 99 x 64",
                "at most 16",
            ),
        ] {
            let e = Reader::new(Source::text("f", ""), head).err().unwrap();
            assert!(e.to_string().contains(what), "{e}");
        }
    }
}
