//! A small x86-64 kernel for QEMU that uses kmem. `cargo xtask qemu` builds and runs it.
#![no_std]
#![no_main]

extern crate alloc;

mod console;
mod mem;
mod memory;
mod platform;
mod pvh;
mod scenarios;
mod smp;
mod traps;

core::arch::global_asm!(include_str!("boot.s"));

/// Rust's entry, called by `boot.s` with the physical address of PVH's start info.
#[unsafe(no_mangle)]
extern "C" fn kernel_main(start_info: u64) -> ! {
    // SAFETY: first code on the first CPU, interrupts off.
    unsafe {
        platform::set_this_cpu(0);
        traps::install(0);
    }
    // SAFETY: memory is as the loader left it.
    let boot = unsafe { pvh::Boot::read(start_info) };
    // SAFETY: the stack, code and data in use stand in the image's map.
    unsafe { platform::identity_map(false) };
    let success = scenarios::run(boot.scenario(), &boot);
    println!("{}", if success { "OK" } else { "FAILED" });
    console::exit(success)
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    console::force();
    println!("{info}");
    console::exit(false)
}
