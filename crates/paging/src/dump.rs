//! A page table as text, for people.
//!
//! One line for each run of leaves: pages, frames, size, rights, memory type, the bits that are set.
//!
//! ```text
//! x86-64, four levels: root 0x3f, 4 tables
//!   0x0000000000400000-0x0000000000402000  frame 0x40    4K  r-xu-  WB A-
//!   0x0000000000600000-0x0000000000800000  frame 0x200   2M  rw-u-  WB AD
//! ```
//!
//! Or as a graph in Graphviz's language, which `dot -Tsvg` draws: a box for each table, an arrow for each entry that
//! points to one, and how many leaves and payloads it has.

use core::fmt;

use kmem_hal::{Frame, FrameHandle, Grace, PAGE_SIZE, Page, PageRange};

use crate::attributes::{Leaf, MemoryType, Rights};
use crate::cursor::Run;
use crate::env::Env;
use crate::format::{Format, Kind, level};
use crate::node::View;
use crate::table::{MAX_LEVELS, PageTable};

/// Shows a page table; see [`PageTable::dump`].
pub struct Dump<'t, F: Format, E: Env, H: FrameHandle> {
    table: &'t PageTable<F, E, H>,
}

impl<F: Format, E: Env, H: FrameHandle> PageTable<F, E, H> {
    /// The table as text, a line for each run of leaves. Takes the locks of the tables, one at a time.
    ///
    /// # Examples
    ///
    /// ```
    /// # mod example { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/example.rs")); }
    /// # use example::*;
    /// let table = mapped(pages(0x400, 3));
    /// let text = table.dump().to_string();
    /// assert!(text.starts_with("x86-64, four levels: root "));
    /// assert!(text.contains("0x0000000000400000-0x0000000000403000  frame 0x100400"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "ptdump")]
    #[must_use]
    pub fn dump(&self) -> Dump<'_, F, E, H> {
        Dump { table: self }
    }
}

impl<F: Format, E: Env, H: FrameHandle> fmt::Display for Dump<'_, F, E, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let table = self.table;
        writeln!(
            f,
            "{}: root {}, {} tables",
            F::NAME,
            table.root_frame(),
            table.table_count()
        )?;
        let canonical = F::canonical(table.levels());
        let lower = PageRange::new(Page::ZERO, Page::containing(canonical.lower_end()));
        let upper = canonical
            .upper_start()
            .and_then(|start| PageRange::new(Page::containing(start), Page::MAX));
        for half in [lower, upper].into_iter().flatten() {
            let Some(own) = table.own_part(half) else {
                continue;
            };
            let Ok(mut cursor) = table.cursor(own) else {
                continue;
            };
            while let Some(run) = cursor.next_run() {
                match run {
                    Run::Absent(_) => {}
                    Run::Payload(page, payload) => writeln!(
                        f,
                        "  {:#018x}  payload {:#x}",
                        page.start().as_u64(),
                        payload.number()
                    )?,
                    Run::Leaves { range, first } => line(f, range, &first)?,
                }
            }
        }
        Ok(())
    }
}

