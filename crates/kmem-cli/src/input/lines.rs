//! Where lines come from: a file, standard input, or data embedded in the binary; gzip is undone on the way.
//!
//! Invariants
//! - I1: a line is at most [`MAX_LINE`] bytes; a longer one is an error and not an allocation.
//! - I2: line numbers start at 1 and count physical lines.
//! - I3: one line is held at a time.
//!
//! Costs: one buffered read per 8 KiB and one copy a line.

use super::InputError;
use flate2::read::MultiGzDecoder;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};

/// The longest line that any reader takes, in bytes.
pub const MAX_LINE: usize = 64 * 1024;
/// The most lines that a memory map (a whole boot log) may have.
pub const MAX_MAP_LINES: usize = 4_000_000;

/// A named stream of numbered lines.
pub struct Source {
    name: String,
    reader: Box<dyn BufRead>,
    line: usize,
    buffer: Vec<u8>,
    terminated: bool,
}

impl Source {
    /// Opens a file; `-` is standard input. A file that starts with gzip's two bytes is unpacked.
    ///
    /// # Errors
    /// An [`InputError`] with line 0 and the system's words, if the file cannot be opened or read.
    pub fn open(path: &str) -> Result<Self, InputError> {
        let raw: Box<dyn Read> = if path == "-" {
            Box::new(io::stdin())
        } else {
            let refuse = |e: io::Error| InputError::new(path, 0, "file", path, e.to_string());
            let file = File::open(path).map_err(refuse)?;
            if file.metadata().map_err(refuse)?.is_dir() {
                return Err(InputError::new(path, 0, "file", path, "is a directory"));
            }
            Box::new(file)
        };
        Self::from_reader(path, raw)
    }

    /// Reads embedded bytes under the name `embedded:NAME`.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn embedded(name: &str, bytes: &'static [u8]) -> Result<Self, InputError> {
        Self::from_reader(&format!("embedded:{name}"), Box::new(bytes))
    }

    /// Reads text that is already at hand.
    pub fn text(name: &str, text: &str) -> Self {
        Self {
            name: name.into(),
            reader: Box::new(io::Cursor::new(text.as_bytes().to_vec())),
            line: 0,
            buffer: Vec::new(),
            terminated: true,
        }
    }

    fn from_reader(name: &str, raw: Box<dyn Read>) -> Result<Self, InputError> {
        let mut reader = BufReader::new(raw);
        let head = reader
            .fill_buf()
            .map_err(|e| InputError::new(name, 0, "file", name, e.to_string()))?;
        let packed = head.starts_with(&[0x1f, 0x8b]);
        let reader: Box<dyn BufRead> = if packed {
            Box::new(BufReader::new(MultiGzDecoder::new(reader)))
        } else {
            Box::new(reader)
        };
        Ok(Self {
            name: name.into(),
            reader,
            line: 0,
            buffer: Vec::new(),
            terminated: true,
        })
    }

    /// Returns the name that errors carry.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the number of the line that was read last, 0 before the first.
    pub fn line(&self) -> usize {
        self.line
    }

    /// Returns whether the line that was read last ended in a line feed (a file that was cut off does not).
    pub fn terminated(&self) -> bool {
        self.terminated
    }

    /// Makes an error about the line that was read last.
    pub fn error(&self, field: &str, value: &str, what: impl Into<String>) -> InputError {
        InputError::new(&self.name, self.line, field, value, what)
    }

    /// Reads the next line without its line end; bytes that are no UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// An unreadable file, a damaged gzip stream, or a line above [`MAX_LINE`].
    pub fn next_lossy(&mut self) -> Result<Option<String>, InputError> {
        Ok(self
            .next_bytes()?
            .map(|bytes| String::from_utf8_lossy(bytes).into_owned()))
    }

    /// Reads the next line without its line end, which must be UTF-8.
    ///
    /// # Errors
    /// As [`next_lossy`](Self::next_lossy), and for bytes that are no UTF-8.
    pub fn next_strict(&mut self) -> Result<Option<String>, InputError> {
        let Some(bytes) = self.next_bytes()? else {
            return Ok(None);
        };
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(Some(text.to_string())),
            Err(_) => {
                let shown = String::from_utf8_lossy(bytes).into_owned();
                Err(self.error("line", &shown, "is not text (bytes that are no UTF-8)"))
            }
        }
    }

    fn next_bytes(&mut self) -> Result<Option<&[u8]>, InputError> {
        self.buffer.clear();
        let limit = MAX_LINE as u64 + 2;
        let read = (&mut self.reader)
            .take(limit)
            .read_until(b'\n', &mut self.buffer);
        self.line += 1;
        let n = read.map_err(|e| {
            InputError::new(&self.name, self.line, "file", &self.name, e.to_string())
        })?;
        if n == 0 {
            self.line -= 1;
            return Ok(None);
        }
        self.terminated = self.buffer.last() == Some(&b'\n');
        while matches!(self.buffer.last(), Some(b'\n' | b'\r')) {
            self.buffer.pop();
        }
        if self.buffer.len() > MAX_LINE {
            let shown = String::from_utf8_lossy(&self.buffer[..64]).into_owned();
            return Err(self.error("line", &shown, format!("is longer than {MAX_LINE} bytes")));
        }
        Ok(Some(&self.buffer))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{Compression, write::GzEncoder};
    use std::io::Write;

    #[test]
    fn numbers_lines_and_knows_a_cut_file() {
        let mut s = Source::text("t", "one\r\n\nthree");
        assert_eq!(s.next_strict().unwrap().as_deref(), Some("one"));
        assert_eq!(s.next_strict().unwrap().as_deref(), Some(""));
        assert!(s.terminated());
        assert_eq!(s.next_strict().unwrap().as_deref(), Some("three"));
        assert_eq!(s.line(), 3);
        assert!(!s.terminated());
        assert_eq!(s.next_strict().unwrap(), None);
        assert_eq!(s.line(), 3);
    }

    #[test]
    fn an_endless_line_is_an_error_and_no_allocation() {
        let mut s = Source::from_reader("zero", Box::new(io::repeat(0))).unwrap();
        let e = s.next_lossy().unwrap_err();
        assert!(e.what.contains("longer than"), "{e}");
        assert!(s.buffer.capacity() < 4 * MAX_LINE);
    }

    #[test]
    fn gzip_is_undone_and_damage_is_an_error() {
        let mut z = GzEncoder::new(Vec::new(), Compression::best());
        z.write_all(b"a\nb\n").unwrap();
        let packed: &'static [u8] = z.finish().unwrap().leak();
        let mut s = Source::embedded("x", packed).unwrap();
        assert_eq!(s.name(), "embedded:x");
        assert_eq!(s.next_strict().unwrap().as_deref(), Some("a"));
        let mut cut = Source::embedded("x", &packed[..packed.len() - 9]).unwrap();
        let mut last = Ok(Some(String::new()));
        while matches!(last, Ok(Some(_))) {
            last = cut.next_strict();
        }
        assert!(last.is_err(), "a cut stream must not look like an end");
    }

    #[test]
    fn strict_reading_refuses_other_bytes() {
        let mut s = Source::embedded("x", b"ok\n\xff\xfe\n").unwrap();
        s.next_strict().unwrap();
        let e = s.next_strict().unwrap_err();
        assert_eq!(e.line, 2);
    }
}
