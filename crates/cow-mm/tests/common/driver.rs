//! Applies one list of steps to the model and to real address spaces on the mock machine, and compares every byte.

use std::cell::Cell;

use super::held_pin::HeldPin;
use super::oracle_files::{self, OracleFile, index_of};
use kmem_cow_mm::replacement::Fifo;
use kmem_cow_mm::{
    Advice, Env as _, Errno, FileIo, MapFlags, MapRequest, Mm, Outcome, PinError, Prot, Reclaimer,
    RemapFlags, Signal,
};
use kmem_hal::{FrameRequest, FrameSink, FrameSource, FrameTag, Migrate, MigrateError};
use kmem_paging::{Env as _, Rights};
use kmem_testkit::processes::{
    Answer, FILE_PAGES, FILES, PINS, PROCESSES, ProcessOp, Processes, WINDOW, pinned_word, span,
    stored, written,
};

use super::shortage::{self, Leaves};
use super::{PAGE, Program, World};

/// Where the window of the steps lies.
const BASE: u64 = 0x1000_0000;

/// Errors of calls, and what the model says in their place.
const HOLE: (Errno, Answer) = (Errno::ENOMEM, Answer::Hole);
const INVALID: (Errno, Answer) = (Errno::EINVAL, Answer::Invalid);
const FAILED: (Errno, Answer) = (Errno::EIO, Answer::BusError);

pub fn address(page: u8) -> u64 {
    BASE + u64::from(page % WINDOW) * PAGE
}

fn range(page: u8, pages: u8) -> (u64, u64) {
    let (first, last) = span(page, pages);
    (BASE + first as u64 * PAGE, (last - first) as u64 * PAGE)
}

pub fn prot(rights: u8) -> Prot {
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
        Outcome::Signal {
            signal: Signal::BusError,
            ..
        } => Some(Answer::BusError),
        Outcome::OutOfMemory => None,
        other => panic!("an outcome that no step has: {other:?}"),
    }
}

/// What a read or write of one word of a file came to, made again while the page is on its way.
fn file_call(
    mut call: impl FnMut() -> Result<FileIo, Errno>,
    done: impl FnOnce() -> Answer,
) -> Option<Answer> {
    loop {
        match call() {
            Ok(io) if io.bytes == 8 => return Some(done()),
            Ok(io) if io.ticket.is_none() => return Some(Answer::End),
            Ok(_) => {}
            Err(Errno::ENOMEM) => return None,
            // A read that failed: as a bus error.
            Err(Errno::EIO) => return Some(Answer::BusError),
            Err(error) => panic!("a file's call answered {error}"),
        }
    }
}

