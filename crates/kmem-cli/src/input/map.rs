//! The physical memory map of a machine, read from whatever a user has of it.
//!
//! Formats, told apart by their content: `BIOS-e820:` lines (alone or in a whole boot log with any noise around them, see
//! [`e820`]) with optional `SRAT:` lines, or `/proc/iomem` ([`iomem`]).
//!
//! What is legal and what is not
//! - I1: every range has at least one byte, does not wrap, and ends below 2^52 (no x86 processor has more address bits).
//! - I2: order does not matter, holes do not matter, and up to [`MAX_ENTRIES`] ranges are taken.
//! - I3: ranges may overlap, as firmware's do. Where two kinds meet, the less usable one wins (Linux: the higher type
//!   number). Each overlap is noted, so that boot can print it. **One range given twice with two kinds** is a
//!   contradiction, and an error: no rule could tell which of the two the firmware meant.
//! - I4: a page belongs to one node: `SRAT` ranges of two nodes that overlap are an error.
//! - I5: at least one byte is usable.
//! - I6: if the list is printed more than once (several boots in one log), the first complete one counts: the longest,
//!   and of equals the first. A list begins anew where its first range comes again, or at Linux's heading for the list.
//!   Lines such as `e820: update` and `e820: remove`, by which Linux edits its own copy, are no part of the firmware's map;
//!   but where they take usable memory away (page 0 apart), Linux's page counts are those of another map and are dropped.
//!
//! What Linux printed about its own zones for the same map is kept in [`LinuxNotes`]: an oracle to hold kmem's zones to.

use super::lines::{MAX_MAP_LINES, Source};
use super::linux_notes::LinuxNotes;
use super::{InputError, e820, field::At, iomem, srat};
use core::fmt;

/// The most ranges that a map may have.
pub const MAX_ENTRIES: usize = 256;
/// The number of physical address bits that an x86-64 processor can have (Intel SDM volume 3, section 4.1.4).
pub const ADDRESS_BITS: u32 = 52;

/// What a range of physical addresses is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Memory that a kernel may use at once.
    Usable,
    /// Memory that holds the firmware's tables; a kernel may reclaim it after reading them.
    AcpiData,
    /// Non-volatile memory that keeps its content without power.
    Persistent,
    /// Memory that the firmware sets aside for a purpose.
    SoftReserved,
    /// Memory that the firmware keeps for itself while the machine sleeps.
    AcpiNvs,
    /// Not for a kernel's use.
    Reserved,
    /// Memory with errors.
    Unusable,
    /// Another firmware type, by number.
    Other(u32),
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usable => f.pad("usable"),
            Self::AcpiData => f.pad("ACPI data"),
            Self::Persistent => f.pad("persistent"),
            Self::SoftReserved => f.pad("soft reserved"),
            Self::AcpiNvs => f.pad("ACPI NVS"),
            Self::Reserved => f.pad("reserved"),
            Self::Unusable => f.pad("unusable"),
            Self::Other(n) => f.pad(&format!("type {n}")),
        }
    }
}

/// One range of the map, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The first byte's address.
    pub base: u64,
    /// The length in bytes, never 0.
    pub len: u64,
    /// What the range is.
    pub kind: Kind,
    /// The line that it came from.
    pub line: usize,
}

impl Entry {
    /// Returns the address of the last byte.
    pub fn last(&self) -> u64 {
        self.base + (self.len - 1)
    }

    fn overlaps(&self, other: &Entry) -> bool {
        self.base <= other.last() && other.base <= self.last()
    }
}

/// A range of addresses that belongs to a node, whether there is memory in all of it or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeRange {
    /// The first byte's address.
    pub base: u64,
    /// The length in bytes, never 0.
    pub len: u64,
    /// The node's number.
    pub node: u32,
    /// The line that it came from.
    pub line: usize,
}

impl NodeRange {
    /// Returns the address of the last byte.
    pub fn last(&self) -> u64 {
        self.base + (self.len - 1)
    }
}

/// Which format a map came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// `BIOS-e820:` lines, alone or in a boot log.
    E820,
    /// `/proc/iomem`.
    Iomem,
}

