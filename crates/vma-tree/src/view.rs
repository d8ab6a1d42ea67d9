//! Looking at a tree: its nodes as text, its layout and its nodes as a picture.
//!
//! Everything is a `Display`, so it goes to a console, a file or a string; nothing allocates. The pictures are SVG for a
//! browser or a report.

use core::fmt;

use kmem_hal::{ObjectAlloc, PageRange};

use crate::check::TreeStats;
use crate::node::Node;
use crate::stock::{Exclusive, Sharing};
use crate::tree::RangeTree;
use crate::value::Value;

/// The nodes of a tree, one line each, with what they answer for and their gaps. Made by [`RangeTree::dump`].
pub struct Dump<'a, V: Value, A: ObjectAlloc<Node<W>>, S: Sharing = Exclusive, const W: usize = 32>
{
    tree: &'a RangeTree<V, A, S, W>,
}

/// A picture of the pages: ranges and holes. Made by [`RangeTree::layout_svg`].
pub struct LayoutSvg<
    'a,
    V: Value,
    A: ObjectAlloc<Node<W>>,
    S: Sharing = Exclusive,
    const W: usize = 32,
> {
    tree: &'a RangeTree<V, A, S, W>,
    pages: PageRange,
}

/// A picture of the nodes. Made by [`RangeTree::nodes_svg`].
pub struct NodesSvg<
    'a,
    V: Value,
    A: ObjectAlloc<Node<W>>,
    S: Sharing = Exclusive,
    const W: usize = 32,
> {
    tree: &'a RangeTree<V, A, S, W>,
}

/// Width of a picture, in its own units.
const WIDTH: u64 = 1000;
/// Levels of nodes, drawn this far apart.
const STEP: usize = 40;

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> RangeTree<V, A, S, W> {
    /// The nodes as text: what each answers for, and the largest gap there as its parent has it on record (the free pages
    /// above the last range are on record nowhere).
    ///
    /// # Examples
    ///
    /// ```
    /// use kmem_hal::{FixedPool, Page, PageRange};
    /// use kmem_vma_tree::{Node, RangeTree};
    ///
    /// let nodes = FixedPool::<Node, 4>::new();
    /// let mut tree: RangeTree<u8, _> = RangeTree::new_in(&nodes);
    /// tree.store(PageRange::with_count(Page::new(16).unwrap(), 4).unwrap(), Some(9), &mut |_| ())?;
    /// assert_eq!(
    ///     tree.dump().to_string(),
    ///     "leaf  0x0..=0xfffffffffffff ranges=1 gap=0x10\n  0x10..=0x13 -> 0x9\n",
    /// );
    /// # Ok::<(), kmem_hal::AllocError>(())
    /// ```
    #[must_use]
    #[doc(alias = "mt_dump")]
    pub fn dump(&self) -> Dump<'_, V, A, S, W> {
        Dump { tree: self }
    }

    /// A picture of the ranges inside `pages`, drawn to scale.
    #[must_use]
    pub fn layout_svg(&self, pages: PageRange) -> LayoutSvg<'_, V, A, S, W> {
        LayoutSvg { tree: self, pages }
    }

    /// A picture of the nodes, a row a level, each as wide as its share of the leaves.
    #[must_use]
    pub fn nodes_svg(&self) -> NodesSvg<'_, V, A, S, W> {
        NodesSvg { tree: self }
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> fmt::Display
    for Dump<'_, V, A, S, W>
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let top = self.tree.height().saturating_sub(1);
        self.tree.walk(&mut |at| {
            let indent = 2 * (top - at.level);
            if at.level > 0 {
                return writeln!(
                    f,
                    "{:indent$}inner {:#x}..={:#x} children={} gap={:#x}",
                    "",
                    at.low,
                    at.high,
                    at.node.children(),
                    at.node.largest_child_gap(),
                );
            }
            let leaf = at.node.leaf();
            let gap = leaf.largest_gap(at.low);
            writeln!(
                f,
                "{:indent$}leaf  {:#x}..={:#x} ranges={} gap={gap:#x}",
                "",
                at.low,
                at.high,
                leaf.count(),
            )?;
            (0..leaf.count()).try_for_each(|slot| {
                let raw = leaf.raw(slot);
                let (first, last, value) = (raw.first, raw.last, raw.value);
                writeln!(f, "{:indent$}  {first:#x}..={last:#x} -> {value:#x}", "")
            })
        })
    }
}

