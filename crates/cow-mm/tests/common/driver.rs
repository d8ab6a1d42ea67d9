//! Applies one list of steps to the model and to real address spaces on the mock machine, and compares every word.

use std::cell::Cell;

use kmem_cow_mm::replacement::Fifo;
use kmem_cow_mm::{
    Advice, Env as _, Errno, MapFlags, MapRequest, Mm, Outcome, Prot, Reclaimer, RemapFlags, Signal,
};
use kmem_hal::{FrameRequest, FrameSink, FrameSource, FrameTag, Migrate, MigrateError};
use kmem_paging::{Env as _, Rights};
use kmem_testkit::processes::{Answer, PROCESSES, ProcessOp, Processes, WINDOW, span, stored};

use super::{PAGE, Program, World};

/// Where the window of the steps lies.
const BASE: u64 = 0x1000_0000;

fn address(page: u8) -> u64 {
    BASE + u64::from(page % WINDOW) * PAGE
}

fn range(page: u8, pages: u8) -> (u64, u64) {
    let (first, last) = span(page, pages);
    (BASE + first as u64 * PAGE, (last - first) as u64 * PAGE)
}

fn prot(rights: u8) -> Prot {
    Prot::from_bits_truncate(u32::from(rights & 3))
}

fn answer(outcome: Outcome) -> Option<Answer> {
    match outcome {
        Outcome::Signal {
            signal: Signal::MapError,
            ..
        } => Some(Answer::NotMapped),
        Outcome::Signal {
            signal: Signal::AccessError,
            ..
        } => Some(Answer::NotAllowed),
        Outcome::OutOfMemory => None,
        other => panic!("an outcome that no step has: {other:?}"),
    }
}

/// Does the step for real, on a disk that may still fail so often; `None` where memory ran out.
fn real(program: &Program, op: ProcessOp, errors: &Cell<usize>) -> Option<Answer> {
    let space = &program.space;
    let called = |result: Result<(), Errno>| match result {
        Ok(()) => Some(Answer::Done),
        Err(error) => panic!("{op:?} answered {error}"),
    };
    match op {
        ProcessOp::Map {
            page,
            pages,
            rights,
            shared,
            ..
        } => {
            let (start, length) = range(page, pages);
            let kind = if shared {
                MapFlags::SHARED
            } else {
                MapFlags::PRIVATE
            };
            let flags = kind | MapFlags::ANONYMOUS | MapFlags::FIXED;
            let request = MapRequest {
                address: start,
                flags,
                ..MapRequest::anonymous(length, prot(rights))
            };
            match space.mmap(&request) {
                Err(Errno::ENOMEM) => None,
                other => called(other.map(|_| ())),
            }
        }
        ProcessOp::Unmap { page, pages, .. } => {
            let (start, length) = range(page, pages);
            match space.munmap(start, length) {
                Err(Errno::ENOMEM) => None,
                other => called(other),
            }
        }
        ProcessOp::Protect {
            page,
            pages,
            rights,
            ..
        } => {
            let (start, length) = range(page, pages);
            match space.mprotect(start, length, prot(rights)) {
                Err(Errno::ENOMEM) => Some(Answer::Hole),
                other => called(other),
            }
        }
        ProcessOp::Store { page, value, .. } => {
            let store = || program.store(address(page), stored(page, value));
            match despite(errors, store) {
                Ok(()) => Some(Answer::Done),
                Err(outcome) => answer(outcome),
            }
        }
        ProcessOp::Load { page, .. } => match despite(errors, || program.load(address(page))) {
            Ok(value) => Some(Answer::Value(value)),
            Err(outcome) => answer(outcome),
        },
        ProcessOp::Migrate { page, pages, .. } => {
            let (first, last) = span(page, pages);
            for page in first..last {
                migrate(program, address(page as u8))?;
            }
            Some(Answer::Done)
        }
        ProcessOp::DontNeed { page, pages, .. } => {
            let (start, length) = range(page, pages);
            match space.madvise(start, length, Advice::DontNeed) {
                Err(Errno::ENOMEM) => Some(Answer::Hole),
                other => called(other),
            }
        }
        ProcessOp::Move {
            page, pages, to, ..
        } => {
            let (start, length) = range(page, pages);
            let flags = RemapFlags::MAYMOVE | RemapFlags::FIXED;
            let (to, room) = range(to, (length / PAGE) as u8);
            let to = if room == length { to } else { start };
            match space.mremap(start, length, length, flags, to) {
                Err(Errno::EINVAL) => Some(Answer::Invalid),
                Err(Errno::EFAULT) => Some(Answer::NothingThere),
                other => called(other.map(|_| ())),
            }
        }
        ProcessOp::Fork { .. }
        | ProcessOp::Exit { .. }
        | ProcessOp::Reclaim { .. }
        | ProcessOp::DiskError { .. } => unreachable!(),
    }
}

/// Moves a page, if one is there, to another frame; everything else about its entry stays, but the right to write to anonymous memory.
fn migrate(program: &Program, address: u64) -> Option<()> {
    let space = &program.space;
    let frames = space.mm().env().frames();
    let page = kmem_hal::Page::containing(kmem_hal::VirtAddr::new(address));
    let before = space.tables().query(page).leaf();
    let Some(leaf) = before.filter(|leaf| leaf.frame != space.mm().zero_page()) else {
        return Some(());
    };
    let to = frames.alloc(&FrameRequest::ONE).ok()?;
    let target = to.first();
    match space.mm().migrate(leaf.frame, to) {
        Ok(old) => {
            let now = space.tables().query(page).leaf();
            let now = now.expect("a page that was moved is mapped");
            assert_eq!(now.frame, target);
            let mut rights = leaf.attributes.rights;
            let slot = space.mm().env().paging().slots().slot(target);
            if slot.unwrap().tag() == FrameTag::Anon {
                // The next write decides whose it is.
                rights.remove(Rights::WRITE);
            }
            assert_eq!(now.attributes.rights, rights);
            frames.free(old);
        }
        Err((MigrateError::Pinned, to)) => frames.free(to),
        Err((error, _)) => panic!("{page:?} is not moved: {error}"),
    }
    Some(())
}

