//! Whole trees at once: bulk build, and fork's copy.
//!
//! Ranges that come ascending fill leaf after leaf and node after node, without a search and without a split. The nodes
//! under construction are one open row of children a level; a row that is full becomes a node of the row above.
//!
//! ```text
//!   level 2   [ ..... ]                    the open rows, on the stack of nodes
//!   level 1   [ n n n ]
//!   level 0   [ r r r r r r ]  <- push
//! ```
//!
//! Leaves get 13 of 15 places, so that the first edits of the new tree stay inside. A copy takes whole leaves over as they
//! are, values aside, where they are at least half full and nothing is left out of them.

use core::fmt;

use kmem_hal::{AllocError, ObjectAlloc, Page};

use crate::edit::entry;
use crate::list::List;
use crate::node::{Child, Coding, Leaf, Node, NodePtr, Raw, saturate, to_word};
use crate::path::{MAX_HEIGHT, Path};
use crate::stock::{Exclusive, Sharing};
use crate::tree::RangeTree;
use crate::value::{Entry, Value};

/// Why a bulk build stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BuildError {
    /// No node could be had.
    Alloc(AllocError),
    /// A range does not lie above the one before it.
    Order,
}

impl fmt::Display for BuildError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Alloc(error) => error.fmt(f),
            Self::Order => f.write_str("the ranges are not ascending"),
        }
    }
}

impl core::error::Error for BuildError {}

impl From<AllocError> for BuildError {
    fn from(error: AllocError) -> Self {
        Self::Alloc(error)
    }
}

/// An open row of children: a node that is not full, and the last page of its last child.
#[derive(Clone, Copy)]
struct Open<const W: usize> {
    node: NodePtr<W>,
    last: u64,
}

/// A tree under construction. Dropping it gives its nodes back.
struct Builder<V: Value, A: ObjectAlloc<Node<W>>, const W: usize> {
    tree: RangeTree<V, A, Exclusive, W>,
    leaf: List<Raw, 15>,
    /// The first page that the open leaf answers for.
    low: u64,
    /// The open rows, by level; none at level 0.
    rows: [Option<Open<W>>; MAX_HEIGHT],
    count: usize,
}

impl<V: Value, A: ObjectAlloc<Node<W>>, const W: usize> Builder<V, A, W> {
    const FILL: usize = Node::<W>::RANGES - Node::<W>::RANGES / 7;

    fn new(alloc: A) -> Self {
        Self {
            tree: RangeTree::new_in(alloc),
            leaf: List::new(),
            low: 0,
            rows: [None; MAX_HEIGHT],
            count: 0,
        }
    }

    #[inline]
    fn push(&mut self, raw: Raw) -> Result<(), BuildError> {
        let free = self.leaf.last().map_or(self.low, |last| last.last + 1);
        if raw.first < free {
            return Err(BuildError::Order);
        }
        if self.leaf.len() >= Self::FILL {
            self.close_leaf()?;
        }
        self.leaf.push(raw);
        self.count += 1;
        Ok(())
    }

    /// Takes over a leaf with other values, by slot; `low` is the first page it answers for in its own tree, `gap` the largest gap
    /// there. `false`, and nothing is taken, where its ranges had better be pushed one by one.
    #[inline]
    fn adopt(
        &mut self,
        source: &Leaf<'_, W>,
        values: &[u64; 16],
        (low, gap): (u64, u32),
    ) -> Result<bool, BuildError> {
        let few = source.count() * 2 < Node::<W>::RANGES;
        if few || (!self.leaf.is_empty() && self.leaf.len() < Node::<W>::LEAF_LOW) {
            return Ok(false);
        }
        self.close_leaf()?;
        let node = self.tree.stock.take(&self.tree.alloc)?;
        // SAFETY: the node is ours until the tree is finished.
        let fresh = unsafe { node.as_ref() };
        fresh.copy_from(source.node());
        let leaf = fresh.leaf();
        for (slot, &value) in values.iter().enumerate().take(Node::<W>::RANGES) {
            leaf.set_value(slot, value);
        }
        let gap = if self.low == low {
            gap
        } else {
            saturate(leaf.largest_gap(self.low))
        };
        let last = leaf.end();
        self.low = last + 1;
        self.count += leaf.count();
        self.add(1, Child { node, last, gap })?;
        Ok(true)
    }

