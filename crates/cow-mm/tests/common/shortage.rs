//! What a step may leave behind where memory runs out in the midst of it: `docs/spec/partial-effects.md`, as assertions.

use kmem_cow_mm::Prot;
use kmem_hal::{Page, VirtAddr};
use kmem_testkit::FailPlan;
use kmem_testkit::processes::{ProcessOp, WINDOW, span};

use super::Program;
use super::driver::{address, prot};

/// What a step that finds no memory leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leaves {
    /// Nothing: it was never made.
    Nothing,
    /// A beginning of it; made again, it is whole.
    Prefix,
    /// Mappings that moved before the one that could not, and an empty place where that would be (mremap with FIXED).
    Moved,
    /// It cannot find none: it needs no memory.
    NoWay,
}

impl Leaves {
    pub fn of(op: ProcessOp) -> Self {
        match op {
            ProcessOp::Protect { .. }
            | ProcessOp::Lock { .. }
            | ProcessOp::Unlock { .. }
            | ProcessOp::Sync { .. }
            | ProcessOp::SyncFile { .. }
            | ProcessOp::Remove { .. }
            | ProcessOp::Migrate { .. }
            | ProcessOp::Truncate { .. } => Self::Prefix,
            ProcessOp::Move { .. } => Self::Moved,
            ProcessOp::DontNeed { .. } => Self::NoWay,
            _ => Self::Nothing,
        }
    }
}

/// The pages that a step names.
fn pages_of(op: ProcessOp) -> std::ops::Range<usize> {
    let (first, last) = match op {
        ProcessOp::Protect { page, pages, .. }
        | ProcessOp::Lock { page, pages, .. }
        | ProcessOp::Unlock { page, pages, .. }
        | ProcessOp::Sync { page, pages, .. }
        | ProcessOp::Remove { page, pages, .. }
        | ProcessOp::Migrate { page, pages, .. }
        | ProcessOp::Unmap { page, pages, .. }
        | ProcessOp::DontNeed { page, pages, .. }
        | ProcessOp::Move { page, pages, .. } => span(page, pages),
        _ => (0, 0),
    };
    first..last
}

fn at(page: usize) -> VirtAddr {
    VirtAddr::new(address(page as u8))
}

/// What the pages that a step names may be used for.
pub fn rights(program: &Program, op: ProcessOp) -> Vec<Option<Prot>> {
    let rights = |page| Some(program.space.vma_at(at(page))?.flags.prot());
    pages_of(op).map(rights).collect()
}

/// Holds rights in the midst of a step against those before it: mprotect has given the new ones up to some page, no other step changes any.
pub fn check_rights(program: &Program, op: ProcessOp, before: &[Option<Prot>]) {
    let now = rights(program, op);
    let most = match op {
        ProcessOp::Protect { .. } => before.len(),
        _ => 0,
    };
    let new = |pages: &[Option<Prot>]| match op {
        ProcessOp::Protect { rights, .. } => pages.iter().all(|page| *page == Some(prot(rights))),
        _ => true,
    };
    let is_prefix = |done: usize| new(&now[..done]) && now[done..] == before[done..];
    assert!(
        (0..=most).any(is_prefix),
        "{op:?} made {now:?} of {before:?}"
    );
}

/// Makes a step that needs no memory but tables, with nothing left of what `plan` is for; `None`, and it was not made, where the frames that are
/// set aside for it are used up.
pub fn without<R>(
    plan: &FailPlan,
    program: &Program,
    op: ProcessOp,
    step: impl FnOnce() -> Option<R>,
) -> Option<R> {
    /// Tables at both ends, of two levels.
    const ENOUGH: usize = 4;
    let tables = program.space.page_tables();
    let pages = pages_of(op);
    let shared = |page| tables.path(Page::containing(at(page))).sharers() > 1;
    if tables.spares() < ENOUGH && pages.clone().any(shared) {
        return None;
    }
    plan.fail_from(1);
    let got = step();
    plan.stop();
    assert!(got.is_some(), "{op:?} failed for want of memory");
    got
}

/// What of a move that failed was made: steps, and what is left to do.
pub fn moved(program: &Program, left: &mut ProcessOp) -> Vec<ProcessOp> {
    let ProcessOp::Move { process, to, .. } = *left else {
        return Vec::new();
    };
    let (pages, to) = (pages_of(*left), usize::from(to % WINDOW));
    let is_gone = |page: &usize| program.space.vma_at(at(*page)).is_none();
    let moved = pages.clone().take_while(is_gone).count();
    let mut made = Vec::new();
    let of = |page: usize, pages: usize, to: usize| ProcessOp::Move {
        process,
        page: page as u8,
        pages: pages as u8,
        to: to as u8,
    };
    if moved > 0 {
        made.push(of(pages.start, moved, to));
        *left = of(pages.start + moved, pages.len() - moved, to + moved);
    }
    let rest = to + moved..to + pages.len();
    let cleared = rest.clone().take_while(is_gone).count();
    if cleared > 0 {
        made.push(ProcessOp::Unmap {
            process,
            page: rest.start as u8,
            pages: cleared as u8,
        });
    }
    made
}
