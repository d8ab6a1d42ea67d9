//! The allocator and the textbook twin side by side: every call, every error, every refusal.
//!
//! The model is a set of intervals, who has which frames (`hands.rs`), and beside it the lists of what nobody has (`twin.rs`), which
//! are a function of the set of free frames. The allocator must show the same lists whenever its caches are empty, and may refuse only
//! what that set cannot give. After each call nothing is in two hands, and contents are what whoever has the frames wrote.
//!
//! The memory is in `layout.rs`; three CPUs are played by the thread in turn. The calls that allocate and free are in `allocation.rs`, those
//! that empty ranges in `emptying.rs`, those about nodes and CPUs in `placement.rs`.
#![allow(dead_code)]

use std::collections::BTreeSet;

use kmem_buddy::{Buddy, CmaArea, Config, MigrateType, OwnedRange, Reservation, ZoneKind};
use kmem_hal::{
    AllocError, CpuId, CpuSet, Frame, FrameRange, FrameSink, Mobility, NoPressure, NodeId, Order,
    OwnedFrame, PhysAddr, PhysMap, Spin,
};

use super::allocation::mobility_of;
use super::hands::{Hand, Hands};
use super::layout::{BLOCK, END, LIMITS, NODES, ZONES, top_block, zone_of};
use super::machine::map_with_holes;
use super::op::BuddyOp;
use super::played::{Calls, Played, become_cpu};
use super::twin::{TOP, ZoneTwin};
use super::users::{Mood, Users};
use super::window::Window;

/// CPUs, of which the first has arrays from the boot on, and the second since just after it.
pub const CPUS: u32 = 3;

/// What each frame that was allocated or claimed is filled with.
const FILL: u8 = 0xa5;

/// The allocator under test.
pub type Kernel<'a> = Buddy<&'a Window, Played<CPUS>, Spin, Calls>;

/// A run of free frames that would meet a request.
#[derive(Clone, Copy, Debug)]
pub struct Need {
    pub frames: u64,
    pub align: u64,
    /// One past the last frame that it may have.
    pub limit: u64,
    pub mobility: Mobility,
    pub node: Option<NodeId>,
    /// Frames that it may not have.
    pub outside: FrameRange,
}

impl Need {
    pub fn new(frames: u64, align: u64, mobility: Mobility) -> Self {
        Self {
            frames,
            align,
            limit: END,
            mobility,
            node: None,
            outside: FrameRange::EMPTY,
        }
    }
}

/// Four zones with holes, unaligned ends and reservations.
pub struct World<'a> {
    pub buddy: Kernel<'a>,
    pub(super) window: &'a Window,
    twins: [(ZoneKind, ZoneTwin); ZONES.len()],
    hands: Hands,
    /// Frames that are the allocator's.
    pub(super) managed: BTreeSet<u64>,
    pub(super) live: Vec<OwnedFrame>,
    pub(super) claims: Vec<OwnedRange>,
    pub(super) areas: Vec<CmaArea>,
    pub(super) users: Users<'a>,
    pub(super) calls: Calls,
    /// CPUs that were online at some time.
    pub(super) with_arrays: CpuSet,
    /// Frames that a CPU's arrays are in.
    pub(super) area_frames: u64,
}

