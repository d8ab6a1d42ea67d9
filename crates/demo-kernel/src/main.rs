//! A small x86-64 kernel for QEMU that uses kmem. `cargo xtask qemu` builds and runs it.
#![no_std]
#![no_main]

extern crate alloc;

mod apic;
mod console;
mod cpu;
mod differential;
mod error;
mod file;
mod layout;
mod mem;
mod memory;
mod plant;
mod platform;
mod process;
mod pvh;
mod scenarios;
mod sched;
mod signal;
mod smp;
mod syscall;
mod tlb;
mod traps;

core::arch::global_asm!(include_str!("boot.s"));
core::arch::global_asm!(include_str!("entry.s"));
core::arch::global_asm!(include_str!("legacy.s"));

/// Rust's entry, called by `boot.s` with the physical address of PVH's start info.
#[unsafe(no_mangle)]
extern "C" fn kernel_main(start_info: u64) -> ! {
    console::start();
    // SAFETY: memory is as the loader left it.
    let boot = unsafe { pvh::Boot::read(start_info) };
    let planted = boot.word("plant=");
    let known = planted.is_none_or(plant::set);
    // SAFETY: first code on the first CPU, interrupts off; the stack, code and data in use stand in the image's map.
    unsafe {
        cpu::install(0);
        traps::install(0);
        tlb::start(0);
        layout::identity_map(false);
    }
    let success = known && scenarios::run(boot.scenario(), &boot);
    println!("{}", if success { "OK" } else { "FAILED" });
    console::exit(success)
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    console::force();
    println!("{info}");
    console::exit(false)
}