/// The place of `page` in a picture of `pages`.
fn place(page: u64, pages: PageRange) -> u64 {
    let offset = u128::from(page.saturating_sub(pages.first().number()));
    let place = offset * u128::from(WIDTH) / u128::from(pages.count());
    u64::try_from(place).unwrap_or(WIDTH).min(WIDTH)
}

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> fmt::Display
    for LayoutSvg<'_, V, A, S, W>
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pages = self.pages;
        writeln!(
            f,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} 60\" font-family=\"monospace\">"
        )?;
        writeln!(f, "<rect width=\"{WIDTH}\" height=\"30\" fill=\"#eee\"/>")?;
        for entry in self.tree.range(pages) {
            let Some(inside) = entry.clipped(pages) else {
                continue;
            };
            let left = place(inside.first().number(), pages);
            let right = place(inside.last().number() + 1, pages);
            let word = inside.value.to_word();
            writeln!(
                f,
                "<rect x=\"{left}\" width=\"{}\" height=\"30\" fill=\"hsl({},60%,55%)\"><title>{:#x}..={:#x} {word:#x}</title></rect>",
                (right - left).max(1),
                word.wrapping_mul(0x9e37_79b9) % 360,
                entry.first().number(),
                entry.last().number(),
            )?;
        }
        writeln!(
            f,
            "<text y=\"50\" font-size=\"14\">{:#x}</text><text x=\"{WIDTH}\" y=\"50\" font-size=\"14\" text-anchor=\"end\">{:#x}</text></svg>",
            pages.first().number(),
            pages.last().number(),
        )
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> fmt::Display
    for NodesSvg<'_, V, A, S, W>
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stats = self.tree.stats();
        let height = stats.height * STEP;
        writeln!(
            f,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"monospace\">"
        )?;
        for level in 0..stats.height {
            self.row(f, &stats, level)?;
        }
        writeln!(f, "</svg>")
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> NodesSvg<'_, V, A, S, W> {
    /// Draws the nodes of a level: each from where the leaves below those before it end, to where its own do.
    fn row(&self, f: &mut fmt::Formatter<'_>, stats: &TreeStats, level: usize) -> fmt::Result {
        let all = (stats.leaves as u64).max(1);
        let top = (stats.height - 1 - level) * STEP;
        let is_leaf = level == 0;
        let of = if is_leaf {
            Node::<W>::RANGES
        } else {
            Node::<W>::CHILDREN
        };
        let what = if is_leaf { "ranges" } else { "children" };
        // The node that is not drawn yet, since its leaves are still counted.
        let mut open = None;
        let mut leaves = 0_u64;
        let mut draw = |open: Option<(u64, usize, u64, u64)>, leaves: u64| {
            let Some((before, count, low, high)) = open else {
                return Ok(());
            };
            let (left, right) = (before * WIDTH / all, leaves * WIDTH / all);
            writeln!(
                f,
                "<rect x=\"{left}\" y=\"{top}\" width=\"{}\" height=\"{}\" fill=\"hsl({},60%,60%)\" stroke=\"#fff\"><title>{low:#x}..={high:#x} {count} of {of} {what}</title></rect>",
                (right - left).max(2),
                STEP - 10,
                120 * count / of,
            )
        };
        self.tree.walk(&mut |at| {
            if at.level == level {
                let count = if is_leaf {
                    at.node.leaf().count()
                } else {
                    at.node.children()
                };
                draw(open.replace((leaves, count, at.low, at.high)), leaves)?;
            }
            leaves += u64::from(at.level == 0);
            Ok(())
        })?;
        draw(open, leaves)
    }
}
