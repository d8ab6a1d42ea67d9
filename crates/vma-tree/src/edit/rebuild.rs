//! The edit that changes more than one leaf, or how many leaves there are.

use kmem_hal::{AllocError, ObjectAlloc, Page};

use super::sweep::Old;
use super::{Cut, Pieces};
use crate::list::List;
use crate::node::{Child, Coding, Node, NodePtr, Raw, saturate, to_word};
use crate::path::{MAX_HEIGHT, Path};
use crate::stock::Sharing;
use crate::tree::RangeTree;
use crate::value::{Entry, Value};

/// Old leaves give at most 15 + 15 ranges, and 3 pieces of which two are parts of old ranges.
const RANGES: usize = 32;
/// Old parents give at most 12 + 12 children beside at most 3 new ones.
const CHILDREN: usize = 28;
/// New nodes a level, and the nodes drawn in.
const GROUPS: usize = 3;

/// How a row of ranges is cut into leaves: sizes, and how each is written.
type Groups = List<(u8, Coding), GROUPS>;

/// The nodes taken for an edit; given back unless the edit goes through.
struct Taken<'t, V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> {
    tree: &'t RangeTree<V, A, S, W>,
    nodes: List<NodePtr<W>, { GROUPS * MAX_HEIGHT }>,
    used: bool,
}

impl<'t, V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> Taken<'t, V, A, S, W> {
    fn take(&mut self) -> Result<NodePtr<W>, AllocError> {
        if self.nodes.len() == GROUPS * MAX_HEIGHT {
            return Err(AllocError::Unsatisfiable);
        }
        let node = self.tree.stock.take(&self.tree.alloc)?;
        self.nodes.push(node);
        Ok(node)
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> Drop for Taken<'_, V, A, S, W> {
    fn drop(&mut self) {
        if !self.used {
            for &node in self.nodes.iter() {
                self.tree.stock.give(node);
            }
        }
    }
}

/// What the rebuilding of a level draws in beside the nodes on the two paths.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Drawn {
    #[default]
    Nothing,
    /// The neighbour below the left node.
    Below,
    /// The neighbour above the right node.
    Above,
}

