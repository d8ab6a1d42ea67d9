//! Limits and promises: what each call answers beyond them, and that what is refused changes nothing.

mod common;

use common::{PAGE, Program, RW, World, check_counters};
use kmem_cow_mm::{
    CommitPolicy, Errno, Label, Limits, LockAll, LockFlags, MapFlags, MapRequest, Overcommit, Prot,
    RemapFlags, VmFlags,
};

const AT: u64 = 0x7000_0000;

fn limited(change: impl FnOnce(&mut Limits)) -> Program {
    let program = Program::new(World::new().mm());
    let mut limits = program.space.limits();
    change(&mut limits);
    program.space.set_limits(limits);
    program
}

fn map(program: &Program, at: u64, pages: u64, prot: Prot) -> Result<(), Errno> {
    let request = MapRequest::anonymous(pages * PAGE, prot).at(at);
    program.space.mmap(&request).map(|_| ())
}

#[test]
fn the_size_of_a_space_is_limited() {
    let program = limited(|limits| limits.address_space = 10 * PAGE);
    map(&program, AT, 10, RW).unwrap();
    assert_eq!(map(&program, AT + 32 * PAGE, 1, RW), Err(Errno::ENOMEM));
    map(&program, AT, 10, Prot::READ).unwrap();
    let space = &program.space;
    assert_eq!(
        space.mremap(AT, 10 * PAGE, 11 * PAGE, RemapFlags::MAYMOVE, 0),
        Err(Errno::ENOMEM)
    );
    let dontunmap = RemapFlags::MAYMOVE | RemapFlags::DONTUNMAP;
    assert_eq!(
        space.mremap(AT, PAGE, PAGE, dontunmap, 0),
        Err(Errno::ENOMEM)
    );
    space.set_heap(0x60_0000);
    assert_eq!(space.brk(0x60_1000), 0x60_0000);
    check_counters([&program]);
    program.exit();
}

#[test]
fn memory_that_moves_and_stays_counts_once_more() {
    let (to, flags) = (
        AT + 64 * PAGE,
        RemapFlags::MAYMOVE | RemapFlags::FIXED | RemapFlags::DONTUNMAP,
    );
    let is_mapped = |program: &Program, at: u64| {
        let vma = program.space.find_vma(at.into());
        vma.is_some_and(|vma| vma.range.start().as_u64() <= at)
    };
    let move_all = |program: &Program, pages: u64| {
        let length = pages * PAGE;
        program.space.mremap(AT, length, length, flags, to)
    };
    // The target is cleared, then the call is refused.
    let program = limited(|limits| limits.data = 6 * PAGE);
    map(&program, AT, 4, RW).unwrap();
    map(&program, to, 4, Prot::READ).unwrap();
    program.store(AT, 7).unwrap();
    assert_eq!(move_all(&program, 4), Err(Errno::ENOMEM));
    assert!(!is_mapped(&program, to));
    assert_eq!(program.load(AT), Ok(7), "nothing moved");
    check_counters([&program]);
    program.exit();
    // What was at the target makes room.
    let program = limited(|limits| limits.address_space = 10 * PAGE);
    map(&program, AT, 4, RW).unwrap();
    map(&program, to, 4, Prot::READ).unwrap();
    assert_eq!(move_all(&program, 4), Ok(to));
    assert_eq!(program.space.counters().total, 8);
    program.exit();
    // Of several, those before the refused one have moved, and the targets behind it stay.
    for (data, moved) in [(9, 0), (13, 1)] {
        let program = limited(|limits| limits.data = data * PAGE);
        map(&program, AT, 4, RW).unwrap();
        map(&program, AT + 4 * PAGE, 4, RW | Prot::EXEC).unwrap();
        map(&program, to, 8, Prot::READ).unwrap();
        program.store(AT, 7).unwrap();
        assert_eq!(move_all(&program, 8), Err(Errno::ENOMEM));
        assert_eq!(is_mapped(&program, to), moved == 1);
        assert_eq!(is_mapped(&program, to + 4 * PAGE), moved == 0);
        assert_eq!(program.load(AT), Ok(if moved == 1 { 0 } else { 7 }));
        assert_eq!(program.space.counters().data, 8 + 4 * moved);
        check_counters([&program]);
        program.exit();
    }
    // Locked memory: what moves stays locked and counted, what is left behind is neither.
    for (data, answer) in [(7, Err(Errno::ENOMEM)), (8, Ok(to))] {
        let program = limited(|limits| {
            limits.locked = 4 * PAGE;
            limits.data = data * PAGE;
        });
        map(&program, AT, 4, RW).unwrap();
        program.space.mlock(AT, 4 * PAGE).unwrap();
        program.store(AT, 7).unwrap();
        assert_eq!(move_all(&program, 4), answer);
        assert_eq!(program.space.counters().locked, 4);
        let is_locked = |at: u64| {
            let vma = program.space.find_vma(at.into());
            vma.is_some_and(|vma| {
                vma.range.start().as_u64() <= at && vma.flags.contains(VmFlags::LOCKED)
            })
        };
        assert_eq!(
            (is_locked(AT), is_locked(to)),
            (answer.is_err(), answer.is_ok())
        );
        check_counters([&program]);
        program.exit();
    }
    // What is no ordinary memory may not be left behind; that is found out before its target is cleared.
    let program = limited(|_| {});
    program
        .space
        .map_special(AT, 4 * PAGE, Prot::READ, Label::Vdso)
        .unwrap();
    map(&program, to, 4, Prot::READ).unwrap();
    assert_eq!(move_all(&program, 4), Err(Errno::EINVAL));
    assert!(is_mapped(&program, to));
    program.exit();
}