fn line(f: &mut fmt::Formatter<'_>, range: PageRange, leaf: &Leaf) -> fmt::Result {
    let start = range.start().as_u64();
    // The end of the last page of the space does not fit: it is shown as all ones would be followed.
    let end = u128::from(start) + u128::from(range.count()) * u128::from(PAGE_SIZE);
    let kib = leaf.order.bytes() >> 10;
    let (size, unit) = match kib {
        0x10_0000.. => (kib >> 20, 'G'),
        0x400.. => (kib >> 10, 'M'),
        _ => (kib, 'K'),
    };
    let attributes = &leaf.attributes;
    let flag = |right, letter| {
        if attributes.rights.contains(right) {
            letter
        } else {
            '-'
        }
    };
    write!(
        f,
        "  {start:#018x}-{end:#018x}  frame {:<#10x} {size:>4}{unit}  {}{}{}{}{}  {} {}{}",
        leaf.frame.number(),
        flag(Rights::READ, 'r'),
        flag(Rights::WRITE, 'w'),
        flag(Rights::EXECUTE, 'x'),
        flag(Rights::USER, 'u'),
        flag(Rights::GLOBAL, 'g'),
        match attributes.memory_type {
            MemoryType::WriteBack => "WB",
            MemoryType::WriteThrough => "WT",
            MemoryType::Uncached => "UC",
            MemoryType::WriteCombining => "WC",
        },
        if attributes.accessed { 'A' } else { '-' },
        if attributes.dirty { 'D' } else { '-' },
    )?;
    if attributes.soft.bits() != 0 {
        write!(f, " soft {:#b}", attributes.soft.bits())?;
    }
    if attributes.pkey != 0 {
        write!(f, " key {}", attributes.pkey)?;
    }
    writeln!(f)
}

impl<F: Format, E: Env, H: FrameHandle> fmt::Debug for Dump<'_, F, E, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Dump({:?})", self.table)
    }
}

/// Draws a page table; see [`PageTable::graph`].
pub struct Graph<'t, F: Format, E: Env, H: FrameHandle> {
    table: &'t PageTable<F, E, H>,
}

impl<F: Format, E: Env, H: FrameHandle> PageTable<F, E, H> {
    /// The tables as a graph for Graphviz (`dot -Tsvg`), those of a shared upper part included. Takes no lock; what changes
    /// meanwhile is drawn as it was or as it is.
    ///
    /// # Examples
    ///
    /// ```
    /// # mod example { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/example.rs")); }
    /// # use example::*;
    /// let table = mapped(pages(0x400, 3));
    /// assert!(table.graph().to_string().starts_with("digraph"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn graph(&self) -> Graph<'_, F, E, H> {
        Graph { table: self }
    }
}

impl<F: Format, E: Env, H: FrameHandle> fmt::Display for Graph<'_, F, E, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let env = self.table.env();
        let top = self.table.levels();
        writeln!(f, "digraph \"{}\" {{", F::NAME)?;
        writeln!(f, "  rankdir=LR; node [shape=box, fontname=monospace];")?;
        let _reading = env.grace().read();
        // Where the walk stands, by level: the table, its next entry, its leaves and payloads so far.
        let mut frames = [Frame::ZERO; MAX_LEVELS + 1];
        let mut counts = [(0usize, 0u32, 0u32); MAX_LEVELS + 1];
        let mut number = top;
        frames[top] = self.table.root_frame();
        loop {
            // SAFETY: the root is attached, and a table that an entry pointed to during this read section stays one.
            let view = unsafe { View::<F>::new(env, frames[number], number) };
            let (index, leaves, payloads) = counts[number];
            if index == level::<F>(number).entries() {
                writeln!(
                    f,
                    "  t{:x} [label=\"level {number}\\nframe {:#x}\\n{leaves} leaves, {payloads} payloads\"];",
                    frames[number].number(),
                    frames[number].number(),
                )?;
                if number == top {
                    return writeln!(f, "}}");
                }
                number += 1;
                continue;
            }
            counts[number].0 += 1;
            let word = view.load(index);
            match F::kind(number, word) {
                Kind::Empty => {}
                Kind::Leaf => counts[number].1 += 1,
                Kind::Payload => counts[number].2 += 1,
                Kind::Table => {
                    let below = F::table_frame(word);
                    writeln!(
                        f,
                        "  t{:x} -> t{:x} [label=\"{index:#x}\"];",
                        frames[number].number(),
                        below.number()
                    )?;
                    number -= 1;
                    frames[number] = below;
                    counts[number] = (0, 0, 0);
                }
            }
        }
    }
}

impl<F: Format, E: Env, H: FrameHandle> fmt::Debug for Graph<'_, F, E, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Graph({:?})", self.table)
    }
}
