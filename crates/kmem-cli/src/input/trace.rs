//! Traces: the memory calls of one real program, from its first instruction to its exit.
//!
//! ```text
//! # vmatrace 1 prog ls linux 6.18.. aslr off
//! # file f0 ls                                    a file and its name
//! I 555555554000 555555557000 r--p 0 f0           the list of VMAs at exec
//! m 0 2000 3 22 - 0 = 7ffff7fc0000                calls; all numbers hexadecimal
//! t 7ffff7fc0000                                  the private VMA there has had a write fault
//! C                                               checkpoint: the list follows as = lines
//! = 555555554000 555555557000 r--p 0 f0
//! E                                               the program exits: the last list
//! ```
//!
//! Invariants
//! - I1: `I` lines stand before the first call, ascending and disjoint, and so does each list of `=` lines.
//! - I2: a file is named before it is used.
//! - I3: a whole trace ends in `E` and a list that is not empty; any other end is a file that was cut off.

use super::InputError;
use super::field::At;
use super::lines::Source;
use super::oracle::{Recorded, VmaLine, Words};
use std::collections::VecDeque;

/// One line of a trace; a checkpoint comes with its whole list.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)] // the fields carry the calls' own argument names
pub enum Event {
    /// `# file fN NAME`.
    File { id: String, name: String },
    /// `I`: a VMA that exec made.
    Initial(VmaLine),
    /// `m`: mmap; prot and flags as Linux's headers number them; `file` is `fN`.
    Mmap {
        addr: u64,
        len: u64,
        prot: u64,
        flags: u64,
        file: Option<String>,
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
        prot: u64,
        result: Recorded,
    },
    /// `r`: mremap.
    Mremap {
        addr: u64,
        old: u64,
        new: u64,
        flags: u64,
        to: u64,
        result: Recorded,
    },
    /// `d`: madvise.
    Madvise {
        addr: u64,
        len: u64,
        advice: u64,
        result: Recorded,
    },
    /// `b`: brk and the break after it.
    Brk { addr: u64, result: u64 },
    /// `t`: the private VMA that starts here holds anonymous pages from now on.
    Touch { start: u64 },
    /// `n`: prctl(PR_SET_VMA_ANON_NAME).
    Name {
        addr: u64,
        len: u64,
        result: Recorded,
    },
    /// `x`: another call of the memory manager, by its number.
    Other {
        number: u64,
        args: [u64; 3],
        result: Recorded,
    },
    /// `C` or `E` and the list that Linux showed.
    Checkpoint { last: bool, list: Vec<VmaLine> },
}

/// Reads a trace event by event.
pub struct Reader {
    source: Source,
    program: String,
    files: Vec<String>,
    ahead: Option<(usize, String)>,
    /// Files that a list named; they come behind the list.
    named: VecDeque<(usize, Event)>,
    started: bool,
    last_initial: u64,
    ended: bool,
}

impl Reader {
    /// Starts after the heading, which has been read from `source` already.
    ///
    /// # Errors
    /// If the heading names no program.
    pub fn new(source: Source, heading: &str) -> Result<Self, InputError> {
        let at = At {
            file: source.name(),
            line: 1,
        };
        let words: Vec<&str> = heading.split_whitespace().collect();
        let program = match words
            .iter()
            .position(|w| *w == "prog")
            .and_then(|p| words.get(p + 1))
        {
            Some(name) => (*name).to_string(),
            None => return Err(at.error("prog", "", "is missing in the heading")),
        };
        Ok(Self {
            source,
            program,
            files: Vec::new(),
            ahead: None,
            named: VecDeque::new(),
            started: false,
            last_initial: 0,
            ended: false,
        })
    }

    /// Returns the name of the program that was recorded.
    pub fn program(&self) -> &str {
        &self.program
    }

    /// Reads the next event and the number of its line.
    ///
    /// # Errors
    /// Whatever is wrong with the line; a file that ends early.
    pub fn next_event(&mut self) -> Result<Option<(usize, Event)>, InputError> {
        if let Some(event) = self.named.pop_front() {
            return Ok(Some(event));
        }
        let Some((line, text)) = self.take_line()? else {
            if !self.source.terminated() {
                return Err(self.source.error(
                    "line",
                    "",
                    "the last line has no end: the file is cut off",
                ));
            }
            if !self.ended {
                return Err(self
                    .source
                    .error("end", "", "no E line: the file is cut off"));
            }
            return Ok(None);
        };
        let name = self.source.name().to_string();
        let at = At { file: &name, line };
        if self.ended {
            return Err(at.error("line", &text, "nothing may follow the list after E"));
        }
        let event = self.event(at, &text)?;
        if !matches!(event, Event::File { .. } | Event::Initial(_)) {
            self.started = true;
        }
        Ok(Some((line, event)))
    }