#[test]
fn private_writable_memory_is_limited() {
    let program = limited(|limits| limits.data = 4 * PAGE);
    map(&program, AT, 4, RW).unwrap();
    assert_eq!(map(&program, AT + 32 * PAGE, 1, RW), Err(Errno::ENOMEM));
    map(&program, AT + 32 * PAGE, 1, Prot::READ).unwrap();
    assert_eq!(
        program.space.mprotect(AT + 32 * PAGE, PAGE, RW),
        Err(Errno::ENOMEM)
    );
    program.space.munmap(AT, PAGE).unwrap();
    program.space.mprotect(AT + 32 * PAGE, PAGE, RW).unwrap();
    check_counters([&program]);
    program.exit();
}

#[test]
fn locked_memory_is_limited() {
    let program = limited(|limits| limits.locked = 4 * PAGE);
    let space = &program.space;
    map(&program, AT, 8, RW).unwrap();
    assert_eq!(space.mlock(AT, 5 * PAGE), Err(Errno::ENOMEM));
    space.mlock(AT, 4 * PAGE).unwrap();
    space.mlock(AT, 4 * PAGE).unwrap();
    assert_eq!(space.mlock(AT + 4 * PAGE, PAGE), Err(Errno::ENOMEM));
    let locked = MapRequest {
        flags: MapFlags::PRIVATE | MapFlags::ANONYMOUS | MapFlags::LOCKED,
        ..MapRequest::anonymous(PAGE, RW)
    };
    assert_eq!(space.mmap(&locked), Err(Errno::EAGAIN));
    assert_eq!(space.mlockall(LockAll::CURRENT), Err(Errno::ENOMEM));
    space.mlockall(LockAll::FUTURE).unwrap();
    assert_eq!(map(&program, AT + 32 * PAGE, 1, RW), Err(Errno::EAGAIN));
    space.munlockall().unwrap();
    assert_eq!(space.counters().locked, 0);
    map(&program, AT + 32 * PAGE, 1, RW).unwrap();
    let mut limits = space.limits();
    limits.locked = 0;
    space.set_limits(limits);
    assert_eq!(space.mlock(AT, PAGE), Err(Errno::EPERM));
    assert_eq!(space.mmap(&locked), Err(Errno::EPERM));
    assert_eq!(space.mlockall(LockAll::CURRENT), Err(Errno::EPERM));
    space.munlock(AT, PAGE).unwrap();
    limits.may_lock_all = true;
    space.set_limits(limits);
    space.mlock(AT, 8 * PAGE).unwrap();
    for flags in [
        LockAll::empty(),
        LockAll::ONFAULT,
        LockAll::from_bits_retain(8),
    ] {
        assert_eq!(space.mlockall(flags), Err(Errno::EINVAL));
    }
    assert_eq!(
        space.mlock2(AT, PAGE, LockFlags::from_bits_retain(2)),
        Err(Errno::EINVAL)
    );
    check_counters([&program]);
    program.exit();
}

