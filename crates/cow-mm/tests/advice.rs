//! Every piece of advice has an effect that can be seen, or a row in the table of what is missing.

mod common;

use common::{PAGE, Program, RW, World};
use kmem_cow_mm::replacement::Clock;
use kmem_cow_mm::{Advice, Errno, MapFlags, MapRequest, Outcome, Reclaimer};

/// Pages of each mapping; those from the third on are advised, and the first four were written to.
const PAGES: u64 = 64;
const ADVISED: u64 = 2;
const WRITTEN: u64 = 4;

/// What advice is given about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Private,
    Shared,
    File,
}

const KINDS: [Kind; 3] = [Kind::Private, Kind::Shared, Kind::File];

/// What somebody sees who looks at contents, at what is in memory, at a child, and at reclaim; of a VMA's flags nothing.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    in_core: Vec<u8>,
    /// In memory after one page went, and after many did.
    kept: [Vec<u8>; 2],
    written_to_swap: u64,
    child: Vec<Result<u64, Outcome>>,
    words: Vec<Result<u64, Outcome>>,
    /// Pages of the file in memory, before it is read and after one page was.
    cached: [u64; 2],
}

/// Gives advice, after other advice, to memory of a kind; the answer, and what is seen then.
fn look(kind: Kind, before: Option<Advice>, advice: Option<Advice>) -> (Result<(), Errno>, Seen) {
    let world = World::new();
    let mm = world.mm();
    let disk = world.disk(mm, 256);
    let (_, file) = world.file(mm, &[7; (PAGES * PAGE) as usize]);
    let program = Program::new(mm);
    let space = &program.space;
    let (flags, file_of) = match kind {
        Kind::Private => (MapFlags::PRIVATE | MapFlags::ANONYMOUS, None),
        Kind::Shared => (MapFlags::SHARED | MapFlags::ANONYMOUS, None),
        Kind::File => (MapFlags::SHARED, Some(file)),
    };
    let request = MapRequest {
        flags,
        file: file_of,
        ..MapRequest::anonymous(PAGES * PAGE, RW)
    };
    let start = space.mmap(&request).unwrap().as_u64();
    let at = |page: u64| start + page * PAGE;
    if kind != Kind::File {
        for page in 0..WRITTEN {
            program.store(at(page), 100 + page).unwrap();
        }
    }
    let (from, length) = (at(ADVISED), (PAGES - ADVISED) * PAGE);
    before.map(|before| space.madvise(from, length, before));
    let answer = advice.map_or(Ok(()), |advice| space.madvise(from, length, advice));
    let in_core = || {
        let mut vector = vec![0; PAGES as usize];
        space.mincore(start, PAGES * PAGE, &mut vector).unwrap();
        vector
    };
    let now = in_core();
    let cached = mm.cached_pages(file.file);
    let mut reclaimer = Reclaimer::new(Clock);
    let kept = [1, 64].map(|target| {
        reclaimer.reclaim(mm, target);
        while mm.poll_swap().is_some() {}
        in_core()
    });
    let written_to_swap = disk.transfers().1;
    let forked = program.fork().unwrap();
    let child = (0..WRITTEN).map(|page| forked.load(at(page))).collect();
    forked.exit();
    let words = (0..WRITTEN).map(|page| program.load(at(page))).collect();
    // Where a window of read-ahead begins.
    let read = (ADVISED..PAGES).find(|page| (at(*page) / PAGE).is_multiple_of(16));
    let _ = program.load(at(read.unwrap() + 16));
    let seen = Seen {
        in_core: now,
        kept,
        written_to_swap,
        child,
        words,
        cached: [cached, mm.cached_pages(file.file)],
    };
    program.exit();
    assert!(mm.close(file.file));
    (answer, seen)
}

/// What advice takes back: its effect is seen after this.
fn opposite(advice: Advice) -> Option<Advice> {
    match advice {
        Advice::Normal => Some(Advice::Random),
        Advice::DoFork => Some(Advice::DontFork),
        Advice::KeepOnFork => Some(Advice::WipeOnFork),
        Advice::GuardRemove => Some(Advice::GuardInstall),
        Advice::Unmergeable => Some(Advice::Mergeable),
        Advice::NoHugePage => Some(Advice::HugePage),
        Advice::DoDump => Some(Advice::DontDump),
        _ => None,
    }
}

#[test]
fn advice_has_an_effect_or_a_row_in_the_table_of_what_is_missing() {
    for advice in Advice::ALL {
        let before = opposite(advice);
        let (mut answers, mut effect) = (Vec::new(), false);
        for kind in KINDS {
            let (_, without) = look(kind, before, None);
            let (answer, with) = look(kind, before, Some(advice));
            effect |= answer.is_ok() && with != without;
            answers.push(answer);
        }
        let Some(missing) = advice.missing_effect() else {
            assert!(effect, "{advice:?} does nothing, and no row says so");
            continue;
        };
        let named = missing.split_whitespace().next().unwrap();
        let named = named.trim_end_matches(',');
        if named.starts_with('E') {
            let says = |answer: &Result<(), Errno>| {
                answer.is_err_and(|errno| format!("{errno:?}") == named)
            };
            assert!(
                answers.iter().any(says),
                "{advice:?}: {missing}: {answers:?}"
            );
        } else {
            assert_eq!(answers, [Ok(()); 3], "{advice:?}: {missing}");
            assert!(
                !effect,
                "{advice:?} has an effect, and a row says that it has none"
            );
        }
    }
}
