//! Several CPUs at once in one table, as coroutines.

use std::collections::BTreeMap;

use kmem_hal::{FrameRequest, FrameSink, FrameSource, Mmu, Page, PageRange};
use kmem_mock_x86::{Registers, Scheduler, SeededRng, Stats};
use kmem_paging::format::X86_64;
use kmem_paging::{Entry, Rights, TableCache};

use super::mock::Fault;
use super::world::{Table, env};

/// Several CPUs at once: each maps, protects and unmaps pages of its own, which lie between those of the others, and looks
/// at everybody's. Its own pages must be as it left them at every access; no CPU may use what is gone.
pub(super) fn several_cpus(seed: u64, fault: Fault) -> Stats {
    const CPUS: usize = 3;
    let env = env(
        Registers::LONG,
        CPUS,
        seed,
        if seed.is_multiple_of(2) { 0 } else { 16 },
    );
    let table = Table::<X86_64>::new(env).unwrap();
    env.mmu.fault.set(fault);
    for cpu in 0..CPUS {
        // SAFETY: as in `World::new`.
        env.machine
            .on_cpu(cpu, || unsafe { env.mmu.load_root(table.root(), false) });
    }
    let mut scheduler = Scheduler::new(env.machine, seed);
    for cpu in 0..CPUS {
        let table = &table;
        scheduler.spawn(cpu, move || {
            let mut rng = SeededRng::new(seed * 7 + cpu as u64);
            let mut model: BTreeMap<u64, Rights> = BTreeMap::new();
            let me = env.machine.cpu(cpu).user();
            // Tables come and go: few pages in each of several tables.
            let page_of = |rng: &mut SeededRng, owner: u64| {
                0x400 + rng.below(4) * 0x200 + rng.below(3) * CPUS as u64 + owner
            };
            for _ in 0..60 {
                let page = page_of(&mut rng, cpu as u64);
                let at = Page::new(page).unwrap();
                let range = PageRange::single(at);
                match rng.below(6) {
                    0..=2 => {
                        let frame = env.pool.alloc(&FrameRequest::ONE).unwrap();
                        let mut cursor = table.cursor(range).unwrap();
                        match cursor.map(at, frame, Rights::USER_DATA) {
                            Ok(()) => assert_eq!(model.insert(page, Rights::USER_DATA), None),
                            Err((_, frame)) => {
                                assert!(model.contains_key(&page));
                                env.pool.free(frame);
                            }
                        }
                    }
                    3 => {
                        let rights =
                            [Rights::USER_DATA, Rights::READ | Rights::USER][rng.below(2) as usize];
                        let mut gather = table.gather::<1>();
                        let mut cursor = table.cursor(range).unwrap();
                        cursor.protect(range, rights, &mut gather).unwrap();
                        drop(cursor);
                        gather.commit(drop);
                        model.entry(page).and_modify(|old| *old = rights);
                    }
                    4 => {
                        let mut gather = table.gather::<1>();
                        let mut cursor = table.cursor(range).unwrap();
                        let unmapped = cursor.unmap(range, &mut gather).unwrap();
                        drop(cursor);
                        gather.commit_to(&env.pool);
                        assert_eq!(unmapped == 1, model.remove(&page).is_some());
                    }
                    _ => {
                        // Without a lock, at a page of anybody's.
                        let owner = rng.below(CPUS as u64);
                        let page = page_of(&mut rng, owner);
                        if let Entry::Leaf(leaf) = table.query(Page::new(page).unwrap()) {
                            assert_eq!(leaf.page.number(), page);
                        }
                    }
                }
                for _ in 0..4 {
                    let page = page_of(&mut rng, cpu as u64);
                    let rights = model.get(&page).copied().unwrap_or_default();
                    let write = rng.below(2) == 0;
                    let allowed = rights.contains(if write { Rights::WRITE } else { Rights::READ });
                    let access = || {
                        if write {
                            me.write_u64(page << 12, page).map(|()| page)
                        } else {
                            me.read_u64(page << 12)
                        }
                    };
                    let seen = (0..40)
                        .map(|_| access())
                        .find(|seen| seen.is_ok() || !allowed);
                    match seen {
                        Some(Ok(_)) => assert!(allowed, "page {page:#x} of CPU {cpu}"),
                        _ => assert!(!allowed, "page {page:#x} of CPU {cpu}"),
                    }
                    let owner = rng.below(CPUS as u64);
                    let other = page_of(&mut rng, owner);
                    let _ = me.read_u64(other << 12);
                }
            }
        });
    }
    scheduler.run();
    let stale = env.machine.audit(0, u64::MAX);
    assert!(stale.is_empty(), "{}", stale[0]);
    let idle = Table::<X86_64>::new(env).unwrap();
    for cpu in 0..CPUS {
        // SAFETY: as in `World::new`.
        env.machine
            .on_cpu(cpu, || unsafe { env.mmu.load_root(idle.root(), false) });
    }
    table.destroy(|_, frame| env.pool.free(frame), |_, _| {});
    idle.destroy(|_, _| {}, |_, _| {});
    TableCache::shrink(&env, usize::MAX);
    assert_eq!(env.pool.in_use(), 0, "frames leaked");
    env.machine.stats()
}

#[test]
fn several_cpus_change_one_table_at_once() {
    for seed in 0..24 {
        println!("seed {seed}: {}", several_cpus(seed, Fault::None));
    }
}