impl<'a> World<'a> {
    /// Boots the allocator on the window, which backs all of [`END`].
    pub fn new(window: &'a Window) -> Self {
        become_cpu(0);
        let mut map = map_with_holes(END);
        map.reserve(PhysAddr::new(0x840 << 12), 0x9_9000, Reservation::Initrd)
            .unwrap();
        for node in 0..NODES {
            let zones = ZONES.iter().filter(|zone| zone.0 == node);
            let (first, end) = zones.fold((END, 0), |span, zone| {
                (span.0.min(zone.2), span.1.max(zone.3))
            });
            let bytes = (end - first) << 12;
            map.assign_node(PhysAddr::new(first << 12), bytes, NodeId::new(node))
                .unwrap();
        }
        let config = Config::new()
            .limits(LIMITS)
            .min_free_kib(0)
            .reserve_ratio([0; 5])
            .cpus(1)
            .cpu_node(|cpu| NodeId::new((cpu.get() % 2) as u16));
        let calls = Calls::default();
        let buddy = Kernel::with(window, Played, calls.clone(), NoPressure);
        // SAFETY: X1: the test's own memory, which only this allocator has.
        unsafe { buddy.init(&mut map, &config) }.unwrap();
        let mut managed = BTreeSet::new();
        let mut twins = ZONES.map(|(_, kind, first, end)| (kind, ZoneTwin::new(first, end)));
        map.for_each_free(|range| {
            managed.extend(range.iter().map(|frame| frame.number()));
            for (_, twin) in &mut twins {
                twin.give_range(range.first().number(), range.end_number());
            }
        });
        let mut world = Self {
            buddy,
            window,
            twins,
            hands: Hands::default(),
            managed,
            live: Vec::new(),
            claims: Vec::new(),
            areas: Vec::new(),
            users: Users::new(window),
            calls,
            with_arrays: CpuSet::single(CpuId::BOOT),
            area_frames: 0,
        };
        world.agree();
        world.online(1);
        world.agree();
        world
    }

    fn twin(&mut self, frame: u64) -> &mut ZoneTwin {
        let twin = self.twins.iter_mut().find(|(_, twin)| twin.contains(frame));
        &mut twin.expect("a frame of some zone").1
    }

    pub(super) fn is_free(&self, first: u64, end: u64) -> bool {
        self.twins
            .iter()
            .any(|(_, twin)| twin.contains(first) && twin.is_free(first, end))
    }

    pub(super) fn free(&self) -> u64 {
        self.twins.iter().map(|(_, twin)| twin.free()).sum()
    }

    /// Whether some of the range is lent to movable users.
    pub(super) fn is_lent(&self, range: FrameRange) -> bool {
        let mut areas = self.areas.iter();
        areas.any(|area| !area.range().intersection(range).is_empty())
    }

    /// Whether some of the range is lent, and some is not.
    fn is_mixed(&self, range: FrameRange) -> bool {
        let lent = |at| self.is_lent(FrameRange::from_numbers(at, at + 1).unwrap());
        let (first, end) = (range.first().number(), range.end_number());
        let mut others = (first..end).step_by(BLOCK as usize).skip(1);
        others.any(|at| lent(at) != lent(first))
    }

    /// What must hold after every call, with the arrays as they are.
    pub fn check(&self) {
        self.buddy.check().unwrap();
        let (info, count) = (self.buddy.mem_info(), self.buddy.recount());
        assert_eq!((info.free, info.cached), (count.free, count.cached));
        assert_eq!(info.free + info.cached, self.free());
        assert_eq!(info.total, self.managed.len() as u64);
        assert_eq!(count.managed, info.total);
        assert_eq!(self.free() + self.hands.frames(), info.total);
        for (range, hand) in self.hands.iter() {
            match hand {
                Hand::Held | Hand::Claimed => self.check_filled(range),
                Hand::Page(id) => self.users.check(range.first(), id),
                Hand::Arrays => {}
            }
        }
        for cell in self.buddy.picture().cells() {
            assert_ne!(cell.migrate, MigrateType::Isolate, "{:?}", cell.range);
            let lent = self.is_lent(cell.range);
            assert_eq!(cell.migrate == MigrateType::Cma, lent, "{:?}", cell.range);
        }
    }

