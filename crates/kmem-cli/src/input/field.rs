//! Numbers and words of one line, with errors that name the field.

use super::InputError;

/// Where a field stands: enough to make an error of it.
#[derive(Debug, Clone, Copy)]
pub struct At<'a> {
    /// The file's name.
    pub file: &'a str,
    /// The line, from 1.
    pub line: usize,
}

impl At<'_> {
    /// Makes an error about a field of this line.
    pub fn error(&self, field: &str, value: &str, what: impl Into<String>) -> InputError {
        InputError::new(self.file, self.line, field, value, what)
    }

    /// Reads a hexadecimal number, with or without `0x`.
    ///
    /// # Errors
    /// If the text is empty, holds another character than a digit, or does not fit 64 bits.
    pub fn hex(&self, field: &str, text: &str) -> Result<u64, InputError> {
        let digits = text
            .strip_prefix("0x")
            .or_else(|| text.strip_prefix("0X"))
            .unwrap_or(text);
        if digits.is_empty() {
            return Err(self.error(field, text, "a hexadecimal number is missing here"));
        }
        if let Some(bad) = digits.chars().find(|c| !c.is_ascii_hexdigit()) {
            return Err(self.error(field, text, format!("{bad:?} is no hexadecimal digit")));
        }
        u64::from_str_radix(digits, 16).map_err(|_| self.error(field, text, "does not fit 64 bits"))
    }

    /// Reads a decimal number that fits 32 bits.
    ///
    /// # Errors
    /// If the text is empty, holds another character than a digit, or does not fit.
    pub fn decimal(&self, field: &str, text: &str) -> Result<u32, InputError> {
        if text.is_empty() {
            return Err(self.error(field, text, "a decimal number is missing here"));
        }
        if let Some(bad) = text.chars().find(|c| !c.is_ascii_digit()) {
            return Err(self.error(field, text, format!("{bad:?} is no decimal digit")));
        }
        text.parse()
            .map_err(|_| self.error(field, text, "does not fit 32 bits"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: At<'static> = At { file: "f", line: 7 };

    #[test]
    fn hex_takes_both_spellings() {
        assert_eq!(AT.hex("start", "0x1f"), Ok(0x1f));
        assert_eq!(AT.hex("start", "ffffffffffffffff"), Ok(u64::MAX));
    }

    #[test]
    fn hex_says_what_is_wrong() {
        assert_eq!(
            AT.hex("start", "0x").unwrap_err().to_string(),
            "f:7: start: 0x: a hexadecimal number is missing here"
        );
        assert!(AT.hex("start", "-1").is_err());
        assert!(AT.hex("start", "+1").is_err());
        assert!(AT.hex("end", "12g4").unwrap_err().what.contains("'g'"));
        assert!(
            AT.hex("end", "10000000000000000")
                .unwrap_err()
                .what
                .contains("64 bits")
        );
    }

    #[test]
    fn decimal_refuses_signs_and_overflow() {
        assert_eq!(AT.decimal("node", "12"), Ok(12));
        assert!(AT.decimal("node", "+3").is_err());
        assert!(AT.decimal("node", "4294967296").is_err());
    }
}
