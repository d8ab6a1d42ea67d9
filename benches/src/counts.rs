//! Instruction counts: `counts NAME` runs one workload of fixed size, for callgrind.
//!
//! A count does not depend on what else the machine does, so that it can stand in the gate, where a time cannot.
//! `cargo xtask counts` runs each workload under valgrind, counts what happens below [`measured`], and compares with the
//! committed figures. Setting up is outside. Without a name the program lists its workloads.

use std::alloc::Layout;
use std::hint::black_box;

use kmem::hal::{
    Cpu, DeviceFrame, FaultCode, FixedPool, Frame, FrameRequest, FrameSink, FrameSource, Lock,
    ObjectAlloc, OffsetMap, Order, Page, PageRange, SingleCpu, Spin,
};
use kmem::paging::format::X86_64;
use kmem::paging::{ChangeError, PageTable, Parts, Rights};
use kmem::vma_tree::{GapRequest, Node, RangeTree};
use kmem::{BootMap, Config, Heap, PhysAddr, RegionKind};
use kmem_benches::area::fork::{Process, mm};
use kmem_benches::mixed::pairs;
use kmem_benches::platform::{NoWalks, Region, ThreadCpus, buddy, frame_table, grace};
use kmem_benches::valgrind::skip_interrupt_flag;

/// A machine of 64 MiB on one CPU, with the plain lock.
type Machine = Heap<OffsetMap, SingleCpu, Spin>;
// SAFETY: one thread runs.
static HEAP: Machine = Heap::with(OffsetMap::unset(), unsafe { SingleCpu::new() });

/// Starts [`HEAP`].
fn boot() -> &'static Machine {
    let bytes = 64 << 20;
    let layout = Layout::from_size_align(bytes, 2 << 20).expect("a layout");
    // SAFETY: the layout has a size.
    let memory = unsafe { std::alloc::alloc_zeroed(layout) };
    assert!(!memory.is_null(), "no memory for the machine");
    let base = 2 << 20;
    let mut map: BootMap = BootMap::new();
    map.push(PhysAddr::new(base as u64), bytes as u64, RegionKind::Usable)
        .expect("one entry");
    let offset = memory.expose_provenance().wrapping_sub(base);
    // SAFETY: the memory was just allocated and stays; one thread runs.
    unsafe {
        HEAP.memory()
            .frames()
            .memory()
            .set(offset, ((base + bytes) >> 12) as u64);
        HEAP.init_mapped(&mut map, &Config::new())
            .expect("the machine starts");
    }
    &HEAP
}

/// One or many blocks of an order, allocated and freed.
fn frames(order: u8, batch: usize) {
    let frames = boot().memory().frames();
    let request = FrameRequest::new(Order::new(order).expect("an order"));
    let mut held = Vec::with_capacity(batch);
    measured(&mut || {
        for _ in 0..N / batch {
            for _ in 0..batch {
                held.push(frames.alloc(black_box(&request)).expect("64 MiB"));
            }
            while let Some(frame) = held.pop() {
                frames.free(frame);
            }
        }
    });
}

/// The pair as `compare` calls it, so that what is between its loop and the allocator does not grow unseen.
fn compared(order: u8) {
    let frames = buddy(Region::leak(1 << 14));
    assert_eq!(pairs(&frames, order, 1), 1, "64 MiB are free");
    measured(&mut || {
        black_box(pairs(&frames, black_box(order), N as u64));
    });
}

/// One or many objects of a size, allocated and freed.
fn objects(size: usize, batch: usize) {
    let slab = boot().memory().slab();
    let layout = Layout::from_size_align(size, 8).expect("a layout");
    let mut held = Vec::with_capacity(batch);
    measured(&mut || {
        for _ in 0..N / batch {
            for _ in 0..batch {
                held.push(slab.alloc(black_box(layout)));
            }
            while let Some(memory) = held.pop() {
                // SAFETY: just allocated with this layout.
                unsafe { slab.dealloc(memory, layout) };
            }
        }
    });
}

/// Look-ups, gap searches, or stores in a tree of a thousand ranges.
fn ranges(what: &str) {
    static NODES: FixedPool<Node, 1024> = FixedPool::new();
    let mut tree: RangeTree<u64, _> = RangeTree::new_in(&NODES);
    let at = |i: usize| {
        PageRange::with_count(Page::from_number(0x1000 + 4 * i as u64), 3).expect("pages")
    };
    let mut fill = || {
        for i in 0..N {
            tree.store(at(i * 7 % N), Some(1), &mut |_| ())
                .expect("nodes");
        }
    };
    if what == "store" {
        return measured(&mut fill);
    }
    fill();
    let whole = PageRange::with_count(Page::from_number(0x1000), 4 * N as u64 + 64).expect("pages");
    let request = GapRequest::new(8).limits(whole);
    measured(&mut || {
        for i in 0..N {
            if what == "get" {
                black_box(tree.get(black_box(at(i * 7 % N).first())));
            } else {
                black_box(tree.find_gap_up(black_box(&request)));
            }
        }
    });
}