/// Does the step for real; `None` where memory ran out.
fn real(program: &Program, files: &[OracleFile; FILES], op: ProcessOp) -> Option<Answer> {
    let space = &program.space;
    let mm = space.mm();
    let file = |file: u8| &files[usize::from(file) % FILES];
    // Done, or an error that the model knows.
    let called = |result: Result<(), Errno>, known: &[(Errno, Answer)]| {
        let Err(error) = result else {
            return Some(Answer::Done);
        };
        match known.iter().find(|(errno, _)| *errno == error) {
            Some((_, answer)) => Some(*answer),
            None if matches!(error, Errno::ENOMEM | Errno::EAGAIN) => None,
            None => panic!("{op:?} answered {error}"),
        }
    };
    // Done, or memory ran out.
    let made = |result: Result<(), Errno>| match result {
        Err(Errno::ENOMEM) => None,
        result => called(result, &[]),
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
            made(space.mmap(&request).map(|_| ()))
        }
        ProcessOp::Unmap { page, pages, .. } => {
            let (start, length) = range(page, pages);
            made(space.munmap(start, length))
        }
        ProcessOp::Protect {
            page,
            pages,
            rights,
            ..
        } => {
            let (start, length) = range(page, pages);
            called(space.mprotect(start, length, prot(rights)), &[HOLE])
        }
        ProcessOp::Store { page, value, .. } => {
            match program.store(address(page), stored(page, value)) {
                Ok(()) => Some(Answer::Done),
                Err(outcome) => answer(outcome),
            }
        }
        ProcessOp::Load { page, .. } => match program.load(address(page)) {
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
            called(
                space.madvise(start, length, Advice::DontNeed),
                &[HOLE, INVALID],
            )
        }
        ProcessOp::Move {
            page, pages, to, ..
        } => {
            let (start, length) = range(page, pages);
            let flags = RemapFlags::MAYMOVE | RemapFlags::FIXED;
            let (to, room) = range(to, (length / PAGE) as u8);
            let to = if room == length { to } else { start };
            called(
                space.mremap(start, length, length, flags, to).map(|_| ()),
                &[INVALID, (Errno::EFAULT, Answer::NothingThere)],
            )
        }
        ProcessOp::MapFile {
            page,
            pages,
            rights,
            shared,
            file: number,
            index,
            ..
        } => {
            let (start, length) = range(page, pages);
            let kind = match shared {
                true => MapFlags::SHARED,
                false => MapFlags::PRIVATE,
            };
            let request = MapRequest {
                address: start,
                flags: kind | MapFlags::FIXED,
                file: Some(file(number).open),
                offset: index_of(index) * PAGE,
                ..MapRequest::anonymous(length, prot(rights))
            };
            made(space.mmap(&request).map(|_| ()))
        }
        ProcessOp::Truncate {
            file: number,
            pages,
        } => {
            let pages = u64::from(pages % (FILE_PAGES + 1));
            made(file(number).truncate(mm, pages))
        }
        ProcessOp::WriteFile {
            file: number,
            index,
            value,
        } => {
            let word = written(index, value).to_le_bytes();
            let at = index_of(index) * PAGE;
            let write = || mm.write_file(file(number).open.file, at, &word);
            file_call(write, || Answer::Done)
        }
        ProcessOp::ReadFile {
            file: number,
            index,
        } => {
            let mut word = [0; 8];
            let at = index_of(index) * PAGE;
            let read = || mm.read_file(file(number).open.file, at, &mut word);
            file_call(read, || Answer::Done).map(|answer| match answer {
                Answer::Done => Answer::Value(u64::from_le_bytes(word)),
                other => other,
            })
        }
        ProcessOp::SyncFile { file: number } => {
            called(mm.sync_file(file(number).open.file), &[FAILED])
        }
        ProcessOp::Sync { page, pages, .. } => {
            let (start, length) = range(page, pages);
            called(space.msync(start, length), &[HOLE, FAILED])
        }
        ProcessOp::Remove { page, pages, .. } => {
            let (start, length) = range(page, pages);
            called(
                space.madvise(start, length, Advice::Remove),
                &[
                    HOLE,
                    INVALID,
                    (Errno::EACCES, Answer::Denied),
                    (Errno::EOPNOTSUPP, Answer::Unsupported),
                ],
            )
        }
        ProcessOp::Lock { page, pages, .. } => {
            let (start, length) = range(page, pages);
            called(space.mlock(start, length), &[HOLE])
        }
        ProcessOp::Unlock { page, pages, .. } => {
            let (start, length) = range(page, pages);
            called(space.munlock(start, length), &[HOLE])
        }
        ProcessOp::Fork { .. }
        | ProcessOp::Exit { .. }
        | ProcessOp::Reclaim { .. }
        | ProcessOp::Pin { .. }
        | ProcessOp::PinWrite { .. }
        | ProcessOp::PinRead { .. }
        | ProcessOp::Unpin { .. }
        | ProcessOp::DiskError { .. } => unreachable!(),
    }
}

