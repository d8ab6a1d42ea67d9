//! Tables that no processor walks: who may have them, and that what caches still hold is flushed all the same.

#![cfg(not(loom))]

#[path = "common/mock.rs"]
mod mock;

use kmem_hal::{Asid, FrameRequest, FrameSink, FrameSource, Mmu, OwnedFrame, Page, PageRange};
use kmem_mock_x86::{Adversary, Machine, MemoryMap, Registers};
use kmem_paging::format::{Format, X86_64};
use kmem_paging::{ChangeError, Entry, ForkItem, PageTable, QuiesceError, Rights, UnshareStep};
use mock::MockEnv;

type Table = PageTable<X86_64, &'static MockEnv, OwnedFrame>;

fn env(seed: u64) -> &'static MockEnv {
    let machine = Machine::builder()
        .memory(MemoryMap::pc(64 << 20))
        .cpus(2)
        .registers(Registers::LONG_PCID)
        .seed(seed)
        .adversary(Adversary::FULL)
        .build()
        .unwrap();
    MockEnv::new(machine, 0x400, 0)
}

fn pages(first: u64, count: u64) -> PageRange {
    PageRange::with_count(Page::new(first).unwrap(), count).unwrap()
}

fn fill(env: &'static MockEnv, table: &Table, range: PageRange) {
    let mut cursor = table.cursor(range).unwrap();
    for page in range.iter() {
        let frame = env.pool.alloc(&FrameRequest::ONE).unwrap();
        cursor.map(page, frame, Rights::USER_DATA).unwrap();
    }
}

fn load(env: &'static MockEnv, cpu: usize, table: &Table) {
    // SAFETY: the machine runs no code from these tables, and each test takes them down after the last access.
    env.machine
        .on_cpu(cpu, || unsafe { env.mmu.load_root(table.root(), true) });
}

fn take_down(env: &'static MockEnv, table: Table) {
    table.destroy(|_, frame| env.pool.free(frame), |_, _| {});
}

#[test]
fn a_table_that_some_cpu_has_loaded_is_refused() {
    let env = env(1);
    let (mut table, mut other) = (Table::new(env).unwrap(), Table::new(env).unwrap());
    table.set_asid(Asid::new(1)).unwrap();
    other.set_asid(Asid::new(2)).unwrap();
    assert!(table.quiesce().is_ok(), "nobody knows the root");
    load(env, 1, &table);
    assert_eq!(table.quiesce().unwrap_err(), QuiesceError::Loaded);
    load(env, 1, &other);
    assert!(table.quiesce().is_ok());
    assert_eq!(other.quiesce().unwrap_err(), QuiesceError::Loaded);
}

#[test]
fn a_table_that_others_lead_into_is_refused() {
    let env = env(2);
    let mut kernel = Table::new(env).unwrap();
    let top = Page::containing(X86_64::canonical(4).upper_start().unwrap());
    kernel.lend_from(top).unwrap();
    assert_eq!(kernel.quiesce().unwrap_err(), QuiesceError::Lent);
    let mut space = Table::sharing(env, &kernel, top).unwrap();
    assert!(space.quiesce().is_ok());
}

