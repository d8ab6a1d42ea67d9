//! A CPU's own area is reached with a pin of that CPU, not with a number.
use kmem_hal::sync::LocalU64;
use kmem_hal::{CpuId, PerCpu};

fn count_on_another(areas: PerCpu<'_, LocalU64>) {
    let other = CpuId::new(1);
    if let Some(area) = areas.get_own(&other) {
        area.set(area.get() + 1);
    }
}

fn main() {}