/// New nodes of one level.
struct Row<const W: usize> {
    children: List<Child<W>, GROUPS>,
    drawn: Drawn,
    /// Whether a descending series of new ranges is what split them: nodes above are split for it too.
    descends: bool,
}

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> RangeTree<V, A, S, W> {
    /// Replaces the ranges from `left`'s leaf and slot up to (not including) `right`'s by `pieces`.
    #[inline(never)]
    pub(super) fn rebuild(
        &self,
        left: (&Path<W>, usize),
        right: (&Path<W>, usize),
        pieces: &Pieces,
        cut: &Cut,
        removed: &mut dyn FnMut(Entry<V>),
    ) -> Result<(), AllocError> {
        let (before, after) = (left.0, right.0);
        let height = before.height();
        let mut taken = Taken {
            tree: self,
            nodes: List::new(),
            used: false,
        };
        let mut drawn = [Drawn::Nothing; MAX_HEIGHT];
        let (mut row, end) = self.leaf_row(left, right, pieces, cut, &mut taken)?;
        drawn[0] = row.drawn;
        // The leaf above what was rebuilt has a larger gap below it now.
        let stale = match row.children.last() {
            Some(last) if last.last == end => None,
            _ => Some(end),
        };

        let mut level = 1;
        while level < height {
            let same = before.pointer(level) == after.pointer(level)
                && before.slot(level) == after.slot(level);
            if same && row.drawn == Drawn::Nothing && row.children.len() == 1 {
                break;
            }
            row = self.inner_row(level, (before, after), &row, &mut taken)?;
            drawn[level] = row.drawn;
            level += 1;
        }
        let top = level;
        if level < height {
            let child = row.children[0];
            let old_high = after.bounds(level - 1).1;
            self.publish(before, level, child.node);
            if child.last < old_high {
                self.move_boundary(after, level, child.last);
            }
            before.record_gap(level, child.gap);
        } else {
            // The root itself was rebuilt: none, one or more nodes are left.
            let mut levels = height;
            while row.children.len() > 1 {
                if levels == MAX_HEIGHT {
                    return Err(AllocError::Unsatisfiable);
                }
                let mut all = List::<Child<W>, GROUPS>::new();
                all.extend(&row.children);
                row = Row {
                    children: self.write_inners(&all, (Shape::Even, 0), &mut taken)?,
                    drawn: Drawn::Nothing,
                    descends: false,
                };
                levels += 1;
            }
            self.begin_edit();
            match row.children.first() {
                Some(root) => self.set_root(to_word(root.node) | levels as u64),
                None => self.set_root(0),
            }
        }
        taken.used = true;
        drop(taken);
        let old = Old {
            tree: self,
            before,
            after,
            top,
            drawn: &drawn,
        };
        self.count_edit(pieces.len(), old.ranges(left.1, right.1));
        if level == height {
            self.drop_lone_roots();
        }
        if let Some(end) = stale {
            self.refresh_gap((end + 1).min(Page::MAX.number()));
        }
        if end == Page::MAX.number() {
            self.measure_top();
        }
        old.show(cut, removed);
        drop(old);
        self.stock.trim(&self.alloc);
        Ok(())
    }

    /// The new leaves, and the last page that the old ones answered for.
    fn leaf_row(
        &self,
        (before, from): (&Path<W>, usize),
        (after, to): (&Path<W>, usize),
        pieces: &Pieces,
        cut: &Cut,
        taken: &mut Taken<'_, V, A, S, W>,
    ) -> Result<(Row<W>, u64), AllocError> {
        let (left, right) = (before.leaf(), after.leaf());
        let own = from + pieces.len() + right.count() - to;
        // Too few ranges for a leaf are joined with the neighbour above, or below where there is none.
        let mut drawn = Drawn::Nothing;
        if own > 0 && own < Node::<W>::LEAF_LOW && before.height() > 1 {
            if after.slot(1) + 1 < after.node(1).children() {
                drawn = Drawn::Above;
            } else if before.slot(1) > 0 {
                drawn = Drawn::Below;
            }
        }
        let (mut low, mut high) = (before.low(), after.high());
        let mut all = List::<Raw, RANGES>::new();
        if drawn == Drawn::Below {
            all.extend_leaf(before.node(1), before.slot(1) - 1);
        }
        let start_of_own = all.len();
        for slot in 0..from {
            all.push(left.raw(slot));
        }
        all.extend(pieces);
        for slot in to..right.count() {
            all.push(right.raw(slot));
        }
        if drawn == Drawn::Above {
            all.extend_leaf(after.node(1), after.slot(1) + 1);
        }
        let mut ranges = &all[..];
        if drawn != Drawn::Nothing {
            let (mut new_low, mut new_high) = (low, high);
            if drawn == Drawn::Above {
                let slot = after.slot(1) + 1;
                new_high = after.node(1).last_of(slot, after.bounds(1).1);
            } else {
                let slot = before.slot(1) - 1;
                new_low = before.node(1).first_of(slot, before.bounds(1).0);
            }
            if plan::<W>(ranges, new_low, Shape::Even, None).is_some_and(|plan| plan.len() <= 2) {
                (low, high) = (new_low, new_high);
            } else {
                ranges = &all[start_of_own..start_of_own + own];
                drawn = Drawn::Nothing;
            }
        }
        // An ascending or descending series of new ranges leaves nearly full leaves behind.
        let inserted = drawn == Drawn::Nothing && pieces.len() == 1;
        let shape = if inserted && to == right.count() && before.is_last() {
            Shape::LowFull
        } else if inserted && from == 0 {
            Shape::HighFull
        } else {
            Shape::Even
        };
        let lower = usize::from(pieces.first().is_some_and(|piece| piece.first < cut.first));
        let start = from + lower;
        let parts = (start, start + usize::from(cut.value.is_some()));
        let parts = (drawn == Drawn::Nothing).then_some(parts);
        let groups = plan::<W>(ranges, low, shape, parts).ok_or(AllocError::Unsatisfiable)?;
        let mut children = List::new();
        let (mut rest, mut from_page) = (ranges, low);
        for &(size, coding) in groups.iter() {
            let (group, others) = rest.split_at(usize::from(size));
            rest = others;
            let node = taken.take()?;
            // SAFETY: the node is ours until it is published.
            let leaf = unsafe { node.as_ref() };
            leaf.write_leaf(coding, group);
            let is_last = rest.is_empty() && high == Page::MAX.number();
            let last = match group.last() {
                Some(raw) if !is_last => raw.last,
                _ => high,
            };
            children.push(Child {
                node,
                last,
                gap: saturate(leaf.leaf().largest_gap(from_page)),
            });
            from_page = last.wrapping_add(1);
        }
        let descends = shape == Shape::HighFull && children.len() > 1;
        let row = Row {
            children,
            drawn,
            descends,
        };
        Ok((row, high))
    }

    /// The new nodes of `level`, whose children from one path to the other are replaced by `below`.
    fn inner_row(
        &self,
        level: usize,
        (before, after): (&Path<W>, &Path<W>),
        below: &Row<W>,
        taken: &mut Taken<'_, V, A, S, W>,
    ) -> Result<Row<W>, AllocError> {
        let mut all = List::<Child<W>, CHILDREN>::new();
        let (left, right) = (before.node(level), after.node(level));
        let high = after.bounds(level).1;
        let start = before.slot(level) - usize::from(below.drawn == Drawn::Below);
        let end = after.slot(level) + 1 + usize::from(below.drawn == Drawn::Above);
        let own = start + below.children.len() + right.children() - end;
        // Too few children for a node are joined with the neighbour above, or below where there is none.
        let mut drawn = Drawn::Nothing;
        if own > 0 && own < Node::<W>::INNER_LOW && level + 1 < before.height() {
            if after.slot(level + 1) + 1 < after.node(level + 1).children() {
                drawn = Drawn::Above;
            } else if before.slot(level + 1) > 0 {
                drawn = Drawn::Below;
            }
        }
        if drawn == Drawn::Below {
            let (parent, slot) = (before.node(level + 1), before.slot(level + 1) - 1);
            all.extend_node(parent, slot, parent.last_of(slot, high));
        }
        // `last_of` is asked only of children that are not the last of their node.
        all.extend_children(left, 0..start, high);
        for &child in below.children.iter() {
            all.push(child);
        }
        all.extend_children(right, end..right.children(), high);
        if drawn == Drawn::Above {
            let (parent, slot) = (after.node(level + 1), after.slot(level + 1) + 1);
            let top = parent.last_of(slot, after.bounds(level + 1).1);
            all.extend_node(parent, slot, top);
        }
        let descends = below.descends && drawn == Drawn::Nothing;
        let shape = if end == right.children() && high == Page::MAX.number() {
            Shape::LowFull
        } else if descends {
            Shape::HighFull
        } else {
            Shape::Even
        };
        let children = self.write_inners(&all, (shape, start), taken)?;
        let descends = descends && children.len() > 1;
        Ok(Row {
            children,
            drawn,
            descends,
        })
    }

    /// Writes a row of children into as few nodes as hold them. What is new begins with child `at`.
    fn write_inners(
        &self,
        all: &[Child<W>],
        (shape, at): (Shape, usize),
        taken: &mut Taken<'_, V, A, S, W>,
    ) -> Result<List<Child<W>, GROUPS>, AllocError> {
        let mut nodes = List::new();
        let full = Node::<W>::CHILDREN;
        let count = all.len().div_ceil(full);
        let mut rest = all;
        for left in (1..=count).rev() {
            let even = rest.len().div_ceil(left);
            let size = match shape {
                Shape::LowFull if left > 1 => full.min(rest.len() - 1).max(even),
                // What lies below the series is left behind; from then on a lone child is, in which it goes on.
                Shape::HighFull if count == 2 && left > 1 => at.clamp(rest.len() - full, full),
                _ => even,
            };
            let (group, others) = rest.split_at(size);
            rest = others;
            let Some(last) = group.last() else {
                continue;
            };
            let node = taken.take()?;
            // SAFETY: the node is ours until it is published.
            unsafe { node.as_ref() }.write_inner(group);
            nodes.push(Child {
                node,
                last: last.last,
                gap: group.iter().map(|child| child.gap).max().unwrap_or(0),
            });
        }
        Ok(nodes)
    }

    /// Takes roots with a single child away.
    pub(crate) fn drop_lone_roots(&self) {
        // SAFETY: E3: nobody else edits; nodes in the tree are alive.
        while let Some(path) = unsafe { Path::<W>::new(self.root_word(), 0) } {
            let level = path.height() - 1;
            if level == 0 || path.node(level).children() != 1 {
                return;
            }
            self.set_root(to_word(path.pointer(level - 1)) | level as u64);
            self.retire(path.pointer(level));
        }
    }
}

