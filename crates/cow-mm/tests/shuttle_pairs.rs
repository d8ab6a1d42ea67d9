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
#[path = "shuttle_pairs/directed.rs"]
mod directed;
#[path = "shuttle_pairs/kernel.rs"]
mod kernel;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bursts::Bursts;
use changing_file::ChangingFile;
use kernel::{Kernel, SLOTS, Space, forever};
use kmem_cow_mm::replacement::Fifo;
use kmem_cow_mm::{
    Advice, Counters, Layout, MapFlags, MapRequest, OpenFile, Outcome, PinError, Prot, Reclaimer,
    RemapFlags,
};
use kmem_hal::{
    Access, Frame, FrameRequest, FrameSink, FrameSource, Migrate, Mmu, Page, Root, VirtAddr,
};
use kmem_mock_x86::DiskImage;
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
const THREADS: usize = 2;

/// What a thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    Read,
    Write,
    WriteShared,
    WriteFile,
    WriteAndSync,
    WriteCopy,
    ReadFile,
    Fork,
    ForkAndExit,
    Unmap,
    Move,
    Protect,
    DontNeed,
    Free,
    PageOut,
    Pin,
    PinShared,
    Migrate,
    Reclaim,
    SwapOff,
    Truncate,
    Sync,
    Remove,
}

const OPS: [Op; 23] = [
    Op::Read,
    Op::Write,
    Op::WriteShared,
    Op::WriteFile,
    Op::WriteAndSync,
    Op::WriteCopy,
    Op::ReadFile,
    Op::Fork,
    Op::ForkAndExit,
    Op::Unmap,
    Op::Move,
    Op::Protect,
    Op::DontNeed,
    Op::Free,
    Op::PageOut,
    Op::Pin,
    Op::PinShared,
    Op::Migrate,
    Op::Reclaim,
    Op::SwapOff,
    Op::Truncate,
    Op::Sync,
    Op::Remove,
];

/// What a thread did: writes that were made, and children.
#[derive(Default)]
struct Done {
    /// Address of the page, value; in order.
    wrote: Vec<(u64, u64)>,
    children: Vec<Space>,
}

/// The program, shared by the threads of a schedule.
struct Program {
    kernel: Kernel,
    space: Space,
    file: OpenFile,
    provider: &'static ChangingFile,
    ops: [Op; THREADS],
}

impl Program {
    fn one_of(&self, wanted: &[Op]) -> bool {
        self.ops.iter().any(|op| wanted.contains(op))
    }

    /// Whether an operation of the schedule may take away what a page of the region holds.
    fn may_lose(&self, page: u64) -> bool {
        match page {
            COPY => false,
            SHARED => self.one_of(&[Op::Remove]),
            FILE.. if page < COPY => page != FILE && self.one_of(&[Op::Truncate]),
            _ => self.one_of(&[Op::DontNeed, Op::Free]),
        }
    }
}

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

/// What a thread writes to its word of a page.
fn value(thread: usize, round: u64, page: u64) -> u64 {
    page | (thread as u64 + 1) << 56 | (round + 1) << 48
}