/// A machine's memory map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryMap {
    /// The name of the file that it came from.
    pub name: String,
    /// The format that it came in.
    pub format: Format,
    /// The ranges, in the order of the file.
    pub entries: Vec<Entry>,
    /// Which node has which addresses; empty on a machine with one node.
    pub nodes: Vec<NodeRange>,
    /// What Linux made of the map, as far as the file says.
    pub linux: LinuxNotes,
    /// What a reader should know: overlaps and how they are resolved.
    pub remarks: Vec<String>,
    /// The last line, which errors about the whole map name.
    pub last_line: usize,
}

impl MemoryMap {
    /// Returns the usable bytes: overlapping ranges counted once, what another kind covers left out.
    pub fn usable_bytes(&self) -> u64 {
        self.usable().iter().map(|(base, end)| end - base).sum()
    }

    /// Returns the usable ranges as sorted, disjoint (start, end) pairs in bytes, overlaps resolved (I3).
    ///
    /// This is a plain recount for the eyes of a reader; it shares no code with the allocator's own boot map.
    pub fn usable(&self) -> Vec<(u64, u64)> {
        let mut edges: Vec<u64> = self
            .entries
            .iter()
            .flat_map(|e| [e.base, e.base + e.len])
            .collect();
        edges.sort_unstable();
        edges.dedup();
        let mut out: Vec<(u64, u64)> = Vec::new();
        for pair in edges.windows(2) {
            let covering = self
                .entries
                .iter()
                .filter(|e| e.base <= pair[0] && pair[1] <= e.base + e.len)
                .map(|e| e.kind)
                .max();
            if covering != Some(Kind::Usable) {
                continue;
            }
            match out.last_mut() {
                Some(last) if last.1 == pair[0] => last.1 = pair[1],
                _ => out.push((pair[0], pair[1])),
            }
        }
        out
    }

    /// Returns the nodes' numbers, ascending; node 0 alone where the map has no `SRAT` lines.
    pub fn node_numbers(&self) -> Vec<u32> {
        let mut all: Vec<u32> = self.nodes.iter().map(|n| n.node).collect();
        all.sort_unstable();
        all.dedup();
        if all.is_empty() {
            all.push(0);
        }
        all
    }

    /// Makes an error about the map as a whole.
    pub fn error(&self, field: &str, value: &str, what: impl Into<String>) -> InputError {
        InputError::new(&self.name, self.last_line, field, value, what)
    }
}

/// Reads a map of any known format.
///
/// # Errors
/// The first thing that is wrong, by file, line, field and value.
pub fn read(mut source: Source) -> Result<MemoryMap, InputError> {
    let name = source.name().to_string();
    let mut lines = Vec::new();
    while let Some(line) = source.next_lossy()? {
        lines.push((source.line(), line));
        if lines.len() > MAX_MAP_LINES {
            return Err(source.error(
                "lines",
                &lines.len().to_string(),
                format!("more than {MAX_MAP_LINES} lines"),
            ));
        }
    }
    let last_line = source.line();
    if lines.iter().all(|(_, l)| l.trim().is_empty()) {
        return Err(InputError::new(
            name,
            last_line,
            "file",
            "",
            "is empty: no memory map in it",
        ));
    }
    let mut map = if lines.iter().any(|(_, l)| l.contains(e820::MARK)) {
        refuse_cut_end(&name, &lines, source.terminated())?;
        read_e820(&name, &lines)?
    } else if lines
        .iter()
        .any(|(_, l)| iomem::looks_like(l) || l.contains("System RAM"))
    {
        let mut map = bare(&name, Format::Iomem);
        map.entries = iomem::parse(&name, &lines)?;
        map
    } else {
        refuse_cut_end(&name, &lines, source.terminated())?;
        let (line, text) = lines
            .iter()
            .find(|(_, l)| !l.trim().is_empty())
            .expect("a line with text was found above");
        return Err(InputError::new(
            name,
            *line,
            "format",
            text.trim(),
            "no memory map: neither a BIOS-e820: line nor a line of /proc/iomem in the file",
        ));
    };
    map.last_line = last_line;
    check(&mut map)?;
    Ok(map)
}