    /// Writes the open leaf; as several where its ranges are too far apart or too long to share one.
    fn close_leaf(&mut self) -> Result<(), BuildError> {
        let mut start = 0;
        while start < self.leaf.len() {
            let rest = &self.leaf[start..];
            let mut size = rest.len();
            let coding = loop {
                match Coding::choose(self.low, &rest[..size]) {
                    Some(coding) => break coding,
                    None if size > 1 => size -= 1,
                    None => return Err(AllocError::Unsatisfiable.into()),
                }
            };
            let group = &rest[..size];
            let node = self.tree.stock.take(&self.tree.alloc)?;
            // SAFETY: the node is ours until the tree is finished.
            let leaf = unsafe { node.as_ref() };
            leaf.write_leaf(coding, group);
            let gap = saturate(leaf.leaf().largest_gap(self.low));
            let last = group[size - 1].last;
            self.low = last + 1;
            start += size;
            self.add(1, Child { node, last, gap })?;
        }
        self.leaf.clear();
        Ok(())
    }

    /// Puts a finished node of `level - 1` into the open row of `level`.
    fn add(&mut self, mut level: usize, mut child: Child<W>) -> Result<(), BuildError> {
        loop {
            if level == MAX_HEIGHT {
                self.drop_nodes(level - 1, child.node);
                return Err(AllocError::Unsatisfiable.into());
            }
            if let Some(row) = &mut self.rows[level] {
                // SAFETY: the node is ours until the tree is finished.
                let inner = unsafe { row.node.as_ref() };
                if inner.children() < Node::<W>::CHILDREN {
                    inner.append_child(row.last, child);
                    row.last = child.last;
                    return Ok(());
                }
            }
            let fresh = match self.tree.stock.take(&self.tree.alloc) {
                Ok(fresh) => fresh,
                Err(error) => {
                    self.drop_nodes(level - 1, child.node);
                    return Err(error.into());
                }
            };
            // SAFETY: as above.
            unsafe { fresh.as_ref() }.write_inner(&[child]);
            let full = self.rows[level].replace(Open {
                node: fresh,
                last: child.last,
            });
            let Some(full) = full else {
                return Ok(());
            };
            // The full row goes up.
            child = Child {
                node: full.node,
                last: full.last,
                // SAFETY: as above.
                gap: unsafe { full.node.as_ref() }.largest_child_gap(),
            };
            level += 1;
        }
    }

    /// Gives back a node of `level` and what is below it.
    fn drop_nodes(&self, level: usize, node: NodePtr<W>) {
        let root = to_word(node) | (level + 1) as u64;
        // SAFETY: the nodes are ours until the tree is finished.
        let ends = unsafe { (Path::new(root, 0), Path::new(root, Page::MAX.number())) };
        if let (Some(before), Some(after)) = ends {
            self.tree.sweep_all(&before, &after);
        }
    }

