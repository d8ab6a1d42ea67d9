//! Tags, generations, lazy CPUs and page-table isolation: `AsidMmu` on the mock machine, whose instructions do exactly what the manual says.

#![cfg(not(loom))]

#[path = "common/switch_env.rs"]
mod switch_env;
#[path = "common/switching.rs"]
mod switching;

use kmem_hal::{FrameRequest, FrameSink, FrameSource, Mmu, OwnedFrame, Page, PageRange};
use kmem_mock_x86::{Adversary, Registers, Stats};
use kmem_paging::format::{Format, X86_64};
use kmem_paging::{Rights, TableError};
use switching::{Table, World, map, overtaken, plain, run, switching, unmap};

/// What the machine of a run did.
fn report(seed: u64, stats: Stats) {
    println!("seed {seed}: {stats}");
}

#[test]
fn cpus_switch_borrow_and_change_spaces() {
    for seed in 0..30 {
        report(
            seed,
            switching(seed, 200, false, Registers::LONG_PCID, Adversary::FULL),
        );
    }
}

#[test]
fn without_tags_too() {
    for seed in 0..10 {
        report(
            seed,
            switching(seed, 200, false, Registers::LONG, Adversary::FULL),
        );
    }
}

#[test]
fn user_mode_on_a_root_of_its_own() {
    for seed in 0..30 {
        report(
            seed,
            switching(seed, 200, true, Registers::LONG_PCID, Adversary::FULL),
        );
    }
    for seed in 0..10 {
        report(
            seed,
            switching(seed, 200, true, Registers::LONG, Adversary::FULL),
        );
    }
}

fn drop_table(world: &World, table: Table) {
    table.destroy(|_, frame: OwnedFrame| world.env.pool.free(frame), |_, _| {});
}

#[test]
fn a_flush_that_overtakes_another_does_the_work_of_both() {
    overtaken();
}

/// Meltdown: what user mode's root maps, a program can see. Without isolation that is the kernel's memory; with it, the trampoline alone.
#[test]
fn isolation_hides_the_kernel_from_reads_ahead_of_their_check() {
    for (isolated, child) in [(false, false), (true, false), (true, true)] {
        let world = plain(isolated);
        let env = world.env;
        let secret = world.env.pool.alloc(&FrameRequest::ONE).unwrap();
        env.machine
            .memory()
            .store(secret.first().number() << 12, 1, 0x5e);
        let page = Page::new(world.first_kernel_page).unwrap();
        let mut cursor = world.kernel.cursor(PageRange::single(page)).unwrap();
        cursor.map(page, secret, Rights::KERNEL_DATA).unwrap();
        drop(cursor);
        // A space that was made, and one that was made like it, as a fork's child is.
        let first = world.new_space();
        let table = match child {
            true => Table::empty_like(env, &first).unwrap(),
            false => first,
        };
        run(&world, 0, &table);
        let user = env.machine.cpu(0).user();
        // The kernel has used it, so that it is in the TLB as well.
        assert_eq!(
            env.machine.cpu(0).read_u64(page.start().as_u64()).unwrap() & 0xff,
            0x5e
        );
        if isolated {
            env.cpus.leave_kernel();
        }
        // A read in the ordinary way faults either way.
        assert!(user.read_u64(page.start().as_u64()).is_err());
        let seen = user.transient_read(page.start().as_u64());
        assert_eq!(seen, if isolated { None } else { Some(0x5e) });
        if isolated {
            let trampoline = Page::new(world.first_kernel_page - 0x10).unwrap();
            assert_eq!(user.transient_read(trampoline.start().as_u64()), Some(0x77));
            env.cpus.enter_kernel();
            assert_eq!(
                env.machine.cpu(0).read_u64(page.start().as_u64()).unwrap() & 0xff,
                0x5e
            );
        }
    }
}