fn bare(name: &str, format: Format) -> MemoryMap {
    MemoryMap {
        name: name.into(),
        format,
        entries: Vec::new(),
        nodes: Vec::new(),
        linux: LinuxNotes::default(),
        remarks: Vec::new(),
        last_line: 0,
    }
}

/// A file whose last line breaks off inside the mark of an entry was cut: silence would lose a range.
fn refuse_cut_end(
    name: &str,
    lines: &[(usize, String)],
    terminated: bool,
) -> Result<(), InputError> {
    if let (false, Some((number, line))) = (terminated, lines.last()) {
        let word = line.rsplit(char::is_whitespace).next().unwrap_or("");
        if word.len() >= 3 && word.len() < e820::MARK.len() && e820::MARK.starts_with(word) {
            return Err(InputError::new(
                name,
                *number,
                "line",
                line.as_str(),
                "the file is cut off inside a BIOS-e820: line",
            ));
        }
    }
    Ok(())
}

fn read_e820(name: &str, lines: &[(usize, String)]) -> Result<MemoryMap, InputError> {
    let mut map = bare(name, Format::E820);
    // Lists of entries and of node ranges, one pair per printing of the firmware's map (I6).
    let mut edits = Vec::new();
    let mut lists: Vec<(Vec<Entry>, Vec<NodeRange>)> = vec![(Vec::new(), Vec::new())];
    for (number, line) in lines {
        let at = At {
            file: name,
            line: *number,
        };
        if line.starts_with('#') {
            map.linux.comment(line);
            continue;
        }
        let list = lists.last_mut().expect("there is always a list");
        if let Some(entry) = e820::parse(at, line)? {
            let again = list
                .0
                .first()
                .is_some_and(|f| (f.base, f.len, f.kind) == (entry.base, entry.len, entry.kind));
            if again {
                lists.push((vec![entry], Vec::new()));
            } else {
                list.0.push(entry);
            }
            if lists.last().is_some_and(|l| l.0.len() > MAX_ENTRIES) {
                return Err(at.error(
                    "entries",
                    &(MAX_ENTRIES + 1).to_string(),
                    format!("more than {MAX_ENTRIES} ranges in one map"),
                ));
            }
        } else if let Some(range) = srat::parse(at, line)? {
            list.1.push(range);
        } else if let Some((first, last)) = e820::edit(line) {
            edits.push((*number, first, last));
        } else if line.contains("BIOS-provided physical RAM map") && !list.0.is_empty() {
            lists.push((Vec::new(), Vec::new()));
        } else {
            map.linux.log_line(line);
        }
    }
    let longest = lists.iter().map(|l| l.0.len()).max().unwrap_or(0);
    let chosen = lists
        .iter()
        .position(|l| l.0.len() == longest)
        .expect("there is always a list");
    if lists.len() > 1 {
        map.remarks.push(format!(
            "the map is printed {} times, number {} counts",
            lists.len(),
            chosen + 1
        ));
    }
    // A log may give the nodes in another printing than the one that counts.
    let nodes = if lists[chosen].1.is_empty() {
        lists.iter().position(|l| !l.1.is_empty()).unwrap_or(chosen)
    } else {
        chosen
    };
    map.nodes = core::mem::take(&mut lists[nodes].1);
    map.entries = core::mem::take(&mut lists[chosen].0);
    let usable = map.usable();
    let taking = edits.iter().find(|(_, first, last)| {
        usable
            .iter()
            .any(|(base, end)| (*first).max(*base).max(0x1000) <= (*last).min(end - 1))
    });
    if let (Some((line, first, last)), false) = (taking, map.linux.is_empty()) {
        map.remarks.push(format!(
            "line {line}: Linux took {first:#x}-{last:#x} out of its copy of the map: its page counts are not compared"
        ));
        map.linux = LinuxNotes::default();
    }
    Ok(map)
}