/// Makes an access again that a failed read of swap ended, as the device is asked anew. Each request that was told to fail is met once at most;
/// one page may meet several: a read ahead of it, and its own.
fn despite<R>(errors: &Cell<usize>, access: impl Fn() -> Result<R, Outcome>) -> Result<R, Outcome> {
    loop {
        let result = access();
        let bus_error = Signal::BusError;
        match (&result, errors.get().checked_sub(1)) {
            (Err(Outcome::Signal { signal, .. }), Some(rest)) if *signal == bus_error => {
                errors.set(rest);
            }
            _ => return result,
        }
    }
}

/// Whether the step leaves everything as it was when memory runs out: such a step is also tried with failures.
fn is_all_or_nothing(op: ProcessOp) -> bool {
    matches!(
        op,
        ProcessOp::Map { .. }
            | ProcessOp::Unmap { .. }
            | ProcessOp::Store { .. }
            | ProcessOp::Load { .. }
    )
}

/// Runs the steps; with `failures`, each all-or-nothing step is first tried with its first allocation failing, then its
/// second, and so on, and must leave the model's words alone each time.
pub fn run(
    world: &'static World,
    mm: &'static Mm<'static, World>,
    ops: &[ProcessOp],
    failures: bool,
) {
    let disk = world.disk(mm, 512);
    let mut reclaimer = Reclaimer::new(Fifo);
    let before = world.used_frames();
    // Requests that the disk was told to let fail, and whose failure nobody has met.
    let errors = Cell::new(0);
    let mut model = Processes::new();
    let mut programs: Vec<Option<Program>> = (0..PROCESSES).map(|_| None).collect();
    programs[0] = Some(Program::new(mm));
    for (step, &op) in ops.iter().enumerate() {
        let living = model.living(op.process());
        match op {
            ProcessOp::Fork { .. } => {
                let Some(child) = model.vacancy() else {
                    continue;
                };
                let parent = programs[living].as_ref().unwrap();
                let forked = with_failures(
                    world,
                    failures,
                    || parent.fork().ok(),
                    || check(&model, &programs, step, &errors),
                );
                model.fork(living, child);
                programs[child] = Some(forked);
            }
            ProcessOp::Reclaim { pages, latency } => {
                disk.set_latency(u32::from(latency % 4));
                reclaimer.reclaim(mm, u64::from(pages));
            }
            ProcessOp::DiskError { after } => {
                disk.fail_at(u64::from(after.max(1)));
                errors.set(errors.get() + 1);
            }
            ProcessOp::Exit { .. } => {
                if model.alive().count() > 1 {
                    model.exit(living);
                    programs[living].take().unwrap().exit();
                }
            }
            _ => {
                let program = programs[living].as_ref().unwrap();
                let fail = failures && is_all_or_nothing(op);
                let got = with_failures(
                    world,
                    fail,
                    || real(program, op, &errors),
                    || check(&model, &programs, step, &errors),
                );
                assert_eq!(
                    got,
                    model.apply(living, op),
                    "step {step}: {op:?} of process {living}"
                );
            }
        }
        super::check_counters(programs.iter().flatten());
    }
    check(&model, &programs, ops.len(), &errors);
    for program in programs.into_iter().flatten() {
        program.exit();
    }
    while mm.poll_swap().is_some() {}
    if std::env::var_os("KMEM_EVENTS").is_some() {
        eprintln!("{:?}", mm.events());
    }
    let swap = mm.meminfo().swap;
    assert_eq!(swap.free, swap.total, "slots of swap leak");
    assert_eq!(world.used_frames(), before, "frames leak");
    assert_eq!(mm.committed(), 0, "promises leak");
}

/// Calls `f` with the n-th allocation failing, for n = 1, 2, .. until it succeeds; `unchanged` runs after each failure.
fn with_failures<R>(
    world: &World,
    fail: bool,
    f: impl Fn() -> Option<R>,
    unchanged: impl Fn(),
) -> R {
    for n in 1.. {
        if fail {
            world.plan.fail_at(n);
        }
        let result = f();
        world.plan.stop();
        match result {
            Some(result) => return result,
            None => assert!(fail, "memory ran out by itself"),
        }
        unchanged();
    }
    unreachable!()
}

/// Compares every word of every process, by a look that changes nothing: no fault, no TLB.
fn check(model: &Processes, programs: &[Option<Program>], step: usize, errors: &Cell<usize>) {
    for (process, program) in programs.iter().enumerate() {
        let Some(program) = program else { continue };
        for page in 0..WINDOW {
            let want = match model.load(process, page) {
                Answer::Value(value) => value,
                _ => continue,
            };
            let mut word = [0; 8];
            let at = kmem_hal::VirtAddr::new(address(page));
            // What is in swap has to be brought in; a failed read is tried again, as in `despite`.
            let mut found = program.space.peek(at, &mut word).is_some();
            while !found {
                found = program.space.read_memory(at, &mut word).is_ok();
                match errors.get().checked_sub(1) {
                    Some(rest) if !found => errors.set(rest),
                    _ => break,
                }
            }
            assert!(found, "step {step}: process {process} lost page {page}");
            assert_eq!(
                u64::from_le_bytes(word),
                want,
                "step {step}: process {process}, page {page}"
            );
        }
    }
}
