//! The world's calls that allocate and free: blocks and ranges, anywhere and by place, and wrong frees.
#![allow(dead_code)]

use kmem_buddy::{FreeError, PlaceError, Reservation, ZoneKind};
use kmem_hal::{
    AllocError, Frame, FrameRange, FrameRequest, FrameSink, FrameSource, Mobility, Order,
    OwnedFrame, PhysAddr, PhysMap,
};

use super::hands::Hand;
use super::layout::{segment_of, zone_of};
use super::world::{Need, World};

impl World<'_> {
    /// Allocates one block.
    pub(super) fn alloc(
        &mut self,
        order: u8,
        align: u8,
        limit: Option<u16>,
        mobility: u8,
        zeroed: bool,
    ) {
        let order = Order::new(order % 14).unwrap();
        let align = align % 14;
        let mobility = mobility_of(mobility);
        let mut request = FrameRequest::new(order)
            .mobility(mobility)
            .aligned(Order::new(align).unwrap());
        if let Some(limit) = limit {
            request = request.below(PhysAddr::new(u64::from(limit) << 12));
        }
        request.zeroed = zeroed;
        let limit = limit.map_or(1 << 52, u64::from);
        let step = order.frames().max(1 << align);
        match self.buddy.alloc(&request) {
            Ok(frame) => {
                assert_eq!(frame.order(), order);
                assert_eq!(frame.first().number() % step, 0);
                assert!(frame.range().end_number() <= limit);
                if zeroed {
                    let pointer = self.window.to_ptr(frame.first().start());
                    let bytes = (frame.order().bytes()) as usize;
                    // SAFETY: backed, and ours.
                    let bytes = unsafe { core::slice::from_raw_parts(pointer, bytes) };
                    assert!(bytes.iter().all(|&byte| byte == 0));
                }
                self.granted(frame, mobility);
            }
            Err(error) => {
                let need = Need {
                    limit,
                    ..Need::new(order.frames(), step, mobility)
                };
                self.refused(error, &need);
            }
        }
    }

    /// A block of a kind of memory that the request may have is somebody's now.
    pub(super) fn granted(&mut self, frame: OwnedFrame, mobility: Mobility) {
        let kind = zone_of(frame.first().number()).1;
        assert!(kind <= ZoneKind::highest_for(mobility));
        assert!(mobility == Mobility::Movable || !self.is_lent(frame.range()));
        self.took(frame.range(), Hand::Held);
        self.live.push(frame);
    }

    /// Allocates blocks in one call.
    pub(super) fn alloc_batch(&mut self, order: u8, count: u8, mobility: u8) {
        let (count, mobility) = (usize::from(count), mobility_of(mobility));
        let order = Order::new(order % 11).unwrap();
        let request = FrameRequest::new(order).mobility(mobility);
        let mut got = Vec::new();
        let result = self
            .buddy
            .alloc_batch(&request, count, &mut |frame| got.push(frame));
        assert_eq!(result.unwrap_or(0), got.len());
        for frame in got {
            self.granted(frame, mobility);
        }
        let frames = request.order.frames();
        let need = Need::new(frames, frames, mobility);
        match result {
            Ok(got) if got >= count => {}
            Ok(_) => assert!(self.calls.is_deaf() || !self.possible(&need)),
            Err(error) => self.refused(error, &need),
        }
    }

    /// Frees a block that is held.
    pub(super) fn free_one(&mut self, at: u16) {
        if !self.live.is_empty() {
            let frame = self.live.swap_remove(usize::from(at) % self.live.len());
            self.gave(frame);
        }
    }

    /// Frees several in one call.
    pub(super) fn free_batch(&mut self, at: u16, count: u8) {
        let mut frames = Vec::new();
        for step in 0..usize::from(count).min(self.live.len()) {
            let at = (usize::from(at) + step) % self.live.len();
            frames.push(self.live.swap_remove(at));
        }
        for range in frames.iter().map(OwnedFrame::range).collect::<Vec<_>>() {
            self.returned(range);
        }
        self.buddy.free_batch(&mut || frames.pop());
    }

    /// Allocates the block at a place.
    pub(super) fn alloc_at(&mut self, first: u16, order: u8) {
        let first = u64::from(first);
        let order = Order::new(order % 11).unwrap();
        let frame = Frame::new(first).unwrap().align_down(order);
        let range = FrameRange::of_order(frame, order).unwrap();
        match self.buddy.alloc_at(frame, order) {
            Ok(frame) => {
                assert!(!self.is_lent(range), "{range:?} is lent");
                self.took(frame.range(), Hand::Held);
                self.live.push(frame);
            }
            Err(error) => self.refused_at(range, error),
        }
        assert_eq!(
            self.buddy
                .alloc_at(Frame::new(first | 1).unwrap(), Order::new(1).unwrap()),
            Err(PlaceError::Foreign)
        );
    }

    /// Allocates contiguous frames.
    pub(super) fn alloc_range(&mut self, frames: u16, align: u8) {
        let (frames, align) = (u64::from(frames), Order::new(align % 11).unwrap());
        match self
            .buddy
            .alloc_range(frames, align, &FrameRequest::ONE.movable().zeroed())
        {
            Ok(range) => {
                assert_eq!(range.range().count(), frames);
                assert!(range.range().first().is_aligned(align));
                for block in range.into_blocks(Order::MAX_BUDDY) {
                    self.took(block.range(), Hand::Held);
                    self.live.push(block);
                }
            }
            Err(error) => {
                assert!(frames > 0 || error == AllocError::Unsatisfiable);
                if frames > 0 {
                    let need = Need::new(frames, align.frames(), Mobility::Movable);
                    self.refused(error, &need);
                }
            }
        }
    }

    /// Allocates exactly these frames and frees them again.
    pub(super) fn alloc_range_at(&mut self, first: u16, frames: u16) {
        let (first, frames) = (u64::from(first), u64::from(frames));
        let range = FrameRange::from_numbers(first, first + frames).unwrap();
        match self.buddy.alloc_range_at(range) {
            Ok(range) => {
                assert!(!self.is_lent(range.range()), "{range:?} is lent");
                self.took(range.range(), Hand::Held);
                let frames = range.range();
                assert_eq!(self.buddy.free_range(range), Ok(()));
                self.returned(frames);
            }
            Err(error) => self.refused_at(range, error),
        }
    }

    /// Frees a block twice; the second time is refused.
    pub(super) fn free_twice(&mut self, at: u16) {
        // Orders that no array holds are found out at the call; what is free already cannot be freed.
        let blocks: Vec<_> = self
            .live
            .iter()
            .filter(|f| (7..=8).contains(&f.order().get()))
            .collect();
        let Some(frame) = blocks.get(usize::from(at).checked_rem(blocks.len()).unwrap_or(0)) else {
            return;
        };
        let (first, order) = (frame.first(), frame.order());
        let index = self
            .live
            .iter()
            .position(|frame| frame.first() == first)
            .unwrap();
        let frame = self.live.swap_remove(index);
        self.gave(frame);
        // SAFETY: the wrong free is what is tested; nobody else has the frames since no call came between.
        let again = unsafe { OwnedFrame::from_raw(first, order) };
        let (error, again) = self.buddy.try_free(again).unwrap_err();
        assert_eq!(error, FreeError::DoubleFree);
        assert_eq!(again.first(), first);
    }

    /// Frees a frame that is not the allocator's.
    pub(super) fn free_foreign(&mut self, frame: u16) {
        let frame = u64::from(frame);
        if !self.managed.contains(&frame) {
            // SAFETY: a frame that nobody has: the wrong free is what is tested.
            let foreign = unsafe { OwnedFrame::from_raw(Frame::new(frame).unwrap(), Order::ZERO) };
            let (error, _) = self.buddy.try_free(foreign).unwrap_err();
            assert_eq!(error, FreeError::Foreign, "{frame:#x}");
        }
    }

    /// Frees what was reserved for the boot.
    pub(super) fn release(&mut self) {
        // SAFETY: nobody uses the simulated initrd.
        let freed = unsafe { self.buddy.release(Reservation::Initrd) };
        if freed > 0 {
            assert_eq!(freed, 0x99);
            self.joined(FrameRange::from_numbers(0x840, 0x840 + 0x99).unwrap());
            self.managed.extend(0x840..0x840 + 0x99);
        }
    }

    fn refused_at(&self, range: FrameRange, error: PlaceError) {
        let free = !range.is_empty() && self.is_free(range.first().number(), range.end_number());
        match error {
            PlaceError::InUse => {
                let free = free && !self.is_lent(range);
                assert!(!free && !self.calls.is_deaf(), "{range:?} is free");
            }
            PlaceError::InUseHere => assert!(self.calls.is_deaf()),
            PlaceError::Foreign => assert_eq!(segment_of(range), None, "{range:?}"),
            _ => panic!("{range:?}: {error:?}"),
        }
    }
}

/// A mobility by number.
pub fn mobility_of(number: u8) -> Mobility {
    match number {
        0 => Mobility::Unmovable,
        1 => Mobility::Reclaimable,
        _ => Mobility::Movable,
    }
}