fn check(map: &mut MemoryMap) -> Result<(), InputError> {
    let name = map.name.clone();
    if map.entries.len() > MAX_ENTRIES {
        let n = map.entries.len().to_string();
        return Err(map.error(
            "entries",
            &n,
            format!("more than {MAX_ENTRIES} ranges in one map"),
        ));
    }
    for e in &map.entries {
        if e.last() >> ADDRESS_BITS != 0 {
            let value = format!("{:#x}", e.last());
            return Err(InputError::new(
                name,
                e.line,
                "end",
                value,
                "lies beyond the 52 bits of a physical address",
            ));
        }
    }
    for (i, b) in map.entries.iter().enumerate() {
        for a in &map.entries[..i] {
            if !a.overlaps(b) {
                continue;
            }
            if (a.base, a.len) == (b.base, b.len) && a.kind != b.kind {
                let what = format!(
                    "contradicts line {}, which gives the same range as {}",
                    a.line, a.kind
                );
                return Err(InputError::new(
                    name,
                    b.line,
                    "kind",
                    b.kind.to_string(),
                    what,
                ));
            }
            let winner = a.kind.max(b.kind);
            map.remarks.push(format!(
                "line {}: {:#x}-{:#x} overlaps line {}: {winner} wins where they meet",
                b.line,
                b.base,
                b.last(),
                a.line
            ));
        }
    }
    check_nodes(map)?;
    if map.usable().is_empty() {
        return Err(map.error("usable", "0 bytes", "no usable memory in the map"));
    }
    Ok(())
}