    fn event(&mut self, at: At<'_>, text: &str) -> Result<Event, InputError> {
        let mut w = Words::of(text);
        Ok(match w.word(at, "call")? {
            "#" => self.file_line(at, &mut w)?,
            "I" => {
                let vma = VmaLine::parse(at, &mut w)?;
                if self.started {
                    return Err(at.error(
                        "start",
                        &format!("{:x}", vma.start),
                        "an I line stands behind the first call",
                    ));
                }
                if vma.start < self.last_initial {
                    return Err(at.error(
                        "start",
                        &format!("{:x}", vma.start),
                        "overlaps the VMA before it, or stands before it",
                    ));
                }
                self.last_initial = vma.end;
                self.known(at, &vma.id)?;
                Event::Initial(vma)
            }
            "m" => {
                let (addr, len) = (w.hex(at, "addr")?, w.hex(at, "len")?);
                let (prot, flags) = (w.hex(at, "prot")?, w.hex(at, "flags")?);
                let file = match w.word(at, "file")? {
                    "-" => None,
                    id => {
                        self.known(at, id)?;
                        Some(id.to_string())
                    }
                };
                let offset = w.hex(at, "off")?;
                Event::Mmap {
                    addr,
                    len,
                    prot,
                    flags,
                    file,
                    offset,
                    result: w.result(at)?,
                }
            }
            "u" => Event::Munmap {
                addr: w.hex(at, "addr")?,
                len: w.hex(at, "len")?,
                result: w.result(at)?,
            },
            "p" => Event::Mprotect {
                addr: w.hex(at, "addr")?,
                len: w.hex(at, "len")?,
                prot: w.hex(at, "prot")?,
                result: w.result(at)?,
            },
            "r" => Event::Mremap {
                addr: w.hex(at, "old")?,
                old: w.hex(at, "oldlen")?,
                new: w.hex(at, "newlen")?,
                flags: w.hex(at, "flags")?,
                to: w.hex(at, "newaddr")?,
                result: w.result(at)?,
            },
            "d" => Event::Madvise {
                addr: w.hex(at, "addr")?,
                len: w.hex(at, "len")?,
                advice: w.hex(at, "advice")?,
                result: w.result(at)?,
            },
            "b" => {
                let addr = w.hex(at, "addr")?;
                let result = w.equals(at)?;
                w.end(at)?;
                Event::Brk {
                    addr,
                    result: at.hex("result", result)?,
                }
            }
            "t" => {
                let start = w.hex(at, "start")?;
                w.end(at)?;
                Event::Touch { start }
            }
            "n" => Event::Name {
                addr: w.hex(at, "addr")?,
                len: w.hex(at, "len")?,
                result: w.result(at)?,
            },
            "x" => {
                // The number of the call is the one decimal field.
                let number = at.decimal("nr", w.word(at, "nr")?)?.into();
                let args = [w.hex(at, "a")?, w.hex(at, "b")?, w.hex(at, "c")?];
                Event::Other {
                    number,
                    args,
                    result: w.result(at)?,
                }
            }
            letter @ ("C" | "E") => {
                w.end(at)?;
                self.ended = letter == "E";
                Event::Checkpoint {
                    last: self.ended,
                    list: self.list(at)?,
                }
            }
            "=" => return Err(at.error("call", "=", "a list stands only behind C or E")),
            other => return Err(at.error("call", other, "is none of I m u p r d b t n x C E")),
        })
    }

    fn file_line(&mut self, at: At<'_>, w: &mut Words<'_>) -> Result<Event, InputError> {
        w.word(at, "file")?;
        let id = w.word(at, "id")?.to_string();
        if !id.starts_with('f') || id.len() < 2 || self.files.contains(&id) {
            return Err(at.error("id", &id, "is not fN, or was named before"));
        }
        let rest: Vec<&str> = core::iter::from_fn(|| w.word(at, "name").ok()).collect();
        if rest.is_empty() {
            return Err(at.error("name", "", "the file has no name"));
        }
        self.files.push(id.clone());
        Ok(Event::File {
            id,
            name: rest.join(" "),
        })
    }