/// What CPUs remember of a space that they left is flushed, though the entries were changed by plain stores.
#[test]
fn what_was_cached_under_the_tag_goes() {
    for seed in 0..20 {
        let env = env(seed);
        let (mut table, mut other) = (Table::new(env).unwrap(), Table::new(env).unwrap());
        table.set_asid(Asid::new(1)).unwrap();
        other.set_asid(Asid::new(2)).unwrap();
        let range = pages(0x400, 40);
        fill(env, &table, range);
        load(env, 1, &table);
        for page in range.iter() {
            let at = page.start().as_u64();
            env.machine.cpu(1).user().write_u64(at, 1).unwrap();
        }
        load(env, 1, &other);
        let quiescent = table.quiesce().unwrap();
        let mut cursor = quiescent.cursor(range).unwrap();
        let mut gather = quiescent.gather::<64>();
        let read_only = Rights::READ | Rights::USER;
        cursor
            .protect(pages(0x400, 20), read_only, &mut gather)
            .unwrap();
        cursor.unmap(pages(0x414, 20), &mut gather).unwrap();
        drop(cursor);
        gather.commit_to(&env.pool);
        drop(gather);
        let stale = env.machine.audit(0, u64::MAX);
        assert!(stale.is_empty(), "{}", stale[0]);
        load(env, 1, &table);
        for page in range.iter() {
            let at = page.start().as_u64();
            let user = env.machine.cpu(1).user();
            assert!(user.write_u64(at, 2).is_err());
            assert_eq!(user.read_u64(at).is_ok(), page.number() < 0x414);
        }
        load(env, 1, &other);
        take_down(env, table);
        take_down(env, other);
    }
}

/// A space that was never loaded sends no flush anywhere, by whatever cursor it is changed.
#[test]
fn what_was_never_loaded_needs_no_flush() {
    let env = env(3);
    let mut table = Table::new(env).unwrap();
    let range = pages(0x400, 8);
    fill(env, &table, range);
    let before = env.machine.stats().flushes;
    {
        let quiescent = table.quiesce().unwrap();
        let mut gather = quiescent.gather::<64>();
        let mut cursor = quiescent.cursor(range).unwrap();
        assert_eq!(cursor.protect(range, Rights::READ, &mut gather), Ok(8));
    }
    let mut gather = table.gather::<64>();
    let mut cursor = table.cursor(range).unwrap();
    assert_eq!(cursor.unmap(range, &mut gather), Ok(8));
    drop(cursor);
    assert_eq!(gather.commit_to(&env.pool), 8);
    drop(gather);
    assert_eq!(env.machine.stats().flushes, before);
    take_down(env, table);
    assert_eq!(env.pool.in_use(), 0);
}

/// The other side of a fork may run: its tables are not this space's to store into.
#[test]
fn a_shared_table_is_refused_until_it_is_alone() {
    let env = env(4);
    let parent = Table::new(env).unwrap();
    let range = pages(0x400, 512);
    fill(env, &parent, range);
    load(env, 0, &parent);
    let mut child = Table::empty_like(env, &parent).unwrap();
    let mut gather = parent.gather::<1>();
    // SAFETY: no cursor is open, and nothing runs in the parent before the commit.
    let shared = unsafe { parent.fork_sharing(&child, range, 1, &mut gather, |_| unreachable!()) };
    assert_eq!(shared.unwrap(), 512);
    gather.commit(drop);
    drop(gather);
    let quiescent = child.quiesce().unwrap();
    let mut gather = quiescent.gather::<64>();
    let mut cursor = quiescent.cursor(range).unwrap();
    assert_eq!(
        cursor.protect(range, Rights::READ, &mut gather),
        Err(ChangeError::Shared { at: range.first() })
    );
    let copied = cursor.unshare(
        range.first(),
        &mut gather,
        |item| match item {
            ForkItem::Leaf(leaf) => {
                // SAFETY: O1 to O3: as if the frame were counted; neither is given back.
                let again = unsafe { OwnedFrame::from_raw(leaf.frame, leaf.order) };
                UnshareStep::Protected(again)
            }
            ForkItem::Payload(..) => UnshareStep::Stop,
        },
        |_| panic!("the copy is finished"),
    );
    assert_eq!(copied, Ok(true));
    drop(cursor);
    gather.commit(|frame| env.pool.free(frame));
    let mut cursor = quiescent.cursor(range).unwrap();
    assert_eq!(cursor.protect(range, Rights::READ, &mut gather), Ok(512));
    drop(cursor);
    gather.commit(|frame| env.pool.free(frame));
    drop(gather);
    assert!(matches!(parent.query(range.first()), Entry::Leaf(_)));
}