    fn finish(mut self) -> Result<RangeTree<V, A, Exclusive, W>, BuildError> {
        self.close_leaf()?;
        for level in 1..MAX_HEIGHT {
            let Some(row) = self.rows[level].take() else {
                continue;
            };
            if self.rows[level + 1..].iter().all(Option::is_none) {
                self.tree.set_root(to_word(row.node) | (level + 1) as u64);
                self.tree.count_edit(self.count, 0);
                self.tree.drop_lone_roots();
                self.tree.measure_top();
                self.tree.stock.trim(&self.tree.alloc);
                break;
            }
            let child = Child {
                node: row.node,
                last: row.last,
                // SAFETY: the node is ours until the tree is finished.
                gap: unsafe { row.node.as_ref() }.largest_child_gap(),
            };
            self.add(level + 1, child)?;
        }
        let alloc_tree = core::mem::ManuallyDrop::new(self);
        // SAFETY: every row has been taken, so the builder's own drop has nothing to do, and the tree is moved out once.
        Ok(unsafe { core::ptr::read(&alloc_tree.tree) })
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, const W: usize> Drop for Builder<V, A, W> {
    fn drop(&mut self) {
        for level in 1..MAX_HEIGHT {
            if let Some(row) = self.rows[level].take() {
                self.drop_nodes(level, row.node);
            }
        }
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, const W: usize> RangeTree<V, A, Exclusive, W> {
    /// A tree of ascending entries, built without searching.
    ///
    /// # Errors
    ///
    /// [`BuildError`]: no memory, or an entry that does not lie above the one before it. Nodes taken are given back.
    ///
    /// # Examples
    ///
    /// ```
    /// use kmem_hal::{FixedPool, Page, PageRange};
    /// use kmem_vma_tree::{Entry, Node, RangeTree};
    ///
    /// let nodes = FixedPool::<Node, 16>::new();
    /// let entries = (0..100).map(|i| Entry {
    ///     range: PageRange::with_count(Page::new(i * 4).unwrap(), 3).unwrap(),
    ///     value: i,
    /// });
    /// let tree = RangeTree::<u64, _>::build_in(&nodes, entries)?;
    /// assert_eq!((tree.len(), tree.height()), (100, 2));
    /// # Ok::<(), kmem_vma_tree::BuildError>(())
    /// ```
    pub fn build_in(
        alloc: A,
        entries: impl IntoIterator<Item = Entry<V>>,
    ) -> Result<Self, BuildError> {
        let mut builder = Builder::new(alloc);
        for entry in entries {
            builder.push(Raw {
                first: entry.first().number(),
                last: entry.last().number(),
                value: entry.value.to_word(),
            })?;
        }
        builder.finish()
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> RangeTree<V, A, S, W> {
    /// A tree with what `filter` makes of each entry (`None` leaves it out): fork's copy.
    ///
    /// # Errors
    ///
    /// [`AllocError`] where there are too few nodes; those taken are given back.
    #[doc(alias = "__mt_dup")]
    #[doc(alias = "dup_mmap")]
    pub fn duplicate_in<B: ObjectAlloc<Node<W>>>(
        &self,
        alloc: B,
        filter: &mut dyn FnMut(Entry<V>) -> Option<V>,
    ) -> Result<RangeTree<V, B, Exclusive, W>, AllocError> {
        // A tree's own entries ascend.
        self.copy_into(alloc, filter).map_err(|error| match error {
            BuildError::Alloc(error) => error,
            BuildError::Order => AllocError::Unsatisfiable,
        })
    }

    fn copy_into<B: ObjectAlloc<Node<W>>>(
        &self,
        alloc: B,
        filter: &mut dyn FnMut(Entry<V>) -> Option<V>,
    ) -> Result<RangeTree<V, B, Exclusive, W>, BuildError> {
        let mut builder = Builder::new(alloc);
        let mut low = 0;
        for (leaf, gap) in self.leaves() {
            // By slot, as they will lie.
            let mut values = [0; 16];
            let (mut kept, mut all) = (0_u32, true);
            for slot in leaf.slots() {
                match filter(entry(leaf.raw_in(slot))) {
                    Some(value) => {
                        values[slot & 15] = value.to_word();
                        kept |= 1 << slot;
                    }
                    None => all = false,
                }
            }
            let adopted = all && builder.adopt(&leaf, &values, (low, gap))?;
            if !adopted {
                for slot in leaf.slots().filter(|slot| kept >> slot & 1 == 1) {
                    builder.push(Raw {
                        value: values[slot & 15],
                        ..leaf.raw_in(slot)
                    })?;
                }
            }
            low = leaf.end() + 1;
        }
        builder.finish()
    }
}