    /// Compares everything, with the arrays empty.
    pub fn agree(&self) {
        self.check();
        let deaf = self.calls.set_deaf(false);
        assert!(self.buddy.drain_all());
        self.calls.set_deaf(deaf);
        assert_eq!(self.buddy.mem_info().cached, 0);
        for zone in self.buddy.zones() {
            let twins = self.twins.iter();
            let mut twins = twins.filter(|(_, twin)| twin.contains(zone.start));
            let (kind, twin) = twins.next().unwrap();
            assert_eq!(zone.kind, *kind);
            let mut blocks = twin.counts();
            // Page blocks that are lent and others do not merge.
            let tops = twin.blocks(TOP).map(top_block);
            let mixed = tops.filter(|&block| self.is_mixed(block)).count() as u64;
            blocks[TOP] -= mixed;
            blocks[TOP - 1] += 2 * mixed;
            assert_eq!(zone.blocks, blocks, "{}", zone.kind);
            assert_eq!(zone.sum(), zone.free);
        }
        for cell in self.buddy.picture().cells() {
            let free = cell.range.iter().map(Frame::number);
            let free = free.filter(|&frame| self.is_free(frame, frame + 1)).count();
            assert_eq!(cell.free, free as u64, "{:?}", cell.range);
        }
    }

    /// The words that whoever has a range looks at: the first and the last of it.
    fn check_filled(&self, range: FrameRange) {
        let first = self.window.to_ptr(range.first().start()).cast::<u64>();
        for word in [0, (range.count() * 512 - 1) as usize] {
            // SAFETY: the window backs all memory, and nothing else runs.
            let found = unsafe { first.add(word).read() };
            assert_eq!(found, u64::from_ne_bytes([FILL; 8]), "{range:?}");
        }
    }

    /// Takes a range out of the free set: the allocator said that it is somebody's now.
    pub(super) fn hand_out(&mut self, range: FrameRange, hand: Hand) {
        let (first, end) = (range.first().number(), range.end_number());
        self.hands.take(range, hand);
        let twin = self.twin(first);
        assert!(twin.contains(end - 1), "{range:?} crosses zones");
        twin.take_range(first, end);
    }

    /// The same where the new owner writes to all of it.
    pub(super) fn took(&mut self, range: FrameRange, hand: Hand) {
        self.hand_out(range, hand);
        let pointer = self.window.to_ptr(range.first().start());
        // SAFETY: the window backs all memory, and the range was just allocated.
        unsafe { pointer.write_bytes(FILL, (range.count() << 12) as usize) };
    }

    /// Puts a range back into the free set; whose it was.
    pub(super) fn returned(&mut self, range: FrameRange) -> Hand {
        let hand = self.hands.give(range);
        if hand != Hand::Arrays && !matches!(hand, Hand::Page(_)) {
            self.check_filled(range);
        }
        self.joined(range);
        hand
    }

    /// The frames are free from now on.
    pub(super) fn joined(&mut self, range: FrameRange) {
        let first = range.first().number();
        self.twin(first).give_range(first, range.end_number());
    }

    pub(super) fn gave(&mut self, frame: OwnedFrame) {
        self.returned(frame.range());
        self.buddy.free(frame);
    }

    /// Whether some run of free frames would have met the request.
    pub(super) fn possible(&self, need: &Need) -> bool {
        let highest = ZoneKind::highest_for(need.mobility);
        let starts = (0..need.limit.min(END)).step_by(need.align as usize);
        starts
            .filter_map(|first| FrameRange::from_numbers(first, first.checked_add(need.frames)?))
            .take_while(|range| range.end_number() <= need.limit.min(END))
            .any(|range| {
                let (first, end) = (range.first().number(), range.end_number());
                let zone = zone_of(first);
                zone.1 <= highest
                    && zone_of(end - 1) == zone
                    && need.node.is_none_or(|node| node.get() == zone.0)
                    && self.is_free(first, end)
                    && need.outside.intersection(range).is_empty()
                    && (need.mobility == Mobility::Movable || !self.is_lent(range))
                    && (range.count() != 1 << TOP || !self.is_mixed(range))
            })
    }

