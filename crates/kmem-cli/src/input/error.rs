//! The one error of all readers.
//!
//! It prints as `file:line: field: value: what is wrong`, always on one line: whatever control characters the value
//! holds are escaped, and a long value is cut.

use core::fmt;

/// The longest part of a bad value that is shown, in characters.
const SHOWN: usize = 60;

/// What is wrong with an input, and where.
///
/// # Examples
/// ```
/// use kmem_cli::input::InputError;
/// let e = InputError::new("map.txt", 3, "end", "0xfff", "lies before the start 0x1000");
/// assert_eq!(e.to_string(), "map.txt:3: end: 0xfff: lies before the start 0x1000");
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InputError {
    /// The file's name as the user gave it, or `embedded:NAME`.
    pub file: String,
    /// The line, from 1; 0 where the file as a whole is meant.
    pub line: usize,
    /// The name of the field that is wrong.
    pub field: String,
    /// What stood there.
    pub value: String,
    /// What is wrong with it.
    pub what: String,
}

impl InputError {
    /// Makes an error.
    pub fn new(
        file: impl Into<String>,
        line: usize,
        field: impl Into<String>,
        value: impl Into<String>,
        what: impl Into<String>,
    ) -> Self {
        Self {
            file: file.into(),
            line,
            field: field.into(),
            value: value.into(),
            what: what.into(),
        }
    }
}

/// Escapes control characters and cuts what is too long, so that a value stays on its line.
fn shown(value: &str) -> String {
    if value.is_empty() {
        return "(nothing)".into();
    }
    let mut s: String = value
        .chars()
        .take(SHOWN)
        .flat_map(|c| {
            if c.is_control() {
                c.escape_default().collect::<Vec<_>>()
            } else {
                vec![c]
            }
        })
        .collect();
    if value.chars().count() > SHOWN {
        s.push_str("..");
    }
    s
}

impl fmt::Display for InputError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}:{}: {}: {}: {}",
            shown_path(&self.file),
            self.line,
            self.field,
            shown(&self.value),
            self.what
        )
    }
}

/// Escapes control characters of a path; a path is never cut.
fn shown_path(path: &str) -> String {
    path.chars()
        .flat_map(|c| {
            if c.is_control() {
                c.escape_default().collect::<Vec<_>>()
            } else {
                vec![c]
            }
        })
        .collect()
}

impl std::error::Error for InputError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stays_on_one_line_whatever_the_value() {
        let e = InputError::new(
            "a\nb",
            1,
            "kind",
            "x\n\r\u{1b}[31m".repeat(50),
            "is not known",
        );
        let text = e.to_string();
        assert!(!text.chars().any(char::is_control), "{text:?}");
        assert!(text.len() < 300);
    }

    #[test]
    fn an_empty_value_is_said_in_words() {
        let e = InputError::new("m", 0, "file", "", "holds nothing");
        assert_eq!(e.to_string(), "m:0: file: (nothing): holds nothing");
    }
}
