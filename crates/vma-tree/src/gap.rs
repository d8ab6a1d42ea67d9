//! Free ranges: what a search asks for, how it finds it, what it answers.
//!
//! Every inner node has the largest gap below each child on record, so a search goes straight to a leaf that has one
//! large enough, from either end, without looking into any other.
//!
//! ```text
//!   find_gap_up(9 pages)          [ 3 | 12 | 7 ]           records of the root: child 1 is the first with >= 9
//!                                      |
//!                             [ 2 | 12 | 11 | 4 ]          and again below
//! ```
//!
//! Cost: O(log N) where every gap of the size asked for serves. That is the case without alignment, and with
//! [`GapRequest::at_least`] `pages + alignment - 1`, which is how Linux asks. A gap clipped by the limits costs one more
//! descent at each end. A gap that the predicate refuses costs one step.
//!
//! The ends of the page numbers are ordinary: a gap may begin with page 0 and end with the last page.

use core::fmt;
use core::mem::MaybeUninit;

use kmem_hal::{ObjectAlloc, Page, PageRange};

use crate::node::{Leaf, Node, NodePtr, from_word, saturate};
use crate::path::{HEIGHT_MASK, MAX_HEIGHT};
use crate::stock::Sharing;
use crate::tree::RangeTree;
use crate::value::{Entry, Value};

/// What a gap search looks for.
///
/// # Examples
///
/// ```
/// use kmem_vma_tree::GapRequest;
///
/// // 2 MiB at a multiple of 2 MiB, as Linux asks for huge pages: only gaps that surely fit are considered.
/// let huge = GapRequest::new(512).aligned(512, 0).at_least(512 + 511);
/// assert_eq!(huge.pages(), 512);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[doc(alias = "vm_unmapped_area_info")]
pub struct GapRequest {
    pub(crate) limits: PageRange,
    pub(crate) pages: u64,
    pub(crate) alignment: u64,
    pub(crate) offset: u64,
    pub(crate) at_least: u64,
}

impl GapRequest {
    /// Asks for `pages` pages (0 counts as 1) anywhere.
    #[must_use]
    pub const fn new(pages: u64) -> Self {
        let pages = if pages == 0 { 1 } else { pages };
        Self {
            limits: PageRange::ALL,
            pages,
            alignment: 1,
            offset: 0,
            at_least: pages,
        }
    }

    /// Keeps the answer inside `limits`.
    #[must_use]
    pub const fn limits(mut self, limits: PageRange) -> Self {
        self.limits = limits;
        self
    }

    /// Asks for a first page that is `offset` modulo `alignment` pages (0 counts as 1).
    #[must_use]
    #[doc(alias = "align_mask")]
    #[doc(alias = "align_offset")]
    pub const fn aligned(mut self, alignment: u64, offset: u64) -> Self {
        self.alignment = if alignment == 0 { 1 } else { alignment };
        self.offset = offset % self.alignment;
        self
    }

    /// Passes over gaps of fewer than `pages` pages (after clipping to the limits), though the request might fit.
    ///
    /// With at least `pages() + alignment - 1` every gap that is considered fits, so the search never looks at a
    /// second one: that is how Linux searches (`vm_unmapped_area`), and it is O(log N) in the worst case. Without it
    /// the search is an exact first fit, which steps over gaps that are large enough and lie badly.
    #[must_use]
    pub const fn at_least(mut self, pages: u64) -> Self {
        self.at_least = if pages > self.pages {
            pages
        } else {
            self.pages
        };
        self
    }

    /// The number of pages asked for.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// The lowest place for the request in the free range `usable`.
    #[must_use]
    #[inline]
    pub fn place_low(&self, usable: PageRange) -> Option<PageRange> {
        let first = usable.first().number();
        if self.alignment == 1 {
            let place = PageRange::with_count(usable.first(), self.pages)?;
            return (place.last() <= usable.last()).then_some(place);
        }
        let up = (self.offset + self.alignment - first % self.alignment) % self.alignment;
        let place = PageRange::with_count(Page::new(first.checked_add(up)?)?, self.pages)?;
        (place.last() <= usable.last()).then_some(place)
    }