    /// Whether a refusal is due: nothing would have met the need, or what is free may be where nobody could look.
    pub(super) fn refused(&self, error: AllocError, need: &Need) {
        match error {
            AllocError::OutOfMemory if !self.calls.is_deaf() => {}
            AllocError::OutOfMemoryHere if self.calls.is_deaf() => return,
            AllocError::Unsatisfiable => {}
            _ => panic!("{need:?}: {error:?}"),
        }
        assert!(!self.possible(need), "{need:?} refused with {error:?}");
    }

    /// Applies one operation to both and looks at everything.
    pub fn apply(&mut self, op: &BuddyOp) {
        self.run(op);
        self.check();
    }

    fn run(&mut self, op: &BuddyOp) {
        match *op {
            BuddyOp::Alloc {
                order,
                align,
                limit,
                mobility,
                zeroed,
            } => self.alloc(order, align, limit, mobility, zeroed),
            BuddyOp::Batch {
                order,
                count,
                mobility,
            } => self.alloc_batch(order, count, mobility),
            BuddyOp::Free(at) => self.free_one(at),
            BuddyOp::FreeBatch(at, count) => self.free_batch(at, count),
            BuddyOp::At { first, order } => self.alloc_at(first, order),
            BuddyOp::Range { frames, align } => self.alloc_range(frames, align),
            BuddyOp::RangeAt { first, frames } => self.alloc_range_at(first, frames),
            BuddyOp::DoubleFree(at) => self.free_twice(at),
            BuddyOp::Foreign(frame) => self.free_foreign(frame),
            BuddyOp::Drain => self.agree(),
            BuddyOp::Release => self.release(),
            BuddyOp::Pages(count) => self.add_pages(8 * usize::from(count)),
            BuddyOp::Mood { which, mood } => self.set_mood(usize::from(which), Mood::of(mood)),
            BuddyOp::FreePages { which, count } => {
                self.free_pages(usize::from(which), usize::from(count));
            }
            BuddyOp::Claim { first, frames } => {
                let (first, frames) = (u64::from(first), u64::from(frames));
                self.claim(FrameRange::from_numbers(first, first + frames).unwrap());
            }
            BuddyOp::Unclaim(which) => self.unclaim(usize::from(which)),
            BuddyOp::Area { block, more } => {
                let (first, more) = (u64::from(block % 10) * BLOCK, u64::from(more % 4));
                let end = first + (more + 1) * BLOCK;
                self.lend(FrameRange::from_numbers(first, end).unwrap());
            }
            BuddyOp::CmaClaim {
                area,
                frames,
                align,
            } => {
                let align = Order::new(align % 11).unwrap();
                self.claim_of_area(usize::from(area), u64::from(frames), align);
            }
            BuddyOp::Compact(blocks) => self.compact(u64::from(blocks)),
            BuddyOp::OnNode {
                policy,
                order,
                mobility,
            } => {
                let order = Order::new(order % 14).unwrap();
                self.alloc_on_node(policy, order, mobility_of(mobility));
            }
            BuddyOp::OnCpu(cpu) => self.go_to(cpu),
            BuddyOp::Offline(cpu) => self.offline(cpu),
            BuddyOp::Online(cpu) => self.online(cpu),
            BuddyOp::Deaf(deaf) => {
                self.calls.set_deaf(deaf);
            }
        }
    }

    /// Gives everything back and compares once more.
    pub fn finish(mut self) {
        self.agree();
        while let Some(frame) = self.live.pop() {
            self.gave(frame);
        }
        while !self.claims.is_empty() {
            self.unclaim(0);
        }
        self.free_pages(0, self.users.len());
        self.agree();
        let mut left = self.hands.iter();
        assert!(left.all(|(_, hand)| hand == Hand::Arrays));
        assert_eq!(self.buddy.misuse(), None);
        assert_eq!(self.buddy.lost(), 0);
    }
}
