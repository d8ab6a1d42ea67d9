//! A page table as text, for people.
//!
//! One line for each run of leaves: pages, frames, size, rights, memory type, the bits that are set.
//!
//! ```text
//! x86-64, four levels: root 0x3f, 4 tables
//!   0x0000000000400000-0x0000000000402000  frame 0x40    4K  r-xu-  WB A-
//!   0x0000000000600000-0x0000000000800000  frame 0x200   2M  rw-u-  WB AD
//! ```

use core::fmt;

use kmem_hal::{FrameHandle, PAGE_SIZE, Page, PageRange};

use crate::attributes::{Leaf, MemoryType, Rights};
use crate::cursor::Run;
use crate::env::Env;
use crate::format::Format;
use crate::table::PageTable;

/// Shows a page table; see [`PageTable::dump`].
pub struct Dump<'t, F: Format, E: Env, H: FrameHandle> {
    table: &'t PageTable<F, E, H>,
}

impl<F: Format, E: Env, H: FrameHandle> PageTable<F, E, H> {
    /// The table as text, a line for each run of leaves. Takes the locks of the tables, one at a time.
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