    /// The highest place for the request in the free range `usable`.
    #[must_use]
    #[inline]
    pub fn place_high(&self, usable: PageRange) -> Option<PageRange> {
        let highest = usable.last().number().checked_sub(self.pages - 1)?;
        if self.alignment == 1 {
            let first = Page::new(highest)?;
            return (first >= usable.first()).then_some(PageRange::with_count(first, self.pages)?);
        }
        let down = (highest % self.alignment + self.alignment - self.offset) % self.alignment;
        let first = Page::new(highest.checked_sub(down)?)?;
        (first >= usable.first()).then_some(PageRange::with_count(first, self.pages)?)
    }
}

/// A free range between two neighbours, as a search shows it to its predicate.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Gap<V> {
    /// The free pages, clipped to the request's limits.
    pub range: PageRange,
    /// The entry that ends right below the gap; `None` at the bottom of the space, or where the limits clip the gap.
    pub below: Option<Entry<V>>,
    /// The entry that begins right above the gap; `None` at the top of the space, or where the limits clip the gap.
    pub above: Option<Entry<V>>,
}

impl<V: fmt::Debug> fmt::Debug for Gap<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gap")
            .field("range", &self.range)
            .field("below", &self.below)
            .field("above", &self.above)
            .finish()
    }
}

/// What a search's caller makes of a gap: the part that may be used, or `None` to pass it over.
pub type Usable<'u, V> = &'u mut dyn FnMut(&Gap<V>) -> Option<PageRange>;

