//! Reclaim, swap and migration, step by step.

mod common;

use common::{PAGE, Program, RW, World};
use kmem_cow_mm::replacement::{Clock, Fifo, Generations, Replacement, TwoLists};
use kmem_cow_mm::{Advice, MapFlags, MapRequest, Outcome, Reclaimer};
use kmem_hal::{FrameRequest, FrameSink, FrameSource, Migrate, Page, VirtAddr};
use kmem_mock_x86::Machine;
use kmem_paging::Rights;

#[test]
fn pages_go_to_swap_and_come_back() {
    let world = World::new();
    let mm = world.mm();
    let before = world.used_frames();
    let disk = world.disk(mm, 256);
    let program = Program::new(mm);
    let start = program.map(64);
    for page in 0..64 {
        program.store(start + page * PAGE, 0x1000 + page).unwrap();
    }
    assert_eq!(program.space.recount().rss_anon, 64);
    let made = Reclaimer::new(Fifo).reclaim(mm, 64);
    assert_eq!(made.freed, 64, "{made:?}");
    assert_eq!(disk.transfers().1, 64);
    assert_eq!(program.space.recount().rss_anon, 0);
    assert_eq!(program.space.swapped(), 64);
    assert_eq!(mm.meminfo().swap.free, 256 - 64);
    for page in 0..64 {
        assert_eq!(program.load(start + page * PAGE), Ok(0x1000 + page));
    }
    assert_eq!(
        disk.transfers().0,
        64,
        "every page is read once, with its cluster"
    );
    assert!(mm.events().read_ahead > 40, "{:?}", mm.events());
    assert_eq!(mm.meminfo().swap.free, 256);
    program.exit();
    assert_eq!(world.used_frames(), before);
}

#[test]
fn a_page_on_its_way_out_comes_back_without_a_read() {
    let world = World::new();
    let mm = world.mm();
    let disk = world.disk(mm, 16);
    disk.set_latency(3);
    let program = Program::new(mm);
    let start = program.map(1);
    program.store(start, 7).unwrap();
    let made = Reclaimer::new(Fifo).reclaim(mm, 1);
    assert_eq!((made.freed, made.writing), (0, 1), "{made:?}");
    assert_eq!(mm.meminfo().writeback, 1);
    assert_eq!(program.load(start), Ok(7));
    program.store(start, 8).unwrap();
    while mm.poll_swap().is_some() {}
    assert_eq!(program.load(start), Ok(8));
    assert_eq!(disk.transfers().0, 0);
    assert_eq!(mm.meminfo().swap.free, 16);
    program.exit();
}

#[test]
fn shared_tables_are_changed_once_and_everybody_reads_the_same() {
    let world = World::new();
    let mm = world.mm();
    let before = world.used_frames();
    world.disk(mm, 4096);
    let parent = Program::new(mm);
    let start = parent.map(1024);
    for page in 0..1024 {
        parent.store(start + page * PAGE, page + 1).unwrap();
    }
    let child = parent.fork().unwrap();
    let grandchild = child.fork().unwrap();
    child.store(start, 99).unwrap();
    let made = Reclaimer::new(Fifo).reclaim(mm, 2000);
    assert!(made.freed >= 1024, "{made:?}");
    for page in 0..1024 {
        let address = start + page * PAGE;
        let own = if page == 0 { 99 } else { page + 1 };
        assert_eq!(parent.load(address), Ok(page + 1));
        assert_eq!(child.load(address), Ok(own));
        assert_eq!(grandchild.load(address), Ok(page + 1));
    }
    parent.store(start + PAGE, 5).unwrap();
    assert_eq!(child.load(start + PAGE), Ok(2));
    Reclaimer::new(Fifo).reclaim(mm, 4000);
    parent.exit();
    assert_eq!(grandchild.load(start + PAGE), Ok(2));
    child.exit();
    grandchild.exit();
    assert_eq!(mm.meminfo().swap.free, 4096);
    assert_eq!(world.used_frames(), before);
}

