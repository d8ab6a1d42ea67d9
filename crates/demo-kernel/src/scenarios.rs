//! The scenarios that `cargo xtask qemu NAME` runs, by name.

use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};

use kmem_hal::CpuCall;

use crate::platform::{self, Machine};
use crate::pvh::Boot;
use crate::{println, smp, traps};

/// Runs the named scenario; false when there is none of that name or it failed.
pub fn run(name: &str, boot: &Boot) -> bool {
    println!("scenario {name}");
    match name {
        "boot" => hello(boot),
        "fault" => fault(),
        "smp" => smp(boot),
        "fail" => false,
        "panic" => panic!("asked for"),
        "triple" => triple_fault(),
        "hang" => loop {
            core::hint::spin_loop();
        },
        _ => {
            println!("no scenario of that name");
            false
        }
    }
}

/// Prints the memory map, takes a breakpoint exception and returns from it.
fn hello(boot: &Boot) -> bool {
    let mut usable = 0;
    for entry in boot.map() {
        println!(
            "{:#013x}..{:#013x} type {}",
            entry.base,
            entry.base + entry.length,
            entry.kind
        );
        if entry.kind == 1 {
            usable += entry.length;
        }
    }
    println!(
        "{} KiB usable, image ends at {:#x}",
        usable >> 10,
        platform::image_end()
    );
    // SAFETY: the breakpoint handler counts and returns.
    unsafe { asm!("int3") };
    traps::BREAKPOINTS.load(Ordering::Relaxed) == 1 && usable > 0
}

/// Takes a real page fault on an address that nothing maps, and retries the access after the handler.
fn fault() -> bool {
    static SEEN: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(0)];
    traps::on_page_fault(|address, error| {
        SEEN[0].store(address, Ordering::Relaxed);
        SEEN[1].store(error, Ordering::Relaxed);
        // SAFETY: switching a map on takes nothing away.
        unsafe { platform::identity_map(true) };
        true
    });
    let word = 0x5000 as *mut u64;
    // SAFETY: frame 5 is usable memory that nothing owns; the handler maps it before the store completes.
    let back = unsafe {
        word.write_volatile(0xfeed);
        platform::identity_map(false);
        platform::direct(0x5000).cast::<u64>().read_volatile()
    };
    let [address, error] = [&SEEN[0], &SEEN[1]].map(|word| word.load(Ordering::Relaxed));
    println!("page fault at {address:#x}, error {error:#x}, read back {back:#x}");
    (address, error, back) == (0x5000, 0x2, 0xfeed)
}

/// Starts every CPU and calls functions on all of them, from all of them at once.
fn smp(boot: &Boot) -> bool {
    // SAFETY: once, on the first CPU.
    let running = unsafe { smp::start(boot.cpus()) };
    smp::expect(running, boot.cpus());
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let all = smp::online();
    for _ in 0..100 {
        Machine
            .run_on(&all, &|_| {
                let inner = Machine.run_on(&all, &|_| {
                    COUNT.fetch_add(1, Ordering::Relaxed);
                });
                assert!(inner.is_ok());
            })
            .expect("every CPU answers");
    }
    let count = COUNT.load(Ordering::Relaxed);
    println!("{running} CPUs, {count} nested calls");
    count == 100 * u64::from(running * running)
}

/// Resets the machine: with `-no-reboot` QEMU ends with status 0, which must not count as success.
fn triple_fault() -> ! {
    let none = [0u8; 10];
    // SAFETY: an empty IDT makes the next exception a shutdown, which is the purpose.
    unsafe { asm!("lidt [{}]", "ud2", in(reg) &none, options(noreturn)) }
}
