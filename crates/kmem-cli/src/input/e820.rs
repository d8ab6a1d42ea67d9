//! One `BIOS-e820:` line, in both of its forms.
//!
//! ```text
//! BIOS-e820: [mem 0x0000000000000000-0x000000000009ebff] usable          since Linux 3.4; the end is inclusive
//! BIOS-e820: 0000000000000000 - 000000000009fc00 (usable)                before; the end is exclusive
//! ```
//! Whatever stands before `BIOS-e820:` (time stamps, host names, log levels) is skipped. The words for kinds are those of
//! Linux's `arch/x86/kernel/e820.c`, old and new.

use super::InputError;
use super::field::At;
use super::map::{Entry, Kind};

/// The words that make a line an entry of the firmware's map.
pub const MARK: &str = "BIOS-e820:";

/// Reads the entry that a line holds, or `None` if the line is none.
///
/// # Errors
/// If the line holds the mark and what follows is not an entry.
pub fn parse(at: At<'_>, line: &str) -> Result<Option<Entry>, InputError> {
    let Some(place) = line.find(MARK) else {
        return Ok(None);
    };
    let rest = line[place + MARK.len()..].trim();
    if rest.is_empty() {
        return Err(at.error("start", rest, "the line ends after BIOS-e820:"));
    }
    let (range, kind) = if let Some(inner) = rest
        .strip_prefix("[mem ")
        .or_else(|| rest.strip_prefix("[gap "))
    {
        let Some((range, kind)) = inner.split_once(']') else {
            return Err(at.error("range", rest, "the closing bracket is missing"));
        };
        if rest.starts_with("[gap ") {
            return Ok(None);
        }
        let Some((start, end)) = range.split_once('-') else {
            return Err(at.error("range", range, "is not START-END"));
        };
        let start = at.hex("start", start.trim())?;
        let last = at.hex("end", end.trim())?;
        (inclusive(at, start, last, end.trim())?, kind.trim())
    } else {
        let Some((start, tail)) = rest.split_once('-') else {
            return Err(at.error("range", rest, "is neither [mem START-END] nor START - END"));
        };
        let tail = tail.trim();
        let (end, kind) = tail.split_once(char::is_whitespace).unwrap_or((tail, ""));
        let first = at.hex("start", start.trim())?;
        let after = at.hex("end", end)?;
        let kind = kind.trim();
        let inner = kind.strip_prefix('(').and_then(|k| k.strip_suffix(')'));
        let Some(inner) = inner else {
            return Err(at.error("kind", kind, "the kind of the range is not in brackets"));
        };
        (exclusive(at, first, after, end)?, inner)
    };
    Ok(Some(Entry {
        base: range.0,
        len: range.1,
        kind: kind_of(at, kind)?,
        line: at.line,
    }))
}

/// Reads a line by which Linux took memory out of its own copy of the map, as (first, last) address.
///
/// ```text
/// e820: update [mem 0x00000000-0x00000fff] usable ==> reserved
/// e820: remove [mem 0x000a0000-0x000fffff] usable
/// ```
/// Lines that leave the range usable, or that cannot be read, are `None`: they are Linux's remarks and no part of the map.
pub fn edit(line: &str) -> Option<(u64, u64)> {
    let (_, rest) = line
        .split_once("e820: update [mem ")
        .or_else(|| line.split_once("e820: remove [mem "))?;
    let (range, what) = rest.split_once(']')?;
    let (first, last) = range.split_once('-')?;
    let hex = |t: &str| u64::from_str_radix(t.trim().trim_start_matches("0x"), 16).ok();
    let takes = match what.split_once("==>") {
        Some((from, to)) => from.trim() == "usable" && to.trim() != "usable",
        None => what.trim() == "usable",
    };
    if takes {
        Some((hex(first)?, hex(last)?))
    } else {
        None
    }
}

/// Turns an inclusive range into base and length.
///
/// # Errors
/// Zero length (the end is the byte before the start), or an end below the start.
pub fn inclusive(at: At<'_>, start: u64, last: u64, text: &str) -> Result<(u64, u64), InputError> {
    if last < start {
        return Err(if last.checked_add(1) == Some(start) {
            at.error("end", text, "the range has no bytes (ends are inclusive)")
        } else {
            at.error(
                "end",
                text,
                format!("lies before the start {start:#x}: the range wraps"),
            )
        });
    }
    match (last - start).checked_add(1) {
        Some(len) => Ok((start, len)),
        None => Err(at.error("end", text, "the range spans all 64 bits")),
    }
}

/// Turns a half-open range into base and length.
///
/// # Errors
/// As [`inclusive`].
pub fn exclusive(at: At<'_>, start: u64, after: u64, text: &str) -> Result<(u64, u64), InputError> {
    if after == start {
        return Err(at.error(
            "end",
            text,
            "the range has no bytes (start and end are equal)",
        ));
    }
    if after < start {
        return Err(at.error(
            "end",
            text,
            format!("lies before the start {start:#x}: the range wraps"),
        ));
    }
    Ok((start, after - start))
}

