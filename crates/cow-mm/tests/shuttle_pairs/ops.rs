//! What a thread of a schedule does: one of many operations on the program's pages, and what it notes of it.

use std::sync::atomic::Ordering;

use kmem_cow_mm::replacement::Fifo;
use kmem_cow_mm::{Advice, OpenFile, PinError, Prot, Reclaimer, RemapFlags};
use kmem_hal::{Access, FrameRequest, FrameSink, FrameSource, Migrate, Page, VirtAddr};
use shuttle::rand::Rng;

use super::changing_file::ChangingFile;
use super::kernel::{Kernel, Space};
use super::{ANON, COPY, ELSEWHERE, FILE, PAGE, RW, SHARED, access, exit};

/// Threads of a schedule.
pub const THREADS: usize = 2;

/// What a thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
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

pub const OPS: [Op; 23] = [
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
pub struct Done {
    /// Address of the page, value; in order.
    pub wrote: Vec<(u64, u64)>,
    pub children: Vec<Space>,
}

/// The program, shared by the threads of a schedule.
pub struct Program {
    pub kernel: Kernel,
    pub space: Space,
    pub file: OpenFile,
    pub provider: &'static ChangingFile,
    pub ops: [Op; THREADS],
}

impl Program {
    pub fn one_of(&self, wanted: &[Op]) -> bool {
        self.ops.iter().any(|op| wanted.contains(op))
    }

    /// Whether an operation of the schedule may take away what a page of the region holds.
    pub fn may_lose(&self, page: u64) -> bool {
        match page {
            COPY => false,
            SHARED => self.one_of(&[Op::Remove]),
            FILE.. if page < COPY => page != FILE && self.one_of(&[Op::Truncate]),
            _ => self.one_of(&[Op::DontNeed, Op::Free]),
        }
    }
}

/// What a thread writes to its word of a page.
fn value(thread: usize, round: u64, page: u64) -> u64 {
    page | (thread as u64 + 1) << 56 | (round + 1) << 48
}

pub fn run_op(program: &Program, thread: usize, round: u64, op: Op, done: &mut Done) {
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