/// A search under way.
struct Search<'s, 'u, V> {
    request: &'s GapRequest,
    usable: Option<Usable<'u, V>>,
    up: bool,
}

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> RangeTree<V, A, S, W> {
    /// The lowest place for the request.
    ///
    /// # Examples
    ///
    /// ```
    /// use kmem_hal::{FixedPool, Page, PageRange};
    /// use kmem_vma_tree::{GapRequest, Node, RangeTree};
    ///
    /// let nodes = FixedPool::<Node, 8>::new();
    /// let mut tree: RangeTree<u8, _> = RangeTree::new_in(&nodes);
    /// let page = |number| Page::new(number).unwrap();
    /// tree.store(PageRange::new(page(3), page(9)).unwrap(), Some(0), &mut |_| ())?;
    /// // Four pages at a multiple of four: pages 0 to 2 are too few, and 10 is none.
    /// let place = tree.find_gap_up(&GapRequest::new(4).aligned(4, 0)).unwrap();
    /// assert_eq!(place.first(), page(12));
    /// // From above the last page of the space serves like any other.
    /// assert_eq!(tree.find_gap_down(&GapRequest::new(4)).unwrap().last(), Page::MAX);
    /// # Ok::<(), kmem_hal::AllocError>(())
    /// ```
    #[must_use]
    #[doc(alias = "unmapped_area")]
    #[doc(alias = "mas_empty_area")]
    pub fn find_gap_up(&self, request: &GapRequest) -> Option<PageRange> {
        if let Some(place) = self.greedy_up(request) {
            return Some(place);
        }
        self.search(Search {
            request,
            usable: None,
            up: true,
        })
    }

    /// The highest place for the request.
    #[must_use]
    #[doc(alias = "unmapped_area_topdown")]
    #[doc(alias = "mas_empty_area_rev")]
    pub fn find_gap_down(&self, request: &GapRequest) -> Option<PageRange> {
        if let Some(place) = self.greedy_down(request) {
            return Some(place);
        }
        self.search(Search {
            request,
            usable: None,
            up: false,
        })
    }

    /// The lowest place for the request in the part of a gap that `usable` leaves: stack guards take their share of it.
    #[doc(alias = "vm_start_gap")]
    #[doc(alias = "stack_guard_gap")]
    pub fn find_gap_up_with(
        &self,
        request: &GapRequest,
        usable: Usable<'_, V>,
    ) -> Option<PageRange> {
        self.search(Search {
            request,
            usable: Some(usable),
            up: true,
        })
    }

    /// The highest place for the request in the part of a gap that `usable` leaves.
    pub fn find_gap_down_with(
        &self,
        request: &GapRequest,
        usable: Usable<'_, V>,
    ) -> Option<PageRange> {
        self.search(Search {
            request,
            usable: Some(usable),
            up: false,
        })
    }

    /// Pages in the largest free range; 0 where every page is covered. O(log N).
    #[must_use]
    pub fn largest_gap(&self) -> u64 {
        let above = Page::LIMIT - self.top();
        let recorded = match self.height() {
            0 => return Page::LIMIT,
            1 => 0,
            _ => from_word::<W>(self.root_word()).map_or(0, |root| {
                // SAFETY: nobody edits while `&self` of this tree is out, so the nodes stay.
                u64::from(unsafe { root.as_ref() }.largest_child_gap())
            }),
        };
        if self.height() > 1 && recorded < u64::from(u32::MAX) {
            return recorded.max(above);
        }
        // Gaps too large for a record, or a single leaf: look at each. There are at most 2^20 of the former.
        let mut largest = above;
        let request = GapRequest::new(1).at_least(recorded);
        let _ = self.find_gap_up_with(&request, &mut |gap| {
            largest = largest.max(gap.range.count());
            None
        });
        largest
    }

    /// The free ranges inside `limits`, ascending, with their neighbours.
    pub fn gaps(&self, limits: PageRange) -> impl Iterator<Item = Gap<V>> + '_ {
        let mut entries = self.iter_from(limits.first());
        let mut below = self.last_before(limits.first());
        let mut free = Some(limits.first());
        core::iter::from_fn(move || {
            loop {
                let first = free.filter(|&first| first <= limits.last())?;
                let above = entries.next();
                let under = core::mem::replace(&mut below, above);
                free = above.and_then(|above| above.last().checked_add(1));
                let last = match above {
                    Some(above) => match above.first().checked_sub(1) {
                        Some(last) => last,
                        None => continue,
                    },
                    None => Page::MAX,
                };
                if let Some(range) = PageRange::new(first, last.min(limits.last())) {
                    return Some(Gap {
                        range,
                        below: under.filter(|under| under.last().number() + 1 == first.number()),
                        above: above
                            .filter(|above| above.first().number() == range.last().number() + 1),
                    });
                }
            }
        })
    }

    /// [`find_gap_up`](Self::find_gap_up) without a way back: `None` where the first gap that is large enough by the
    /// records does not serve, because the limits clip it or the alignment wastes it.
    #[inline]
    fn greedy_up(&self, request: &GapRequest) -> Option<PageRange> {
        let root = self.root_word();
        let mut node = from_word::<W>(root)?;
        let from = request.limits.first().number();
        let need = request.at_least;
        let small = saturate(need);
        let mut low = 0;
        for _ in 1..root & HEIGHT_MASK {
            // SAFETY: nobody edits while `&self` of this tree is out, so the nodes stay.
            let inner = unsafe { node.as_ref() };
            // Below the limit only in the first child, as a rule.
            let first = if low < from && inner.last_of(0, u64::MAX) < from {
                inner.child_for(from)
            } else {
                0
            };
            let slot = inner.first_with_gap(first, small)?;
            low = inner.first_of(slot, low);
            node = inner.child(slot)?;
        }
        // SAFETY: as above.
        let leaf = unsafe { node.as_ref() }.leaf();
        let start = if low < from {
            leaf.first_at_or_after(from)
        } else {
            0
        };
        if start == leaf.count() {
            return None;
        }
        let end = request.limits.last().number() + 1;
        let serves = |free: u64, above: u64| {
            let above = above.min(end);
            if above.saturating_sub(free) < need {
                return None;
            }
            // SAFETY: `need` is not 0, so the gap has a page; its ends are pages.
            request.place_low(unsafe { PageRange::from_numbers_unchecked(free, above - 1) })
        };
        // The gap below the first range that counts; none where the limit lies inside that range.
        let (free, first) = (low.max(from), leaf.range(start).0);
        if first > free
            && let Some(place) = serves(free, first)
        {
            return Some(place);
        }
        let mut gaps = leaf.gaps_up(start, need);
        gaps.find_map(|(free, above)| serves(free, above))
    }

    /// [`find_gap_down`](Self::find_gap_down) without a way back, as [`greedy_up`](Self::greedy_up).
    #[inline]
    fn greedy_down(&self, request: &GapRequest) -> Option<PageRange> {
        if let Some(place) = self.above_all(request, false) {
            return Some(place);
        }
        let root = self.root_word();
        let mut node = from_word::<W>(root)?;
        let to = request.limits.last().number();
        let small = saturate(request.at_least);
        // The pages above the last range were seen to: what is below is clipped only by a limit below its end.
        let mut at_limit = to + 1 < self.top();
        let mut low = 0;
        for _ in 1..root & HEIGHT_MASK {
            // SAFETY: nobody edits while `&self` of this tree is out, so the nodes stay.
            let inner = unsafe { node.as_ref() };
            let last = if at_limit {
                inner.child_for(to)
            } else {
                Node::<W>::CHILDREN - 1
            };
            let slot = inner.last_with_gap(last + 1, small)?;
            at_limit &= slot == last;
            low = inner.first_of(slot, low);
            node = inner.child(slot)?;
        }
        // SAFETY: as above.
        let leaf = unsafe { node.as_ref() }.leaf();
        let stop = if at_limit {
            leaf.rank(to)
        } else {
            leaf.count()
        };
        Self::highest(request, leaf, stop, low)
    }

    /// A place in the free pages above the last range.
    #[inline(always)]
    fn above_all(&self, request: &GapRequest, up: bool) -> Option<PageRange> {
        let last = request.limits.last();
        if last.number() < self.top() {
            return None;
        }
        let free = PageRange::new(
            Page::from_number(self.top()).max(request.limits.first()),
            last,
        )?;
        if free.count() < request.at_least {
            None
        } else if up {
            request.place_low(free)
        } else {
            request.place_high(free)
        }
    }

    /// The highest place in the gaps below and between the ranges `.. stop` of a leaf that begins at `low`, and above the
    /// last of them.
    #[inline(always)]
    fn highest(
        request: &GapRequest,
        leaf: Leaf<'_, W>,
        stop: usize,
        low: u64,
    ) -> Option<PageRange> {
        let (from, to) = (
            request.limits.first().number(),
            request.limits.last().number(),
        );
        let need = request.at_least;
        let serves = |free: u64, end: u64| {
            let free = free.max(from);
            if end.saturating_sub(free) < need {
                return None;
            }
            // SAFETY: `need` is not 0, so the gap has a page; its ends are pages.
            request.place_high(unsafe { PageRange::from_numbers_unchecked(free, end - 1) })
        };
        let above = if stop < leaf.count() {
            leaf.range(stop).0
        } else {
            leaf.end() + 1
        };
        let mut end = above.min(to + 1);
        if let Some(slot) = stop.checked_sub(1) {
            // The gap above the last range that counts; none where the limit lies inside that range.
            let last = leaf.range(slot).1;
            if end > last
                && let Some(place) = serves(last + 1, end)
            {
                return Some(place);
            }
            let mut gaps = leaf.gaps_down(stop, need);
            if let Some(place) = gaps.find_map(|(free, end)| serves(free, end)) {
                return Some(place);
            }
            end = end.min(leaf.range(0).0);
        }
        if end > low { serves(low, end) } else { None }
    }

    fn search(&self, mut search: Search<'_, '_, V>) -> Option<PageRange> {
        let root = self.root_word();
        let Some(node) = from_word::<W>(root) else {
            return search.consider(self, (0, Page::MAX.number()));
        };
        let above = (self.top(), Page::MAX.number());
        if !search.up
            && above.0 <= above.1
            && let Some(place) = search.consider(self, above)
        {
            return Some(place);
        }
        if let Some(place) = self.search_below(&mut search, root, node) {
            return Some(place);
        }
        if search.up && above.0 <= above.1 {
            return search.consider(self, above);
        }
        None
    }

    /// Searches the gaps below and between the ranges.
    fn search_below(
        &self,
        search: &mut Search<'_, '_, V>,
        root: u64,
        node: NodePtr<W>,
    ) -> Option<PageRange> {
        let limits = search.request.limits;
        let need = saturate(search.request.at_least);
        let top = (root & HEIGHT_MASK) as usize - 1;
        if top == 0 {
            // SAFETY: nobody edits while `&self` of this tree is out, so the nodes stay.
            let leaf = unsafe { node.as_ref() }.leaf();
            return search.leaf(self, leaf, 0);
        }
        // The way down: a node, the pages it answers for, and its children still to look into.
        let mut way = [const { MaybeUninit::<Step<W>>::uninit() }; MAX_HEIGHT];
        let mut level = top;
        let mut step = Step {
            node,
            low: 0,
            high: Page::MAX.number(),
            next: if search.up { 0 } else { Node::<W>::CHILDREN },
        };
        loop {
            // SAFETY: as above, here and below.
            let inner = unsafe { step.node.as_ref() };
            let found = if search.up {
                inner.first_with_gap(step.next, need)
            } else {
                inner.last_with_gap(step.next, need)
            };
            let Some(slot) = found else {
                if level == top {
                    return None;
                }
                level += 1;
                // SAFETY: every level above the present one was written on the way down.
                step = unsafe { way[level].assume_init() };
                continue;
            };
            step.next = slot + usize::from(search.up);
            let low = inner.first_of(slot, step.low);
            let high = inner.last_of(slot, step.high);
            if high < limits.first().number() || low > limits.last().number() {
                // Outside of the limits. At each level a search meets at most the other children of one node.
                continue;
            }
            let child = inner.child(slot)?;
            // SAFETY: as above.
            let below = unsafe { child.as_ref() };
            if level > 1 {
                way[level].write(step);
                level -= 1;
                step = Step {
                    node: child,
                    low,
                    high,
                    next: if search.up { 0 } else { Node::<W>::CHILDREN },
                };
            } else if let Some(place) = search.leaf(self, below.leaf(), low) {
                return Some(place);
            }
        }
    }
}

