//! Tables made here, walked there: the mock machine's MMU, whose constants come from the manual, uses what this
//! crate writes, with TLBs that forget nothing unless they are told to.
//!
//! Here: random runs of one context in every mode (`world.rs`), forks, and huge leaves. Kernels that flush wrongly are in `faults.rs`, several
//! CPUs in one table in `several.rs`, the kernel's part of several spaces in `shared_half.rs`.

#![cfg(not(loom))]

#[path = "../common/mock.rs"]
mod mock;
#[allow(dead_code, unused_imports, unused_macros)]
#[path = "../common/modes.rs"]
mod modes;

mod faults;
mod several;
mod shared_half;
mod world;

use kmem_hal::{FrameRequest, FrameSink, FrameSource, Mmu, Order, Page, PageRange};
use kmem_mock_x86::{AccessKind, Registers};
use kmem_paging::format::{Format, X86_64, X86_64La57, X86Pae, X86Pse36, X86TwoLevel};
use kmem_paging::{
    ChangeError, Cleared, ForkItem, ForkStep, RangeError, Rights, TableCache, TableError,
};

use modes::Kind;
use world::{Table, World, env, env_with};

fn agree<F: Format>(registers: Registers) {
    for seed in 0..6 {
        // Without a cache of tables, a table that is freed too early is a free frame that is walked.
        let env = env(registers, 3, seed, if seed % 2 == 0 { 0 } else { 64 });
        let mut world = World::<F>::new(env, seed);
        for _ in 0..250 {
            world.step();
            for _ in 0..6 {
                world.access();
            }
        }
        let stats = env.machine.stats();
        println!("seed {seed}: {stats}");
        assert!(stats.tlb_hits > 0);
        world.finish();
    }
}

#[test]
fn four_levels_agree_with_the_manual() {
    agree::<X86_64>(Registers::LONG);
}

#[test]
fn four_levels_with_tags_agree_with_the_manual() {
    agree::<X86_64>(Registers::LONG_PCID);
}

#[test]
fn five_levels_agree_with_the_manual() {
    agree::<X86_64La57>(Kind::La57.registers());
}

#[test]
fn pae_agrees_with_the_manual() {
    agree::<X86Pae>(Kind::Pae.registers());
}

#[test]
fn two_levels_agree_with_the_manual() {
    agree::<X86TwoLevel>(Kind::TwoLevel.registers());
}

/// Leaves of 4 MiB above 4 GiB, beside pages that come and go below: as a whole they do what others do, and no part of them is changed.
#[test]
fn leaves_above_4_gib_agree_with_the_manual() {
    for seed in 0..6 {
        let memory = modes::memory::<X86Pse36>();
        let env = env_with(memory, Kind::Pse36.registers(), 2, seed, 0);
        let mut world = World::<X86Pse36>::new(env, seed);
        let all = world.range(0x8_0000, 1 << 10);
        let block = FrameRequest::new(Order::new(10).unwrap());
        let mut low = Vec::new();
        let high = loop {
            let block = env.pool.alloc(&block).unwrap();
            if block.first().number() >= 1 << 20 {
                break block;
            }
            low.push(block);
        };
        low.into_iter().for_each(|block| env.pool.free(block));
        let base = high.first().number();
        let mut cursor = world.table.cursor(all).unwrap();
        cursor
            .map(all.first(), high, Rights::USER_DATA)
            .map_err(|(error, _)| error)
            .unwrap();
        drop(cursor);
        agree_high(&mut world, all, Some((base, Rights::USER_DATA)));
        let mut gather = world.table.gather::<4>();
        let one = world.range(all.first().number() + 7, 1);
        let refused = Err(ChangeError::Indivisible { at: all.first() });
        let mut cursor = world.table.cursor(all).unwrap();
        assert_eq!(cursor.protect(one, Rights::USER_CODE, &mut gather), refused);
        assert_eq!(cursor.unmap(one, &mut gather), refused);
        drop(cursor);
        gather.commit(drop);
        drop(gather);
        agree_high(&mut world, all, Some((base, Rights::USER_DATA)));
        let mut gather = world.table.gather::<4>();
        let mut cursor = world.table.cursor(all).unwrap();
        let protected = cursor.protect(all, Rights::USER_CODE, &mut gather);
        assert_eq!(protected, Ok(all.count()));
        drop(cursor);
        gather.commit(drop);
        drop(gather);
        agree_high(&mut world, all, Some((base, Rights::USER_CODE)));
        let mut gather = world.table.gather::<4>();
        let unmapped = world.table.cursor(all).unwrap().unmap(all, &mut gather);
        assert_eq!(unmapped, Ok(all.count()));
        gather.commit_to(&env.pool);
        drop(gather);
        agree_high(&mut world, all, None);
        world.finish();
    }
}

/// What CPUs see of the block in `all`, while pages elsewhere come and go.
fn agree_high(world: &mut World<X86Pse36>, all: PageRange, block: Option<(u64, Rights)>) {
    for offset in [0, 1, 7, 512, 1023] {
        let page = all.first().number() + offset;
        if let Some((base, rights)) = block {
            world.model.insert(page, (base + offset, rights));
        }
        for cpu in 0..2 {
            world.check(cpu, page, AccessKind::Write, true);
            world.check(cpu, page, AccessKind::Read, true);
        }
        world.model.remove(&page);
    }
    for _ in 0..40 {
        world.step();
        world.access();
    }
}

