//! Every pair of operations on one program's pages, interleaved at every access to a shared word.
//!
//! ```text
//!   setup ── anonymous, shared, file, private copy ── (forked?) (swapped out?) (slow devices?)
//!     ├── thread 1: one operation, once or twice ──┐
//!     ├── thread 2: another one                    ┴── every word is the last that was written there, every child's one that was
//!     └── all pages can go and come back, the disk holds what the program wrote, nothing leaks
//! ```
//!
//! Each thread writes to words of its own in each page, so that what a page must hold in the end does not depend on the schedule: only what
//! an operation takes away (unmapping, discarding, truncation) may be missing, and then whole.
//!
//! The machine is the mock one, a CPU for each thread: an access of a program is one step, and a flush reaches every CPU before it returns.
//! Schedules are random, from a seed; `KMEM_PAIRS` sets how many there are of each pair, `KMEM_PAIR=Write,Fork` picks one, and `KMEM_SEED`
//! begins elsewhere. A schedule that fails prints its seed.
#![cfg(shuttle)]

#[path = "shuttle_pairs/bursts.rs"]
mod bursts;
#[path = "common/changing_file.rs"]
mod changing_file;
#[path = "shuttle_pairs/check.rs"]
mod check;
#[path = "common/counted.rs"]
mod counted;
#[path = "shuttle_pairs/directed.rs"]
mod directed;
#[path = "shuttle_pairs/files.rs"]
mod files;
#[path = "shuttle_pairs/kernel.rs"]
mod kernel;
#[path = "shuttle_pairs/ops.rs"]
mod ops;
#[path = "shuttle_pairs/stops.rs"]
mod stops;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use bursts::Bursts;
use changing_file::ChangingFile;
use check::check;
use kernel::{Kernel, SLOTS, Space, forever};
use kmem_cow_mm::replacement::Fifo;
use kmem_cow_mm::{Advice, Layout, MapFlags, MapRequest, OpenFile, Outcome, Prot, Reclaimer};
use kmem_hal::{Frame, Mmu, Root};
use kmem_mock_x86::DiskImage;
use ops::{Done, OPS, Op, Program, THREADS, run_op};
use shuttle::rand::Rng;

const PAGE: u64 = 4096;
const RW: Prot = Prot::READ.union(Prot::WRITE);

/// Two private anonymous pages, and where they may be moved.
const ANON: u64 = 0x1000_0000;
const ELSEWHERE: u64 = 0x5000_0000;
/// A page of shared memory.
const SHARED: u64 = 0x2000_0000;
/// Two pages of a file, shared.
const FILE: u64 = 0x3000_0000;
/// The file's first page, private.
const COPY: u64 = 0x4000_0000;
fn access(kernel: Kernel, space: &Space, address: u64, write: Option<u64>) -> Result<u64, Outcome> {
    let machine = kernel.hardware.0;
    loop {
        // One instruction: nobody else runs in the middle of it.
        let result = kernel.hardware.here(|| {
            let cpu = machine.current_cpu();
            if machine.loaded_root(cpu) != space.root() {
                // SAFETY: the mock's kernel code does not run in the tables.
                unsafe { machine.load_root(space.root(), false) };
            }
            match write {
                Some(value) => machine
                    .cpu(cpu)
                    .user()
                    .write_u64(address, value)
                    .map(|()| value),
                None => machine.cpu(cpu).user().read_u64(address),
            }
        });
        match result {
            Ok(value) => return Ok(value),
            Err(fault) => match space.fault(&fault.as_page_fault().expect("a page fault")) {
                Outcome::Handled => {}
                Outcome::NeedIo(_) => shuttle::thread::yield_now(),
                other => return Err(other),
            },
        }
    }
}

/// Ends a space: no CPU runs it any more.
fn exit(kernel: Kernel, space: Space) {
    let machine = kernel.hardware.0;
    let nothing = Root {
        frame: Frame::ZERO,
        asid: kmem_hal::Asid::ZERO,
    };
    for cpu in 0..machine.cpu_count() {
        if machine.loaded_root(cpu).frame == space.root().frame {
            // SAFETY: the mock's kernel code does not run in any tables.
            machine.on_cpu(cpu, || unsafe { machine.load_root(nothing, false) });
        }
    }
    space.exit();
}

