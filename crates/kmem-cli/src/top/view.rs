//! One picture of the machine: figures only, no allocator is asked while drawing.

use crate::output::units::{bytes, grouped};
use ratatui::Frame;
use ratatui::backend::TestBackend;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::widgets::{Block, Cell, Gauge, Paragraph, Row, Table};

/// The number of block orders that are shown: 0 to 10.
pub const ORDERS: usize = 11;

/// One zone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ZoneRow {
    /// `Node 0 DMA32`.
    pub name: String,
    /// Present pages.
    pub present: u64,
    /// Free pages.
    pub free: u64,
    /// Free blocks by order.
    pub blocks: [u64; ORDERS],
}

/// One object cache.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SlabRow {
    /// The cache's name.
    pub name: String,
    /// Objects in use.
    pub active: u64,
    /// Objects that its slabs hold.
    pub total: u64,
    /// Bytes an object.
    pub size: u64,
    /// Slabs.
    pub slabs: u64,
    /// Bytes of its slabs.
    pub bytes: u64,
}

/// One picture.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct View {
    /// The machine and what runs on it.
    pub title: String,
    /// Managed bytes.
    pub total: u64,
    /// Free bytes.
    pub free: u64,
    /// One line of figures each: calls, faults, address space.
    pub lines: Vec<String>,
    /// The zones.
    pub zones: Vec<ZoneRow>,
    /// The object caches, largest first.
    pub slabs: Vec<SlabRow>,
}

impl View {
    /// Draws the picture on the whole frame.
    pub fn draw(&self, frame: &mut Frame<'_>, running: bool) {
        let zones = u16::try_from(self.zones.len())
            .unwrap_or(u16::MAX)
            .saturating_add(3)
            .min(12);
        let lines = u16::try_from(self.lines.len()).unwrap_or(u16::MAX).min(8);
        let [head, gauge, text, zone, slab] = Layout::vertical([
            Constraint::Length(1),
            Constraint::Length(3),
            Constraint::Length(lines),
            Constraint::Length(zones),
            Constraint::Min(4),
        ])
        .areas(frame.area());
        let state = if running {
            "running, q leaves"
        } else {
            "done, q leaves"
        };
        let bold = Style::default().add_modifier(Modifier::BOLD);
        frame.render_widget(
            Paragraph::new(format!("kmem top - {} ({state})", self.title)).style(bold),
            head,
        );
        self.draw_gauge(frame, gauge);
        frame.render_widget(Paragraph::new(self.lines.join("\n")), text);
        self.draw_zones(frame, zone);
        self.draw_slabs(frame, slab);
    }

    fn draw_gauge(&self, frame: &mut Frame<'_>, area: Rect) {
        let used = self.total.saturating_sub(self.free);
        let percent = if self.total == 0 {
            0
        } else {
            (used as u128 * 100 / self.total as u128).min(100) as u16
        };
        let label = format!("{} of {} in use", bytes(used), bytes(self.total));
        let gauge = Gauge::default()
            .block(Block::bordered().title("memory"))
            .gauge_style(Style::default().fg(Color::Cyan))
            .label(label)
            .percent(percent);
        frame.render_widget(gauge, area);
    }

    fn draw_zones(&self, frame: &mut Frame<'_>, area: Rect) {
        let mut head = vec!["zone".to_string(), "present".into(), "free".into()];
        head.extend((0..ORDERS).map(|o| o.to_string()));
        let rows = self.zones.iter().map(|z| {
            let mut cells = vec![z.name.clone(), grouped(z.present), grouped(z.free)];
            cells.extend(z.blocks.iter().map(u64::to_string));
            Row::new(cells.into_iter().map(Cell::from))
        });
        let mut widths = vec![
            Constraint::Length(16),
            Constraint::Length(11),
            Constraint::Length(11),
        ];
        widths.extend([Constraint::Length(6); ORDERS]);
        frame.render_widget(
            table(rows, widths, head, "zones: free blocks by order"),
            area,
        );
    }

    fn draw_slabs(&self, frame: &mut Frame<'_>, area: Rect) {
        let head = ["cache", "active", "objects", "size", "slabs", "memory"]
            .map(String::from)
            .to_vec();
        let rows = self.slabs.iter().map(|s| {
            Row::new([
                s.name.clone(),
                grouped(s.active),
                grouped(s.total),
                s.size.to_string(),
                s.slabs.to_string(),
                bytes(s.bytes),
            ])
        });
        let mut widths = vec![Constraint::Length(24)];
        widths.extend([Constraint::Length(12); 5]);
        frame.render_widget(table(rows, widths, head, "object caches"), area);
    }

    /// Draws the picture as plain text of a width.
    pub fn text(&self, width: u16) -> String {
        let rows = self.zones.len().min(9) + self.lines.len() + self.slabs.len() + 12;
        let backend = TestBackend::new(width, u16::try_from(rows).unwrap_or(200).min(200));
        let Ok(mut terminal) = ratatui::Terminal::new(backend);
        let Ok(_) = terminal.draw(|f| self.draw(f, false));
        let buffer = terminal.backend().buffer();
        let mut out = String::new();
        for y in 0..buffer.area.height {
            let line: String = (0..buffer.area.width)
                .map(|x| buffer[(x, y)].symbol())
                .collect();
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out
    }
}

fn table<'a>(
    rows: impl Iterator<Item = Row<'a>>,
    widths: Vec<Constraint>,
    head: Vec<String>,
    title: &'a str,
) -> Table<'a> {
    Table::new(rows, widths)
        .header(Row::new(head).style(Style::default().add_modifier(Modifier::REVERSED)))
        .block(Block::bordered().title(title))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_holds_all_figures() {
        let view = View {
            title: "qemu-q35-64m, ls".into(),
            total: 64 << 20,
            free: 16 << 20,
            lines: vec!["calls 1 234".into()],
            zones: vec![ZoneRow {
                name: "Node 0 DMA".into(),
                present: 3998,
                free: 3000,
                blocks: [7; ORDERS],
            }],
            slabs: vec![SlabRow {
                name: "vm_area".into(),
                active: 11,
                total: 31,
                size: 128,
                slabs: 1,
                bytes: 4096,
            }],
        };
        let text = view.text(120);
        for part in [
            "qemu-q35-64m, ls",
            "48 MiB of 64 MiB in use",
            "calls 1 234",
            "Node 0 DMA",
            "3 998",
            "vm_area",
            "4 KiB",
        ] {
            assert!(text.contains(part), "{part} is missing in\n{text}");
        }
    }

    #[test]
    fn nothing_at_all_is_a_picture_too() {
        assert!(View::default().text(80).contains("0 B of 0 B"));
        assert!(!View::default().text(10).is_empty());
    }
}