/// The costs that the module's table names: interrupts and flush instructions of each situation.
#[test]
fn a_flush_reaches_whom_it_must() {
    let world = plain(false);
    let env = world.env;
    let (a, b) = (world.new_space(), world.new_space());
    for page in 0x400..0x440 {
        map(&world, &a, page);
    }
    map(&world, &b, 0x400);
    run(&world, 0, &a);
    run(&world, 1, &a);
    run(&world, 2, &b);
    let interrupts = || env.cpus.interrupts.get();
    // CPU 2 runs another space: it hears nothing.
    unmap(&world, &a, 0x400);
    assert_eq!(interrupts(), 1);
    // Forty pages in one gather are one interrupt too.
    let range = PageRange::with_count(Page::new(0x401).unwrap(), 40).unwrap();
    let mut gather = a.gather::<64>();
    a.cursor(range).unwrap().unmap(range, &mut gather).unwrap();
    gather.commit_to(&env.pool);
    drop(gather);
    assert_eq!(interrupts(), 2);
    // A lazy CPU hears nothing while no tables are freed.
    env.machine.on_cpu(1, || env.mmu.enter_lazy().unwrap());
    unmap(&world, &a, 0x430);
    assert_eq!(interrupts(), 2);
    // It catches up when a thread of the space comes back, without a load of CR3 that drops other spaces.
    env.machine.cpu(1).read_u64(0x43_1000).unwrap();
    run(&world, 1, &a);
    assert!(env.machine.cpu(1).user().read_u64(0x43_0000).is_err());
    // A thread of the same space: nothing is dropped.
    let flushes = env.machine.stats().flushes;
    run(&world, 1, &a);
    assert_eq!(env.machine.stats().flushes, flushes);
    // Another space and back, unchanged: what was cached is still there.
    env.machine.cpu(1).read_u64(0x43_1000).unwrap();
    run(&world, 1, &b);
    run(&world, 1, &a);
    let walks = env.machine.stats().walks;
    env.machine.cpu(1).read_u64(0x43_1000).unwrap();
    assert_eq!(env.machine.stats().walks, walks, "it was still in the TLB");
    // Where tables are freed a lazy CPU is told, once: it leaves the space.
    env.machine.on_cpu(1, || env.mmu.enter_lazy().unwrap());
    for page in 0x429..0x440 {
        if page != 0x430 {
            unmap(&world, &a, page);
        }
    }
    assert_eq!(interrupts(), 3);
    assert_eq!(
        env.machine.loaded_root(1).frame,
        world.kernel.root().frame,
        "the last page took the leaf table with it"
    );
    // CPU 0 runs no thread of it any more.
    env.machine.on_cpu(0, || env.mmu.enter_lazy().unwrap());
    drop_table(&world, a);
    assert!(env.mmu.is_loaded(b.root()));
}

/// A frame that becomes another space's root must not find the old one's translations.
#[test]
fn a_root_frame_is_used_again() {
    let world = plain(false);
    let env = world.env;
    let a = world.new_space();
    map(&world, &a, 0x400);
    run(&world, 0, &a);
    env.machine.cpu(0).read_u64(0x40_0000).unwrap();
    let frame = a.root().frame;
    // SAFETY: the kernel's root is for ever.
    unsafe { env.mmu.load_root(world.kernel.root(), true) };
    drop_table(&world, a);
    // The pool gives frames in turn, so many spaces are made until the frame comes round.
    let mut rest = Vec::new();
    let again = loop {
        let table = world.new_space();
        if table.root().frame == frame {
            break table;
        }
        rest.push(table);
    };
    run(&world, 0, &again);
    assert!(env.machine.cpu(0).user().read_u64(0x40_0000).is_err());
}

/// Two roots, the same lower half, through all that changes a top entry.
#[test]
fn both_roots_lead_to_the_same_tables() {
    let world = plain(true);
    let env = world.env;
    let table = world.new_space();
    assert!(table.is_isolated());
    let child = Table::empty_like(env, &table).unwrap();
    assert!(child.is_isolated());
    run(&world, 0, &table);
    for page in [0x400, 0x800_0000, 0x1000_0000] {
        let at = Page::new(page).unwrap().start().as_u64();
        map(&world, &table, page);
        env.cpus.leave_kernel();
        env.machine.cpu(0).user().write_u64(at, page).unwrap();
        env.cpus.enter_kernel();
        assert_eq!(env.machine.cpu(0).read_u64(at), Ok(page));
        unmap(&world, &table, page);
        env.cpus.leave_kernel();
        assert!(env.machine.cpu(0).user().read_u64(at).is_err());
        env.cpus.enter_kernel();
    }
    // SAFETY: the kernel's root is for ever.
    unsafe { env.mmu.load_root(world.kernel.root(), true) };
    drop_table(&world, table);
    drop_table(&world, child);
}

/// An MMU that knows one root a space would neither see a CPU in user mode nor flush it.
#[test]
fn isolation_asks_for_an_mmu_that_knows_it() {
    let world = plain(false);
    let half = Page::containing(X86_64::canonical(4).upper_start().unwrap());
    let refused = Table::isolated(world.env, &world.kernel, &world.trampoline, half);
    assert_eq!(refused.unwrap_err(), TableError::OneRoot);
}
