//! hal's `Cpu`, `CpuCall`, `PhysMap`, `Clock` and `Rng` on the machine.
//!
//! `&Machine` is the `Copy` handle. The CPU that code runs on is the task's under a [`Scheduler`](crate::Scheduler), the one named
//! by [`Machine::on_cpu`], and 0 otherwise; several host threads that use one machine must each be a CPU of their own.
//!
//! The physical map reaches all memory of the machine. Frames in a hole or a device inside that reach are no memory, and asking
//! for a pointer to one panics: a kernel that does it would corrupt a device.

use std::marker::PhantomData;

use kmem_hal::{
    Clock, Cpu, CpuCall, CpuCallError, CpuId, CpuSet, FrameRange, PhysAddr, PhysMap, Rng,
};

use crate::machine::Machine;
use crate::manual::rflags;
use crate::sched;

/// Nanoseconds that one step of the machine takes on its clock.
const STEP_NANOSECONDS: u64 = 10;

/// A pin to a virtual CPU. Tasks never move between virtual CPUs, so it only remembers the number.
#[derive(Debug)]
pub struct MachinePin<'m> {
    cpu: CpuId,
    _here: PhantomData<(&'m Machine, *mut ())>,
}

// SAFETY: C1, C2: a virtual CPU has one task, and code under `on_cpu` for another CPU returns before its caller goes on; C3: the count
// is fixed; C4: a pin is a number; C5: one host thread runs all tasks of a machine.
unsafe impl Cpu for Machine {
    type Guard<'a> = MachinePin<'a>;

    fn raw_pin(&self) -> MachinePin<'_> {
        sched::yield_point(self);
        MachinePin {
            cpu: cpu_id(self.current_cpu()),
            _here: PhantomData,
        }
    }

    fn id(&self, guard: &MachinePin<'_>) -> CpuId {
        guard.cpu
    }

    fn count(&self) -> u32 {
        self.cpu_count() as u32
    }
}

pub(crate) fn cpu_id(number: usize) -> CpuId {
    CpuId::new(number as u32)
}

// SAFETY: R1: `Machine::call_on` returns after every CPU of the set has run the closure to its end, each as itself; R2: the checks come
// before any call; R3: one host thread runs them all.
unsafe impl CpuCall for Machine {
    fn run_on(&self, cpus: &CpuSet, f: &(dyn Fn(CpuId) + Sync)) -> Result<(), CpuCallError> {
        let me = self.current_cpu();
        if self.cpu(me).registers().rflags & rflags::IF == 0 {
            return Err(CpuCallError::WouldDeadlock);
        }
        let numbers: Vec<usize> = cpus
            .iter()
            .map(CpuId::index)
            .filter(|&cpu| cpu < self.cpu_count())
            .collect();
        self.call_on(&numbers, &|cpu| f(cpu_id(cpu)));
        Ok(())
    }
}

// SAFETY: P1 to P3: one arena holds all physical memory at one offset (memory I1), and frames without memory get no pointer at all;
// P4: the reach never changes; P5: temporary mappings are the default ones, of memory of one type.
unsafe impl PhysMap for Machine {
    fn reach(&self) -> FrameRange {
        FrameRange::from_numbers(0, self.memory().frame_limit()).unwrap_or(FrameRange::EMPTY)
    }

    #[inline]
    fn to_ptr(&self, address: PhysAddr) -> *mut u8 {
        self.kernel_reaches(address.as_u64());
        self.memory().to_ptr(address.as_u64())
    }

    #[inline]
    fn to_phys(&self, pointer: *const u8) -> PhysAddr {
        PhysAddr::new(
            self.memory()
                .to_phys(pointer)
                .expect("not a pointer into the machine's memory"),
        )
    }
}

impl Clock for Machine {
    /// Ten nanoseconds for each step: the same in every run.
    fn now(&self) -> u64 {
        self.step() * STEP_NANOSECONDS
    }
}

impl Rng for Machine {
    fn next_u64(&self) -> u64 {
        self.with(|inner| inner.core.rng.next())
    }
}
