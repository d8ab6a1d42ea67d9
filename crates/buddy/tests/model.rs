//! The allocator against a set of frames: every call, every error, every refusal.
//!
//! The model knows which frames are free and nothing else. A textbook buddy system over that set has, on its list of
//! order j, exactly the naturally aligned free blocks of that order whose buddy is not wholly free: `decompose`. The
//! allocator must show the same lists whenever its caches are empty, and may refuse only what that set cannot give.

mod common;

use std::collections::BTreeSet;

use common::window::Window;
use kmem_buddy::{
    BootMap, Buddy, Config, PlaceError, RegionKind, Reservation, ZoneKind, ZoneLimits,
};
use kmem_hal::{
    AllocError, Frame, FrameRange, FrameRequest, FrameSink, FrameSource, Mobility, Order,
    OwnedFrame, PhysAddr, PhysMap, SingleCpu, Spin,
};
use proptest::prelude::*;

const END: u64 = 0x1155;
const LIMITS: ZoneLimits = ZoneLimits {
    dma: Some(0x3a0),
    dma32: None,
    normal: Some(0xc00),
    movable: None,
};

type Machine<'a> = Buddy<&'a Window, SingleCpu, Spin>;

#[derive(Clone, Debug)]
enum Op {
    Alloc {
        order: u8,
        align: u8,
        limit: Option<u64>,
        mobility: Mobility,
        zeroed: bool,
    },
    Batch {
        order: u8,
        count: usize,
        mobility: Mobility,
    },
    Free(usize),
    FreeBatch(usize, usize),
    At {
        first: u64,
        order: u8,
    },
    Range {
        frames: u64,
        align: u8,
    },
    RangeAt {
        first: u64,
        frames: u64,
    },
    DoubleFree(usize),
    Foreign(u64),
    Drain,
    Release,
}

fn mobility() -> impl Strategy<Value = Mobility> {
    prop_oneof![
        1 => Just(Mobility::Unmovable),
        1 => Just(Mobility::Reclaimable),
        3 => Just(Mobility::Movable),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    let order = prop_oneof![6 => 0..4u8, 3 => 4..=10u8, 1 => 11..=13u8];
    let limit = prop_oneof![4 => Just(None), 1 => (0..END + 50).prop_map(Some)];
    prop_oneof![
        12 => (order, prop_oneof![5 => Just(0), 1 => 0..12u8], limit, mobility(), any::<bool>())
            .prop_map(|(order, align, limit, mobility, zeroed)| Op::Alloc { order, align, limit, mobility, zeroed }),
        3 => (0..6u8, 1..90usize, mobility())
            .prop_map(|(order, count, mobility)| Op::Batch { order, count, mobility }),
        10 => any::<usize>().prop_map(Op::Free),
        2 => (any::<usize>(), 1..90usize).prop_map(|(at, count)| Op::FreeBatch(at, count)),
        2 => (0..END + 20, 0..11u8).prop_map(|(first, order)| Op::At { first, order }),
        2 => (0..1500u64, 0..11u8).prop_map(|(frames, align)| Op::Range { frames, align }),
        1 => (0..END + 20, 0..300u64).prop_map(|(first, frames)| Op::RangeAt { first, frames }),
        1 => any::<usize>().prop_map(Op::DoubleFree),
        1 => (0..END + 3000).prop_map(Op::Foreign),
        2 => Just(Op::Drain),
        1 => Just(Op::Release),
    ]
}

struct World<'a> {
    buddy: Machine<'a>,
    window: &'a Window,
    free: BTreeSet<u64>,
    /// Frames that are the allocator's.
    managed: BTreeSet<u64>,
    live: Vec<OwnedFrame>,
}

fn zone_of(frame: u64) -> ZoneKind {
    LIMITS.kind_of(Frame::new(frame).unwrap()).0
}

fn boot_map() -> BootMap {
    let mut map = BootMap::new();
    let mut usable = |first: u64, end: u64| {
        map.push(
            PhysAddr::new(first << 12),
            (end - first) << 12,
            RegionKind::Usable,
        )
        .unwrap();
    };
    usable(0, 0x9f);
    usable(0x100, 0x777);
    usable(0x7ff, END);
    map.reserve(PhysAddr::new(0x123 << 12), 0x4321, Reservation::KernelImage)
        .unwrap();
    map.reserve(PhysAddr::new(0x840 << 12), 0x9_9000, Reservation::Initrd)
        .unwrap();
    map
}

impl<'a> World<'a> {
    fn new(window: &'a Window) -> Self {
        let mut map = boot_map();
        // SAFETY: the test has one thread.
        let buddy = Machine::new(window, unsafe { SingleCpu::new() });
        let config = Config::new()
            .limits(LIMITS)
            .min_free_kib(0)
            .reserve_ratio([0; 5]);
        buddy.init(&mut map, &config).unwrap();
        let mut free = BTreeSet::new();
        map.for_each_free(|range| free.extend(range.iter().map(|frame| frame.number())));
        let world = Self {
            buddy,
            window,
            managed: free.clone(),
            free,
            live: Vec::new(),
        };
        world.agree();
        world
    }

    /// Blocks by zone and order that a textbook buddy system would have.
    fn decompose(&self, kind: ZoneKind) -> [u64; 11] {
        let mut counts = [0; 11];
        let whole = |first: u64, order: u32| {
            (first..first + (1 << order)).all(|f| self.free.contains(&f) && zone_of(f) == kind)
        };
        let mut at = 0;
        while at < END {
            if !whole(at, 0) {
                at += 1;
                continue;
            }
            let mut order = 0;
            while order < 10 && at % (2 << order) == 0 && whole(at, order + 1) {
                order += 1;
            }
            counts[order as usize] += 1;
            at += 1 << order;
        }
        counts
    }