impl<const N: usize> List<Raw, N> {
    fn extend_leaf<const W: usize>(&mut self, parent: &Node<W>, slot: usize) {
        if let Some(node) = parent.child(slot) {
            // SAFETY: N4: a child of a node in the tree is alive.
            let leaf = unsafe { node.as_ref() }.leaf();
            for slot in 0..leaf.count() {
                self.push(leaf.raw(slot));
            }
        }
    }
}

impl<const W: usize, const N: usize> List<Child<W>, N> {
    /// Pushes all children of child `slot` of `parent`, which ends with page `top`.
    fn extend_node(&mut self, parent: &Node<W>, slot: usize, top: u64) {
        if let Some(node) = parent.child(slot) {
            // SAFETY: N4: a child of a node in the tree is alive.
            let node = unsafe { node.as_ref() };
            self.extend_children(node, 0..node.children(), top);
        }
    }

    fn extend_children(&mut self, node: &Node<W>, slots: core::ops::Range<usize>, top: u64) {
        for slot in slots {
            if let Some(child) = node.describe(slot, top) {
                self.push(child);
            }
        }
    }
}

/// Which node of a split is left nearly full.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    Even,
    LowFull,
    HighFull,
}

/// How `ranges` are cut into leaves, the first of which begins at `low`.
///
/// `parts` says where the new range of an edit begins and ends: what is left of each old leaf can always be written as
/// a leaf, since it was part of one, so three leaves always do.
fn plan<const W: usize>(
    ranges: &[Raw],
    low: u64,
    shape: Shape,
    parts: Option<(usize, usize)>,
) -> Option<Groups> {
    let full = Node::<W>::RANGES;
    let least = ranges.len().div_ceil(full);
    for count in least..=GROUPS {
        let mut sizes = List::<usize, GROUPS>::new();
        let mut rest = ranges.len();
        for left in (1..=count).rev() {
            let even = rest.div_ceil(left);
            let size = if left == 1 || count > 2 || least < count {
                even
            } else {
                match shape {
                    Shape::Even => even,
                    Shape::LowFull => even.max((full - full / 8).min(rest - 1)),
                    Shape::HighFull => even.min(rest.saturating_sub(full - full / 8).max(1)),
                }
            };
            sizes.push(size);
            rest -= size;
        }
        if let Some(groups) = codings::<W>(ranges, low, &sizes) {
            return Some(groups);
        }
    }
    let (start, end) = parts?;
    codings::<W>(ranges, low, &[start, end - start, ranges.len() - end])
}

/// How each group is written; `None` if one is too many ranges, or too far apart and too long.
fn codings<const W: usize>(ranges: &[Raw], mut low: u64, sizes: &[usize]) -> Option<Groups> {
    let mut groups = Groups::new();
    let mut rest = ranges;
    for &size in sizes {
        if size > Node::<W>::RANGES {
            return None;
        }
        let (group, others) = rest.split_at(size);
        rest = others;
        if let Some(last) = group.last() {
            groups.push((size as u8, Coding::choose(low, group)?));
            low = last.last.wrapping_add(1);
        }
    }
    Some(groups)
}