#[test]
fn what_is_locked_is_present_and_what_is_locked_on_fault_comes_when_touched() {
    let program = limited(|_| {});
    let space = &program.space;
    map(&program, AT, 8, RW).unwrap();
    space.mlock(AT, 2 * PAGE).unwrap();
    assert_eq!(space.recount().rss_anon, 2);
    space
        .mlock2(AT + 2 * PAGE, 2 * PAGE, LockFlags::ONFAULT)
        .unwrap();
    assert_eq!(space.recount().rss_anon, 2);
    // Neither does it come when the mapping becomes writable, as what is locked at once does.
    for (at, flags) in [
        (AT + 64 * PAGE, LockFlags::ONFAULT),
        (AT + 80 * PAGE, LockFlags::empty()),
    ] {
        map(&program, at, 1, Prot::READ).unwrap();
        space.mlock2(at, PAGE, flags).unwrap();
        space.mprotect(at, PAGE, RW).unwrap();
        let pages = if flags.is_empty() { 3 } else { 2 };
        assert_eq!(space.recount().rss_anon, pages, "{flags:?}");
        space.munmap(at, PAGE).unwrap();
    }
    space.mlockall(LockAll::FUTURE).unwrap();
    map(&program, AT + 32 * PAGE, 3, RW).unwrap();
    assert_eq!(space.recount().rss_anon, 5);
    space.set_heap(0x60_0000);
    space.brk(0x60_2000);
    assert_eq!(space.recount().rss_anon, 7, "the heap is locked too");
    let child = program.fork().unwrap();
    assert_eq!(child.space.counters().locked, 0, "a child inherits no lock");
    map(&child, AT + 64 * PAGE, 1, RW).unwrap();
    assert_eq!(child.space.counters().locked, 0, "and no wish for locks");
    child.exit();
    program.exit();
}

#[test]
fn the_number_of_mappings_is_limited() {
    let program = limited(|limits| limits.mappings = 8);
    for number in 0..9 {
        map(&program, AT + number * 4 * PAGE, 3, RW).unwrap();
    }
    assert_eq!(map(&program, AT - 4 * PAGE, 1, RW), Err(Errno::ENOMEM));
    assert_eq!(
        program.space.munmap(AT + PAGE, PAGE),
        Err(Errno::ENOMEM),
        "a hole makes one more"
    );
    program.space.munmap(AT, 3 * PAGE).unwrap();
    program.exit();
}

#[test]
fn what_cuts_a_mapping_stays_within_their_number() {
    let program = Program::new(World::new().mm());
    let space = &program.space;
    let allow = |mappings| {
        space.set_limits(Limits {
            mappings,
            ..space.limits()
        });
    };
    map(&program, AT, 8, RW).unwrap();
    let (inside, advice) = (AT + 4 * PAGE, kmem_cow_mm::Advice::DontFork);
    let fixed = MapRequest::anonymous(PAGE, RW).at(inside);
    allow(1);
    assert_eq!(space.mprotect(inside, PAGE, Prot::READ), Err(Errno::ENOMEM));
    assert_eq!(space.mlock(inside, PAGE), Err(Errno::ENOMEM));
    assert_eq!(space.madvise(inside, PAGE, advice), Err(Errno::EAGAIN));
    assert_eq!(
        space.set_anon_name(inside, PAGE, Some(b"x")),
        Err(Errno::EAGAIN)
    );
    assert_eq!(space.munmap(inside, PAGE), Err(Errno::ENOMEM));
    assert_eq!(space.mmap(&fixed), Err(Errno::ENOMEM));
    assert_eq!(
        space.mprotect(AT, PAGE, Prot::READ),
        Err(Errno::ENOMEM),
        "one cut"
    );
    assert_eq!(space.map_count(), 1);
    space.mlock(AT, 8 * PAGE).unwrap();
    assert_eq!(space.munlock(inside, PAGE), Err(Errno::ENOMEM));
    space.munlock(AT, 8 * PAGE).unwrap();
    assert_eq!(space.map_count(), 1);
    // Of two cuts, the one that there was room for stays.
    allow(2);
    assert_eq!(space.mprotect(inside, PAGE, Prot::READ), Err(Errno::ENOMEM));
    assert_eq!(space.map_count(), 2);
    assert!(
        space
            .vma_at(inside.into())
            .unwrap()
            .flags
            .contains(VmFlags::WRITE)
    );
    space.mprotect(inside, 4 * PAGE, Prot::READ).unwrap();
    // What goes to a neighbour cuts nothing.
    space.mprotect(inside - PAGE, PAGE, Prot::READ).unwrap();
    assert_eq!(space.map_count(), 2);
    // To move, there must be room for what a move can cut.
    let grow = || space.mremap(inside, 4 * PAGE, 5 * PAGE, RemapFlags::MAYMOVE, 0);
    map(&program, AT + 8 * PAGE, 1, RW).unwrap();
    allow(6);
    assert_eq!(grow(), Err(Errno::ENOMEM));
    allow(7);
    grow().unwrap();
    check_counters([&program]);
    program.exit();
}

