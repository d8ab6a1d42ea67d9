//! The list: faults that address spaces have had, each as a small run that a correct one passes.
//!
//! With each stand the faults on purpose (`src/mutants.in`) that take its guard away: the run must notice them. No entry is without one.

use std::cell::Cell;

use kmem_cow_mm::{
    Advice, Env, Errno, Layout, Limits, MapFlags, MapRequest, Outcome, Prot, RemapFlags, Signal,
};
use kmem_hal::sync::Ordering;
use kmem_hal::{FaultCode, Frame, Page, PageFault, VirtAddr};
use kmem_mock_x86::{Adversary, Machine, MemoryMap, Scheduler};
use kmem_paging::Env as _;

use super::common::{PAGE, Program, RW, World, check_counters, signal};

const AT: u64 = 0x1000_0000;

/// A run, and the faults on purpose that it must notice: this crate's, or after `paging:` one of the page tables', where the guard stands there.
pub type Regression = (&'static str, fn(), &'static [&'static str]);

/// All of them.
pub const ALL: &[Regression] = &[
    (
        "reuse_while_another_reference_exists",
        reuse_while_another_reference_exists,
        &["reuse-ignores-references"],
    ),
    (
        "a_shared_page_is_not_exclusive",
        a_shared_page_is_not_exclusive,
        &["shared-stays-exclusive"],
    ),
    (
        "a_chain_of_forks_each_writes_its_own",
        a_chain_of_forks_each_writes_its_own,
        &["shared-stays-exclusive"],
    ),
    (
        "the_parents_processors_may_not_write_after_fork",
        the_parents_processors_may_not_write_after_fork,
        &["shared-stays-exclusive"],
    ),
    (
        "frames_are_free_only_after_every_processor_has_flushed",
        frames_are_free_only_after_every_processor_has_flushed,
        &[
            "paging:commit-does-not-flush",
            "paging:commit-gives-before-the-flush",
        ],
    ),
    (
        "a_private_write_does_not_reach_the_file",
        a_private_write_does_not_reach_the_file,
        &["private-write-hits-the-file"],
    ),
    (
        "a_later_write_reaches_the_file_too",
        a_later_write_reaches_the_file_too,
        &["cleaned-page-stays-writable"],
    ),
    (
        "a_child_of_locked_memory_is_not_locked",
        a_child_of_locked_memory_is_not_locked,
        &["fork-locks-the-child"],
    ),
    (
        "the_zero_page_is_nobodys",
        the_zero_page_is_nobodys,
        &["zero-page-counts"],
    ),
    (
        "a_copied_page_is_anonymous_and_no_file_page",
        a_copied_page_is_anonymous_and_no_file_page,
        &["copy-counts-as-the-file"],
    ),
    (
        "addresses_at_the_top_are_refused",
        addresses_at_the_top_are_refused,
        &["fixed-beyond-the-user"],
    ),
    (
        "a_stack_grows_into_no_guard",
        a_stack_grows_into_no_guard,
        &["stack-guard-forgotten"],
    ),
    (
        "nothing_gets_into_the_first_pages",
        nothing_gets_into_the_first_pages,
        &["first-pages-are-mapped"],
    ),
    (
        "a_mapping_is_cut_where_there_may_be_more",
        a_mapping_is_cut_where_there_may_be_more,
        &["cut-beyond-the-limit"],
    ),
    (
        "counts_are_refused_before_they_wrap",
        counts_are_refused_before_they_wrap,
        &["counts-wrap"],
    ),
    (
        "an_absent_entry_names_no_memory_that_exists",
        an_absent_entry_names_no_memory_that_exists,
        &[
            "paging:format-none-names-memory",
            "paging:format-payload-names-memory",
        ],
    ),
    (
        "protection_outlives_a_page_that_is_absent",
        protection_outlives_a_page_that_is_absent,
        &["what-may-be-granted-is"],
    ),
];

fn two_processors(seed: u64) -> &'static World {
    let machine = Machine::builder()
        .memory(MemoryMap::pc(32 << 20))
        .cpus(2)
        .adversary(Adversary::FULL)
        .seed(seed)
        .build();
    World::on(Box::leak(Box::new(machine.unwrap())))
}

fn map(program: &Program, pages: u64, prot: Prot) {
    program
        .space
        .mmap(&MapRequest::anonymous(pages * PAGE, prot).at(AT))
        .unwrap();
}

fn frame(program: &Program, address: u64) -> Frame {
    let page = Page::containing(VirtAddr::new(address));
    program.space.frame_at(page).expect("a page that is there")
}

/// CVE-2020-29374, and a reference in a swap cache or a batch of an LRU list: one mapping is left, but somebody still looks.
fn reuse_while_another_reference_exists() {
    let world = World::new();
    let parent = Program::new(world.mm());
    map(&parent, 1, RW);
    parent.store(AT, 1).unwrap();
    let shared = frame(&parent, AT);
    let child = parent.fork().unwrap();
    let page = world
        .paging()
        .slots()
        .slot(shared)
        .unwrap()
        .as_user()
        .unwrap();
    page.add_reference().unwrap();
    child.space.munmap(AT, PAGE).unwrap();
    // The child's table goes with it, so that the parent's mapping is the only one.
    child.exit();
    parent.store(AT, 2).unwrap();
    assert_ne!(
        frame(&parent, AT),
        shared,
        "the page was written while the child's reference reads it"
    );
    page.sub_reference().unwrap();
    parent.exit();
}

fn a_shared_page_is_not_exclusive() {
    let world = World::new();
    let parent = Program::new(world.mm());
    map(&parent, 2, RW);
    parent.store(AT, 1).unwrap();
    parent.store(AT + PAGE, 1).unwrap();
    let child = parent.fork().unwrap();
    // The first write copies the table, the second the page.
    child.store(AT + PAGE, 2).unwrap();
    child.store(AT, 2).unwrap();
    assert_eq!((parent.load(AT), child.load(AT)), (Ok(1), Ok(2)));
    parent.store(AT, 3).unwrap();
    assert_eq!((parent.load(AT), child.load(AT)), (Ok(3), Ok(2)));
    child.exit();
    parent.exit();
}

/// nanvix#2512: whether a page may be written was kept in the entry, which a second fork had already taken the right from.
fn a_chain_of_forks_each_writes_its_own() {
    let world = two_processors(3);
    let mut family = vec![Program::new(world.mm())];
    map(&family[0], 4, RW);
    family[0].store(AT, 0).unwrap();
    for generation in 1..5 {
        let child = family[generation - 1].fork().unwrap();
        family.push(child);
    }
    for (number, program) in family.iter().enumerate().rev() {
        program.store(AT, number as u64).unwrap();
        program.store(AT + PAGE, number as u64).unwrap();
    }
    for (number, program) in family.iter().enumerate() {
        assert_eq!(program.load(AT), Ok(number as u64));
        assert_eq!(program.load(AT + PAGE), Ok(number as u64));
    }
    check_counters(&family);
    family.into_iter().for_each(Program::exit);
}

/// A processor of the parent's that wrote before the fork still has the right in its TLB, unless the fork flushes it.
fn the_parents_processors_may_not_write_after_fork() {
    for seed in 0..8 {
        let world = two_processors(seed);
        let parent = Program::new(world.mm());
        map(&parent, 2, RW);
        // Both processors, one after the other.
        for value in 0..4 {
            parent.store(AT, value).unwrap();
        }
        let child = parent.fork().unwrap();
        for value in 4..8 {
            parent.store(AT, value).unwrap();
        }
        assert_eq!(child.load(AT), Ok(3), "seed {seed}");
        child.store(AT, 9).unwrap();
        assert_eq!(parent.load(AT), Ok(7), "seed {seed}");
        child.exit();
        parent.exit();
    }
}

/// The mock fails the run if any processor reaches a frame through an entry that was taken away after the frame was freed.
fn frames_are_free_only_after_every_processor_has_flushed() {
    for seed in 0..8 {
        let world = two_processors(seed);
        let mm = world.mm();
        let (one, other) = (Program::new(mm), Program::new(mm));
        map(&one, 8, RW);
        map(&other, 8, RW);
        for round in 0..8 {
            for page in 0..8 {
                one.store(AT + page * PAGE, round).unwrap();
                one.load(AT + page * PAGE).unwrap();
            }
            one.space.madvise(AT, 4 * PAGE, Advice::DontNeed).unwrap();
            one.space.munmap(AT + 4 * PAGE, 4 * PAGE).unwrap();
            // The frames are another's now.
            for page in 0..8 {
                other.store(AT + page * PAGE, 100 + round).unwrap();
            }
            assert_eq!(one.load(AT), Ok(0));
            let gone = AT + 5 * PAGE;
            assert_eq!(one.load(gone), Err(signal(Signal::MapError, gone)));
            one.space
                .mmap(&MapRequest::anonymous(4 * PAGE, RW).at(AT + 4 * PAGE))
                .unwrap();
            other.space.madvise(AT, 8 * PAGE, Advice::DontNeed).unwrap();
        }
        one.exit();
        other.exit();
    }
    (0..16).for_each(a_thread_reads_what_goes);
}

/// Another thread of the program reads on while the call is at work, through entries that its processor still has.
fn a_thread_reads_what_goes(seed: u64) {
    let world = two_processors(seed);
    let program = Program::new(world.mm());
    map(&program, 8, RW);
    for page in 0..8 {
        program.store(AT + page * PAGE, 1).unwrap();
    }
    program.run_on(0);
    program.run_on(1);
    let gone = Cell::new(false);
    let mut schedule = Scheduler::new(world.machine, seed);
    schedule.spawn(0, || {
        program.space.munmap(AT, 8 * PAGE).unwrap();
        gone.set(true);
    });
    schedule.spawn(1, || {
        let user = world.machine.cpu(1).user();
        let read = |page| user.read_u64(AT + page * PAGE);
        while !gone.get() {
            for page in 0..8 {
                assert_ne!(read(page), Ok(0), "seed {seed}: nobody wrote that");
            }
            world.machine.yield_now();
        }
        assert!((0..8).all(|page| read(page).is_err()), "seed {seed}");
    });
    schedule.run();
    program.exit();
}

fn a_private_write_does_not_reach_the_file() {
    let world = World::new();
    let mm = world.mm();
    let (_, open) = world.file(mm, &[7; 4096]);
    let request = MapRequest {
        file: Some(open),
        flags: MapFlags::PRIVATE | MapFlags::FIXED,
        address: AT,
        ..MapRequest::anonymous(PAGE, RW)
    };
    let (one, other) = (Program::new(mm), Program::new(mm));
    for program in [&one, &other] {
        program.space.mmap(&request).unwrap();
    }
    // Without a read before it: the page comes by the write itself.
    one.store(AT, 1).unwrap();
    assert_eq!(other.load(AT), Ok(0x0707_0707_0707_0707));
    assert_eq!(
        one.load(AT + 8),
        Ok(0x0707_0707_0707_0707),
        "the rest of the page is the file's"
    );
    one.exit();
    other.exit();
    mm.close(open.file);
}

/// A page that was written back is clean only once no processor may write to it unseen: the next write must be noticed.
fn a_later_write_reaches_the_file_too() {
    for seed in 0..8 {
        let world = two_processors(seed);
        let mm = world.mm();
        let (image, open) = world.file(mm, &[0; 4096]);
        let program = Program::new(mm);
        let request = MapRequest {
            file: Some(open),
            flags: MapFlags::SHARED | MapFlags::FIXED,
            address: AT,
            ..MapRequest::anonymous(PAGE, RW)
        };
        program.space.mmap(&request).unwrap();
        for value in 1..6 {
            program.store(AT, value).unwrap();
            program.space.msync(AT, PAGE).unwrap();
            let again = mm.open_file(image, "again", 43).unwrap();
            let reader = Program::new(mm);
            let request = MapRequest {
                file: Some(kmem_cow_mm::OpenFile {
                    file: again,
                    ..open
                }),
                flags: MapFlags::PRIVATE | MapFlags::FIXED,
                ..request
            };
            reader.space.mmap(&request).unwrap();
            assert_eq!(
                reader.load(AT),
                Ok(value),
                "seed {seed}: what the file holds"
            );
            reader.exit();
            mm.close(again);
        }
        program.exit();
        mm.close(open.file);
    }
}

/// FreeBSD's fix: a fork of locked memory makes the parent's pages shared, and its next write must neither fail nor lose the lock.
fn a_child_of_locked_memory_is_not_locked() {
    let world = World::new();
    let parent = Program::new(world.mm());
    map(&parent, 4, RW);
    parent.space.mlock(AT, 4 * PAGE).unwrap();
    let child = parent.fork().unwrap();
    assert_eq!(child.space.counters().locked, 0);
    parent.store(AT, 5).unwrap();
    assert_eq!((parent.load(AT), child.load(AT)), (Ok(5), Ok(0)));
    assert_eq!(
        (
            parent.space.counters().locked,
            parent.space.recount().rss_anon
        ),
        (4, 4)
    );
    // The child may give up what it does not keep.
    child.space.madvise(AT, PAGE, Advice::DontNeed).unwrap();
    check_counters([&parent, &child]);
    child.exit();
    parent.exit();
}

fn the_zero_page_is_nobodys() {
    let world = World::new();
    let program = Program::new(world.mm());
    map(&program, 4, RW);
    for page in 0..4 {
        assert_eq!(program.load(AT + page * PAGE), Ok(0));
    }
    assert_eq!(program.space.recount().rss_anon, 0);
    assert_eq!(program.space.recount().rss_file, 0);
    program.store(AT, 1).unwrap();
    assert_eq!(program.space.recount().rss_anon, 1);
    assert_eq!(
        program.load(AT + PAGE),
        Ok(0),
        "nobody writes to the page of zeros"
    );
    program.exit();
}

fn a_copied_page_is_anonymous_and_no_file_page() {
    let world = World::new();
    let mm = world.mm();
    let (_, open) = world.file(mm, &[7; 8192]);
    let program = Program::new(mm);
    let request = MapRequest {
        file: Some(open),
        flags: MapFlags::PRIVATE | MapFlags::FIXED,
        address: AT,
        ..MapRequest::anonymous(2 * PAGE, RW)
    };
    program.space.mmap(&request).unwrap();
    program.load(AT).unwrap();
    program.load(AT + PAGE).unwrap();
    let usage = program.space.recount();
    assert_eq!((usage.rss_file, usage.rss_anon), (2, 0));
    program.store(AT, 1).unwrap();
    let usage = program.space.recount();
    assert_eq!((usage.rss_file, usage.rss_anon), (1, 1));
    let child = program.fork().unwrap();
    let usage = child.space.recount();
    assert_eq!(
        usage.rss_anon, 1,
        "what a child sees through a shared table is its own too"
    );
    child.exit();
    program.exit();
    mm.close(open.file);
}

/// The end of the user's addresses, the hole that no address may lie in, and the top of all: every call with each of them.
fn addresses_at_the_top_are_refused() {
    let world = World::new();
    let program = Program::new(world.mm());
    let space = &program.space;
    let end = Layout::x86_64().task_size;
    let edges = [
        0,
        end,
        1 << 47,
        0xffff_8000_0000_0000,
        u64::MAX - PAGE + 1,
        u64::MAX,
    ];
    let near = |edge: u64| {
        [0, 1, PAGE - 1, PAGE, 2 * PAGE]
            .into_iter()
            .flat_map(move |by| [edge.wrapping_add(by), edge.wrapping_sub(by)])
    };
    let numbers: Vec<u64> = edges.into_iter().flat_map(near).collect();
    for &address in &numbers {
        for &length in &numbers {
            for flags in [
                MapFlags::empty(),
                MapFlags::FIXED,
                MapFlags::FIXED_NOREPLACE,
            ] {
                let request = MapRequest {
                    address,
                    flags: MapFlags::PRIVATE | MapFlags::ANONYMOUS | MapFlags::NORESERVE | flags,
                    ..MapRequest::anonymous(length, Prot::READ)
                };
                if let Ok(at) = space.mmap(&request) {
                    assert!(at.as_u64() + length <= end, "{address:#x} {length:#x}");
                    space.munmap(at.as_u64(), length).unwrap();
                }
            }
            let _ = space.munmap(address, length);
            let _ = space.mprotect(address, length, RW);
            let _ = space.madvise(address, length, Advice::DontNeed);
            let _ = space.madvise(address, length, Advice::PopulateRead);
            let _ = space.mlock(address, length);
            let _ = space.munlock(address, length);
            let _ = space.msync(address, length);
            let _ = space.mincore(address, length, &mut [0; 16]);
            let _ = space.set_anon_name(address, length, Some(b"x"));
            for to in [0, AT, end - PAGE, end, !(PAGE - 1)] {
                for flags in [0, 1, 3, 5, 7] {
                    let flags = RemapFlags::from_bits_retain(flags);
                    let _ = space.mremap(address, length, PAGE, flags, to);
                    let _ = space.mremap(address, PAGE, length, flags, to);
                }
            }
        }
        let code = FaultCode::USER | FaultCode::WRITE;
        let address = VirtAddr::new(address);
        let outcome = space.fault(&PageFault { address, code });
        let nothing = signal(Signal::MapError, address.as_u64());
        assert_eq!(outcome, nothing, "{}", space.maps());
        let _ = space.read_memory(address, &mut [0; 64]);
        let _ = space.peek(address, &mut [0; 8]);
        let _ = space.explain_fault(address, code).to_string();
        let _ = space.brk(address.as_u64());
    }
    assert_eq!(space.map_count(), 0);
    check_counters([&program]);
    program.exit();
}

/// The stack clash: a stack that grows may not come nearer to another mapping than the gap.
fn a_stack_grows_into_no_guard() {
    let world = World::new();
    let program = Program::new(world.mm());
    let stack = MapRequest {
        address: AT + 0x100_0000,
        flags: MapFlags::PRIVATE | MapFlags::ANONYMOUS | MapFlags::FIXED | MapFlags::GROWSDOWN,
        ..MapRequest::anonymous(PAGE, RW)
    };
    program.space.mmap(&stack).unwrap();
    let below = AT + 0x100_0000 - 300 * PAGE;
    program
        .space
        .mmap(&MapRequest::anonymous(PAGE, RW).at(below))
        .unwrap();
    let nearest = below + 257 * PAGE;
    program.store(nearest, 1).unwrap();
    let too_near = nearest - PAGE;
    assert_eq!(
        program.store(too_near, 1),
        Err(signal(Signal::MapError, too_near))
    );
    program.exit();
}

/// CVE-2019-9213: a stack that grows into the first pages puts memory where a kernel's null pointer leads. Nor does mremap.
fn nothing_gets_into_the_first_pages() {
    const LOWEST: u64 = 0x1_0000;
    let world = World::new();
    let program = Program::new(world.mm());
    let mut stack = MapRequest::anonymous(PAGE, RW).at(LOWEST);
    stack.flags |= MapFlags::GROWSDOWN;
    program.space.mmap(&stack).unwrap();
    let below = LOWEST - PAGE;
    assert_eq!(
        program.store(below, 1),
        Err(signal(Signal::MapError, below))
    );
    let to = RemapFlags::MAYMOVE | RemapFlags::FIXED;
    assert_eq!(
        program.space.mremap(LOWEST, PAGE, PAGE, to, PAGE),
        Err(Errno::EPERM)
    );
    program.exit();
}

/// A program that may have no more mappings gets none by cutting one: each costs the kernel memory.
fn a_mapping_is_cut_where_there_may_be_more() {
    let world = World::new();
    let program = Program::new(world.mm());
    map(&program, 3, RW);
    let limits = program.space.limits();
    program.space.set_limits(Limits {
        mappings: 1,
        ..limits
    });
    let cut = program.space.mprotect(AT + PAGE, PAGE, Prot::READ);
    assert_eq!((cut, program.space.map_count()), (Err(Errno::ENOMEM), 1));
    program.exit();
}

/// A page that is dropped and comes again has the rights of its mapping now, not those that it had.
fn protection_outlives_a_page_that_is_absent() {
    let world = two_processors(1);
    let program = Program::new(world.mm());
    map(&program, 2, RW);
    program.store(AT, 1).unwrap();
    program.space.mprotect(AT, PAGE, Prot::READ).unwrap();
    program.space.madvise(AT, PAGE, Advice::DontNeed).unwrap();
    assert_eq!(program.load(AT), Ok(0));
    assert_eq!(program.store(AT, 1), Err(signal(Signal::AccessError, AT)));
    program.space.mprotect(AT, PAGE, RW).unwrap();
    program.store(AT, 2).unwrap();
    program.exit();
}

/// CVE-2016-0728 and its kind: a count that wraps frees what is in use. A page that is mapped as often as can be counted is not mapped
/// once more.
fn counts_are_refused_before_they_wrap() {
    let world = World::new();
    let parent = Program::new(world.mm());
    map(&parent, 2, RW);
    parent.store(AT, 1).unwrap();
    let child = parent.fork().unwrap();
    let slot = world.paging().slots().slot(frame(&parent, AT)).unwrap();
    let word = slot.owner().load(Ordering::Acquire);
    slot.owner()
        .store(word | u64::from(u32::MAX) << 32, Ordering::Release);
    // The child's write would copy the table, and map the page a second time.
    assert_eq!(child.store(AT + PAGE, 2), Err(Outcome::OutOfMemory));
    assert_eq!(slot.as_user().unwrap().mappings(), u32::MAX);
    slot.owner().store(word, Ordering::Release);
    child.store(AT + PAGE, 2).unwrap();
    assert_eq!((parent.load(AT), child.load(AT)), (Ok(1), Ok(1)));
    child.exit();
    parent.exit();
}

/// L1TF, CVE-2018-3620: a processor that reads past the present bit must find an address at the top of its space.
fn an_absent_entry_names_no_memory_that_exists() {
    let world = World::new();
    let program = Program::new(world.mm());
    map(&program, 2, RW);
    program.store(AT, 1).unwrap();
    program.store(AT + PAGE, 1).unwrap();
    program
        .space
        .madvise(AT, PAGE, Advice::GuardInstall)
        .unwrap();
    program
        .space
        .mprotect(AT + PAGE, PAGE, Prot::empty())
        .unwrap();
    for address in [AT, AT + PAGE] {
        let page = Page::containing(VirtAddr::new(address));
        let Some(step) = program.space.page_tables().path(page).steps().last() else {
            panic!("no way to the page")
        };
        assert!(step.word != 0 && step.word & 1 == 0, "{:#x}", step.word);
        let frame = step.word >> 12 & ((1 << 40) - 1);
        assert!(
            frame >= world.machine.memory().frame_limit(),
            "{:#x}",
            step.word
        );
    }
    program.exit();
}
