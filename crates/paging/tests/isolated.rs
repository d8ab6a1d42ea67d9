//! A table with a second root for user mode, where memory runs out at each allocation in turn.

#![cfg(not(loom))]

#[path = "common/machine.rs"]
mod machine;

use std::collections::BTreeSet;
use std::sync::Mutex;

use kmem_hal::{
    AllocError, DeviceFrame, FlushRequest, Frame, FrameRequest, FrameSink, FrameSource, Mmu, Order,
    OwnedFrame, Page, PageRange, PhysMap, Root, SingleCpu, SingleGrace,
};
use kmem_paging::format::{Format, X86_64};
use kmem_paging::{Env, PageTable, Parts, Rights, TableCache, TableError};
use machine::{Arena, Machine};

/// Blocks of any order of the arena's upper half, until the fuse burns out.
struct Blocks {
    map: &'static Arena,
    free: Mutex<BTreeSet<u64>>,
    fuse: Mutex<Option<usize>>,
}

// SAFETY: F1: what is given is free no more; F2: the run is aligned and of the order; F3: a refused call takes nothing.
unsafe impl FrameSource for Blocks {
    fn alloc(&self, request: &FrameRequest) -> Result<OwnedFrame, AllocError> {
        if let Some(left) = &mut *self.fuse.lock().unwrap() {
            *left = left.checked_sub(1).ok_or(AllocError::OutOfMemory)?;
        }
        let mut free = self.free.lock().unwrap();
        let count = request.order.frames();
        let first = free
            .iter()
            .copied()
            .find(|first| first % count == 0 && (0..count).all(|at| free.contains(&(first + at))))
            .ok_or(AllocError::OutOfMemory)?;
        for number in first..first + count {
            free.remove(&number);
            let frame = Frame::new(number).unwrap();
            // SAFETY: the frame is in the arena and free.
            unsafe { self.map.to_ptr(frame.start()).write_bytes(0, 4096) };
        }
        // SAFETY: O1 to O3: it was free, and is aligned.
        Ok(unsafe { OwnedFrame::from_raw(Frame::new(first).unwrap(), request.order) })
    }
}

impl FrameSink for Blocks {
    fn free(&self, frame: OwnedFrame) {
        for number in frame.range().iter() {
            let new = self.free.lock().unwrap().insert(number.number());
            assert!(new, "{number:?} freed twice");
        }
    }
}

/// An MMU that knows of user roots, on a machine that walks nowhere.
struct TwoRoots;

// SAFETY: M1 to M5: no CPU walks these tables.
unsafe impl Mmu for TwoRoots {
    unsafe fn load_root(&self, _root: Root, _keep: bool) {}
    fn flush_local(&self, _request: &FlushRequest) {}
    fn isolates(&self) -> bool {
        true
    }
}

type TwoEnv = Parts<'static, &'static Arena, &'static Blocks, TwoRoots, SingleGrace, SingleCpu>;
type Table = PageTable<X86_64, &'static TwoEnv, DeviceFrame>;

fn leak<T>(value: T) -> &'static T {
    Box::leak(Box::new(value))
}

/// What is in the two roots, own part and borrowed part.
fn words(map: &Arena, table: &Table) -> [Vec<u64>; 2] {
    let root = table.root().frame.number();
    [root, root + 1].map(|number| {
        let start = map
            .to_ptr(Frame::new(number).unwrap().start())
            .cast::<u64>();
        // SAFETY: a table of the arena, which nobody changes meanwhile.
        (0..512).map(|at| unsafe { start.add(at).read() }).collect()
    })
}

#[test]
fn an_isolated_table_without_memory_is_none_or_as_it_was() {
    let machine = Machine::new(2048);
    let blocks = leak(Blocks {
        map: machine.map,
        free: Mutex::new((1024..2048).collect()),
        fuse: Mutex::new(None),
    });
    // SAFETY: E2 to E4: the only frame table, no MMU walks, and the frames are of the arena's upper half.
    let env: &TwoEnv = leak(unsafe {
        Parts::new(
            machine.map,
            blocks,
            TwoRoots,
            SingleGrace::new(),
            SingleCpu::new(),
            machine.env().slots(),
        )
    });
    let half = Page::containing(X86_64::canonical(4).upper_start().unwrap());
    let [kernel, trampoline] = [(); 2].map(|()| Table::new(env).unwrap());
    for lender in [&kernel, &trampoline] {
        lender.lend_from(half).unwrap();
    }
    let left = || {
        TableCache::shrink(env, usize::MAX);
        blocks.free.lock().unwrap().len()
    };
    let before = left();
    let page = Page::new(0x400).unwrap();
    let mut refused = 0;
    for fuse in 0.. {
        *blocks.fuse.lock().unwrap() = Some(fuse);
        let made = Table::isolated(env, &kernel, &trampoline, half);
        let outcome = made.and_then(|table| {
            let like = Table::empty_like(env, &table);
            let roots = words(machine.map, &table);
            let mut cursor = table.cursor(PageRange::single(page)).unwrap();
            let frame = DeviceFrame::new(Frame::from_number(0x8000), Order::ZERO).unwrap();
            let mapped = cursor.map(page, frame, Rights::USER_DATA);
            drop(cursor);
            let now = words(machine.map, &table);
            assert_eq!(now[0][..256], now[1][..256], "the own part");
            assert_eq!(now != roots, mapped.is_ok());
            let complete = like.is_ok() && mapped.is_ok();
            if let Ok(like) = like {
                like.destroy(|_, _| {}, |_, _| {});
            }
            table.destroy(|_, _| {}, |_, _| {});
            let short = TableError::Memory(AllocError::OutOfMemory);
            if complete { Ok(()) } else { Err(short) }
        });
        *blocks.fuse.lock().unwrap() = None;
        assert_eq!(left(), before, "after {fuse} allocations");
        match outcome {
            Ok(()) => break,
            Err(error) => {
                assert_eq!(error, TableError::Memory(AllocError::OutOfMemory));
                refused += 1;
            }
        }
    }
    // Two pairs of roots, and three tables for the page.
    assert_eq!(refused, 5);
}
