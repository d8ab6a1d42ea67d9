//! What both kinds of recorded runs share: errno names, results, VMA lines, and telling the kinds apart.
//!
//! All numbers are hexadecimal without `0x` unless said; a result stands behind `=` and is a number or an errno's name.

use super::InputError;
use super::field::At;
use core::fmt;

/// The page size of the recorded machine, in bytes.
pub const PAGE: u64 = 4096;

macro_rules! errnos {
    ($($name:ident = $number:literal),* $(,)?) => {
        /// The errno values that memory calls of Linux return, with x86-64's numbers.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[allow(clippy::upper_case_acronyms)]
        pub enum Errno {
            $(#[doc = concat!("`", stringify!($name), "`, ", stringify!($number), ".")] $name = $number,)*
        }

        impl Errno {
            /// Finds an errno by its name.
            pub fn from_name(name: &str) -> Option<Self> {
                match name {
                    $(stringify!($name) => Some(Self::$name),)*
                    _ => None,
                }
            }

            /// Finds an errno by its number.
            pub fn from_number(number: i32) -> Option<Self> {
                match number {
                    $($number => Some(Self::$name),)*
                    _ => None,
                }
            }

            /// Returns the name, as in `errno.h`.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$name => stringify!($name),)*
                }
            }
        }
    };
}

errnos! {
    EPERM = 1,
    ENOENT = 2,
    ESRCH = 3,
    EINTR = 4,
    EIO = 5,
    ENXIO = 6,
    E2BIG = 7,
    ENOEXEC = 8,
    EBADF = 9,
    EAGAIN = 11,
    ENOMEM = 12,
    EACCES = 13,
    EFAULT = 14,
    EBUSY = 16,
    EEXIST = 17,
    ENODEV = 19,
    EINVAL = 22,
    ENFILE = 23,
    EMFILE = 24,
    ETXTBSY = 26,
    EROFS = 30,
    ENOSYS = 38,
    EOVERFLOW = 75,
    EOPNOTSUPP = 95,
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a call returned: a number (an address, or 0) or an errno.
pub type Recorded = Result<u64, Errno>;

/// Prints a result as the files write it.
pub fn show(result: &Recorded) -> String {
    match result {
        Ok(n) => format!("{n:x}"),
        Err(e) => e.to_string(),
    }
}

/// The permissions of a VMA, as `/proc/PID/maps` shows them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Perms {
    /// PROT_READ (1), PROT_WRITE (2), PROT_EXEC (4).
    pub prot: u32,
    /// Shared rather than private.
    pub shared: bool,
}

impl fmt::Display for Perms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bit = |b: u32, c: char| if self.prot & b != 0 { c } else { '-' };
        let last = if self.shared { 's' } else { 'p' };
        write!(f, "{}{}{}{last}", bit(1, 'r'), bit(2, 'w'), bit(4, 'x'))
    }
}

impl fmt::Debug for Perms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// One VMA of a recorded list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmaLine {
    /// The first address.
    pub start: u64,
    /// The address behind the last.
    pub end: u64,
    /// The permissions.
    pub perms: Perms,
    /// The offset into the object, in bytes.
    pub offset: u64,
    /// Whose pages: `-` anonymous, `fN` a file, `sN` shared anonymous, or a name in brackets.
    pub id: String,
}

impl fmt::Display for VmaLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:x} {:x} {} {:x} {}",
            self.start, self.end, self.perms, self.offset, self.id
        )
    }
}

impl VmaLine {
    /// Reads `start end perms offset id` from the words after the line's letter.
    ///
    /// # Errors
    /// A missing field, a bad number, an empty or unaligned range, or unknown permissions.
    pub fn parse(at: At<'_>, words: &mut Words<'_>) -> Result<Self, InputError> {
        let start = words.hex(at, "start")?;
        let end_text = words.word(at, "end")?;
        let end = at.hex("end", end_text)?;
        if end <= start {
            return Err(at.error(
                "end",
                end_text,
                format!("does not lie behind the start {start:x}"),
            ));
        }
        if start % PAGE != 0 || end % PAGE != 0 {
            return Err(at.error(
                "start",
                &format!("{start:x}-{end:x}"),
                "is not made of whole pages",
            ));
        }
        let perms = perms(at, words.word(at, "perms")?)?;
        let offset = words.hex(at, "offset")?;
        let id = words.word(at, "id")?.to_string();
        words.end(at)?;
        Ok(Self {
            start,
            end,
            perms,
            offset,
            id,
        })
    }
}

fn perms(at: At<'_>, text: &str) -> Result<Perms, InputError> {
    let bad = || at.error("perms", text, "is not of the form rwxp");
    let [r, w, x, s] = text.as_bytes() else {
        return Err(bad());
    };
    let bit = |c: u8, letter: u8, value: u32| match c {
        b'-' => Ok(0),
        c if c == letter => Ok(value),
        _ => Err(bad()),
    };
    let prot = bit(*r, b'r', 1)? | bit(*w, b'w', 2)? | bit(*x, b'x', 4)?;
    match s {
        b'p' => Ok(Perms {
            prot,
            shared: false,
        }),
        b's' => Ok(Perms { prot, shared: true }),
        _ => Err(bad()),
    }
}

/// The words of a line, taken one field at a time.
pub struct Words<'a> {
    words: core::str::SplitWhitespace<'a>,
}

impl<'a> Words<'a> {
    /// Splits a line at its blanks.
    pub fn of(line: &'a str) -> Self {
        Self {
            words: line.split_whitespace(),
        }
    }