#[test]
fn a_page_is_moved_under_everybody_who_maps_it() {
    let world = World::new();
    let mm = world.mm();
    let before = world.used_frames();
    let parent = Program::new(mm);
    let start = parent.map(8);
    for page in 0..8 {
        parent.store(start + page * PAGE, page + 1).unwrap();
    }
    let child = parent.fork().unwrap();
    child.store(start, 50).unwrap();
    let frames = world.frames();
    for program in [&parent, &child] {
        for page in 0..8 {
            let from = program.frame_at(start + page * PAGE).unwrap();
            let to = frames.alloc(&FrameRequest::ONE).unwrap();
            let target = to.first();
            let entry = program
                .space
                .page_tables()
                .query(Page::containing(VirtAddr::new(start + page * PAGE)));
            let old = mm.migrate(from, to).unwrap();
            assert_eq!(old.first(), from);
            assert_eq!(program.frame_at(start + page * PAGE), Some(target));
            let now = program
                .space
                .page_tables()
                .query(Page::containing(VirtAddr::new(start + page * PAGE)));
            // The next write decides whose the page is.
            let kept = entry.leaf().unwrap().attributes.rights - Rights::WRITE;
            assert_eq!(now.leaf().unwrap().attributes.rights, kept);
            frames.free(old);
        }
    }
    assert_eq!(parent.load(start), Ok(1));
    assert_eq!(child.load(start), Ok(50));
    for page in 1..8 {
        assert_eq!(parent.load(start + page * PAGE), Ok(page + 1));
        assert_eq!(child.load(start + page * PAGE), Ok(page + 1));
    }
    parent.store(start, 3).unwrap();
    child.store(start + PAGE, 4).unwrap();
    assert_eq!(
        (parent.load(start), parent.load(start + PAGE)),
        (Ok(3), Ok(2))
    );
    parent.exit();
    child.exit();
    assert_eq!(world.used_frames(), before);
}

#[test]
fn the_policies_keep_what_is_used() {
    fn run(policy: impl Replacement) -> u64 {
        let world = World::new();
        let mm = world.mm();
        world.disk(mm, 256);
        let program = Program::new(mm);
        let start = program.map(64);
        for page in 0..64 {
            program.store(start + page * PAGE, page).unwrap();
        }
        let mut reclaimer = Reclaimer::new(policy);
        let mut missed = 0;
        for round in 0..40 {
            for page in 0..16 {
                let hot = start + page * PAGE;
                missed += u64::from(program.frame_at(hot).is_none());
                program.load(hot).unwrap();
            }
            for cold in 0..8 {
                let page = 16 + (round * 8 + cold) % 48;
                program.load(start + page * PAGE).unwrap();
            }
            reclaimer.reclaim(mm, 8);
        }
        program.exit();
        missed
    }
    let fifo = run(Fifo);
    for missed in [run(Clock), run(TwoLists), run(Generations::default())] {
        assert!(
            missed * 4 < fifo,
            "{missed} used pages were gone, {fifo} with FIFO"
        );
    }
}

#[test]
fn locked_pages_stay_and_a_failed_write_loses_nothing() {
    let world = World::new();
    let mm = world.mm();
    let disk = world.disk(mm, 16);
    let program = Program::new(mm);
    let locked = program.map(2);
    let start = program.map(2);
    program.space.mlock(locked, PAGE).unwrap();
    program.store(locked, 1).unwrap();
    program.store(start, 2).unwrap();
    disk.fail_at(1);
    Reclaimer::new(Fifo).reclaim(mm, 16);
    assert!(program.frame_at(locked).is_some());
    assert_eq!(program.load(start), Ok(2));
    assert_eq!(mm.events().write_errors, 1);
    // A read that fails is a bus error, and the next access tries again.
    Reclaimer::new(Fifo).reclaim(mm, 16);
    disk.fail_at(1);
    assert!(matches!(program.load(start), Err(Outcome::Signal { .. })));
    assert_eq!(program.load(start), Ok(2));
    program.exit();
}