/// Moves a page, if one is there, to another frame; everything else about its entry stays, but the right to write to anonymous memory.
fn migrate(program: &Program, address: u64) -> Option<()> {
    let space = &program.space;
    let frames = space.mm().env().frames();
    let page = kmem_hal::Page::containing(kmem_hal::VirtAddr::new(address));
    let before = space.page_tables().query(page).leaf();
    let Some(leaf) = before.filter(|leaf| leaf.frame != space.mm().zero_page()) else {
        return Some(());
    };
    let to = frames.alloc(&FrameRequest::ONE).ok()?;
    let target = to.first();
    match space.mm().migrate(leaf.frame, to) {
        Ok(old) => {
            let now = space.page_tables().query(page).leaf();
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

/// Pins a page; `wanted` is what the model says, as a pin does not say why it is refused.
fn pin(
    program: &Program,
    page: u8,
    write: bool,
    wanted: Answer,
) -> Option<Result<HeldPin, Answer>> {
    let refused = matches!(
        wanted,
        Answer::NotMapped | Answer::NotAllowed | Answer::BusError
    );
    loop {
        match HeldPin::new(&program.space, address(page), write) {
            Ok(pin) => return Some(Ok(pin)),
            Err(PinError::NeedIo(_)) => {}
            Err(PinError::OutOfMemory) => return None,
            Err(PinError::Fault(_)) if refused => return Some(Err(wanted)),
            Err(_) => return Some(Err(Answer::BusError)),
        }
    }
}

/// Makes a step again that a failed transfer ended, as the device is asked anew. Each request that was told to fail is met once at most;
/// one page may meet several: a read ahead of it, and its own.
fn despite(
    errors: &Cell<usize>,
    wanted: Answer,
    step: impl Fn() -> Option<Answer>,
) -> Option<Answer> {
    loop {
        let got = step()?;
        let failed = matches!(got, Answer::BusError | Answer::Hole) && got != wanted;
        match errors.get().checked_sub(1).filter(|_| failed) {
            Some(rest) => errors.set(rest),
            None => return Some(got),
        }
    }
}

/// Steps between two looks at every byte.
const CHECKED_EVERY: usize = 64;

/// Ends the pins that `which` chooses, in the model and for real.
fn end_pins(
    model: &mut Processes,
    pins: &mut [Option<HeldPin>; PINS],
    which: impl FnOnce(&Processes) -> Vec<usize>,
) {
    for pin in which(model) {
        model.unpin(pin);
        pins[pin] = None;
    }
}

/// Runs the steps; with `failures`, each is first tried with its first allocation failing, then its second, and so on, and may leave behind each
/// time what [`Leaves`] says.
pub fn run(
    world: &'static World,
    mm: &'static Mm<'static, World>,
    ops: &[ProcessOp],
    failures: bool,
) {
    let disk = world.disk(mm, 512);
    // A request that an earlier run on this machine told to fail and never made is far away now.
    disk.fail_at(u64::from(u32::MAX));
    disk.set_latency(0);
    let files = oracle_files::fresh(world, mm);
    let mut reclaimer = Reclaimer::new(Fifo);
    let before = world.used_frames();
    // Requests that a device was told to let fail, and whose failure nobody has met.
    let errors = Cell::new(0);
    let mut model = Processes::new();
    let mut programs: Vec<Option<Program>> = (0..PROCESSES).map(|_| None).collect();
    let mut pins: [Option<HeldPin>; PINS] = Default::default();
    programs[0] = Some(Program::new(mm));
    for (step, &op) in ops.iter().enumerate() {
        let living = model.living(op.process());
        if matches!(op, ProcessOp::Truncate { .. } | ProcessOp::Remove { .. }) {
            // Who pinned a page that goes keeps it; what it holds then is nobody's business.
            end_pins(&mut model, &mut pins, |model| {
                model.pins_of_objects().collect()
            });
        }
        let wanted = || model.clone().apply(living, op);
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
                    || check(&model, &programs, &pins, step, &errors),
                );
                model.fork(living, child);
                programs[child] = Some(forked);
            }
            ProcessOp::Reclaim { pages, latency } => {
                disk.set_latency(u32::from(latency % 4));
                for file in files {
                    file.set_latency(u32::from(latency % 4));
                }
                reclaimer.reclaim(mm, u64::from(pages));
            }
            ProcessOp::DiskError { after } => {
                disk.fail_at(u64::from(after.max(1)));
                for file in files {
                    file.fail_at(u64::from(after.max(1)));
                }
                errors.set(errors.get() + 1 + FILES);
            }
            ProcessOp::Exit { .. } => {
                if model.alive().count() > 1 {
                    end_pins(&mut model, &mut pins, |model| {
                        model.pins_of(living).collect()
                    });
                    model.exit(living);
                    let program = programs[living].take().unwrap();
                    if failures {
                        // It needs none.
                        world.plan.fail_from(1);
                    }
                    program.exit();
                    world.plan.stop();
                }
            }
            ProcessOp::Pin { page, write, .. } => {
                let wanted = wanted();
                if wanted == Answer::Skipped {
                    continue;
                }
                let program = programs[living].as_ref().unwrap();
                let place = model.vacant_pin().unwrap();
                let taken = Cell::new(None);
                let got = with_failures(
                    world,
                    failures,
                    || {
                        despite(&errors, wanted, || {
                            Some(match pin(program, page, write, wanted)? {
                                Ok(pin) => {
                                    taken.set(Some(pin));
                                    Answer::Done
                                }
                                Err(answer) => answer,
                            })
                        })
                    },
                    || check(&model, &programs, &pins, step, &errors),
                );
                pins[place] = taken.take();
                assert_eq!(got, model.apply(living, op), "step {step}: {op:?}");
            }
            ProcessOp::PinWrite { pin, value } => {
                if model.apply(living, op) == Answer::Done {
                    let held = pins[usize::from(pin) % PINS].as_ref().unwrap();
                    assert!(held.write(pinned_word(pin, value)), "step {step}: {op:?}");
                }
            }
            ProcessOp::PinRead { pin } => {
                let held = pins[usize::from(pin) % PINS].as_ref().map(HeldPin::read);
                let got = held.map_or(Answer::Skipped, Answer::Value);
                assert_eq!(got, model.apply(living, op), "step {step}: {op:?}");
            }
            ProcessOp::Unpin { pin } => {
                end_pins(&mut model, &mut pins, |_| vec![usize::from(pin) % PINS]);
            }
            _ => {
                let wanted = wanted();
                if wanted == Answer::Skipped {
                    continue;
                }
                let program = programs[living].as_ref().unwrap();
                let once = |op| despite(&errors, wanted, || real(program, files, op));
                let unchanged = || check(&model, &programs, &pins, step, &errors);
                let (mut now, mut failing) = (op, 0);
                let got = match Leaves::of(op) {
                    _ if !failures => with_failures(world, false, || once(op), unchanged),
                    // Whatever else an unmapping may lack, it is not a table.
                    Leaves::Nothing if matches!(op, ProcessOp::Unmap { .. }) && step % 2 == 0 => {
                        let got = shortage::without(world.frame_plan, program, op, || once(op));
                        got.unwrap_or_else(|| once(op).unwrap())
                    }
                    Leaves::Nothing => with_failures(world, true, || once(op), unchanged),
                    Leaves::Prefix => {
                        let mut after = model.clone();
                        after.apply(living, op);
                        let before = shortage::rights(program, op);
                        // Done in spite of a failure or not: it is made again, until nothing failed.
                        let tried = || {
                            despite(&errors, wanted, || {
                                let got = real(program, files, op);
                                got.filter(|_| world.plan.failed() == 0)
                            })
                        };
                        with_failures(world, true, tried, || {
                            shortage::check_rights(program, op, &before);
                            check_either([&model, &after], &programs, &pins, step, &errors);
                        })
                    }
                    Leaves::Moved => loop {
                        failing += 1;
                        world.plan.fail_at(failing);
                        let got = once(op);
                        world.plan.stop();
                        if let Some(got) = got {
                            break got;
                        }
                        // What has moved, and that the place of the rest was cleared, the model is told.
                        for done in shortage::moved(program, &mut now) {
                            assert_eq!(model.apply(living, done), Answer::Done, "{done:?}");
                        }
                        check(&model, &programs, &pins, step, &errors);
                        if now != op {
                            break once(now).unwrap();
                        }
                    },
                    Leaves::NoWay => {
                        let got = shortage::without(world.plan, program, op, || once(op));
                        got.unwrap_or_else(|| once(op).unwrap())
                    }
                };
                assert_eq!(
                    got,
                    model.apply(living, now),
                    "step {step}: {now:?} of process {living}"
                );
                for (file, index, word) in model.synced(living, op) {
                    let found = files[file].on_disk(world, index);
                    assert_eq!(
                        found, word,
                        "step {step}: {op:?}: page {index} of file {file}"
                    );
                }
            }
        }
        super::check_counters(programs.iter().flatten());
        check_pins(&programs, &pins);
        if step % CHECKED_EVERY == CHECKED_EVERY - 1 {
            check(&model, &programs, &pins, step, &errors);
        }
    }
    check(&model, &programs, &pins, ops.len(), &errors);
    drop(pins);
    for program in programs.into_iter().flatten() {
        program.exit();
    }
    for file in files {
        file.truncate(mm, 0).unwrap();
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

/// Holds what slots and spaces count against the pins that are held.
fn check_pins(programs: &[Option<Program>], pins: &[Option<HeldPin>; PINS]) {
    let held = || pins.iter().flatten();
    let mut anonymous = 0;
    for pin in held() {
        let (frame, world) = (pin.frame(), pin.world());
        let counted = super::recount::pins_of(world, frame);
        if counted > 0 {
            let same = held().filter(|other| other.frame() == frame).count();
            assert_eq!(counted as usize, same, "pins in the slot of {frame:?}");
            anonymous += 1;
        }
    }
    let counted: u32 = programs
        .iter()
        .flatten()
        .map(|program| program.space.pins())
        .sum();
    assert_eq!(counted, anonymous, "pins of all spaces");
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

/// Compares every byte of every process and of every pinned page, by a look that changes nothing, where the page is in memory: no fault, no TLB.
fn check(
    model: &Processes,
    programs: &[Option<Program>],
    pins: &[Option<HeldPin>; PINS],
    step: usize,
    errors: &Cell<usize>,
) {
    check_either([model, model], programs, pins, step, errors);
}

/// As [`check`], in the midst of a step: each page is as it was before or as it will be after, where it can be read both before and after.
fn check_either(
    models: [&Processes; 2],
    programs: &[Option<Program>],
    pins: &[Option<HeldPin>; PINS],
    step: usize,
    errors: &Cell<usize>,
) {
    for (number, pin) in pins.iter().enumerate() {
        let found = pin.as_ref().map(HeldPin::read);
        let wanted = models.map(|model| model.pinned(number));
        assert!(
            wanted.contains(&found),
            "step {step}: pin {number}: {found:?}, not {wanted:?}"
        );
    }
    for (process, program) in programs.iter().enumerate() {
        let Some(program) = program else { continue };
        for page in 0..WINDOW {
            let wanted = models.map(|model| match model.load(process, page) {
                Answer::Value(value) => Some(value),
                _ => None,
            });
            if wanted.contains(&None) {
                continue;
            }
            let mut bytes = [0; PAGE as usize];
            let at = kmem_hal::VirtAddr::new(address(page));
            // What is not in memory has to be brought in; a failed read is tried again, as in `despite`.
            let mut found = program.space.peek(at, &mut bytes).is_some();
            while !found {
                found = program.space.read_memory(at, &mut bytes).is_ok();
                match errors.get().checked_sub(1) {
                    Some(rest) if !found => errors.set(rest),
                    _ => break,
                }
            }
            assert!(found, "step {step}: process {process} lost page {page}");
            let (word, rest) = bytes.split_first_chunk().unwrap();
            let word = u64::from_le_bytes(*word);
            assert!(
                wanted.contains(&Some(word)),
                "step {step}: process {process}, page {page}: {word:#x}, not {wanted:x?}"
            );
            assert!(
                rest.iter().all(|&byte| byte == 0),
                "step {step}: process {process}, page {page}: bytes behind the word"
            );
        }
    }
}