fn check_nodes(map: &mut MemoryMap) -> Result<(), InputError> {
    // A log that was taken twice repeats the very same lines.
    let mut kept: Vec<NodeRange> = Vec::new();
    for b in &map.nodes {
        if b.last() >> ADDRESS_BITS != 0 {
            let value = format!("{:#x}", b.last());
            return Err(InputError::new(
                &map.name,
                b.line,
                "end",
                value,
                "lies beyond the 52 bits of a physical address",
            ));
        }
        if kept
            .iter()
            .any(|a| (a.base, a.len, a.node) == (b.base, b.len, b.node))
        {
            continue;
        }
        if let Some(a) = kept
            .iter()
            .find(|a| a.node != b.node && a.base <= b.last() && b.base <= a.last())
        {
            let what = format!(
                "the range overlaps that of node {} in line {}: a page has one node",
                a.node, a.line
            );
            return Err(InputError::new(
                &map.name,
                b.line,
                "node",
                b.node.to_string(),
                what,
            ));
        }
        kept.push(*b);
    }
    map.nodes = kept;
    if map.nodes.is_empty() {
        return Ok(());
    }
    for (base, end) in map.usable() {
        let covered: u64 = map
            .nodes
            .iter()
            .map(|n| (n.last() + 1).min(end).saturating_sub(n.base.max(base)))
            .sum();
        if covered < end - base {
            map.remarks.push(format!(
                "{} bytes of the usable range {base:#x}-{:#x} belong to no node; node 0 takes them",
                end - base - covered,
                end - 1
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Result<MemoryMap, String> {
        read(Source::text("m", text)).map_err(|e| e.to_string())
    }

    #[test]
    fn a_boot_log_with_noise_gives_the_list_alone() {
        let m = of("[    0.000000] Linux version 6.1\n\
                    [    0.000000] BIOS-provided physical RAM map:\n\
                    [    0.000000] BIOS-e820: [mem 0x0000000000000000-0x000000000009fbff] usable\n\
                    kernel: printk: console [ttyS0]\n\
                    [    0.000000] BIOS-e820: [mem 0x0000000000100000-0x0000000003ffffff] usable\n\
                    [    0.000000] e820: update [mem 0x00000000-0x00000fff] usable ==> reserved\n\
                    [    0.000000] e820: remove [mem 0x000a0000-0x000fffff] usable\n")
        .unwrap();
        assert_eq!(m.entries.len(), 2);
        assert_eq!(m.usable_bytes(), 0x9fc00 + 0x3f0_0000);
        assert_eq!(m.node_numbers(), [0]);
    }

    #[test]
    fn the_first_of_two_printings_counts() {
        let one =
            "BIOS-e820: [mem 0x0-0x9ffff] usable\nBIOS-e820: [mem 0x100000-0x3ffffff] usable\n";
        let m = of(&format!("{one}noise\n{one}")).unwrap();
        assert_eq!(m.entries.iter().map(|e| e.line).collect::<Vec<_>>(), [1, 2]);
        let headed = format!("BIOS-provided physical RAM map:\n{one}");
        let other = headed.replace("0x3ffffff", "0x7ffffff");
        let m = of(&format!("{headed}{other}")).unwrap();
        assert_eq!(m.entries[1].len, 0x3f0_0000);
    }

    #[test]
    fn a_repeated_first_line_does_not_swallow_the_list() {
        let m = of("BIOS-e820: [mem 0x0-0x9ffff] usable\nBIOS-e820: [mem 0x0-0x9ffff] usable\nBIOS-e820: [mem 0x100000-0x3ffffff] usable\n").unwrap();
        assert_eq!(m.entries.len(), 2);
    }

    #[test]
    fn overlaps_are_resolved_and_said() {
        let m = of(
            "BIOS-e820: [mem 0x0-0x3ffffff] usable\nBIOS-e820: [mem 0x100000-0x1fffff] reserved\n",
        )
        .unwrap();
        assert_eq!(m.usable(), [(0, 0x10_0000), (0x20_0000, 0x400_0000)]);
        assert_eq!(m.remarks.len(), 1);
        assert!(m.remarks[0].contains("reserved wins"));
    }

    #[test]
    fn contradictions_are_errors() {
        let e =
            of("BIOS-e820: [mem 0x0-0x3ffffff] usable\nBIOS-e820: [mem 0x0-0x3ffffff] reserved\n")
                .unwrap_err();
        assert!(
            e.starts_with("m:2: kind: reserved: contradicts line 1"),
            "{e}"
        );
        let e = of("BIOS-e820: [mem 0x0-0x3ffffff] usable\nSRAT: Node 0 PXM 0 [mem 0x0-0x1ffffff]\nSRAT: Node 1 PXM 1 [mem 0x1000000-0x3ffffff]\n").unwrap_err();
        assert!(e.starts_with("m:3: node: 1: "), "{e}");
    }

    #[test]
    fn unsorted_and_holes_are_legal_beyond_52_bits_is_not() {
        let text = "BIOS-e820: [mem 0x4000000000-0x40ffffffff] usable\nBIOS-e820: [mem 0x0-0x3ffffff] usable\n";
        assert_eq!(of(text).unwrap().usable()[0], (0, 0x400_0000));
        assert!(of("BIOS-e820: [mem 0x0-0xfffffffffffff] usable\n").is_ok());
        let e = of("BIOS-e820: [mem 0x0-0x10000000000000] usable\n").unwrap_err();
        assert!(e.contains("52 bits"), "{e}");
    }

    #[test]
    fn files_without_a_map_are_refused() {
        for (text, what) in [
            ("", "is empty"),
            ("\n \n", "is empty"),
            ("the quick brown fox\n", "no memory map"),
            ("BIOS-e820: [mem 0x0-0xfff] reserved\n", "no usable memory"),
            (
                "BIOS-e820: [mem 0x0-0x3ffffff] usable\n[0.0] BIOS-e8",
                "cut off",
            ),
            ("[0.0] BIOS-e8", "cut off"),
        ] {
            let e = of(text).unwrap_err();
            assert!(e.contains(what), "{text:?}: {e}");
        }
    }

    #[test]
    fn page_counts_of_another_map_are_not_compared() {
        let text = "BIOS-e820: [mem 0x0-0x3ffffff] usable\ne820: update [mem 0x0-0xfff] usable ==> reserved\n\
                    On node 0 totalpages: 16383\n";
        assert_eq!(of(text).unwrap().linux.totals, [(0, 16383)]);
        let edited = of(&text.replace("[mem 0x0-0xfff]", "[mem 0x2000000-0x3ffffff]")).unwrap();
        assert!(edited.linux.is_empty());
        assert!(edited.remarks[0].contains("not compared"));
        assert_eq!(edited.usable_bytes(), 64 << 20);
    }

    #[test]
    fn memory_without_a_node_is_said() {
        let m =
            of("BIOS-e820: [mem 0x0-0x3ffffff] usable\nSRAT: Node 1 PXM 1 [mem 0x0-0x1ffffff]\n")
                .unwrap();
        assert_eq!(m.node_numbers(), [1]);
        assert!(
            m.remarks[0].contains("node 0 takes them"),
            "{:?}",
            m.remarks
        );
    }
}