#[test]
fn promises_stay_below_the_commit_limit() {
    let world = World::new();
    let mm = world.mm();
    let policy = CommitPolicy {
        mode: Overcommit::Never,
        ram: 200,
        swap: 100,
        admin_reserve: 10,
        user_reserve: 0,
        ..CommitPolicy::default()
    };
    mm.set_commit_policy(&policy);
    assert_eq!(policy.limit(), 200);
    let parent = Program::new(mm);
    map(&parent, AT, 100, RW).unwrap();
    assert_eq!(mm.committed(), 100);
    assert_eq!(
        parent.fork().err(),
        Some(Errno::ENOMEM),
        "a child needs as much again"
    );
    assert_eq!(mm.committed(), 100);
    assert_eq!(
        map(&parent, AT + 0x100_0000, 90, RW),
        Err(Errno::ENOMEM),
        "190 is not below 190"
    );
    map(&parent, AT + 0x100_0000, 89, RW).unwrap();
    let mut limits = parent.space.limits();
    limits.is_admin = true;
    parent.space.set_limits(limits);
    map(&parent, AT + 0x200_0000, 10, RW).unwrap();
    parent.space.munmap(AT + 0x200_0000, 10 * PAGE).unwrap();
    // Read-only memory is no promise until it may be written; NORESERVE is none where promises are kept.
    map(&parent, AT + 0x300_0000, 50, Prot::READ).unwrap();
    assert_eq!(
        parent.space.mprotect(AT + 0x300_0000, 50 * PAGE, RW),
        Err(Errno::ENOMEM)
    );
    let noreserve = MapRequest {
        flags: MapFlags::PRIVATE | MapFlags::ANONYMOUS | MapFlags::NORESERVE,
        ..MapRequest::anonymous(50 * PAGE, RW)
    };
    assert_eq!(parent.space.mmap(&noreserve), Err(Errno::ENOMEM));
    let shared = MapRequest {
        flags: MapFlags::SHARED | MapFlags::ANONYMOUS,
        ..MapRequest::anonymous(50 * PAGE, RW)
    };
    assert_eq!(
        parent.space.mmap(&shared),
        Err(Errno::ENOMEM),
        "shared memory is a promise"
    );
    assert_eq!(
        parent
            .space
            .mremap(AT, 100 * PAGE, 150 * PAGE, RemapFlags::MAYMOVE, 0),
        Err(Errno::ENOMEM)
    );
    check_counters([&parent]);
    mm.set_commit_policy(&CommitPolicy {
        mode: Overcommit::Guess,
        ..policy
    });
    assert_eq!(
        map(&parent, AT + 0x400_0000, 301, RW),
        Err(Errno::ENOMEM),
        "more than there is"
    );
    map(&parent, AT + 0x400_0000, 300, RW).unwrap();
    parent.space.mmap(&noreserve).unwrap();
    mm.set_commit_policy(&CommitPolicy {
        mode: Overcommit::Always,
        ..policy
    });
    map(&parent, AT + 0x500_0000, 3000, RW).unwrap();
    parent.space.mmap(&shared).unwrap();
    assert_eq!(
        mm.commit_lines().to_string(),
        format!(
            "CommitLimit:    {:>8} kB\nCommitted_AS:   {:>8} kB\n",
            800,
            mm.committed() * 4
        )
    );
    parent.exit();
    assert_eq!(mm.committed(), 0, "every promise was taken back");
}

#[test]
fn a_refused_fixed_mapping_leaves_what_was_there() {
    let program = limited(|limits| limits.address_space = 10 * PAGE);
    map(&program, AT, 8, RW).unwrap();
    program.store(AT + 7 * PAGE, 5).unwrap();
    // As on Linux the mapping stays cut where the refused one would have begun.
    assert_eq!(map(&program, AT + 6 * PAGE, 6, RW), Err(Errno::ENOMEM));
    assert_eq!(program.space.map_count(), 2);
    assert_eq!(program.load(AT + 7 * PAGE), Ok(5));
    program.exit();
}

#[test]
fn the_heap_leaves_a_page_free_below_what_follows() {
    let program = limited(|limits| limits.data = 64 * PAGE);
    let space = &program.space;
    space.set_heap(0x60_0000);
    map(&program, 0x61_0000, 1, RW).unwrap();
    assert_eq!(space.brk(0x61_0000), 0x60_0000);
    assert_eq!(space.brk(0x60_f000), 0x60_f000);
    assert_eq!(space.brk(0x60_0000), 0x60_0000);
    program.exit();
}

/// Memory that can be written no more is promised no longer where it never was written; where it was, its pages are (`mprotect_fixup`).
#[test]
fn mprotect_takes_back_promises_of_what_was_never_written() {
    let mm = World::new().mm();
    let program = Program::new(mm);
    for (written, promised) in [(false, 0), (true, 4)] {
        let start = program.map(4);
        assert_eq!(mm.committed(), 4);
        if written {
            program.store(start, 1).unwrap();
        }
        program.space.mprotect(start, 4 * PAGE, Prot::READ).unwrap();
        assert_eq!(mm.committed(), promised);
        program.space.munmap(start, 4 * PAGE).unwrap();
        assert_eq!(mm.committed(), 0);
    }
    program.exit();
}
