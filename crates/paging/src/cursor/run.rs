//! Reading a range as runs: what is mapped, entry by entry, joined where it continues.

use kmem_hal::{FrameHandle, Page, PageRange};

use super::Cursor;
use crate::attributes::{Leaf, Payload};
use crate::env::Env;
use crate::format::{Format, Kind, level};
use crate::quiescent::Liveness;
use crate::table::{Entry, decode, index_at, seen_from};

/// A run of pages with one kind of content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Run {
    /// Nothing is mapped.
    Absent(PageRange),
    /// One page with a payload.
    Payload(Page, Payload),
    /// Leaves of one size that follow each other in frames as well, with the same attributes. Inside one table page; a
    /// leaf that reaches beyond the cursor's range is shown whole.
    Leaves {
        /// The pages.
        range: PageRange,
        /// The first leaf.
        first: Leaf,
    },
}

impl Run {
    /// The pages of the run.
    #[must_use]
    pub fn range(&self) -> PageRange {
        match *self {
            Self::Absent(range) | Self::Leaves { range, .. } => range,
            Self::Payload(page, _) => PageRange::single(page),
        }
    }
}

impl<F: Format, E: Env, H: FrameHandle, S: Liveness> Cursor<'_, F, E, H, S> {
    /// The next run of the cursor's range; `None` at its end.
    ///
    /// Holes are given whole, however many tables they span.
    ///
    /// # Examples
    ///
    /// ```
    /// # mod example { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/example.rs")); }
    /// # use example::*;
    /// use kmem_paging::Run;
    ///
    /// // Frames in a row are one run; holes are one, whatever their size.
    /// let table = mapped(pages(0x400, 3));
    /// let mut cursor = table.cursor(pages(0x3fe, 0x1000))?;
    /// assert_eq!(cursor.next_run(), Some(Run::Absent(pages(0x3fe, 2))));
    /// assert_eq!(cursor.next_run().map(|run| run.range()), Some(pages(0x400, 3)));
    /// assert_eq!(cursor.next_run().map(|run| run.range().count()), Some(0xffb));
    /// assert_eq!(cursor.next_run(), None);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn next_run(&mut self) -> Option<Run> {
        let start = self.position?;
        let last = self.range.last().number();
        let mut page = start.number();
        let run = loop {
            let node = self.seek(Page::from_number(page), 1);
            let covered = 1u64 << level::<F>(node.level).shift;
            let entries = level::<F>(node.level).entries();
            let mut index = index_at::<F>(page, node.level);
            let found = loop {
                let word = node.load(index);
                let first = page & !(covered - 1);
                match node.kind(word) {
                    Kind::Empty => {}
                    Kind::Table => break None,
                    kind => break Some((kind, word, first)),
                }
                if last - first < covered {
                    // The hole reaches the end of the range.
                    self.position = None;
                    return Some(Run::Absent(PageRange::new(start, self.range.last())?));
                }
                page = first + covered;
                index += 1;
                if index == entries {
                    break None;
                }
            };
            let Some((kind, word, first)) = found else {
                continue;
            };
            if page > start.number() {
                break Run::Absent(PageRange::new(start, Page::from_number(page - 1))?);
            }
            if kind == Kind::Payload {
                break Run::Payload(start, F::payload_of(word));
            }
            let Entry::Leaf(leaf) = seen_from(
                decode::<F>(Page::from_number(first), node.level, word),
                self.shared,
            ) else {
                unreachable!("the kind is that of a leaf")
            };
            let mut end = leaf.range().last().number();
            let mut frames = covered;
            while index + 1 < entries && end < last {
                index += 1;
                let next = Page::from_number(end + 1);
                let Entry::Leaf(other) =
                    seen_from(decode::<F>(next, node.level, node.load(index)), self.shared)
                else {
                    break;
                };
                if other.attributes != leaf.attributes
                    || Some(other.frame) != leaf.frame.checked_add(frames)
                {
                    break;
                }
                end += covered;
                frames += covered;
            }
            break Run::Leaves {
                range: PageRange::new(leaf.page, Page::from_number(end))?,
                first: leaf,
            };
        };
        let end = run.range().last().number();
        self.position = if end >= last {
            None
        } else {
            Page::new(end + 1)
        };
        Some(run)
    }

    /// Goes to `page`, where [`next_run`](Self::next_run) continues; pages outside the range end it.
    pub fn move_to(&mut self, page: Page) {
        self.position = self.range.contains(page).then_some(page);
    }
}