    fn list(&mut self, opened: At<'_>) -> Result<Vec<VmaLine>, InputError> {
        let mut list: Vec<VmaLine> = Vec::new();
        while let Some((line, text)) = self.take_line()? {
            let at = At {
                file: opened.file,
                line,
            };
            let mut w = Words::of(&text);
            match w.word(at, "call")? {
                "=" => {}
                // An object that no call named (shared anonymous memory) gets its name when a list shows it first.
                "#" => {
                    let event = self.file_line(at, &mut w)?;
                    self.named.push_back((line, event));
                    continue;
                }
                _ => {
                    self.ahead = Some((line, text));
                    break;
                }
            }
            let vma = VmaLine::parse(at, &mut w)?;
            if list.last().is_some_and(|p| vma.start < p.end) {
                return Err(at.error(
                    "start",
                    &format!("{:x}", vma.start),
                    "overlaps the VMA before it, or stands before it",
                ));
            }
            self.known(at, &vma.id)?;
            list.push(vma);
        }
        if list.is_empty() {
            return Err(opened.error("list", "", "no = line follows: the file is cut off"));
        }
        Ok(list)
    }

    fn known(&self, at: At<'_>, id: &str) -> Result<(), InputError> {
        let anonymous =
            id == "-" || id.starts_with('[') || id.starts_with('s') || id.starts_with('S');
        if anonymous || self.files.iter().any(|f| f == id) {
            return Ok(());
        }
        Err(at.error("file", id, "no `# file` line names it"))
    }

    fn take_line(&mut self) -> Result<Option<(usize, String)>, InputError> {
        if let Some(line) = self.ahead.take() {
            return Ok(Some(line));
        }
        loop {
            let Some(text) = self.source.next_strict()? else {
                return Ok(None);
            };
            let comment = text.starts_with('#') && !text.starts_with("# file ");
            if !comment && !text.trim().is_empty() {
                return Ok(Some((self.source.line(), text)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(body: &str) -> Result<Vec<Event>, String> {
        let mut source = Source::text("t", &format!("# vmatrace 1 prog ls linux 6\n{body}"));
        let head = source.next_strict().unwrap().unwrap();
        let mut reader = Reader::new(source, &head).map_err(|e| e.to_string())?;
        let mut events = Vec::new();
        while let Some((_, event)) = reader.next_event().map_err(|e| e.to_string())? {
            events.push(event);
        }
        Ok(events)
    }

    const END: &str = "E\n= 1000 2000 rw-p 0 -\n";

    #[test]
    fn a_small_trace() {
        let e = all(&format!("# file f0 a file\nI 1000 2000 rw-p 0 f0\nb 0 = 5000\nm 0 2000 3 22 - 0 = 7000\nt 7000\n{END}")).unwrap();
        assert_eq!(e.len(), 6);
        assert_eq!(
            e[0],
            Event::File {
                id: "f0".into(),
                name: "a file".into()
            }
        );
        assert!(matches!(&e[5], Event::Checkpoint { last: true, list } if list.len() == 1));
    }

    #[test]
    fn a_list_may_name_an_object_on_its_way() {
        let e = all("E\n= 1000 2000 rw-p 0 -\n# file f0 zero\n= 3000 4000 rw-s 0 f0\n").unwrap();
        assert!(matches!(&e[0], Event::Checkpoint { list, .. } if list.len() == 2));
    }

    #[test]
    fn broken_traces_are_errors() {
        for (body, what) in [
            ("", "no E line"),
            ("C\n", "no = line"),
            ("C\n= 1000 2000 rw-p 0 -\n", "no E line"),
            ("E\n= 1000 2000 rw-p 0 -", "no end"),
            ("E\n= 1000 2000 rw-p 0 -\nt 0\n", "nothing may follow"),
            ("= 1000 2000 rw-p 0 -\n", "only behind C or E"),
            ("t 0\nI 1000 2000 rw-p 0 -\n", "behind the first call"),
            ("I 1000 3000 rw-p 0 -\nI 2000 4000 rw-p 0 -\n", "overlaps"),
            (
                "C\n= 1000 3000 rw-p 0 -\n= 2000 4000 rw-p 0 -\n",
                "overlaps",
            ),
            ("I 1000 2000 rw-p 0 f3\n", "no `# file` line"),
            ("m 0 1000 3 22 f9 0 = 0\n", "no `# file` line"),
            ("m 0 1000 3 22 - 0\n", "missing"),
            ("b 0 = ENOMEM\n", "hexadecimal"),
            ("# file g0 x\n", "not fN"),
            ("# file f0\n", "no name"),
            ("C\n# file f0\n", "no name"),
            ("z\n", "none of I m u"),
        ] {
            let e = all(body).unwrap_err();
            assert!(e.contains(what), "{body:?}: {e}");
        }
    }
}
