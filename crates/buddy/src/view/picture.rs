//! A picture of physical memory: what is free, what is taken, what is whose.
//!
//! ```text
//!   Node 0, zone   Normal: 512 frames a cell
//!   0x000000200000 ======47#####..........................................
//! ```
//!
//! A cell is a power of two of frames, at least a page block; cells end where zones and holes do. Each is counted under its zone's
//! lock, so that no call waits for more than one cell's words; the picture as a whole is of no single instant.

use core::fmt;

use kmem_hal::{Frame, FrameRange, NodeId, RawLock};

use super::{Look, managed_in};
use crate::zone::bits::{BLOCK_FRAMES, WORDS};
use crate::zone::core::Core;
use crate::zone::kind::{MigrateType, ZoneKind};
use crate::zone::segment::Segment;

/// Cells of a line.
const COLUMNS: u64 = 64;
/// The most cells of a picture, unless asked for more.
const CELLS: u64 = 2048;

/// A run of frames of one zone and how it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PictureCell {
    /// The frames; all of them are memory.
    pub range: FrameRange,
    /// The zone's node.
    pub node: NodeId,
    /// The zone's kind.
    pub kind: ZoneKind,
    /// The migrate type of the first page block.
    pub migrate: MigrateType,
    /// Frames that are the allocator's; the others are reserved, or not mapped yet.
    pub managed: u64,
    /// Frames that are free, those in CPUs' caches not among them.
    pub free: u64,
}

impl PictureCell {
    /// Which part of the allocator's frames is not free, in thousandths; `None` where none is the allocator's.
    #[must_use]
    pub fn taken(&self) -> Option<u32> {
        let taken = self.managed.saturating_sub(self.free) * 1000;
        Some(taken.checked_div(self.managed)? as u32)
    }

    /// `.` all free, `1` to `9` tenths taken, `#` all taken, `=` not the allocator's.
    #[must_use]
    pub fn glyph(&self) -> char {
        match self.taken() {
            None => '=',
            Some(0) => '.',
            Some(1000) => '#',
            Some(taken) => char::from(b'0' + (taken / 100).clamp(1, 9) as u8),
        }
    }
}

/// Physical memory in cells: text by `Display`, a drawing by [`svg`](Self::svg), data by [`cells`](Self::cells).
pub struct Picture<'a, L: 'static> {
    look: Option<Look<'a, L>>,
    cell: u64,
}

impl<'a, L: RawLock> Picture<'a, L> {
    pub(super) fn new(look: Option<Look<'a, L>>) -> Self {
        let picture = Self {
            look,
            cell: BLOCK_FRAMES,
        };
        picture.at_most(CELLS)
    }

    /// With at most about `cells` cells, and at least one for each run of memory.
    #[must_use]
    pub fn at_most(self, cells: u64) -> Self {
        let segments = self.look.into_iter().flat_map(|look| look.state.segments);
        let present: u64 = segments.map(|segment| segment.end - segment.first).sum();
        let cell = present.div_ceil(cells.max(1)).max(BLOCK_FRAMES);
        Self {
            cell: cell.next_power_of_two(),
            ..self
        }
    }

    /// Frames in a whole cell.
    #[must_use]
    pub fn frames_per_cell(&self) -> u64 {
        self.cell
    }

    /// The cells by address.
    pub fn cells(&self) -> impl Iterator<Item = PictureCell> + use<'a, L> {
        let (look, cell) = (self.look, self.cell);
        look.into_iter().flat_map(move |look| {
            look.state.segments.iter().flat_map(move |segment| {
                let first = segment.first & !(cell - 1);
                (first..segment.end)
                    .step_by(cell as usize)
                    .filter_map(move |at| count(look, segment, at, at + cell))
            })
        })
    }

    /// The picture as an SVG document: a square a cell, its colour the type and how much is taken.
    #[must_use]
    pub fn svg(&self) -> Svg<'_, L> {
        Svg(self)
    }
}

fn count<L: RawLock>(
    look: Look<'_, L>,
    segment: &'static Segment,
    first: u64,
    end: u64,
) -> Option<PictureCell> {
    let zone = look.state.zones.get(segment.zone as usize)?;
    let (first, end) = (first.max(segment.first), end.min(segment.end));
    let (free, migrate) = look.at(zone, |core| {
        let free = free_between(core, segment, first, end);
        Some((free, core.type_of(segment.block_of(first))))
    })?;
    Some(PictureCell {
        range: FrameRange::from_numbers(first, end)?,
        node: zone.node,
        kind: zone.kind,
        migrate,
        managed: managed_in(look.state, zone.kind, first, end),
        free,
    })
}

/// Free frames of `first..end`, which lie in `segment`.
fn free_between(core: &Core, segment: &Segment, first: u64, end: u64) -> u64 {
    let mut count = 0;
    let mut at = first;
    while at < end {
        let stop = end.min((at | 63) + 1);
        let word = core.words[segment.block_of(at) * WORDS + (at % BLOCK_FRAMES) as usize / 64];
        count += u64::from((word >> (at % 64) << (64 - (stop - at))).count_ones());
        at = stop;
    }
    count
}

/// Whether `next` starts a new line of the text: another zone, a hole before it, or a full line.
fn breaks(line: u64, before: Option<&PictureCell>, next: &PictureCell) -> bool {
    line == COLUMNS
        || before.is_none_or(|before| {
            before.range.end_number() != next.range.first().number()
                || (before.node, before.kind) != (next.node, next.kind)
        })
}