#[test]
fn swapoff_brings_everything_back() {
    let world = World::new();
    let mm = world.mm();
    let disk = world.disk(mm, 64);
    disk.set_latency(2);
    let program = Program::new(mm);
    let start = program.map(32);
    for page in 0..32 {
        program.store(start + page * PAGE, page).unwrap();
    }
    let mut reclaimer = Reclaimer::new(Fifo);
    reclaimer.reclaim(mm, 32);
    while mm.poll_swap().is_some() {}
    reclaimer.reclaim(mm, 32);
    while mm.poll_swap().is_some() {}
    assert!(program.space.swapped() > 0);
    let mut calls = 0;
    while mm.swap_off(0).unwrap().is_some() {
        calls += 1;
        assert!(calls < 1000);
    }
    assert_eq!(program.space.swapped(), 0);
    assert_eq!(mm.meminfo().swap.total, 0);
    for page in 0..32 {
        assert_eq!(program.load(start + page * PAGE), Ok(page));
    }
    assert!(mm.swap_off(0).is_err());
    program.exit();
}

/// A program whose faults wait and reclaim.
fn access<R>(
    program: &Program,
    reclaimer: &mut Reclaimer<Clock>,
    access: impl Fn(kmem_mock_x86::VirtualCpu<'static>) -> Result<R, kmem_mock_x86::Fault>,
) -> R {
    let machine = program.space.mm().env().machine;
    program.run_on(0);
    loop {
        match access(machine.cpu(0).user()) {
            Ok(value) => return value,
            Err(fault) => {
                let fault = fault.as_page_fault().unwrap();
                let outcome = program.space.fault_with(&fault, reclaimer, |_| {
                    let _ = program.space.mm().poll_swap();
                });
                assert_eq!(outcome, Outcome::Handled);
            }
        }
    }
}

#[test]
fn a_working_set_twice_as_large_as_memory_keeps_its_contents() {
    let machine: &'static Machine = Box::leak(Box::new(Machine::pc(6 << 20, 1)));
    let world = World::on(machine);
    let mm = world.mm();
    let before = world.used_frames();
    let room = world.free_frames();
    let disk = world.disk(mm, 16384);
    disk.set_latency(2);
    let pages = 2 * room;
    let mut reclaimer = Reclaimer::new(Clock);
    let parent = Program::new(mm);
    let start = parent.map(pages);
    let mut random = 12345u64;
    let mut next = move || {
        random = random
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        random >> 33
    };
    let mut words = vec![0; pages as usize];
    for page in 0..pages {
        words[page as usize] = page * 3 + 1;
        let value = words[page as usize];
        access(&parent, &mut reclaimer, |cpu| {
            cpu.write_u64(start + page * PAGE, value)
        });
    }
    // A child has them too, and writes some; its parent others.
    let mut child = None;
    for _ in 0..8 {
        match parent.fork() {
            Ok(forked) => child = Some(forked),
            Err(_) => {
                reclaimer.reclaim(mm, 64);
                while mm.poll_swap().is_some() {}
            }
        }
        if child.is_some() {
            break;
        }
    }
    let child = child.expect("room for a child");
    let mut of_child = words.clone();
    for _ in 0..pages / 4 {
        let (page, value) = (next() % pages, next());
        let of_whom = if value % 2 == 0 {
            (&parent, &mut words)
        } else {
            (&child, &mut of_child)
        };
        of_whom.1[page as usize] = value;
        access(of_whom.0, &mut reclaimer, |cpu| {
            cpu.write_u64(start + page * PAGE, value)
        });
    }
    for page in 0..pages {
        for (program, words) in [(&parent, &words), (&child, &of_child)] {
            let found = access(program, &mut reclaimer, |cpu| {
                cpu.read_u64(start + page * PAGE)
            });
            assert_eq!(found, words[page as usize], "page {page}");
        }
    }
    assert!(mm.events().swapped_out > pages / 2, "{:?}", mm.events());
    parent.exit();
    child.exit();
    while mm.poll_swap().is_some() {}
    assert_eq!(mm.meminfo().swap.free, 16384);
    assert_eq!(world.used_frames(), before);
}

#[test]
fn shared_memory_goes_to_swap_and_comes_back_for_everybody() {
    let world = World::new();
    let mm = world.mm();
    let before = world.used_frames();
    let disk = world.disk(mm, 64);
    disk.set_latency(1);
    let parent = Program::new(mm);
    let request = MapRequest {
        flags: MapFlags::SHARED | MapFlags::ANONYMOUS,
        ..MapRequest::anonymous(16 * PAGE, RW)
    };
    let start = parent.space.mmap(&request).unwrap().as_u64();
    let child = parent.fork().unwrap();
    for page in 0..16 {
        let writer = if page % 2 == 0 { &parent } else { &child };
        writer.store(start + page * PAGE, page + 1).unwrap();
    }
    let mut reclaimer = Reclaimer::new(Fifo);
    reclaimer.reclaim(mm, 16);
    // On its way out it comes back without a read, and is written again.
    assert_eq!(child.load(start), Ok(1));
    assert_eq!(disk.transfers().0, 0);
    child.store(start, 100).unwrap();
    while mm.poll_swap().is_some() {}
    assert_eq!(mm.meminfo().shared, 1);
    assert_eq!(mm.meminfo().swap.free, 64 - 15);
    for page in 0..16 {
        let want = if page == 0 { 100 } else { page + 1 };
        for program in [&parent, &child] {
            assert_eq!(program.load(start + page * PAGE), Ok(want));
        }
    }
    reclaimer.reclaim(mm, 16);
    while mm.poll_swap().is_some() {}
    while mm.swap_off(0).unwrap().is_some() {}
    assert_eq!(parent.load(start + PAGE), Ok(2));
    parent.exit();
    child.exit();
    assert_eq!(world.used_frames(), before);
}

/// What advice costs is what is in the range: a walk page by page over this much would not end.
#[test]
fn advice_passes_what_was_never_touched() {
    const LARGE: u64 = 32 << 40;
    let world = World::new();
    let mm = world.mm();
    world.disk(mm, 16);
    let program = Program::new(mm);
    for flags in [MapFlags::PRIVATE, MapFlags::SHARED] {
        let request = MapRequest {
            flags: flags | MapFlags::ANONYMOUS | MapFlags::NORESERVE,
            ..MapRequest::anonymous(LARGE, RW)
        };
        let start = program.space.mmap(&request).unwrap().as_u64();
        let middle = start + LARGE / 2;
        program.store(middle, 7).unwrap();
        let advise = |advice| program.space.madvise(start, LARGE, advice).unwrap();
        advise(Advice::Cold);
        advise(Advice::PageOut);
        assert_eq!(program.frame_at(middle), None);
        let reads = world.disk(mm, 16).transfers().0;
        advise(Advice::WillNeed);
        assert_eq!(world.disk(mm, 16).transfers().0, reads + 1);
        assert_eq!(program.load(middle), Ok(7));
        if flags == MapFlags::SHARED {
            advise(Advice::Remove);
            assert_eq!(program.load(middle), Ok(0));
        }
        program.space.munmap(start, LARGE).unwrap();
    }
    program.exit();
}

/// A page in swap is shared by all who have its entry: in tables of their own, or in one that a fork left shared.
#[test]
fn what_is_in_swap_counts_by_its_share() {
    for copying in [false, true] {
        let world = World::new();
        let mm = world.mm();
        world.disk(mm, 16);
        let program = Program::new(mm);
        let start = program.map(1);
        program.store(start, 1).unwrap();
        program.space.madvise(start, PAGE, Advice::PageOut).unwrap();
        let share = || {
            let resident = program.space.resident_in_all();
            assert_eq!(resident.swap, PAGE);
            resident.swap_pss()
        };
        assert_eq!(share(), PAGE);
        let child = match copying {
            true => program.space.fork_copying(),
            false => program.space.fork(),
        };
        assert_eq!(share(), PAGE / 2);
        child.unwrap().exit();
        assert_eq!(share(), PAGE);
        program.exit();
    }
}

/// A page that was given up is still that when it has moved: there is no swap, and it goes.
#[test]
fn a_page_that_was_given_up_and_moved_goes_without_a_copy() {
    let world = World::new();
    let mm = world.mm();
    let program = Program::new(mm);
    let start = program.map(1);
    program.store(start, 7).unwrap();
    program.space.madvise(start, PAGE, Advice::Free).unwrap();
    let to = world.frames().alloc(&FrameRequest::ONE).unwrap();
    let old = mm.migrate(program.frame_at(start).unwrap(), to).unwrap();
    world.frames().free(old);
    Reclaimer::new(Fifo).reclaim(mm, 16);
    assert_eq!(program.frame_at(start), None);
    assert_eq!(program.load(start), Ok(0));
    program.exit();
}

/// From the first call of `swap_off` on no page goes to the area, though the call is not done.
#[test]
fn an_area_that_is_being_emptied_takes_no_pages() {
    let world = World::new();
    let mm = world.mm();
    let disk = world.disk(mm, 16);
    let program = Program::new(mm);
    let start = program.map(2);
    program.store(start, 1).unwrap();
    program.store(start + PAGE, 2).unwrap();
    program.space.madvise(start, PAGE, Advice::PageOut).unwrap();
    assert_eq!(program.frame_at(start), None);
    disk.set_latency(3);
    assert!(mm.swap_off(0).unwrap().is_some(), "the page is being read");
    let pageout = program.space.madvise(start + PAGE, PAGE, Advice::PageOut);
    pageout.unwrap();
    assert!(program.frame_at(start + PAGE).is_some());
    while mm.swap_off(0).unwrap().is_some() {}
    assert_eq!(mm.meminfo().swap.total, 0);
    assert_eq!(program.load(start), Ok(1));
    program.exit();
}

/// A page counts as being in memory while the swap cache has it, whether it is mapped or not (`mincore_swap`).
#[test]
fn mincore_sees_the_swap_cache() {
    for flags in [MapFlags::PRIVATE, MapFlags::SHARED] {
        let world = World::new();
        let mm = world.mm();
        world.disk(mm, 16).set_latency(3);
        let program = Program::new(mm);
        let request = MapRequest {
            flags: flags | MapFlags::ANONYMOUS,
            ..MapRequest::anonymous(PAGE, RW)
        };
        let start = program.space.mmap(&request).unwrap().as_u64();
        let in_memory = || {
            let mut vector = [9];
            program.space.mincore(start, PAGE, &mut vector).unwrap();
            vector[0] == 1
        };
        assert!(!in_memory());
        program.store(start, 7).unwrap();
        assert!(in_memory());
        program.space.madvise(start, PAGE, Advice::PageOut).unwrap();
        assert_eq!(program.frame_at(start), None);
        assert!(in_memory(), "it is being written");
        while mm.poll_swap().is_some() {}
        assert!(!in_memory());
        let willneed = program.space.madvise(start, PAGE, Advice::WillNeed);
        willneed.unwrap();
        while mm.poll_swap().is_some() {}
        assert!(in_memory(), "it was read and is not mapped");
        assert_eq!(program.load(start), Ok(7));
        program.exit();
    }
}

#[test]
fn emptied_tables_are_given_back_where_there_are_not_pages_enough() {
    let world = World::new();
    let mm = world.mm();
    let program = Program::new(mm);
    world.used_frames(); // leaves no table in the cache
    let in_use = || world.frames_in_use();
    let before = in_use();
    // A table for each page.
    let apart = 512 * PAGE;
    let start = program.map(512 * 8);
    for table in 0..8 {
        program.store(start + table * apart, 1).unwrap();
    }
    program.space.munmap(start, 8 * apart).unwrap();
    let kept = in_use() - before;
    assert!(kept >= 8, "{kept} tables are kept");
    let made = Reclaimer::new(Fifo).reclaim(mm, 3);
    assert_eq!((made.freed, made.tables), (0, 3), "{made:?}");
    assert_eq!(in_use(), before + kept - 3);
    let made = Reclaimer::new(Fifo).reclaim(mm, u64::MAX);
    assert!(made.tables >= 5, "{made:?}");
    assert!(in_use() <= before, "{made:?}");
}

/// A write to a page in swap that is in memory still maps it, though no frame is left for the page of zeros that a first touch would need.
#[test]
fn a_page_in_the_swap_cache_comes_back_without_memory() {
    let world = World::new();
    let mm = world.mm();
    let disk = world.disk(mm, 16);
    disk.set_latency(1000);
    let program = Program::new(mm);
    let start = program.map(1);
    program.store(start, 7).unwrap();
    assert_eq!(Reclaimer::new(Fifo).reclaim(mm, 1).writing, 1);
    assert_eq!(program.frame_at(start), None);
    world.plan.fail_from(1);
    // The write itself needs a copy, as the page is being written.
    assert_eq!(program.store(start, 8), Err(Outcome::OutOfMemory));
    assert!(program.frame_at(start).is_some());
    world.plan.stop();
    assert_eq!(program.load(start), Ok(7));
    program.store(start, 8).unwrap();
    program.exit();
}
