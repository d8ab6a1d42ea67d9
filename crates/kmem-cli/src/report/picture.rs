//! Physical memory as a picture: a row a node (or a range), cut into cells that are coloured by what is in them.
//!
//! ```text
//!   node 0   |DMA|--- DMA32 ----|  hole  |------------- Normal -------------|
//!            |###|#...|.........|        |....#....|....|....|....|....|....|
//! ```
//! A cell stands for equally many bytes in its row. Its colour mixes white (all of it free) with the zone's colour (all in
//! use), and is never lighter than a tint where anything is in use; holes are hatched grey. The numbers are those that the caller counted: nothing is estimated here.

use super::escape;
use crate::output::units::bytes;
use core::fmt::Write;

/// What a cell of a row stands for, in pages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cell {
    /// Pages that are free.
    pub free: u64,
    /// Pages that are in use.
    pub used: u64,
    /// Pages that are not memory.
    pub absent: u64,
}

/// A part of a row with a name: a zone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// The name.
    pub name: String,
    /// The first address.
    pub start: u64,
    /// The address behind the last.
    pub end: u64,
}

/// A row of the picture.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Row {
    /// What stands before the row.
    pub label: String,
    /// The first address.
    pub start: u64,
    /// The address behind the last.
    pub end: u64,
    /// Zones, ascending.
    pub spans: Vec<Span>,
    /// Cells, all of the same length.
    pub cells: Vec<Cell>,
}

/// The whole picture.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Picture {
    /// The rows from top to bottom.
    pub rows: Vec<Row>,
}

const LEFT: f64 = 90.0;
const WIDTH: f64 = 1000.0;
const ROW: f64 = 74.0;
const CELLS_TOP: f64 = 22.0;
const CELLS_HEIGHT: f64 = 30.0;
/// How much colour a cell gets in which anything at all is in use.
const LEAST_TINT: f64 = 0.2;

/// Hues of zones, far enough apart to be told apart without colour vision by their lightness in use.
fn colour(zone: &str) -> (u8, u8, u8) {
    match zone {
        "DMA" => (0xc0, 0x39, 0x2b),
        "DMA32" => (0xd3, 0x8b, 0x0c),
        "Normal" => (0x1f, 0x5f, 0xa8),
        "HighMem" => (0x6c, 0x3c, 0x97),
        _ => (0x2c, 0x7a, 0x4b),
    }
}

impl Picture {
    /// Draws the picture as an SVG document.
    pub fn svg(&self) -> String {
        let height = ROW * self.rows.len() as f64 + 40.0;
        let width = LEFT + WIDTH + 20.0;
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
             height=\"{height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
             <defs><pattern id=\"hole\" width=\"6\" height=\"6\" patternUnits=\"userSpaceOnUse\">\
             <path d=\"M0 6L6 0\" stroke=\"#bbb\"/></pattern></defs>\n\
             <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n"
        );
        for (i, row) in self.rows.iter().enumerate() {
            row.draw(&mut out, i as f64 * ROW + 10.0);
        }
        let y = height - 12.0;
        let _ = writeln!(
            out,
            "<text x=\"{LEFT}\" y=\"{y}\" fill=\"#555\">white: free, full colour: in use, hatched: no memory</text>"
        );
        out.push_str("</svg>\n");
        out
    }
}