/// Reads the word for a kind.
fn kind_of(at: At<'_>, text: &str) -> Result<Kind, InputError> {
    // The newest kernels print the size before the word: "  3 GB System RAM".
    let word = text.trim();
    let lower = word.to_ascii_lowercase();
    Ok(match lower.as_str() {
        "usable" | "system ram" => Kind::Usable,
        "reserved" | "device reserved" => Kind::Reserved,
        "acpi data" | "acpi tables" => Kind::AcpiData,
        "acpi nvs" | "acpi non-volatile storage" => Kind::AcpiNvs,
        "unusable" | "unusable memory" => Kind::Unusable,
        "soft reserved" => Kind::SoftReserved,
        "" => return Err(at.error("kind", word, "the kind of the range is missing")),
        _ => {
            let inner = lower
                .strip_prefix("persistent (type ")
                .map(|t| t.trim_end_matches(')'))
                .or_else(|| lower.strip_prefix("type "));
            match inner {
                Some(number) => match at.decimal("kind", number.trim())? {
                    1 => Kind::Usable,
                    7 | 12 => Kind::Persistent,
                    other => Kind::Other(other),
                },
                None if lower.starts_with("persistent") => Kind::Persistent,
                None => {
                    return Err(at.error(
                        "kind",
                        word,
                        "is no kind that Linux prints (usable, reserved, ACPI data, ..)",
                    ));
                }
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(line: &str) -> Result<Option<Entry>, String> {
        parse(At { file: "m", line: 1 }, line).map_err(|e| e.to_string())
    }

    #[test]
    fn both_forms_say_the_same() {
        let new =
            one("[    0.000000] BIOS-e820: [mem 0x0000000000000000-0x000000000009fbff] usable")
                .unwrap();
        let old = one("<6> BIOS-e820: 0000000000000000 - 000000000009fc00 (usable)").unwrap();
        assert_eq!(new, old);
        assert_eq!(new.unwrap().len, 0x9fc00);
    }

    #[test]
    fn other_lines_are_noise() {
        assert_eq!(
            one("e820: update [mem 0x00000000-0x00000fff] usable ==> reserved"),
            Ok(None)
        );
        assert_eq!(one("BIOS-provided physical RAM map:"), Ok(None));
    }

    #[test]
    fn edits_of_linux_are_told_from_its_remarks() {
        assert_eq!(
            edit("[0.0] e820: update [mem 0x00000000-0x00000fff] usable ==> reserved"),
            Some((0, 0xfff))
        );
        assert_eq!(
            edit("e820: remove [mem 0x000a0000-0x000fffff] usable"),
            Some((0xa0000, 0xfffff))
        );
        assert_eq!(
            edit("e820: update [mem 0xac787018-0xac7ac057] usable ==> usable"),
            None
        );
        assert_eq!(edit("BIOS-e820: [mem 0x1000-0x1fff] usable"), None);
        assert_eq!(
            edit("e820: update [mem nonsense] usable ==> reserved"),
            None
        );
    }

    #[test]
    fn kinds_have_linux_names() {
        for (word, kind) in [
            ("usable", Kind::Usable),
            ("reserved", Kind::Reserved),
            ("ACPI data", Kind::AcpiData),
            ("ACPI NVS", Kind::AcpiNvs),
            ("unusable", Kind::Unusable),
            ("persistent (type 12)", Kind::Persistent),
            ("soft reserved", Kind::SoftReserved),
            ("type 20", Kind::Other(20)),
        ] {
            let line = format!("BIOS-e820: [mem 0x1000-0x1fff] {word}");
            assert_eq!(one(&line).unwrap().unwrap().kind, kind, "{word}");
        }
    }

    #[test]
    fn broken_ranges_are_told_apart() {
        for (line, what) in [
            ("BIOS-e820:", "ends after"),
            ("BIOS-e820: [mem 0x1000", "closing bracket"),
            ("BIOS-e820: [mem 0x1000] usable", "START-END"),
            ("BIOS-e820: [mem 0x1000-0x0fff] usable", "no bytes"),
            ("BIOS-e820: [mem 0x2000-0x0fff] usable", "wraps"),
            (
                "BIOS-e820: [mem 0x0-0xffffffffffffffff] usable",
                "all 64 bits",
            ),
            (
                "BIOS-e820: [mem 0x1000-0x1fff]",
                "kind of the range is missing",
            ),
            ("BIOS-e820: [mem 0x1000-0x1fff] usabel", "no kind"),
            ("BIOS-e820: [mem 0x1000-0x1fff] type x", "decimal"),
            ("BIOS-e820: 1000 - 1000 (usable)", "no bytes"),
            ("BIOS-e820: 2000 - 1000 (usable)", "wraps"),
            ("BIOS-e820: 1000 - 2000 usable", "brackets"),
            ("BIOS-e820: hello", "neither"),
        ] {
            let e = one(line).unwrap_err();
            assert!(e.contains(what), "{line}: {e}");
        }
    }
}
