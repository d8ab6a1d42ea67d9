//! The planner of compaction against the two-finger scan of most kernels: as many blocks for far fewer moves.
//!
//! The two-finger scan (Jonkers 1979; Linux mm/compaction.c) moves what is taken from the bottom into what is free at the top until
//! the fingers meet. It asks nobody how full a block is. The planner empties the emptiest blocks.

mod common;

use std::cell::RefCell;
use std::collections::BTreeSet;

use common::machine::{Machine, boot};
use common::window::Window;
use kmem_buddy::Compacted;
use kmem_hal::{
    Frame, FrameRequest, FrameSink, FrameSource, Migrate, MigrateError, Order, OwnedFrame,
};

const BLOCK: u64 = 512;
const BLOCKS: u64 = 64;
const END: u64 = BLOCKS * BLOCK;

/// Who uses which frame, as single frames that can all be moved.
#[derive(Default)]
struct Users(RefCell<BTreeSet<u64>>);

impl Migrate for Users {
    fn migrate(
        &self,
        from: Frame,
        to: OwnedFrame,
    ) -> Result<OwnedFrame, (MigrateError, OwnedFrame)> {
        let mut used = self.0.borrow_mut();
        if !used.remove(&from.number()) {
            return Err((MigrateError::NotMovable, to));
        }
        let (to, _) = to.into_raw();
        assert!(used.insert(to.number()), "moved onto a frame in use");
        // SAFETY: nobody uses the simulated frame any more.
        Ok(unsafe { OwnedFrame::from_raw(from, Order::ZERO) })
    }
}

/// xorshift64*, so that every run is the same.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) % end
    }
}

/// Blocks of orders 0 to 9 come and go at 90 %, then random ones go until half is free.
fn churn(window: &Window, seed: u64) -> (Machine<'_>, Users) {
    let buddy = boot(window, &[]);
    let total = buddy.mem_info().total;
    let mut random = Random(seed);
    let mut live: Vec<OwnedFrame> = Vec::new();
    let mut used = 0;
    for _ in 0..25_000 {
        if used > total * 9 / 10 || live.is_empty() && used > 0 {
            let frame = live.swap_remove(random.below(live.len() as u64) as usize);
            used -= frame.range().count();
            buddy.free(frame);
        } else {
            let order = random.below(1 << 10).trailing_zeros().min(9) as u8;
            let request = FrameRequest::new(Order::new(order).unwrap()).movable();
            if let Ok(frame) = buddy.alloc(&request) {
                used += frame.range().count();
                live.push(frame);
            }
        }
    }
    while used > total / 2 {
        let frame = live.swap_remove(random.below(live.len() as u64) as usize);
        used -= frame.range().count();
        buddy.free(frame);
    }
    buddy.drain_all();
    let users = Users::default();
    for frame in live {
        let range = frame.range();
        users.0.borrow_mut().extend(range.iter().map(Frame::number));
        let _owned_by_users = frame.into_raw();
    }
    (buddy, users)
}

/// Wholly free blocks, by the users' own account; `other` are taken by nobody that moves.
fn free_blocks(used: &BTreeSet<u64>, other: &BTreeSet<u64>) -> u64 {
    let free = |block: &u64| {
        let frames = block * BLOCK..(block + 1) * BLOCK;
        used.range(frames.clone()).next().is_none() && other.range(frames).next().is_none()
    };
    (0..BLOCKS).filter(free).count() as u64
}

/// How many frames the two-finger scan moves until `target` blocks are free, or its fingers meet.
fn two_fingers(used: &BTreeSet<u64>, other: &BTreeSet<u64>, target: u64) -> u64 {
    let mut taken: Vec<bool> = (0..END)
        .map(|at| used.contains(&at) || other.contains(&at))
        .collect();
    let mut held: Vec<u64> = taken
        .chunks(BLOCK as usize)
        .map(|block| block.iter().filter(|&&taken| taken).count() as u64)
        .collect();
    let mut free = held.iter().filter(|&&held| held == 0).count() as u64;
    let (mut low, mut high, mut moves) = (0, END - 1, 0);
    while free < target {
        while low < high && (!taken[low as usize] || other.contains(&low)) {
            low += 1;
        }
        while low < high && taken[high as usize] {
            high -= 1;
        }
        if low >= high {
            break;
        }
        taken.swap(low as usize, high as usize);
        held[(low / BLOCK) as usize] -= 1;
        free += u64::from(held[(low / BLOCK) as usize] == 0);
        free -= u64::from(held[(high / BLOCK) as usize] == 0);
        held[(high / BLOCK) as usize] += 1;
        moves += 1;
    }
    moves
}

#[test]
fn the_planner_moves_less_than_two_fingers() {
    let window = Window::new(END << 12, 1 << 20);
    let (mut planned, mut scanned) = (0, 0);
    for seed in 1..=16 {
        let (buddy, users) = churn(&window, seed * 0x9e37_79b9);
        let other: BTreeSet<u64> = buddy
            .metadata()
            .iter()
            .map(Frame::number)
            .chain([0])
            .collect();
        let before = users.0.borrow().clone();
        let unaided = free_blocks(&before, &other);
        // Three quarters of what free memory amounts to.
        let target = (END - before.len() as u64) / BLOCK * 3 / 4;
        assert!(
            unaided < target,
            "seed {seed}: {unaided} of {target} without a move"
        );
        let scan = two_fingers(&before, &other, target);
        let Compacted { blocks, moved } = buddy.compact(target - unaided, &users);
        assert_eq!(blocks, target - unaided, "seed {seed}");
        assert_eq!(
            free_blocks(&users.0.borrow(), &other),
            target,
            "seed {seed}"
        );
        assert!(moved < scan, "seed {seed}: {moved} of {scan}");
        planned += moved;
        scanned += scan;
        // Nobody was lost on the way.
        let after = users.0.borrow().clone();
        assert_eq!(after.len(), before.len());
        let info = buddy.mem_info();
        assert_eq!(info.free + info.cached + after.len() as u64, info.total);
        buddy.check().unwrap();
        // The same state gives the same plan.
        let (again, same) = churn(&window, seed * 0x9e37_79b9);
        let result = again.compact(target - unaided, &same);
        assert_eq!((result.blocks, result.moved), (blocks, moved));
        assert_eq!(*same.0.borrow(), after);
    }
    println!("planned {planned} of {scanned} moves");
    assert!(planned * 10 <= scanned * 6, "{planned} of {scanned}");
}
