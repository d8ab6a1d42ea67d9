//! The buddy system as every textbook has it: one list of free blocks for each order.
//!
//! ```text
//!  free_area[0]  -> 0x105                      blocks of 1 frame
//!  free_area[1]  -> 0x102                      blocks of 2
//!  free_area[2]  ->                            blocks of 4
//!  free_area[3]  -> 0x108                      blocks of 8
//!
//!  alloc(order):  the first list from `order` up that is not empty; split until it fits, upper halves go on the lists
//!  free(block):   while the buddy (number ^ 2^order) is free as a whole, take it off its list and merge
//! ```
//!
//! Invariants
//! - `I1`: the blocks on the lists are disjoint and aligned to their order.
//! - `I2`: no two free buddies of one order below the top stand on a list: they would have been merged.
//!
//! Cost: a free searches lists, so it is linear in their length; Linux marks the frame instead.
//!
//! Source: Knuth, The Art of Computer Programming volume 1, 2.5; Linux, mm/page_alloc.c (`free_area`, `__free_one_page`).

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kmem_hal::{
    AllocError, Frame, FrameRange, FrameRequest, FrameSink, FrameSource, Order, OwnedFrame,
    PAGE_SIZE, PhysMap,
};

use crate::arena::{JUNK_FREED, JUNK_GIVEN};

const ORDERS: usize = Order::MAX_BUDDY.index() + 1;

/// Knuth's buddy system over some frames of a map.
///
/// # Examples
///
/// ```
/// use kmem_hal::{FrameRequest, FrameSink, FrameSource};
/// use kmem_testkit::{Arena, twins::ListBuddy};
///
/// let arena = Arena::new(16);
/// let buddy = ListBuddy::new(&arena, arena.range());
/// assert_eq!(buddy.free_blocks(), [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
/// let frame = buddy.alloc(&FrameRequest::ONE).unwrap();
/// // Splitting 16 left a block of 8, 4, 2 and 1.
/// assert_eq!(buddy.free_blocks(), [1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0]);
/// buddy.free(frame); // and all of them merge again
/// assert_eq!(buddy.free_blocks(), [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
/// ```
#[derive(Debug)]
pub struct ListBuddy<'a, M> {
    map: &'a M,
    range: FrameRange,
    free_area: Mutex<[VecDeque<u64>; ORDERS]>,
}

impl<'a, M: PhysMap> ListBuddy<'a, M> {
    /// All frames of `range` are free; they are the twin's, and `map` reaches them.
    #[must_use]
    pub fn new(map: &'a M, range: FrameRange) -> Self {
        let mut free_area: [VecDeque<u64>; ORDERS] = Default::default();
        for (first, order) in range.blocks(Order::MAX_BUDDY) {
            free_area[order.index()].push_back(first.number());
        }
        Self {
            map,
            range,
            free_area: Mutex::new(free_area),
        }
    }

    /// How many blocks of each order are free: a line of `/proc/buddyinfo`.
    #[must_use]
    pub fn free_blocks(&self) -> [usize; ORDERS] {
        let lists = self.lists();
        std::array::from_fn(|order| lists[order].len())
    }

    /// Frames that are free.
    #[must_use]
    pub fn free_frames(&self) -> u64 {
        let blocks = self.free_blocks();
        (0..ORDERS)
            .map(|order| (blocks[order] as u64) << order)
            .sum()
    }

    /// Panics unless `I1` and `I2` hold.
    ///
    /// # Panics
    ///
    /// Where an invariant is broken.
    pub fn assert_consistent(&self) {
        let lists = self.lists();
        let mut seen = std::collections::BTreeMap::new();
        for (order, list) in lists.iter().enumerate() {
            for &block in list {
                assert_eq!(block % (1 << order), 0, "block {block:#x} of order {order}");
                assert_eq!(seen.insert(block, 1u64 << order), None);
                let buddy = block ^ (1 << order);
                let merges = order + 1 < ORDERS && list.contains(&buddy);
                assert!(
                    !merges,
                    "{block:#x} and {buddy:#x} of order {order} are both free"
                );
            }
        }
        let mut end = 0;
        for (first, count) in seen {
            assert!(first >= end, "free blocks overlap at {first:#x}");
            end = first + count;
        }
    }

    fn lists(&self) -> MutexGuard<'_, [VecDeque<u64>; ORDERS]> {
        self.free_area
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, order: Order, fits: impl Fn(u64) -> bool) -> Option<u64> {
        let mut lists = self.lists();
        let (found, block) = (order.index()..ORDERS).find_map(|found| {
            let at = lists[found].iter().position(|&block| fits(block))?;
            Some((found, lists[found].remove(at)?))
        })?;
        // The lower half goes on, the upper one on the list of its order.
        for order in (order.index()..found).rev() {
            lists[order].push_front(block + (1 << order));
        }
        Some(block)
    }

    fn put_back(&self, mut block: u64, order: Order) {
        let mut lists = self.lists();
        let mut order = order.index();
        while order + 1 < ORDERS {
            let buddy = block ^ (1 << order);
            let Some(at) = lists[order].iter().position(|&free| free == buddy) else {
                break;
            };
            lists[order].remove(at);
            block = block.min(buddy);
            order += 1;
        }
        lists[order].push_front(block);
    }

    /// # Safety
    ///
    /// Nobody else owns the block.
    unsafe fn fill(&self, range: FrameRange, byte: u8) {
        let start = self.map.to_ptr(range.first().start());
        // SAFETY: by contract, and P1.
        unsafe { start.write_bytes(byte, (range.count() * PAGE_SIZE) as usize) }
    }
}

// SAFETY: F1: a block is on a list or in somebody's hands (`I1`); F2: the lists are by order, limit and alignment are
// asked of the block, memory is zeroed here; F3: nothing is taken off a list on failure.
unsafe impl<M: PhysMap> FrameSource for ListBuddy<'_, M> {
    fn alloc(&self, request: &FrameRequest) -> Result<OwnedFrame, AllocError> {
        if request.order > Order::MAX_BUDDY || request.alignment > Order::MAX_BUDDY {
            return Err(AllocError::Unsatisfiable);
        }
        let count = request.order.frames();
        // A larger block is cut from its lower end, which therefore must be aligned and low enough.
        let fits = |block: u64| {
            Frame::from_number(block).is_aligned(request.alignment)
                && (block + count) * PAGE_SIZE - 1 <= request.max_address.as_u64()
        };
        let block = self
            .take(request.order, fits)
            .ok_or(AllocError::OutOfMemory)?;
        // SAFETY: O1, O2: taken off its list, aligned (`I1`); O3: no TLB knows host memory.
        let block = unsafe { OwnedFrame::from_raw(Frame::from_number(block), request.order) };
        if request.zeroed {
            // SAFETY: owned.
            unsafe { self.map.zero(block.range()) }
        } else {
            // SAFETY: owned.
            unsafe { self.fill(block.range(), JUNK_GIVEN) }
        }
        Ok(block)
    }
}

impl<M: PhysMap> FrameSink for ListBuddy<'_, M> {
    fn free(&self, block: OwnedFrame) {
        assert!(
            self.range.contains_range(block.range()),
            "{block:?} is not of this allocator"
        );
        // SAFETY: the caller gave it up.
        unsafe { self.fill(block.range(), JUNK_FREED) }
        let (first, order) = block.into_raw();
        self.put_back(first.number(), order);
    }
}
