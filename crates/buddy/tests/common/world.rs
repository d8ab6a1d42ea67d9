//! The allocator and the textbook twin side by side: every call, every error, every refusal.
//!
//! The twin's lists are a function of the set of free frames. The allocator must show the same lists whenever its caches
//! are empty, and may refuse only what that set cannot give.
#![allow(dead_code)]

use std::collections::BTreeSet;

use kmem_buddy::{Config, PlaceError, Reservation, ZoneKind, ZoneLimits};
use kmem_hal::{
    AllocError, Frame, FrameRange, FrameRequest, FrameSink, FrameSource, Mobility, Order,
    OwnedFrame, PhysAddr, PhysMap,
};

use super::machine::{Machine, map_with_holes, start};
use super::twin::{BuddyOp, ZoneTwin};
use super::window::Window;

/// One past the last frame.
pub const END: u64 = 0x1155;
const LIMITS: ZoneLimits = ZoneLimits {
    dma: Some(0x3a0),
    dma32: None,
    normal: Some(0xc00),
    movable: None,
};

/// Three zones with holes, unaligned ends and reservations.
pub struct World<'a> {
    pub buddy: Machine<'a>,
    window: &'a Window,
    twins: [(ZoneKind, ZoneTwin); 3],
    /// Frames that are the allocator's.
    managed: BTreeSet<u64>,
    live: Vec<OwnedFrame>,
}

fn zone_of(frame: u64) -> ZoneKind {
    LIMITS.kind_of(Frame::new(frame).unwrap()).0
}

impl<'a> World<'a> {
    /// Boots the allocator on the window, which backs all of [`END`].
    pub fn new(window: &'a Window) -> Self {
        let mut map = map_with_holes(END);
        map.reserve(PhysAddr::new(0x840 << 12), 0x9_9000, Reservation::Initrd)
            .unwrap();
        let config = Config::new()
            .limits(LIMITS)
            .min_free_kib(0)
            .reserve_ratio([0; 5]);
        let buddy = start(window, &mut map, &config);
        let mut managed = BTreeSet::new();
        let mut twins = [
            (ZoneKind::Dma, ZoneTwin::new(0, 0x3a0)),
            (ZoneKind::Normal, ZoneTwin::new(0x3a0, 0xc00)),
            (ZoneKind::HighMem, ZoneTwin::new(0xc00, END)),
        ];
        map.for_each_free(|range| {
            managed.extend(range.iter().map(|frame| frame.number()));
            for (_, twin) in &mut twins {
                twin.give_range(range.first().number(), range.end_number());
            }
        });
        let world = Self {
            buddy,
            window,
            twins,
            managed,
            live: Vec::new(),
        };
        world.agree();
        world
    }

    fn twin(&mut self, frame: u64) -> &mut ZoneTwin {
        let twin = self.twins.iter_mut().find(|(_, twin)| twin.contains(frame));
        &mut twin.expect("a frame of some zone").1
    }

    fn is_free(&self, first: u64, end: u64) -> bool {
        self.twins
            .iter()
            .any(|(_, twin)| twin.contains(first) && twin.is_free(first, end))
    }

    fn free(&self) -> u64 {
        self.twins.iter().map(|(_, twin)| twin.free()).sum()
    }

    /// Compares everything.
    pub fn agree(&self) {
        self.buddy.check().unwrap();
        let info = self.buddy.mem_info();
        assert_eq!(info.free + info.cached, self.free());
        assert_eq!(info.total, self.managed.len() as u64);
        assert_eq!(self.buddy.recount().managed, info.total);
        assert!(self.buddy.drain_local());
        for zone in self.buddy.zones() {
            let twin = &self
                .twins
                .iter()
                .find(|(kind, _)| *kind == zone.kind)
                .unwrap()
                .1;
            assert_eq!(zone.blocks, twin.counts(), "{}", zone.kind);
            assert_eq!(zone.sum(), zone.free);
        }
    }

    /// Takes a range out of the free set: the allocator said that it is the caller's now.
    fn took(&mut self, range: FrameRange) {
        let (first, end) = (range.first().number(), range.end_number());
        let twin = self.twin(first);
        assert!(twin.contains(end - 1), "{range:?} crosses zones");
        twin.take_range(first, end);
        // Whoever has it writes to it.
        let pointer = self.window.to_ptr(range.first().start());
        // SAFETY: the window backs all memory, and the range was just allocated.
        unsafe { pointer.write_bytes(0xa5, (range.count() << 12) as usize) };
    }

    fn returned(&mut self, range: FrameRange) {
        let first = range.first().number();
        self.twin(first).give_range(first, range.end_number());
    }

    fn gave(&mut self, frame: OwnedFrame) {
        self.returned(frame.range());
        self.buddy.free(frame);
    }

    /// Whether some run of free frames would have met the request.
    fn possible(&self, frames: u64, align: u64, limit: u64, mobility: Mobility) -> bool {
        let highest = ZoneKind::highest_for(mobility);
        let mut first = 0;
        while first < END {
            let Some(end) = first
                .checked_add(frames)
                .filter(|&end| end <= limit.min(END))
            else {
                break;
            };
            let kind = zone_of(first);
            if kind <= highest && zone_of(end - 1) == kind && self.is_free(first, end) {
                return true;
            }
            first += align;
        }
        false
    }

