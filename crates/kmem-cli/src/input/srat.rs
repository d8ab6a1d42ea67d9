//! One `SRAT:` line: which node a range of memory belongs to.
//!
//! ```text
//! SRAT: Node 1 PXM 1 [mem 0x428000000-0x827ffffff]              the end is inclusive
//! ACPI: SRAT: Node 1 PXM 1 [mem 0x100000000-0x43fffffff] hotplug
//! SRAT: Node 0 PXM 0 100000-80000000                            before Linux 3.4; the end is exclusive
//! ```
//! Lines about processors (`SRAT: PXM 0 -> APIC 0x00 -> Node 0`) and about the table itself are noise.

use super::InputError;
use super::e820::{exclusive, inclusive};
use super::field::At;
use super::map::NodeRange;

const MARK: &str = "SRAT: Node ";
/// The most nodes that are taken, as Linux's distribution kernels do (`CONFIG_NODES_SHIFT=10`).
pub const MAX_NODES: u32 = 1024;

/// Reads the range that a line gives to a node, or `None` if the line is none.
///
/// # Errors
/// If the line starts as one and does not go on as one.
pub fn parse(at: At<'_>, line: &str) -> Result<Option<NodeRange>, InputError> {
    let Some(place) = line.find(MARK) else {
        return Ok(None);
    };
    let rest = line[place + MARK.len()..].trim();
    let (node, rest) = word(rest);
    let number = at.decimal("node", node)?;
    if number >= MAX_NODES {
        return Err(at.error("node", node, format!("at most {MAX_NODES} nodes are known")));
    }
    let (mark, rest) = word(rest);
    if mark != "PXM" {
        return Err(at.error("PXM", mark, "PXM and its number are missing"));
    }
    let (pxm, rest) = word(rest);
    at.decimal("PXM", pxm)?;
    let (base, len) = if let Some(inner) = rest.strip_prefix("[mem ") {
        let Some((range, _)) = inner.split_once(']') else {
            return Err(at.error("range", rest, "the closing bracket is missing"));
        };
        let Some((start, end)) = range.split_once('-') else {
            return Err(at.error("range", range, "is not START-END"));
        };
        let first = at.hex("start", start.trim())?;
        let last = at.hex("end", end.trim())?;
        inclusive(at, first, last, end.trim())?
    } else {
        let (range, _) = word(rest);
        let Some((start, end)) = range.split_once('-') else {
            return Err(at.error("range", range, "is neither [mem START-END] nor START-END"));
        };
        let first = at.hex("start", start)?;
        let after = at.hex("end", end)?;
        exclusive(at, first, after, end)?
    };
    Ok(Some(NodeRange {
        base,
        len,
        node: number,
        line: at.line,
    }))
}

/// Splits the first word off.
fn word(text: &str) -> (&str, &str) {
    let text = text.trim_start();
    text.split_once(char::is_whitespace)
        .map_or((text, ""), |(a, b)| (a, b.trim_start()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(line: &str) -> Result<Option<NodeRange>, String> {
        parse(At { file: "m", line: 1 }, line).map_err(|e| e.to_string())
    }

    #[test]
    fn all_three_forms() {
        let a = one("SRAT: Node 1 PXM 1 [mem 0x100000-0x7fffffff]").unwrap();
        let b = one("[0.0] ACPI: SRAT: Node 1 PXM 1 [mem 0x100000-0x7fffffff] hotplug").unwrap();
        let c = one("SRAT: Node 1 PXM 1 100000-80000000").unwrap();
        assert_eq!(a, b);
        assert_eq!(a, c);
        assert_eq!(a.unwrap().node, 1);
    }

    #[test]
    fn noise_is_noise_and_damage_is_damage() {
        assert_eq!(one("SRAT: PXM 0 -> APIC 0x00 -> Node 0"), Ok(None));
        assert_eq!(
            one("ACPI: SRAT 0x00000000CFF8E8C0 000270 (v02 SUN)"),
            Ok(None)
        );
        for (line, what) in [
            ("SRAT: Node x PXM 0 [mem 0x0-0xfff]", "decimal"),
            ("SRAT: Node 4096 PXM 0 [mem 0x0-0xfff]", "nodes are known"),
            ("SRAT: Node 1", "PXM"),
            ("SRAT: Node 1 PXM 1 [mem 0x0-", "bracket"),
            ("SRAT: Node 1 PXM 1 [mem 0x2000-0xfff]", "wraps"),
            ("SRAT: Node 1 PXM 1 zzz", "neither"),
        ] {
            let e = one(line).unwrap_err();
            assert!(e.contains(what), "{line}: {e}");
        }
    }
}
