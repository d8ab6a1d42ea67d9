//! Kernels whose MMU flushes wrongly, and one that frees a frame before its flush: each is noticed, or the other tests prove nothing.

use std::panic::{AssertUnwindSafe, catch_unwind};

use kmem_hal::{FrameHandle, FrameSink, Order, OwnedFrame};
use kmem_mock_x86::{AccessKind, Registers};
use kmem_paging::Rights;
use kmem_paging::format::X86_64;

use super::mock::Fault;
use super::several::several_cpus;
use super::world::{World, env};

/// Runs the same steps with a planted fault; answers whether anybody noticed.
fn is_caught(fault: Fault) -> bool {
    (0..20).any(|seed| {
        let env = env(Registers::LONG, 3, seed, 0);
        env.mmu.fault.set(fault);
        catch_unwind(AssertUnwindSafe(|| {
            let mut world = World::<X86_64>::new(env, seed);
            for _ in 0..200 {
                world.step();
                for _ in 0..6 {
                    world.access();
                }
            }
        }))
        .is_err()
    })
}

#[test]
fn planted_flush_faults_are_caught() {
    let missed: Vec<Fault> = [
        Fault::NoLocalFlush,
        Fault::NoShootdown,
        Fault::ShortRange,
        Fault::KeepsTables,
    ]
    .into_iter()
    .filter(|&fault| !is_caught(fault))
    .collect();
    assert!(missed.is_empty(), "nobody noticed {missed:?}");
}

#[test]
fn a_frame_freed_before_its_flush_is_caught() {
    let env = env(Registers::LONG, 2, 1, 64);
    let mut world = World::<X86_64>::new(env, 1);
    world.map(0x400, Rights::USER_DATA);
    let frame = world.model[&0x400].0;
    world.check(1, 0x400, AccessKind::Read, true);
    let range = world.range(0x400, 1);
    let mut gather = world.table.gather::<1>();
    let mut cursor = world.table.cursor(range).unwrap();
    cursor.unmap(range, &mut gather).unwrap();
    drop(cursor);
    // There is no way to say this without `unsafe`: no value for the frame exists before the commit.
    // SAFETY: none: O3 is broken on purpose, and the machine must say so.
    let early = unsafe { OwnedFrame::from_entry(kmem_hal::Frame::from_number(frame), Order::ZERO) };
    env.pool.free(early);
    let story = catch_unwind(AssertUnwindSafe(|| {
        for _ in 0..50 {
            let _ = env.machine.cpu(1).user().read_u64(0x40_0000);
        }
    }))
    .unwrap_err();
    let story = story.downcast_ref::<String>().unwrap();
    assert!(story.contains("a freed frame was used"), "{story}");
    std::mem::forget(gather);
}

#[test]
fn a_shootdown_that_nobody_waits_for_is_caught() {
    let caught = (0..20)
        .any(|seed| catch_unwind(AssertUnwindSafe(|| several_cpus(seed, Fault::NoWait))).is_err());
    assert!(caught);
}
