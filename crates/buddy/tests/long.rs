//! Many random operations against a map of who owns which frame; `KMEM_LONG_OPS=100000000` makes it 10^8 of them.

mod common;

use common::machine::{map_with_holes, start};
use common::window::Window;
use kmem_buddy::{Config, ZoneKind, ZoneLimits};
use kmem_hal::{
    AllocError, Frame, FrameRange, FrameRequest, FrameSink, FrameSource, Mobility, Order,
    OwnedFrame, PhysAddr,
};

/// One past the last frame.
const END: u64 = 0x2345;
const LIMITS: ZoneLimits = ZoneLimits {
    dma: Some(0x3a0),
    dma32: None,
    normal: Some(0x1700),
    movable: None,
};

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 16) % limit
    }
}

/// Which frames are free, and in which zone each lies.
struct Owners {
    free: Vec<bool>,
    used: u64,
}

impl Owners {
    fn take(&mut self, range: FrameRange) {
        for frame in range.iter() {
            let free = &mut self.free[frame.number() as usize];
            assert!(*free, "{frame} has two owners, or is no memory");
            *free = false;
        }
        self.used += range.count();
    }

    fn give(&mut self, range: FrameRange) {
        for frame in range.iter() {
            self.free[frame.number() as usize] = true;
        }
        self.used -= range.count();
    }

    /// Whether an aligned run of free frames in one zone that `mobility` may use ends at or below `limit`.
    fn has(&self, order: Order, limit: u64, mobility: Mobility) -> bool {
        let size = order.frames();
        let kind = |frame: u64| LIMITS.kind_of(Frame::new(frame).unwrap()).0;
        (0..END / size).any(|block| {
            let (first, last) = (block * size, block * size + size - 1);
            last < limit.min(END)
                && self.free[first as usize..=last as usize]
                    .iter()
                    .all(|&free| free)
                && kind(first) == kind(last)
                && kind(first) <= ZoneKind::highest_for(mobility)
        })
    }
}

fn operations() -> u64 {
    std::env::var("KMEM_LONG_OPS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(200_000)
}

#[test]
fn many_operations_keep_every_frame() {
    let window = Window::new(END << 12, END << 12);
    let mut map = map_with_holes(END);
    let config = Config::new()
        .limits(LIMITS)
        .min_free_kib(0)
        .reserve_ratio([0; 5]);
    let buddy = start(&window, &mut map, &config);
    let mut owners = Owners {
        free: vec![false; END as usize],
        used: 0,
    };
    let mut total = 0;
    map.for_each_free(|range| {
        total += range.count();
        for frame in range.iter() {
            owners.free[frame.number() as usize] = true;
        }
    });
    let mut rng = Rng(0x9e37_79b9_7f4a_7c15);
    let mut live: Vec<OwnedFrame> = Vec::new();
    let mut refusals = 0u64;
    // How full it is kept: changes now and then.
    let mut level = total / 2;
    let count = operations();
    for step in 0..count {
        let dice = rng.below(1 << 20);
        if dice.is_multiple_of(4096) {
            level = total * (1 + rng.below(32)) / 32;
        }
        if dice.is_multiple_of(65536) {
            assert!(buddy.drain_local());
            buddy.check().unwrap();
            assert_eq!(buddy.recount().free + owners.used, total, "step {step}");
            continue;
        }
        if owners.used >= level && !live.is_empty() || dice.is_multiple_of(8) && !live.is_empty() {
            let at = rng.below(live.len() as u64) as usize;
            if dice % 64 == 1 {
                // Many in one call.
                let mut frames = live.split_off(live.len().saturating_sub(40).max(at / 2));
                frames.iter().for_each(|frame| owners.give(frame.range()));
                buddy.free_batch(&mut || frames.pop());
            } else {
                let frame = live.swap_remove(at);
                owners.give(frame.range());
                buddy.free(frame);
            }
            continue;
        }
        let order = Order::new(rng.next().trailing_zeros().min(10) as u8).unwrap();
        let mobility = match rng.below(4) {
            0 => Mobility::Unmovable,
            1 => Mobility::Reclaimable,
            _ => Mobility::Movable,
        };
        if dice % 128 == 2 {
            let place = Frame::new(rng.below(END)).unwrap().align_down(order);
            if let Ok(frame) = buddy.alloc_at(place, order) {
                owners.take(frame.range());
                live.push(frame);
            }
            continue;
        }
        let mut request = FrameRequest::new(order).mobility(mobility);
        let mut limit = END;
        if dice % 32 == 3 {
            limit = rng.below(END);
            request = request.below(PhysAddr::new(limit << 12));
        }
        if dice % 64 == 4 {
            let given = buddy.alloc_batch(&request, 1 + (dice >> 12) as usize % 80, &mut |frame| {
                owners.take(frame.range());
                live.push(frame);
            });
            assert!(given != Ok(0));
            continue;
        }
        match buddy.alloc(&request) {
            Ok(frame) => {
                assert!(frame.first().is_aligned(order) && frame.order() == order);
                assert!(frame.range().end_number() <= limit);
                owners.take(frame.range());
                live.push(frame);
            }
            Err(AllocError::OutOfMemory | AllocError::Unsatisfiable) => {
                refusals += 1;
                // Looking takes long: not each time.
                if refusals % 64 == 1 {
                    assert!(
                        !owners.has(order, limit, mobility),
                        "step {step}: {request:?} was refused"
                    );
                }
            }
            Err(error) => panic!("step {step}: {error:?}"),
        }
    }
    for frame in live {
        owners.give(frame.range());
        buddy.free(frame);
    }
    assert!(buddy.drain_local());
    buddy.check().unwrap();
    assert_eq!(buddy.misuse(), None);
    assert_eq!(buddy.recount().free, total);
    println!("{count} operations, {refusals} refusals");
}
