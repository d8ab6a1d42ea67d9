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

mod greedy;
mod request;
mod search;

use core::fmt;

use kmem_hal::{ObjectAlloc, Page, PageRange};

pub use request::GapRequest;
use search::Search;

use crate::node::{Node, from_word};
use crate::stock::Sharing;
use crate::tree::RangeTree;
use crate::value::{Entry, Value};

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
}