impl Row {
    fn draw(&self, out: &mut String, top: f64) {
        let span = (self.end - self.start).max(1) as f64;
        let x = |address: u64| {
            LEFT + (address.clamp(self.start, self.end) - self.start) as f64 / span * WIDTH
        };
        let middle = top + CELLS_TOP + CELLS_HEIGHT / 2.0 + 4.0;
        let _ = writeln!(
            out,
            "<text x=\"4\" y=\"{middle}\">{}</text>",
            escape(&self.label)
        );
        let step = WIDTH / self.cells.len().max(1) as f64;
        let y = top + CELLS_TOP;
        for (i, cell) in self.cells.iter().enumerate() {
            let left = LEFT + i as f64 * step;
            let total = cell.free + cell.used + cell.absent;
            let middle = self.start + ((i as f64 + 0.5) / self.cells.len() as f64 * span) as u64;
            let zone = self
                .spans
                .iter()
                .find(|s| s.start <= middle && middle < s.end);
            let fill = if cell.free + cell.used == 0 {
                "url(#hole)".to_string()
            } else {
                let (r, g, b) = colour(zone.map_or("", |z| z.name.as_str()));
                let share = cell.used as f64 / (cell.free + cell.used) as f64;
                let share = if cell.used > 0 {
                    share.max(LEAST_TINT)
                } else {
                    0.0
                };
                let mix = |c: u8| (255.0 - (255.0 - f64::from(c)) * share).round() as u8;
                format!("#{:02x}{:02x}{:02x}", mix(r), mix(g), mix(b))
            };
            let _ = writeln!(
                out,
                "<rect x=\"{left:.2}\" y=\"{y}\" width=\"{step:.2}\" height=\"{CELLS_HEIGHT}\" fill=\"{fill}\">\
                 <title>{} pages: {} free, {} in use, {} absent</title></rect>",
                total, cell.free, cell.used, cell.absent
            );
        }
        let _ = writeln!(
            out,
            "<rect x=\"{LEFT}\" y=\"{y}\" width=\"{WIDTH}\" height=\"{CELLS_HEIGHT}\" fill=\"none\" stroke=\"#333\"/>"
        );
        for zone in &self.spans {
            let (a, b) = (x(zone.start), x(zone.end));
            let (r, g, blue) = colour(&zone.name);
            let bar = top + CELLS_TOP - 5.0;
            let _ = writeln!(
                out,
                "<rect x=\"{a:.2}\" y=\"{bar}\" width=\"{:.2}\" height=\"4\" fill=\"#{r:02x}{g:02x}{blue:02x}\"/>",
                (b - a).max(1.0)
            );
            if b - a > 40.0 {
                let text = top + CELLS_TOP - 8.0;
                let _ = writeln!(
                    out,
                    "<text x=\"{a:.2}\" y=\"{text}\">{}</text>",
                    escape(&zone.name)
                );
            }
        }
        let below = y + CELLS_HEIGHT + 13.0;
        let _ = writeln!(
            out,
            "<text x=\"{LEFT}\" y=\"{below}\" fill=\"#555\">{:#x}</text>\
             <text x=\"{:.2}\" y=\"{below}\" fill=\"#555\" text-anchor=\"end\">{:#x} ({})</text>",
            self.start,
            LEFT + WIDTH,
            self.end - 1,
            bytes(self.end - self.start)
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture() -> Picture {
        let cells = vec![
            Cell {
                free: 100,
                used: 0,
                absent: 0,
            },
            Cell {
                free: 0,
                used: 100,
                absent: 0,
            },
            Cell {
                free: 0,
                used: 0,
                absent: 100,
            },
        ];
        let spans = vec![Span {
            name: "DMA".into(),
            start: 0,
            end: 0x30_0000,
        }];
        Picture {
            rows: vec![Row {
                label: "node <0>".into(),
                start: 0,
                end: 0x30_0000,
                spans,
                cells,
            }],
        }
    }

    #[test]
    fn colours_say_what_is_where() {
        let svg = picture().svg();
        assert!(svg.contains("fill=\"#ffffff\""), "a free cell is white");
        assert!(
            svg.contains("fill=\"#c0392b\""),
            "a used cell has its zone's colour"
        );
        assert!(svg.contains("url(#hole)"), "absent memory is hatched");
        assert!(svg.contains("node &lt;0&gt;"));
        assert_eq!(svg.matches("<svg").count(), svg.matches("</svg>").count());
        assert_eq!(svg.matches("<text").count(), svg.matches("</text>").count());
    }

    #[test]
    fn an_empty_picture_is_a_picture() {
        assert!(Picture::default().svg().starts_with("<svg"));
        let row = Row::default();
        let mut out = String::new();
        Row { end: 1, ..row }.draw(&mut out, 0.0);
        assert!(out.contains("<rect"));
    }
}