impl<L: RawLock> fmt::Display for Picture<'_, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut before: Option<PictureCell> = None;
        let mut line = 0;
        for cell in self.cells() {
            if breaks(line, before.as_ref(), &cell) {
                if before.is_some() {
                    writeln!(f)?;
                }
                if before.is_none_or(|b| (b.node, b.kind) != (cell.node, cell.kind)) {
                    let (node, kind) = (cell.node, cell.kind);
                    writeln!(
                        f,
                        "Node {node}, zone {kind:>8}: {} frames a cell",
                        self.cell
                    )?;
                }
                write!(f, "{:#014x} ", cell.range.first().start().as_u64())?;
                line = 0;
            }
            write!(f, "{}", cell.glyph())?;
            line += 1;
            before = Some(cell);
        }
        if before.is_some() {
            writeln!(f)?;
        }
        Ok(())
    }
}

/// A [`Picture`] as an SVG document.
pub struct Svg<'a, L: 'static>(&'a Picture<'a, L>);

/// The colours of a wholly free and a wholly taken cell.
const fn colours(migrate: MigrateType) -> ([u32; 3], [u32; 3]) {
    match migrate {
        MigrateType::Unmovable => ([0xfb, 0xe3, 0xe0], [0xb0, 0x2a, 0x1e]),
        MigrateType::Movable => ([0xe2, 0xef, 0xe4], [0x1f, 0x7a, 0x3a]),
        MigrateType::Reclaimable => ([0xe2, 0xea, 0xf6], [0x1f, 0x55, 0xa5]),
        MigrateType::HighAtomic => ([0xf3, 0xe6, 0xf6], [0x7b, 0x2a, 0x90]),
        MigrateType::Cma => ([0xfb, 0xf1, 0xd8], [0xb0, 0x78, 0x0a]),
        MigrateType::Isolate => ([0xee, 0xee, 0xee], [0x44, 0x44, 0x44]),
    }
}

const RESERVED: [u32; 3] = [0x88, 0x88, 0x88];
const SIZE: u64 = 10;
const LEFT: u64 = 120;
const LINE: u64 = 12;

impl<L: RawLock> Svg<'_, L> {
    /// Calls `text(y, node, kind)` for each zone's heading, `row(y, address)` for each line and `cell(x, y, cell)` for each cell; the
    /// height of all.
    fn place(
        &self,
        mut text: impl FnMut(u64, NodeId, ZoneKind) -> fmt::Result,
        mut cell: impl FnMut(u64, u64, Option<Frame>, &PictureCell) -> fmt::Result,
    ) -> Result<u64, fmt::Error> {
        let mut before: Option<PictureCell> = None;
        let (mut line, mut y) = (0, 0);
        for next in self.0.cells() {
            let mut start = None;
            if breaks(line, before.as_ref(), &next) {
                y += LINE;
                if before.is_none_or(|b| (b.node, b.kind) != (next.node, next.kind)) {
                    y += LINE;
                    text(y, next.node, next.kind)?;
                    y += LINE / 2;
                }
                line = 0;
                start = Some(next.range.first());
            }
            cell(LEFT + line * SIZE, y, start, &next)?;
            line += 1;
            before = Some(next);
        }
        Ok(y + 2 * LINE)
    }
}

impl<L: RawLock> fmt::Display for Svg<'_, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = LEFT + COLUMNS * SIZE + SIZE;
        let height = self.place(|_, _, _| Ok(()), |_, _, _, _| Ok(()))? + 2 * LINE;
        writeln!(
            f,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"monospace\" font-size=\"9\">"
        )?;
        let out = core::cell::RefCell::new(&mut *f);
        self.place(
            |y, node, kind| {
                writeln!(
                    out.borrow_mut(),
                    "<text x=\"4\" y=\"{y}\" font-weight=\"bold\">Node {node}, zone {kind}: {} frames a cell</text>",
                    self.0.cell
                )
            },
            |x, y, start, cell| {
                let mut f = out.borrow_mut();
                if let Some(first) = start {
                    let (base, at) = (first.start().as_u64(), y + SIZE - 2);
                    writeln!(f, "<text x=\"4\" y=\"{at}\">{base:#014x}</text>")?;
                }
                let [red, green, blue] = match cell.taken() {
                    None => RESERVED,
                    Some(taken) => {
                        let (free, full) = colours(cell.migrate);
                        core::array::from_fn(|at| (free[at] * (1000 - taken) + full[at] * taken) / 1000)
                    }
                };
                writeln!(
                    f,
                    "<rect x=\"{x}\" y=\"{y}\" width=\"{0}\" height=\"{0}\" fill=\"#{red:02x}{green:02x}{blue:02x}\"><title>{1}: {2} of {3} free, {4}</title></rect>",
                    SIZE - 1,
                    cell.range.first(),
                    cell.free,
                    cell.managed,
                    cell.migrate,
                )
            },
        )?;
        let y = height - LINE;
        for (at, migrate) in MigrateType::ALL.into_iter().enumerate() {
            let x = LEFT + at as u64 * 90;
            let (_, [red, green, blue]) = colours(migrate);
            writeln!(
                f,
                "<rect x=\"{x}\" y=\"{}\" width=\"9\" height=\"9\" fill=\"#{red:02x}{green:02x}{blue:02x}\"/><text x=\"{}\" y=\"{y}\">{migrate}</text>",
                y - 8,
                x + 12,
            )?;
        }
        writeln!(f, "</svg>")
    }
}

impl<L: RawLock> fmt::Debug for Picture<'_, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Picture({} frames a cell)", self.cell)
    }
}

impl<L: RawLock> fmt::Debug for Svg<'_, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Svg({:?})", self.0)
    }
}
