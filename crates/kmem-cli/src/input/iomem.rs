//! `/proc/iomem`: the resource tree of a running Linux, as `cat` prints it.
//!
//! ```text
//! 00001000-0009fbff : System RAM          ends are inclusive, two blanks of indent a level
//! 000a0000-000fffff : PCI Bus 0000:00
//!   000c0000-000c7fff : Video ROM
//! 100000000-43fffffff : System RAM
//!   2ba000000-2bb1fffff : Kernel code     nested in System RAM: still memory
//! ```
//! System RAM is usable wherever it stands (also below `Persistent Memory`, as the kmem driver puts it), everything else
//! at the top level is reserved, and what is nested below something is a part of it. Without privilege Linux prints zeros
//! for all addresses; that is refused in words.

use super::InputError;
use super::e820::inclusive;
use super::field::At;
use super::map::{Entry, Kind};

/// Returns whether a line looks as one of this file: `HEX-HEX : NAME`.
pub fn looks_like(line: &str) -> bool {
    let Some((range, _)) = line.split_once(" : ") else {
        return false;
    };
    let Some((start, end)) = range.trim_start().split_once('-') else {
        return false;
    };
    let hex = |s: &str| !s.is_empty() && s.chars().all(|c| c.is_ascii_hexdigit());
    hex(start) && hex(end)
}

/// Reads a whole file of numbered lines.
///
/// # Errors
/// At the first line that is neither empty, nor a `#` comment, nor an entry; if a nested range leaves its parent; or if
/// all addresses are zero.
pub fn parse(file: &str, lines: &[(usize, String)]) -> Result<Vec<Entry>, InputError> {
    let mut entries: Vec<Entry> = Vec::new();
    // The chain of ranges around the line at hand: (depth, first, last, is System RAM).
    let mut parents: Vec<(usize, u64, u64, bool)> = Vec::new();
    let mut zeros = None;
    for (number, line) in lines {
        let at = At {
            file,
            line: *number,
        };
        if line.trim().is_empty() || line.starts_with('#') {
            continue;
        }
        let indent = line.len() - line.trim_start_matches(' ').len();
        if indent % 2 != 0 {
            return Err(at.error("indent", &indent.to_string(), "a level is two blanks"));
        }
        let depth = indent / 2;
        let Some((range, name)) = line.trim().split_once(" : ") else {
            return Err(at.error("range", line.trim(), "is not START-END : NAME"));
        };
        let Some((start, end)) = range.split_once('-') else {
            return Err(at.error("range", range, "is not START-END"));
        };
        let first = at.hex("start", start)?;
        let last = at.hex("end", end)?;
        if first == 0 && last == 0 {
            zeros.get_or_insert((*number, range.to_string()));
            continue;
        }
        let (base, len) = inclusive(at, first, last, end)?;
        parents.retain(|p| p.0 < depth);
        if depth > parents.len() {
            return Err(at.error(
                "indent",
                &indent.to_string(),
                "is deeper than one level below the line before",
            ));
        }
        if let Some(parent) = parents.last()
            && (first < parent.1 || last > parent.2)
        {
            return Err(at.error(
                "range",
                range,
                format!(
                    "leaves the range {:x}-{:x} that it is nested in",
                    parent.1, parent.2
                ),
            ));
        }
        let inside_ram = parents.iter().any(|p| p.3);
        let ram = name.starts_with("System RAM");
        if !inside_ram && (ram || depth == 0) {
            entries.push(Entry {
                base,
                len,
                kind: kind_of(name),
                line: *number,
            });
        }
        parents.push((depth, first, last, ram || inside_ram));
    }
    if let (true, Some((line, range))) = (entries.is_empty(), zeros) {
        return Err(InputError::new(
            file,
            line,
            "range",
            range,
            "Linux hides the addresses from users without privilege: read /proc/iomem as root",
        ));
    }
    Ok(entries)
}

fn kind_of(name: &str) -> Kind {
    match name.trim() {
        n if n.starts_with("System RAM") => Kind::Usable,
        "ACPI Tables" => Kind::AcpiData,
        "ACPI Non-volatile Storage" => Kind::AcpiNvs,
        "Unusable memory" => Kind::Unusable,
        n if n.starts_with("Persistent Memory") => Kind::Persistent,
        "Soft Reserved" => Kind::SoftReserved,
        _ => Kind::Reserved,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(text: &str) -> Result<Vec<Entry>, String> {
        let lines: Vec<_> = text
            .lines()
            .enumerate()
            .map(|(i, l)| (i + 1, l.to_string()))
            .collect();
        parse("iomem", &lines).map_err(|e| e.to_string())
    }

    #[test]
    fn nested_lines_are_parts() {
        let e = all("00000000-00000fff : Reserved\n00001000-0009fbff : System RAM\n  00002000-00002fff : Kernel code\n\
                     000a0000-000fffff : PCI Bus 0000:00\n  000c0000-000c7fff : Video ROM\n").unwrap();
        let got: Vec<_> = e.iter().map(|e| (e.base, e.len, e.kind)).collect();
        assert_eq!(
            got,
            [
                (0, 0x1000, Kind::Reserved),
                (0x1000, 0x9ec00, Kind::Usable),
                (0xa0000, 0x60000, Kind::Reserved)
            ]
        );
    }

    #[test]
    fn memory_below_persistent_memory_counts() {
        let e = all("100000000-1ffffffff : Persistent Memory\n  110000000-1ffffffff : dax0.0\n    110000000-1ffffffff : System RAM (kmem)\n").unwrap();
        assert_eq!(e.len(), 2);
        assert_eq!(e[1].kind, Kind::Usable);
    }

    #[test]
    fn hidden_addresses_are_said_in_words() {
        let e = all("00000000-00000000 : Reserved\n00000000-00000000 : System RAM\n").unwrap_err();
        assert!(
            e.starts_with("iomem:1: range: 00000000-00000000: ") && e.contains("root"),
            "{e}"
        );
    }

    #[test]
    fn damage_is_named() {
        for (text, what) in [
            ("00001000-0009fbff System RAM\n", "START-END : NAME"),
            ("00001000 : System RAM\n", "not START-END"),
            ("0000z000-0009fbff : System RAM\n", "hexadecimal"),
            ("00002000-00000fff : System RAM\n", "wraps"),
            (
                "00001000-0009fbff : System RAM\n  000a0000-000a0fff : Kernel code\n",
                "leaves",
            ),
            (
                "00001000-0009fbff : System RAM\n   00002000-00002fff : Kernel code\n",
                "two blanks",
            ),
            (
                "00001000-0009fbff : System RAM\n      00002000-00002fff : Kernel code\n",
                "deeper",
            ),
        ] {
            let e = all(text).unwrap_err();
            assert!(e.contains(what), "{text}: {e}");
        }
    }
}