    fn agree(&self) {
        self.buddy.check().unwrap();
        let info = self.buddy.mem_info();
        assert_eq!(info.free + info.cached, self.free.len() as u64);
        assert_eq!(info.total, self.managed.len() as u64);
        assert_eq!(self.buddy.recount().managed, info.total);
        assert!(self.buddy.drain_local());
        for zone in self.buddy.zones() {
            assert_eq!(zone.blocks, self.decompose(zone.kind), "{}", zone.kind);
            assert_eq!(zone.sum(), zone.free);
        }
    }

    /// Takes a range out of the free set: the allocator said that it is the caller's now.
    fn took(&mut self, range: FrameRange) {
        for frame in range.iter() {
            assert!(self.free.remove(&frame.number()), "{frame} was not free");
        }
        let kinds: BTreeSet<_> = range.iter().map(|frame| zone_of(frame.number())).collect();
        assert_eq!(kinds.len(), 1, "{range:?} crosses zones");
        // Whoever has it writes to it.
        let pointer = self.window.to_ptr(range.first().start());
        // SAFETY: the window backs all memory, and the range was just allocated.
        unsafe { pointer.write_bytes(0xa5, (range.count() << 12) as usize) };
    }

    fn gave(&mut self, frame: OwnedFrame) {
        self.free
            .extend(frame.range().iter().map(|frame| frame.number()));
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
            if kind <= highest
                && zone_of(end - 1) == kind
                && self.free.range(first..end).count() as u64 == frames
            {
                return true;
            }
            first += align;
        }
        false
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Alloc {
                order,
                align,
                limit,
                mobility,
                zeroed,
            } => {
                let order = Order::new(order).unwrap();
                let mut request = FrameRequest::new(order)
                    .mobility(mobility)
                    .aligned(Order::new(align).unwrap());
                if let Some(limit) = limit {
                    request = request.below(PhysAddr::new(limit << 12));
                }
                request.zeroed = zeroed;
                let limit = limit.unwrap_or(1 << 52);
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
            Op::Batch {
                order,
                count,
                mobility,
            } => {
                let request = FrameRequest::new(Order::new(order).unwrap()).mobility(mobility);
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
            Op::Free(at) => {
                if !self.live.is_empty() {
                    let frame = self.live.swap_remove(at % self.live.len());
                    self.gave(frame);
                }
            }
            Op::FreeBatch(at, count) => {
                let mut frames = Vec::new();
                for step in 0..count.min(self.live.len()) {
                    frames.push(
                        self.live
                            .swap_remove((at.wrapping_add(step)) % self.live.len()),
                    );
                }
                for frame in &frames {
                    self.free
                        .extend(frame.range().iter().map(|frame| frame.number()));
                }
                self.buddy.free_batch(&mut || frames.pop());
            }
            Op::At { first, order } => {
                let order = Order::new(order).unwrap();
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
            Op::Range { frames, align } => {
                let align = Order::new(align).unwrap();
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
            Op::RangeAt { first, frames } => {
                let range = FrameRange::from_numbers(first, first + frames).unwrap();
                match self.buddy.alloc_range_at(range) {
                    Ok(range) => {
                        self.took(range.range());
                        let frames = range.range();
                        assert_eq!(self.buddy.free_range(range), Ok(()));
                        self.free.extend(frames.iter().map(|frame| frame.number()));
                    }
                    Err(error) => self.refused_at(range, error),
                }
            }
            Op::DoubleFree(at) => {
                // Orders that no array holds are found out at the call; what is free already cannot be freed.
                let blocks: Vec<_> = self
                    .live
                    .iter()
                    .filter(|f| (4..=8).contains(&f.order().get()))
                    .collect();
                let Some(frame) = blocks.get(at.checked_rem(blocks.len()).unwrap_or(0)) else {
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
            Op::Foreign(frame) => {
                if !self.managed.contains(&frame) {
                    // SAFETY: a frame that nobody has: the wrong free is what is tested.
                    let foreign =
                        unsafe { OwnedFrame::from_raw(Frame::new(frame).unwrap(), Order::ZERO) };
                    let (error, _) = self.buddy.try_free(foreign).unwrap_err();
                    assert_eq!(error, kmem_buddy::FreeError::Foreign, "{frame:#x}");
                }
            }
            Op::Drain => self.agree(),
            Op::Release => {
                // SAFETY: nobody uses the simulated initrd.
                let freed = unsafe { self.buddy.release(Reservation::Initrd) };
                if freed > 0 {
                    assert_eq!(freed, 0x99);
                    self.free.extend(0x840..0x840 + 0x99);
                    self.managed.extend(0x840..0x840 + 0x99);
                }
            }
        }
    }

    fn refused_at(&self, range: FrameRange, error: PlaceError) {
        let free = range
            .iter()
            .all(|frame| self.free.contains(&frame.number()));
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
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 400, ..ProptestConfig::default() })]
    #[test]
    fn behaves_like_a_set_of_frames(ops in prop::collection::vec(op(), 1..120)) {
        let window = Window::new(END << 12, END << 12);
        let mut world = World::new(&window);
        for op in &ops {
            world.apply(op);
        }
        world.agree();
        while let Some(frame) = world.live.pop() {
            world.gave(frame);
        }
        world.agree();
        prop_assert_eq!(world.free.len(), world.managed.len());
        prop_assert_eq!(world.buddy.misuse(), None);
    }
}