    /// Applies one operation to both.
    pub fn apply(&mut self, op: &BuddyOp) {
        match *op {
            BuddyOp::Alloc {
                order,
                align,
                limit,
                mobility,
                zeroed,
            } => {
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
                        assert!(zone_of(frame.first().number()) <= ZoneKind::highest_for(mobility));
                        if zeroed {
                            let pointer = self.window.to_ptr(frame.first().start());
                            let bytes = (frame.order().bytes()) as usize;
                            // SAFETY: backed, and ours.
                            let bytes = unsafe { core::slice::from_raw_parts(pointer, bytes) };
                            assert!(bytes.iter().all(|&byte| byte == 0));
                        }
                        self.took(frame.range());
                        self.live.push(frame);
                    }
                    Err(error) => {
                        assert!(
                            matches!(error, AllocError::OutOfMemory | AllocError::Unsatisfiable),
                            "{error:?}"
                        );
                        assert!(
                            !self.possible(order.frames(), step, limit, mobility),
                            "{request:?} refused with {error:?}"
                        );
                    }
                }
            }
            BuddyOp::Batch {
                order,
                count,
                mobility,
            } => {
                let (count, mobility) = (usize::from(count), mobility_of(mobility));
                let order = Order::new(order % 11).unwrap();
                let request = FrameRequest::new(order).mobility(mobility);
                let mut got = Vec::new();
                let result = self
                    .buddy
                    .alloc_batch(&request, count, &mut |frame| got.push(frame));
                assert_eq!(result.unwrap_or(0), got.len());
                for frame in got {
                    self.took(frame.range());
                    self.live.push(frame);
                }
                if result.unwrap_or(0) < count {
                    let frames = request.order.frames();
                    assert!(!self.possible(frames, frames, END, mobility));
                }
            }
            BuddyOp::Free(at) => {
                if !self.live.is_empty() {
                    let frame = self.live.swap_remove(usize::from(at) % self.live.len());
                    self.gave(frame);
                }
            }
            BuddyOp::FreeBatch(at, count) => {
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
            BuddyOp::At { first, order } => {
                let first = u64::from(first);
                let order = Order::new(order % 11).unwrap();
                let frame = Frame::new(first).unwrap().align_down(order);
                let range = FrameRange::of_order(frame, order).unwrap();
                match self.buddy.alloc_at(frame, order) {
                    Ok(frame) => {
                        self.took(frame.range());
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
            BuddyOp::Range { frames, align } => {
                let (frames, align) = (u64::from(frames), Order::new(align % 11).unwrap());
                match self
                    .buddy
                    .alloc_range(frames, align, &FrameRequest::ONE.movable().zeroed())
                {
                    Ok(range) => {
                        assert_eq!(range.range().count(), frames);
                        assert!(range.range().first().is_aligned(align));
                        self.took(range.range());
                        self.live.extend(range.into_blocks(Order::MAX_BUDDY));
                    }
                    Err(_) => {
                        let possible = frames > 0
                            && self.possible(frames, align.frames(), END, Mobility::Movable);
                        assert!(!possible);
                    }
                }
            }
            BuddyOp::RangeAt { first, frames } => {
                let (first, frames) = (u64::from(first), u64::from(frames));
                let range = FrameRange::from_numbers(first, first + frames).unwrap();
                match self.buddy.alloc_range_at(range) {
                    Ok(range) => {
                        self.took(range.range());
                        let frames = range.range();
                        assert_eq!(self.buddy.free_range(range), Ok(()));
                        self.returned(frames);
                    }
                    Err(error) => self.refused_at(range, error),
                }
            }
            BuddyOp::DoubleFree(at) => {
                // Orders that no array holds are found out at the call; what is free already cannot be freed.
                let blocks: Vec<_> = self
                    .live
                    .iter()
                    .filter(|f| (7..=8).contains(&f.order().get()))
                    .collect();
                let Some(frame) =
                    blocks.get(usize::from(at).checked_rem(blocks.len()).unwrap_or(0))
                else {
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
                assert_eq!(error, kmem_buddy::FreeError::DoubleFree);
                assert_eq!(again.first(), first);
            }
            BuddyOp::Foreign(frame) => {
                let frame = u64::from(frame);
                if !self.managed.contains(&frame) {
                    // SAFETY: a frame that nobody has: the wrong free is what is tested.
                    let foreign =
                        unsafe { OwnedFrame::from_raw(Frame::new(frame).unwrap(), Order::ZERO) };
                    let (error, _) = self.buddy.try_free(foreign).unwrap_err();
                    assert_eq!(error, kmem_buddy::FreeError::Foreign, "{frame:#x}");
                }
            }
            BuddyOp::Drain => self.agree(),
            BuddyOp::Release => {
                // SAFETY: nobody uses the simulated initrd.
                let freed = unsafe { self.buddy.release(Reservation::Initrd) };
                if freed > 0 {
                    assert_eq!(freed, 0x99);
                    self.returned(FrameRange::from_numbers(0x840, 0x840 + 0x99).unwrap());
                    self.managed.extend(0x840..0x840 + 0x99);
                }
            }
        }
    }

    fn refused_at(&self, range: FrameRange, error: PlaceError) {
        let free = !range.is_empty() && self.is_free(range.first().number(), range.end_number());
        match error {
            PlaceError::InUse => assert!(!free, "{range:?} is free"),
            _ => {
                let one_zone = range
                    .iter()
                    .map(|f| zone_of(f.number()))
                    .collect::<BTreeSet<_>>()
                    .len()
                    == 1;
                assert!(!free || !one_zone, "{range:?}: {error:?}");
            }
        }
    }

    /// Gives everything back and compares once more.
    pub fn finish(mut self) {
        self.agree();
        while let Some(frame) = self.live.pop() {
            self.gave(frame);
        }
        self.agree();
        assert_eq!(self.free(), self.managed.len() as u64);
        assert_eq!(self.buddy.misuse(), None);
    }
}

fn mobility_of(number: u8) -> Mobility {
    match number {
        0 => Mobility::Unmovable,
        1 => Mobility::Reclaimable,
        _ => Mobility::Movable,
    }
}
