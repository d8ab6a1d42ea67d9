//! Faults planted on purpose, named on the command line (`plant=NAME`): each must make a scenario fail.
//!
//! A check that never fails proves nothing. `cargo xtask qemu` boots each of these and counts it as a success only if
//! the scenario reports a failure.

use alloc::boxed::Box;
use core::sync::atomic::{AtomicU8, Ordering};

use kmem::hal::{CpuSet, FlushRequest, Mmu};

use crate::platform::Machine;
use crate::{apic, smp};

/// A fault.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Plant {
    /// None.
    Nothing,
    /// A CPU does not drop its own translations.
    LostFlush,
    /// Other CPUs are not told to drop theirs.
    Deaf,
    /// Other CPUs are told, and nobody waits for them.
    NoWait,
    /// Interrupts run on the stack that they interrupt.
    RedZone,
    /// A write fault is reported as a read.
    WrongErrorBit,
    /// A frame is freed twice.
    DoubleFree,
    /// A frame is lost.
    Leak,
    /// INVLPG is left out.
    LostDrop,
}

const NAMES: [(&str, Plant); 8] = [
    ("lost-flush", Plant::LostFlush),
    ("deaf", Plant::Deaf),
    ("no-wait", Plant::NoWait),
    ("red-zone", Plant::RedZone),
    ("wrong-error-bit", Plant::WrongErrorBit),
    ("double-free", Plant::DoubleFree),
    ("leak", Plant::Leak),
    ("lost-drop", Plant::LostDrop),
];
static PLANTED: AtomicU8 = AtomicU8::new(Plant::Nothing as u8);

/// Plants the fault of that name; false where there is none.
pub fn set(name: &str) -> bool {
    let found = NAMES.iter().find(|(known, _)| *known == name);
    found.is_some_and(|(_, plant)| {
        PLANTED.store(*plant as u8, Ordering::Relaxed);
        true
    })
}

/// Whether this fault is planted.
pub fn is(plant: Plant) -> bool {
    PLANTED.load(Ordering::Relaxed) == plant as u8
}

/// Does a shootdown wrongly, if it shall.
pub fn spoils_shootdown(cpus: &CpuSet, request: &FlushRequest) -> bool {
    if is(Plant::NoWait) {
        let request: &'static FlushRequest = Box::leak(Box::new(*request));
        let flush = Box::leak(Box::new(|_| Machine.flush_local(request)));
        smp::post(cpus, flush);
        return true;
    }
    is(Plant::Deaf)
}

/// The interrupt stack that a gate shall use instead of `stack`.
pub fn interrupt_stack(vector: usize, stack: u64) -> u64 {
    let asynchronous = [apic::CALL as usize, apic::TIMER as usize].contains(&vector);
    if asynchronous && is(Plant::RedZone) {
        0
    } else {
        stack
    }
}