/// A node on the way of a search.
#[derive(Clone, Copy)]
struct Step<const W: usize> {
    node: NodePtr<W>,
    low: u64,
    high: u64,
    /// Upwards the lowest child still to look into; downwards the one above the highest.
    next: usize,
}

impl<V: Value> Search<'_, '_, V> {
    /// Looks at the gaps below and between the ranges of a leaf that begins at `low`.
    #[inline]
    fn leaf<A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize>(
        &mut self,
        tree: &RangeTree<V, A, S, W>,
        leaf: Leaf<'_, W>,
        low: u64,
    ) -> Option<PageRange> {
        let need = self.request.at_least;
        if self.up {
            let mut free = low;
            for raw in leaf.raws(0, leaf.count()) {
                if raw.first - free >= need
                    && let Some(place) = self.consider(tree, (free, raw.first - 1))
                {
                    return Some(place);
                }
                free = raw.last + 1;
            }
        } else {
            let mut end = leaf.end();
            for slot in (0..leaf.count()).rev() {
                let (first, last) = leaf.range(slot);
                if end > last
                    && end - last > need
                    && let Some(place) = self.consider(tree, (last + 1, end - 1))
                {
                    return Some(place);
                }
                end = first;
            }
            if end - low >= need {
                return self.consider(tree, (low, end - 1));
            }
        }
        None
    }

    /// Places the request in the gap `first ..= last` if it fits.
    fn consider<A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize>(
        &mut self,
        tree: &RangeTree<V, A, S, W>,
        (first, last): (u64, u64),
    ) -> Option<PageRange> {
        let limits = self.request.limits;
        let clipped = PageRange::new(
            Page::from_number(first).max(limits.first()),
            Page::from_number(last).min(limits.last()),
        )?;
        if clipped.count() < self.request.at_least {
            return None;
        }
        let free = match &mut self.usable {
            None => clipped,
            Some(usable) => {
                let is_whole = |page: Page, end| page.number() == end;
                let gap = Gap {
                    range: clipped,
                    below: clipped
                        .first()
                        .checked_sub(1)
                        .filter(|_| is_whole(clipped.first(), first))
                        .and_then(|page| tree.get(page)),
                    above: clipped
                        .last()
                        .checked_add(1)
                        .filter(|_| is_whole(clipped.last(), last))
                        .and_then(|page| tree.get(page)),
                };
                let free = usable(&gap)?.intersection(clipped)?;
                if free.count() < self.request.at_least {
                    return None;
                }
                free
            }
        };
        if self.up {
            self.request.place_low(free)
        } else {
            self.request.place_high(free)
        }
    }
}