/// Pages that are mapped, looked up, faulted on and unmapped.
fn pages(what: &str) {
    skip_interrupt_flag();
    let region = Region::leak(1 << 14);
    let (frames, cpus) = (buddy(region), ThreadCpus::all());
    // SAFETY: the only frame table of the region, and no MMU walks.
    let env = unsafe { Parts::new(region, frames, NoWalks, grace(), cpus, frame_table(region)) };
    let env = env.with_cache(64);
    let table = PageTable::<X86_64, _, DeviceFrame>::new(&env).expect("a root");
    let _ = table.root();
    let first = Page::from_number(1 << 20);
    let range = PageRange::with_count(first, N as u64).expect("pages");
    let frame = |page: Page| {
        let number = (1 << 24) + page.number();
        DeviceFrame::new(Frame::from_number(number), Order::ZERO).expect("a frame")
    };
    let mut cursor = table.cursor(range).expect("the lower half");
    let mut gather = table.gather::<32>();
    let mut map = || {
        for page in range.iter() {
            let mapped = cursor.map(page, frame(page), black_box(Rights::USER_DATA));
            mapped.expect("tables");
        }
    };
    if what == "map" {
        return measured(&mut map);
    }
    map();
    match what {
        "translate" => {
            drop(cursor);
            measured(&mut || {
                for page in range.iter() {
                    black_box(table.translate(black_box(page).start()));
                }
            });
        }
        "fault" => {
            drop(cursor);
            measured(&mut || {
                for page in range.iter() {
                    let mut entry = table.lock_entry(black_box(page)).expect("a table");
                    assert!(entry.relax(Rights::USER_DATA, true));
                }
            });
        }
        _ => measured(&mut || {
            let mut rest = Some(black_box(range));
            while let Some(part) = rest {
                rest = match cursor.unmap(part, &mut gather) {
                    Err(ChangeError::Full { next }) => PageRange::new(next, range.last()),
                    done => done.map(|_| None).expect("the range is the cursor's"),
                };
                cursor.release();
                gather.commit(drop);
            }
        }),
    }
}

/// Write faults of a process at pages that its child had: no copy, and so nothing of a C library's that is counted too.
fn faults() {
    skip_interrupt_flag();
    let pages = 3 * 512;
    let process = Process::touched(mm(Region::new(1 << 14)), pages);
    let child = process.fork();
    // Both have tables of their own from now on: the first page of each was written to.
    for first in (0..pages).step_by(512) {
        child.write(first..first + 1, FaultCode::PRESENT);
        process.write(first..first + 1, FaultCode::PRESENT);
    }
    drop(child);
    let others = || (0..pages).filter(|page| page % 512 != 0).take(N);
    measured(&mut || process.write(others(), FaultCode::PRESENT));
}

/// Operations in one workload.
const N: usize = 1000;

/// What is counted: the body of a workload and nothing else.
#[unsafe(no_mangle)]
#[inline(never)]
fn measured(body: &mut dyn FnMut()) {
    body();
}

/// A name and a function that sets up and calls [`measured`] once.
type Workload = (&'static str, fn());

/// Every workload, in the order of the published table.
const WORKLOADS: &[Workload] = &[
    ("hal/pin", || {
        // SAFETY: one thread.
        let cpu = unsafe { SingleCpu::new() };
        measured(&mut || {
            for _ in 0..N {
                black_box(cpu.pin().id());
            }
        });
    }),
    ("hal/lock_spin", || {
        let lock = Lock::<u64, Spin>::new(0);
        measured(&mut || {
            for _ in 0..N {
                *black_box(&lock).lock() += 1;
            }
        });
    }),
    ("hal/pool_pair", || {
        static POOL: FixedPool<u64, 256> = FixedPool::new();
        measured(&mut || {
            for _ in 0..N {
                let object = black_box(&POOL).alloc().expect("256 objects");
                // SAFETY: just given, and freed once.
                unsafe { POOL.free(black_box(object)) };
            }
        });
    }),
    ("buddy/pair_o0", || frames(0, 1)),
    ("buddy/pair_o3", || frames(3, 1)),
    ("buddy/compared_o0", || compared(0)),
    ("buddy/batch_o0", || frames(0, N)),
    ("slab/pair64", || objects(64, 1)),
    ("slab/batch64", || objects(64, N)),
    ("slab/pair1k", || objects(1024, 1)),
    ("vma/lookup", || ranges("get")),
    ("vma/gap_up", || ranges("gap")),
    ("vma/insert", || ranges("store")),
    ("paging/map", || pages("map")),
    ("paging/translate", || pages("translate")),
    ("paging/fault", || pages("fault")),
    ("paging/unmap", || pages("unmap")),
    ("cow/reuse_fault", faults),
];

fn main() {
    match std::env::args().nth(1) {
        None => WORKLOADS.iter().for_each(|(name, _)| println!("{name}")),
        Some(wanted) => match WORKLOADS.iter().find(|(name, _)| *name == wanted) {
            Some((_, run)) => run(),
            None => {
                eprintln!("counts: there is no workload {wanted}");
                std::process::exit(2);
            }
        },
    }
}
