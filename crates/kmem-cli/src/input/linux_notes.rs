//! What Linux itself made of a memory map, where the log (or a comment in the map file) says so.
//!
//! ```text
//! # zone ranges: DMA 1000-ffffff, DMA32 1000000-ffffffff, Normal 100000000-2027ffffff
//! # node 0: 4194104 pages = DMA 3992 + DMA32 880544 + Normal 3309568; nodes 1..7: Normal 4194304 each
//! # ..; unavailable: 1 + 97 pages in DMA
//! [    0.0] Zone ranges:
//! [    0.0]   DMA32    [mem 0x0000000001000000-0x00000000ffffffff]
//! [    0.0] On node 0 totalpages: 4194104
//! [    0.0]   DMA zone: 3992 pages, LIFO batch:0
//! ```
//! Pages are present pages: usable memory that lies in the zone, whole pages only. Linux drops page 0.
//!
//! Invariants: I1: what cannot be understood is no note and never an error, since people write comments as they like.
//! I2: the first statement about a (node, zone) counts.

/// The names of zones, as Linux prints them.
const ZONES: [&str; 5] = ["DMA", "DMA32", "Normal", "HighMem", "Movable"];

/// Linux's own figures for the machine that a map came from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LinuxNotes {
    /// (zone, first byte, last byte).
    pub zone_ranges: Vec<(String, u64, u64)>,
    /// (node, zone, present pages).
    pub present: Vec<(u32, String, u64)>,
    /// (node, present pages of all its zones).
    pub totals: Vec<(u32, u64)>,
    /// (zone, pages below the zone's end that are not memory, page 0 and all below the zone's start included).
    pub unavailable: Vec<(String, u64)>,
    node: Option<u32>,
    in_ranges: bool,
}

impl LinuxNotes {
    /// Returns whether the file said anything.
    pub fn is_empty(&self) -> bool {
        self.zone_ranges.is_empty()
            && self.present.is_empty()
            && self.totals.is_empty()
            && self.unavailable.is_empty()
    }

    /// Takes what a `#` comment says.
    pub fn comment(&mut self, line: &str) {
        for clause in line.trim_start_matches('#').split(';') {
            self.ranges_of(clause);
            if let Some(rest) = clause.trim().strip_prefix("unavailable:") {
                self.unavailable_of(rest);
            } else if let Some((nodes, pages)) = nodes_of(clause) {
                self.pages_of(nodes, pages);
            }
        }
    }

    /// Takes what a line of a boot log says.
    pub fn log_line(&mut self, line: &str) {
        // A time stamp or a log prefix ends in "] " or ": ".
        let text = match line.split_once("] ") {
            Some((stamp, rest)) if stamp.contains('[') && !stamp.contains("[mem") => rest,
            _ => line,
        };
        let words: Vec<&str> = text.split_whitespace().collect();
        if text.contains("Zone ranges:") {
            self.in_ranges = true;
        } else if self.in_ranges
            && words.len() == 3
            && ZONES.contains(&words[0])
            && words[1] == "[mem"
        {
            if let Some((a, b)) = hex_range(words[2].trim_end_matches(']')) {
                self.range(words[0], a, b);
            }
        } else if let ["On", "node", node, "totalpages:", pages] = words[..] {
            self.node = node.parse().ok();
            if let (Some(node), Ok(pages)) = (self.node, pages.parse()) {
                self.total(node, pages);
            }
        } else if let [
            "On",
            "node",
            _,
            "zone",
            "DMA:",
            pages,
            "pages",
            "in",
            "unavailable",
            ..,
        ] = words[..]
        {
            // Of higher zones Linux counts holes only where they share a section with memory.
            if let Ok(pages) = pages.parse() {
                self.hole("DMA", pages);
            }
        } else if let [zone, "zone:", pages, "pages,", "LIFO", ..] = words[..] {
            if let (Some(node), Ok(pages), true) = (self.node, pages.parse(), ZONES.contains(&zone))
            {
                self.zone(node, zone, pages);
            }
        } else if !words.is_empty() {
            self.in_ranges &= words.contains(&"empty");
        }
    }

    fn range(&mut self, zone: &str, first: u64, last: u64) {
        if !self.zone_ranges.iter().any(|z| z.0 == zone) {
            self.zone_ranges.push((zone.into(), first, last));
        }
    }

    fn total(&mut self, node: u32, pages: u64) {
        if !self.totals.iter().any(|t| t.0 == node) {
            self.totals.push((node, pages));
        }
    }

    fn zone(&mut self, node: u32, zone: &str, pages: u64) {
        if !self.present.iter().any(|p| p.0 == node && p.1 == zone) {
            self.present.push((node, zone.into(), pages));
        }
    }

    fn hole(&mut self, zone: &str, pages: u64) {
        match self.unavailable.iter_mut().find(|u| u.0 == zone) {
            Some(known) => known.1 = known.1.saturating_add(pages),
            None => self.unavailable.push((zone.into(), pages)),
        }
    }

    fn ranges_of(&mut self, clause: &str) {
        let words: Vec<&str> = clause.split([' ', ',']).filter(|w| !w.is_empty()).collect();
        for pair in words.windows(2) {
            if let (true, Some((a, b))) = (ZONES.contains(&pair[0]), hex_range(pair[1])) {
                self.range(pair[0], a, b);
            }
        }
    }

