//! The scenarios that `cargo xtask qemu NAME` runs, by name.

mod kernel;
mod legacy;
mod tags;
mod user;

use kmem::hal::CpuId;

use crate::memory::{self, frames};
use crate::pvh::Boot;
use crate::{apic, console, differential, file, println, sched, smp};

/// Runs the named scenario; false when there is none of that name or it failed.
pub fn run(name: &str, boot: &Boot) -> bool {
    println!("scenario {name}");
    if boot.word("trace=").is_some() {
        console::trace_calls();
    }
    match name {
        "boot" => kernel::hello(boot),
        "fault" => kernel::fault(),
        "smp" => kernel::smp(boot),
        "heap" => kernel::heap(boot),
        "storm" => kernel::storm(boot),
        "red-zone" => kernel::red_zone(boot),
        "paging" => kernel::paging(boot),
        "tags" => tags::run(boot),
        "overflow" => kernel::overflow(boot),
        "memory" => kernel::all_memory(boot),
        "differential" => {
            let baseline = start(boot);
            let only = boot.word("only=").and_then(|number| number.parse().ok());
            differential::run(only) && end(baseline)
        }
        "legacy" => {
            let baseline = start(boot);
            legacy::run() & end(baseline)
        }
        "fail" => false,
        "panic" => panic!("asked for"),
        "triple" => kernel::triple_fault(),
        "hang" => loop {
            core::hint::spin_loop();
        },
        _ => user::run(name, boot).unwrap_or_else(|| {
            println!("no scenario of that name");
            false
        }),
    }
}

/// What belongs to nobody when a scenario begins.
#[derive(Clone, Copy)]
struct Baseline {
    frames: u64,
}

/// Brings up memory, every CPU and their timers.
fn start(boot: &Boot) -> Baseline {
    // SAFETY: once, on the first CPU, with QEMU's own map.
    unsafe { memory::init(boot) }.expect("memory");
    // SAFETY: once, on the first CPU.
    unsafe { smp::start(boot.cpus()) };
    (1..boot.cpus()).for_each(|cpu| memory::cpu_online(CpuId::new(cpu)));
    smp::each(|_| apic::start_timer());
    // What the first stack brings and the last one leaves: vmalloc's working page.
    let stack = memory::areas().alloc_stack(sched::STACK_PAGES);
    let freed = memory::areas().free_stack(stack.expect("memory for a stack"), sched::STACK_PAGES);
    freed.expect("a stack of ours");
    Baseline {
        frames: memory::free_frames() + memory::object_frames(),
    }
}

/// Whether as many frames are free as when the scenario began, and nothing was freed wrongly.
fn end(baseline: Baseline) -> bool {
    while !sched::is_empty() {
        sched::run_one();
    }
    file::drop_caches();
    let free = memory::free_frames() + memory::object_frames();
    let leaked = baseline.frames as i64 - free as i64;
    let (zones, misuse) = (frames().check(), frames().misuse());
    println!("{leaked} frames leaked; zones: {zones:?}; misuse: {misuse:?}");
    leaked == 0 && zones.is_ok() && misuse.is_none()
}
