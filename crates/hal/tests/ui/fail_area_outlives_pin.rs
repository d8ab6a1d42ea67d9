//! A CPU's own area is not kept beyond the pin: another CPU may run this code by then.
use kmem_hal::sync::LocalU64;
use kmem_hal::{Cpu, PerCpu};

fn keep<'m, C: Cpu>(areas: PerCpu<'m, LocalU64>, cpu: &'m C) -> Option<&'m LocalU64> {
    let pin = cpu.pin();
    areas.get_own(&pin)
}

fn main() {}