fn run_op(program: &Program, thread: usize, round: u64, op: Op, done: &mut Done) {
    let Program {
        kernel,
        space,
        file,
        provider,
        ..
    } = program;
    let (kernel, mm) = (*kernel, kernel.mm);
    let word = 8 * (thread as u64 + 1);
    let mut random = shuttle::rand::thread_rng();
    let anon = ANON + PAGE * random.gen_range(0..2u64);
    let in_file = FILE + PAGE * random.gen_range(0..2u64);
    let mut store = |page: u64| -> Option<u64> {
        let new = value(thread, round, page);
        access(kernel, space, page + word, Some(new)).ok()?;
        done.wrote.push((page, new));
        let taken = page & !PAGE == ANON && program.one_of(&[Op::Unmap, Op::Move, Op::Protect]);
        if !taken && !program.may_lose(page) {
            assert_eq!(access(kernel, space, page + word, None), Ok(new));
        }
        Some(new)
    };
    match op {
        Op::Read => {
            if let Ok(stamp) = access(kernel, space, anon, None) {
                assert!(
                    stamp == anon || stamp == 0 && program.may_lose(anon),
                    "{stamp:#x} at {anon:#x}"
                );
            }
        }
        Op::Write => {
            store(anon);
        }
        Op::WriteShared => {
            store(SHARED).unwrap();
        }
        Op::WriteFile => {
            store(in_file);
        }
        Op::WriteCopy => {
            store(COPY).unwrap();
        }
        Op::WriteAndSync => {
            let new = store(FILE).unwrap();
            mm.sync_file(file.file).unwrap();
            assert_eq!(
                kernel.on_disk(provider, 0, word as usize / 8),
                new,
                "the call said that the disk has it"
            );
        }
        Op::ReadFile => match access(kernel, space, in_file, None) {
            Ok(stamp) => assert_eq!(stamp, in_file),
            Err(_) => assert!(program.may_lose(in_file)),
        },
        Op::Fork => done.children.extend(space.fork().ok()),
        Op::ForkAndExit => {
            let child = space.fork().unwrap();
            let _ = access(kernel, &child, anon + word, Some(7));
            exit(kernel, child);
        }
        Op::Unmap => space.munmap(ANON, 2 * PAGE).unwrap(),
        Op::Move => {
            let flags = RemapFlags::MAYMOVE | RemapFlags::FIXED;
            let _ = space.mremap(ANON, 2 * PAGE, 2 * PAGE, flags, ELSEWHERE);
        }
        Op::Protect => {
            let _ = space.mprotect(ANON, 2 * PAGE, Prot::READ);
            let _ = space.mprotect(ANON, 2 * PAGE, RW);
        }
        Op::DontNeed => {
            let _ = space.madvise(anon, PAGE, Advice::DontNeed);
        }
        Op::Free => {
            let _ = space.madvise(anon, PAGE, Advice::Free);
        }
        Op::PageOut => {
            let _ = space.madvise(ANON, 2 * PAGE, Advice::PageOut);
            space.madvise(SHARED, PAGE, Advice::PageOut).unwrap();
        }
        Op::Pin | Op::PinShared => {
            let page = if op == Op::Pin { anon } else { SHARED };
            let pin = loop {
                match space.pin(VirtAddr::new(page), Access::Write) {
                    Err(PinError::NeedIo(_)) => shuttle::thread::yield_now(),
                    other => break other,
                }
            };
            if let Ok(pin) = pin {
                let new = value(thread, round, page);
                assert!(pin.write(word as usize, &new.to_le_bytes()));
                done.wrote.push((page, new));
                let gone = [Op::Unmap, Op::Move, Op::Protect];
                let stays = op == Op::PinShared || !program.one_of(&gone);
                if stays && !program.may_lose(page) {
                    assert_eq!(access(kernel, space, page + word, None), Ok(new));
                }
            }
        }
        Op::Migrate => {
            for page in [ANON, SHARED, FILE, COPY] {
                let page = Page::containing(VirtAddr::new(page));
                let Some(from) = space.frame_at(page).filter(|&from| from != mm.zero_page()) else {
                    continue;
                };
                let frames = &kernel.tables().frames;
                let to = frames.alloc(&FrameRequest::ONE).unwrap();
                match mm.migrate(from, to) {
                    Ok(old) => frames.free(old),
                    Err((_, to)) => frames.free(to),
                }
            }
        }
        Op::Reclaim => {
            let _ = Reclaimer::new(Fifo).reclaim(mm, random.gen_range(1..12));
        }
        Op::SwapOff => {
            for _ in 0..64 {
                match mm.swap_off(0) {
                    Ok(Some(_)) => shuttle::thread::yield_now(),
                    Ok(None) | Err(_) => break,
                }
            }
            let _ = mm.swap_on(kernel.disk, kernel.slots);
        }
        Op::Truncate => {
            provider.size.store(PAGE, Ordering::SeqCst);
            mm.truncate_file(file.file).unwrap();
        }
        Op::Sync => mm.sync_file(file.file).unwrap(),
        Op::Remove => space.madvise(SHARED, PAGE, Advice::Remove).unwrap(),
    }
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

fn check(program: &Program, done: &[Done], children: &[Space], elder: usize) {
    let Program {
        kernel,
        space,
        file,
        provider,
        ..
    } = program;
    let kernel = *kernel;
    for space in children.iter().chain([space]) {
        let (remembered, counted) = (space.counters(), space.recount());
        let counted = Counters {
            total: counted.total,
            locked: counted.locked,
            data: counted.data,
            exec: counted.exec,
            stack: counted.stack,
            accounted: counted.accounted,
        };
        assert_eq!(remembered, counted);
        assert_eq!(space.pins(), 0);
    }
    let moved = |page: u64| {
        let at = if page & !PAGE == ANON
            && space.vma_at(VirtAddr::new(ANON)).is_none()
            && program.one_of(&[Op::Move])
        {
            page - ANON + ELSEWHERE
        } else {
            page
        };
        space.vma_at(VirtAddr::new(at)).map(|_| at)
    };
    // Every page of the program's own can go, and no child's keeps it.
    if kernel.mm.meminfo().swap.total > 0 {
        let stays = || {
            let places = [ANON, ANON + PAGE, SHARED].into_iter().filter_map(moved);
            let mut pages = places.map(|at| Page::containing(VirtAddr::new(at)));
            let zero = kernel.mm.zero_page();
            pages.find(|&page| space.frame_at(page).is_some_and(|frame| frame != zero))
        };
        for _ in 0..4 {
            if stays().is_some() {
                let _ = Reclaimer::new(Fifo).reclaim(kernel.mm, 64);
            }
            while kernel.mm.poll_swap().is_some() {}
        }
        assert_eq!(stays(), None, "a page that cannot go");
    }
    let gone = program.provider.size.load(Ordering::SeqCst) == PAGE;
    for page in [ANON, ANON + PAGE, SHARED, FILE, FILE + PAGE, COPY] {
        let stamp = if page == COPY { FILE } else { page };
        let Some(at) = moved(page) else {
            assert!(program.one_of(&[Op::Unmap]));
            continue;
        };
        if page == FILE + PAGE && gone {
            assert!(access(kernel, space, at, None).is_err());
            continue;
        }
        let mut want = [stamp, 0, 0];
        for (thread, done) in done.iter().enumerate() {
            let last = done.wrote.iter().rev().find(|wrote| wrote.0 == page);
            want[thread + 1] = last.map_or(0, |wrote| wrote.1);
        }
        // A private copy sees what is written to the file until it is made.
        let of_file = |word: usize, found: u64| {
            page == COPY && {
                let done = &done[word - 1].wrote;
                done.iter().any(|&wrote| wrote == (FILE, found))
            }
        };
        let shared = page == SHARED || page & !PAGE == FILE;
        let mut seen = want;
        for (word, &want) in want.iter().enumerate() {
            let found = access(kernel, space, at + 8 * word as u64, None).unwrap();
            let fine = found == want
                || found == 0 && program.may_lose(page)
                || word > 0 && want == 0 && of_file(word, found);
            assert!(fine, "{found:#x} in word {word} of {at:#x}, not {want:#x}");
            seen[word] = found;
        }
        for (number, child) in children.iter().enumerate() {
            // A child of the schedule's may have been made after its parent's pages moved or went.
            let born_here = number >= elder;
            for (word, &seen) in seen.iter().enumerate() {
                let Ok(found) = access(kernel, child, page + 8 * word as u64, None) else {
                    assert!(
                        born_here && page & !PAGE == ANON && program.one_of(&[Op::Move, Op::Unmap])
                    );
                    continue;
                };
                let ever = |word: usize| {
                    let done = &done[word - 1].wrote;
                    done.iter().any(|&wrote| wrote == (page, found))
                };
                let fine = match word {
                    _ if shared => found == seen,
                    0 => found == stamp || found == 0 && born_here && program.may_lose(page),
                    _ => found == 0 || born_here && ever(word) || of_file(word, found),
                };
                assert!(
                    fine,
                    "child {number} has {found:#x} in word {word} of {page:#x}"
                );
            }
        }
        if page & !PAGE == FILE {
            kernel.mm.sync_file(file.file).unwrap();
            for (word, &want) in want.iter().enumerate() {
                let found = kernel.on_disk(provider, (page - FILE) / PAGE, word);
                assert_eq!(found, want, "on disk, word {word} of {at:#x}");
            }
        }
    }
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