    fn unavailable_of(&mut self, text: &str) {
        let mut sum = 0u64;
        let words: Vec<&str> = text.split([' ', ',']).filter(|w| !w.is_empty()).collect();
        for window in words.windows(3) {
            if let Ok(n) = window[0].parse::<u64>() {
                sum = sum.saturating_add(n);
            }
            if let ["pages", "in", zone] = window
                && ZONES.contains(zone)
            {
                self.unavailable
                    .push(((*zone).into(), core::mem::take(&mut sum)));
            }
        }
    }

    fn pages_of(&mut self, nodes: core::ops::RangeInclusive<u32>, text: &str) {
        let words: Vec<&str> = text
            .split([' ', ',', '=', '+'])
            .filter(|w| !w.is_empty())
            .collect();
        for node in nodes {
            if let [pages, "pages", ..] = words[..]
                && let Ok(pages) = pages.parse()
            {
                self.total(node, pages);
            }
            for pair in words.windows(2) {
                if let (true, Ok(pages)) = (ZONES.contains(&pair[0]), pair[1].parse()) {
                    self.zone(node, pair[0], pages);
                }
            }
        }
    }
}

/// Splits `node 0: REST` or `nodes 1..7: REST`.
fn nodes_of(clause: &str) -> Option<(core::ops::RangeInclusive<u32>, &str)> {
    let (head, rest) = clause.trim().split_once(':')?;
    if let Some(one) = head.strip_prefix("node ") {
        let n = one.trim().parse().ok()?;
        return Some((n..=n, rest));
    }
    let (a, b) = head.strip_prefix("nodes ")?.split_once("..")?;
    let (a, b): (u32, u32) = (a.trim().parse().ok()?, b.trim().parse().ok()?);
    (b < super::srat::MAX_NODES).then_some((a..=b, rest))
}

fn hex_range(text: &str) -> Option<(u64, u64)> {
    let (a, b) = text.split_once('-')?;
    let hex = |s: &str| u64::from_str_radix(s.strip_prefix("0x").unwrap_or(s), 16).ok();
    Some((hex(a)?, hex(b)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_of_the_numa_machine() {
        let mut n = LinuxNotes::default();
        n.comment(
            "# zone ranges: DMA 1000-ffffff, DMA32 1000000-ffffffff, Normal 100000000-2027ffffff",
        );
        n.comment("# node 0: 4194104 pages = DMA 3992 + DMA32 880544 + Normal 3309568; nodes 1..7: Normal 4194304 each");
        assert_eq!(
            n.zone_ranges[2],
            ("Normal".into(), 0x1_0000_0000, 0x20_27ff_ffff)
        );
        assert_eq!(n.totals, [(0, 4_194_104)]);
        assert_eq!(n.present.len(), 10);
        assert_eq!(n.present[0], (0, "DMA".into(), 3992));
        assert_eq!(n.present[9], (7, "Normal".into(), 4_194_304));
    }

    #[test]
    fn comments_of_the_micro_vm() {
        let mut n = LinuxNotes::default();
        n.comment("# What Linux made of it: DMA 1000-ffffff, DMA32 1000000-ffffffff, Normal 100000000-63fffffff; unavailable: 1 + 97 pages in DMA");
        assert_eq!(n.zone_ranges.len(), 3);
        assert_eq!(n.unavailable, [("DMA".into(), 98)]);
    }

    #[test]
    fn a_boot_log() {
        let mut n = LinuxNotes::default();
        for line in [
            "[    0.015] Zone ranges:",
            "[    0.015]   DMA      [mem 0x0000000000001000-0x0000000000ffffff]",
            "[    0.015]   DMA32    [mem 0x0000000001000000-0x00000000ffffffff]",
            "[    0.015]   Normal   empty",
            "[    0.015] Movable zone start for each node",
            "[    0.015]   DMA      [mem 0x0-0xfff]",
            "[    0.015] On node 0 totalpages: 16254",
            "[    0.015]   DMA zone: 64 pages used for memmap",
            "[    0.015]   DMA zone: 3998 pages, LIFO batch:0",
            "[    0.015]   DMA32 zone: 12256 pages, LIFO batch:3",
            "[    0.015] On node 0, zone DMA: 1 pages in unavailable ranges",
            "[    0.015] On node 0, zone DMA: 97 pages in unavailable ranges",
            "[    0.015] On node 0, zone DMA32: 8224 pages in unavailable ranges",
        ] {
            n.log_line(line);
        }
        assert_eq!(n.zone_ranges.len(), 2);
        assert_eq!(n.zone_ranges[0].1, 0x1000);
        assert_eq!(n.totals, [(0, 16254)]);
        assert_eq!(
            n.present,
            [(0, "DMA".into(), 3998), (0, "DMA32".into(), 12256)]
        );
    }

    #[test]
    fn free_text_is_no_note() {
        let mut n = LinuxNotes::default();
        n.comment("# ASUS board; node zero: DMA lots; nodes 3..99999999: DMA 1; unavailable: soon");
        n.log_line("Normal people say 5 pages");
        assert!(n.is_empty(), "{n:?}");
    }
}