    /// Takes the next word.
    ///
    /// # Errors
    /// If there is none.
    pub fn word(&mut self, at: At<'_>, field: &str) -> Result<&'a str, InputError> {
        self.words
            .next()
            .ok_or_else(|| at.error(field, "", "is missing: the line ends before it"))
    }

    /// Takes the next word as a hexadecimal number without `0x`.
    ///
    /// # Errors
    /// If there is none, or it is no number.
    pub fn hex(&mut self, at: At<'_>, field: &str) -> Result<u64, InputError> {
        let word = self.word(at, field)?;
        at.hex(field, word)
    }

    /// Takes `= RESULT`, the end of a call's line.
    ///
    /// # Errors
    /// If the sign is missing, the result is neither a number nor a known errno, or more follows.
    pub fn result(&mut self, at: At<'_>) -> Result<Recorded, InputError> {
        let word = self.equals(at)?;
        self.end(at)?;
        // Names first: EBADF is made of hexadecimal digits, but the files write their numbers in small letters.
        if let Some(errno) = Errno::from_name(word) {
            return Ok(Err(errno));
        }
        if word.starts_with('E') {
            return Err(at.error("result", word, "is no errno of a memory call"));
        }
        at.hex("result", word).map(Ok)
    }

    /// Takes `=` and the word behind it.
    ///
    /// # Errors
    /// If either is missing.
    pub fn equals(&mut self, at: At<'_>) -> Result<&'a str, InputError> {
        let sign = self.word(at, "result")?;
        if sign != "=" {
            return Err(at.error("result", sign, "an equals sign belongs here"));
        }
        self.word(at, "result")
    }

    /// Checks that nothing is left.
    ///
    /// # Errors
    /// If a word is left.
    pub fn end(&mut self, at: At<'_>) -> Result<(), InputError> {
        match self.words.next() {
            Some(word) => Err(at.error("line", word, "is one field too many")),
            None => Ok(()),
        }
    }
}

/// Which kind of recorded run a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunKind {
    /// Random calls in a window, every result and change checked (`# vmagen 1 ..`).
    Fuzz,
    /// One real program, the list checked at checkpoints (`# vmatrace 1 ..`).
    Trace,
}

/// Tells the kind from the first line.
///
/// # Errors
/// If the line is no heading of either kind, or of a newer version than 1.
pub fn kind(at: At<'_>, first: Option<&str>) -> Result<RunKind, InputError> {
    let Some(first) = first else {
        return Err(InputError::new(
            at.file,
            0,
            "file",
            "",
            "is empty: a recorded run starts with a # heading",
        ));
    };
    let words: Vec<&str> = first.split_whitespace().take(3).collect();
    let kind = match words[..] {
        ["#", "vmagen", _] => RunKind::Fuzz,
        ["#", "vmatrace", _] => RunKind::Trace,
        _ => {
            return Err(at.error(
                "heading",
                first,
                "is neither `# vmagen 1 ..` nor `# vmatrace 1 ..`",
            ));
        }
    };
    if words[2] != "1" {
        return Err(at.error("version", words[2], "only version 1 is known"));
    }
    Ok(kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: At<'static> = At { file: "f", line: 1 };

    #[test]
    fn errnos_round_trip() {
        for name in ["EPERM", "ENOMEM", "EEXIST", "EOVERFLOW", "EOPNOTSUPP"] {
            let e = Errno::from_name(name).unwrap();
            assert_eq!(e.to_string(), name);
            assert_eq!(Errno::from_number(e as i32), Some(e));
        }
        assert_eq!(Errno::from_name("EWHAT"), None);
    }

    #[test]
    fn results() {
        let r = |s: &str| Words::of(s).result(AT).map_err(|e| e.to_string());
        assert_eq!(r("= 7fff0000"), Ok(Ok(0x7fff_0000)));
        assert_eq!(r("= ENOMEM"), Ok(Err(Errno::ENOMEM)));
        assert_eq!(
            r("= EBADF"),
            Ok(Err(Errno::EBADF)),
            "though all its letters are digits"
        );
        assert_eq!(r("= ebadf"), Ok(Ok(0xebadf)));
        assert!(r("= EWHAT").unwrap_err().contains("no errno"));
        assert!(r("0").unwrap_err().contains("equals sign"));
        assert!(r("=").unwrap_err().contains("missing"));
        assert!(r("= 0 1").unwrap_err().contains("too many"));
    }

    #[test]
    fn vma_lines_print_as_they_were_read() {
        let text = "500c6000 500c7000 rw-p a000 f0";
        let v = VmaLine::parse(AT, &mut Words::of(text)).unwrap();
        assert_eq!(v.to_string(), text);
        for (bad, what) in [
            ("500c6000 500c6000 rw-p a000 f0", "behind the start"),
            ("500c6010 500c7000 rw-p a000 f0", "whole pages"),
            ("500c6000 500c7000 rwp a000 f0", "rwxp"),
            ("500c6000 500c7000 wr-p a000 f0", "rwxp"),
            ("500c6000 500c7000 rw-p a000", "missing"),
            ("500c6000 500c7000 rw-p a000 f0 x", "too many"),
        ] {
            let e = VmaLine::parse(AT, &mut Words::of(bad)).unwrap_err();
            assert!(e.what.contains(what), "{bad}: {e}");
        }
    }

    #[test]
    fn kinds() {
        assert_eq!(kind(AT, Some("# vmagen 1 seed 1")), Ok(RunKind::Fuzz));
        assert_eq!(kind(AT, Some("# vmatrace 1 prog ls")), Ok(RunKind::Trace));
        assert!(
            kind(AT, Some("# vmagen 2 seed 1"))
                .unwrap_err()
                .what
                .contains("version 1")
        );
        assert!(kind(AT, Some("hello")).is_err());
        assert!(kind(AT, None).is_err());
    }
}