/// One schedule of two operations, begun and checked.
fn schedule(ops: [Op; THREADS]) {
    let kernel = Kernel::get();
    let mm = kernel.mm;
    let mut random = shuttle::rand::thread_rng();
    if mm.meminfo().swap.total == 0 {
        mm.swap_on(kernel.disk, kernel.slots).unwrap();
    }
    let before = kernel.used_frames();
    let bytes: Vec<u8> = (0..2)
        .flat_map(|page| {
            let mut bytes = vec![0; PAGE as usize];
            bytes[..8].copy_from_slice(&(FILE + page * PAGE).to_le_bytes());
            bytes
        })
        .collect();
    let provider = forever(ChangingFile {
        image: DiskImage::from_bytes(kernel.hardware.0, &bytes),
        size: AtomicU64::new(2 * PAGE),
    });
    let file = OpenFile {
        file: mm.open_file(provider, "/file", 7).unwrap(),
        readable: true,
        writable: true,
    };
    let space = Space::new(mm, Layout::x86_64()).unwrap();
    let map = |start, pages, flags, file| {
        let request = MapRequest {
            flags: flags | MapFlags::FIXED,
            address: start,
            file,
            ..MapRequest::anonymous(pages * PAGE, RW)
        };
        space.mmap(&request).unwrap();
    };
    map(ANON, 2, MapFlags::PRIVATE | MapFlags::ANONYMOUS, None);
    map(SHARED, 1, MapFlags::SHARED | MapFlags::ANONYMOUS, None);
    map(FILE, 2, MapFlags::SHARED, Some(file));
    map(COPY, 1, MapFlags::PRIVATE, Some(file));
    let touch = random.gen_bool(0.5);
    for page in [ANON, ANON + PAGE, SHARED] {
        access(kernel, &space, page, Some(page)).unwrap();
    }
    if touch {
        for page in [FILE, FILE + PAGE, COPY] {
            access(kernel, &space, page, None).unwrap();
        }
    }
    let mut children = Vec::new();
    if random.gen_bool(0.4) {
        children.push(space.fork().unwrap());
    }
    let latency = random.gen_range(0..3);
    if random.gen_bool(0.4) {
        kernel.disk.set_latency(latency);
        let _ = Reclaimer::new(Fifo).reclaim(mm, random.gen_range(1..8));
    }
    kernel.disk.set_latency(latency);
    provider.image.set_latency(random.gen_range(0..2));

    let elder = children.len();
    let program = Arc::new(Program {
        kernel,
        space,
        file,
        provider,
        ops,
    });
    let threads: Vec<_> = (0..THREADS)
        .map(|thread| {
            let program = program.clone();
            let rounds = random.gen_range(1..3);
            shuttle::thread::spawn(move || {
                let mut done = Done::default();
                for round in 0..rounds {
                    run_op(&program, thread, round, program.ops[thread], &mut done);
                }
                done
            })
        })
        .collect();
    let mut done: Vec<Done> = threads
        .into_iter()
        .map(|thread| thread.join().unwrap())
        .collect();
    let program = Arc::into_inner(program).expect("the threads are done");
    children.extend(done.iter_mut().flat_map(|done| done.children.drain(..)));
    check(&program, &done, &children, elder);
    for child in children {
        exit(kernel, child);
    }
    exit(kernel, program.space);
    mm.close(file.file);
    while mm.poll_swap().is_some() {}
    let swap = mm.meminfo().swap;
    assert_eq!(swap.free, swap.total, "slots of swap leak");
    assert_eq!(mm.committed(), 0, "promises leak");
    assert_eq!(kernel.used_frames(), before, "frames leak");
}

fn number(name: &str, otherwise: u64) -> u64 {
    let text = std::env::var(name).ok();
    text.and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

/// Runs schedules of one pair; gives how many.
fn run_pair(one: Op, other: Op, schedules: usize) -> usize {
    let name = format!("{one:?},{other:?}");
    run_schedules(name, 1, schedules, move || schedule([one, other]))
}

fn run_schedules(
    name: String,
    seed: u64,
    schedules: usize,
    body: impl Fn() + Send + Sync + 'static,
) -> usize {
    let scheduler = Bursts::new(name, number("KMEM_SEED", seed), schedules);
    run(scheduler, body)
}

/// Runs the schedules of a scheduler; gives how many.
fn run(
    scheduler: impl shuttle::scheduler::Scheduler + 'static,
    body: impl Fn() + Send + Sync + 'static,
) -> usize {
    let mut config = shuttle::Config::new();
    config.stack_size = 1 << 20;
    config.max_steps = shuttle::MaxSteps::FailAfter(4_000_000);
    config.failure_persistence = shuttle::FailurePersistence::None;
    shuttle::Runner::new(scheduler, config).run(body)
}

#[test]
fn shuttle_pairs_of_operations_lose_nothing() {
    let schedules = number("KMEM_PAIRS", 3) as usize;
    let wanted = std::env::var("KMEM_PAIR").unwrap_or_default();
    let mut runs = 0;
    for (at, &one) in OPS.iter().enumerate() {
        for &other in &OPS[at..] {
            if wanted.is_empty() || wanted == format!("{one:?},{other:?}") {
                runs += run_pair(one, other, schedules);
            }
        }
    }
    assert!(runs > 0);
}

/// A page that another thread's fault maps writable is dirty before this thread can write through that mapping: `msync` sees it. One schedule
/// in some hundreds stops the fault between the two.
#[test]
fn shuttle_a_write_through_another_threads_mapping_is_synced() {
    run_pair(Op::WriteFile, Op::WriteAndSync, 500);
}

/// A page that a fault reads in has a reference of the fault's: another thread's `MADV_FREE` gives up the slot, and with it the cache's reference,
/// as soon as the slot names the page. The fault looks again then: a slot that is gone is no bus error.
#[test]
fn shuttle_a_page_that_is_read_in_outlives_its_slot() {
    let body = || {
        let kernel = Kernel::get();
        kernel.disk.set_latency(0);
        if kernel.mm.meminfo().swap.total == 0 {
            kernel.mm.swap_on(kernel.disk, kernel.slots).unwrap();
        }
        let space = Arc::new(Space::new(kernel.mm, Layout::x86_64()).unwrap());
        let request = MapRequest::anonymous(PAGE, RW);
        space.mmap(&request.at(ANON)).unwrap();
        access(kernel, &space, ANON, Some(7)).unwrap();
        space.madvise(ANON, PAGE, Advice::PageOut).unwrap();
        assert_eq!(space.swapped(), 1);
        let other = space.clone();
        let reader = shuttle::thread::spawn(move || access(kernel, &other, ANON, None).unwrap());
        space.madvise(ANON, PAGE, Advice::Free).unwrap();
        assert!([0, 7].contains(&reader.join().unwrap()));
        exit(kernel, Arc::into_inner(space).unwrap());
        assert_eq!(kernel.mm.meminfo().swap.free, SLOTS as u64);
    };
    // Both happen in some of these: the page is freed before its read is begun, and the slot before it is counted for that.
    run_schedules("read in, freed".into(), 20_000, 500, body);
}