#[test]
fn a_five_level_format_with_four_levels_agrees_with_the_manual() {
    let env = env(Registers::LONG, 2, 1, 0);
    assert!(matches!(
        Table::<X86_64La57>::with_levels(env, 3),
        Err(TableError::BadLevels)
    ));
    let table = Table::<X86_64La57>::with_levels(env, 4).unwrap();
    let mut world = World::with(env, table, 1);
    for _ in 0..200 {
        world.step();
        for _ in 0..4 {
            world.access();
        }
    }
    let beyond = PageRange::single(Page::new(1 << 36).unwrap());
    assert_eq!(
        world.table.cursor(beyond).unwrap_err(),
        RangeError::NotCanonical
    );
    let World { env, table, .. } = world;
    let other = Table::<X86_64>::new(env).unwrap();
    for cpu in 0..2 {
        // SAFETY: as in `World::new`.
        env.machine
            .on_cpu(cpu, || unsafe { env.mmu.load_root(other.root(), false) });
    }
    table.destroy(|_, frame| env.pool.free(frame), |_, _| {});
    other.destroy(|_, _| {}, |_, _| {});
    assert_eq!(env.pool.in_use(), 0);
}

#[test]
fn a_fork_leaves_no_cpu_a_writable_translation() {
    for seed in 0..10 {
        let env = env(Registers::LONG, 3, seed, 64);
        let mut world = World::<X86_64>::new(env, seed);
        for page in 0x400..0x420 {
            world.map(page, Rights::USER_DATA);
        }
        for cpu in 0..3 {
            for page in 0x400..0x420 {
                world.check(cpu, page, AccessKind::Write, true);
            }
        }
        let child = Table::<X86_64>::new(env).unwrap();
        let mut gather = world.table.gather::<1>();
        let copied = world
            .table
            .fork_into(&child, world.range(0x400, 0x20), &mut gather, |item| {
                let ForkItem::Leaf(leaf) = item else {
                    return ForkStep::Stop;
                };
                assert!(leaf.attributes.dirty, "what a CPU wrote is dirty");
                ForkStep::Leaf {
                    handle: env.pool.alloc(&FrameRequest::ONE).unwrap(),
                    child: leaf.attributes.write_protected(),
                    parent: Some(leaf.attributes.write_protected()),
                }
            });
        assert_eq!(copied.unwrap(), 0x20);
        gather.commit(drop);
        drop(gather);
        for entry in world.model.values_mut() {
            entry.1.remove(Rights::WRITE);
        }
        for cpu in 0..3 {
            for page in 0x400..0x420 {
                world.check(cpu, page, AccessKind::Write, true);
                world.check(cpu, page, AccessKind::Read, true);
            }
        }
        child.destroy(|_, frame| env.pool.free(frame), |_, _| {});
        world.finish();
    }
}

#[test]
fn huge_leaves_split_merge_and_agree() {
    for seed in 0..8 {
        let env = env(Registers::LONG, 2, seed, 64);
        let table = Table::<X86_64>::new(env).unwrap();
        for cpu in 0..2 {
            // SAFETY: as in `World::new`.
            env.machine
                .on_cpu(cpu, || unsafe { env.mmu.load_root(table.root(), false) });
        }
        let first = 0x4_0000u64;
        let page = Page::new(first).unwrap();
        let all = PageRange::with_count(page, 512).unwrap();
        let block = env.pool.alloc(&FrameRequest::new(Order::HUGE_2M)).unwrap();
        let base = block.first().number();
        let mut cursor = table.cursor(all).unwrap();
        cursor.map(page, block, Rights::USER_DATA).unwrap();
        let reads = |expected: &dyn Fn(u64) -> Option<u64>| {
            for cpu in 0..2 {
                for offset in [0, 1, 17, 255, 256, 511] {
                    let linear = (first + offset) << 12;
                    let mut seen = env
                        .machine
                        .cpu(cpu)
                        .user()
                        .translate(linear, AccessKind::Write);
                    for _ in 0..20 {
                        if seen.is_ok() || expected(offset).is_none() {
                            break;
                        }
                        seen = env
                            .machine
                            .cpu(cpu)
                            .user()
                            .translate(linear, AccessKind::Write);
                    }
                    assert_eq!(seen.ok(), expected(offset).map(|frame| frame << 12));
                }
            }
        };
        reads(&|offset| Some(base + offset));
        let mut gather = table.gather::<4>();
        cursor.split(page, &mut gather).unwrap();
        reads(&|offset| Some(base + offset));
        gather.commit(drop);
        reads(&|offset| Some(base + offset));
        let leaf = cursor.query(page).leaf().unwrap();
        assert_eq!(leaf.order, Order::ZERO);
        cursor.merge(page, Order::HUGE_2M, &mut gather).unwrap();
        gather.commit(drop);
        reads(&|offset| Some(base + offset));
        let leaf = cursor.query(page).leaf().unwrap();
        assert_eq!((leaf.order, leaf.frame.number()), (Order::HUGE_2M, base));
        assert!(leaf.attributes.dirty, "no dirty bit is lost by merging");
        // Unmapping a part splits it again.
        let hole = PageRange::with_count(Page::new(first + 17).unwrap(), 1).unwrap();
        let mut seen = 0;
        cursor
            .unmap_with(hole, &mut gather, |cleared| {
                assert!(matches!(cleared, Cleared::Leaf(leaf) if leaf.frame.number() == base + 17));
                seen += 1;
            })
            .unwrap();
        assert_eq!(seen, 1);
        drop(cursor);
        gather.commit_to(&env.pool);
        reads(&|offset| (offset != 17).then_some(base + offset));
        assert!(env.machine.audit(0, u64::MAX).is_empty());
        drop(gather);
        table.destroy(|_, frame| env.pool.free(frame), |_, _| {});
        TableCache::shrink(&env, usize::MAX);
        assert_eq!(env.pool.in_use(), 0);
    }
}
