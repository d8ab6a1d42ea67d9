//! Further CPUs: starting them, and having them work side by side.

use core::ptr;
use core::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};

use kmem::hal::{CpuCall, CpuId, CpuSet};

use crate::layout::{self, direct};
use crate::platform::{MAX_CPUS, Machine, this_cpu};
use crate::{apic, console, cpu, memory, sched, tlb, traps};

const STACK_BYTES: usize = 65536;
#[repr(C, align(16))]
struct Stack(core::cell::UnsafeCell<[u8; STACK_BYTES]>);
// SAFETY: used by the one CPU that is given it.
unsafe impl Sync for Stack {}
static STACKS: [Stack; MAX_CPUS] =
    [const { Stack(core::cell::UnsafeCell::new([0; STACK_BYTES])) }; MAX_CPUS];

/// Read by `boot64_further`.
#[unsafe(no_mangle)]
static FURTHER_STACK: AtomicU64 = AtomicU64::new(0);
static ONLINE: AtomicU32 = AtomicU32::new(1);

/// CPUs that take calls.
pub fn online() -> CpuSet {
    CpuSet::first(ONLINE.load(Ordering::Acquire))
}

/// Starts the other CPUs, one after the other, and ends the run if one is missing.
///
/// # Safety
/// Once, on the first CPU, with the final tables loaded.
pub unsafe fn start(count: u32) {
    unsafe extern "C" {
        static trampoline: u8;
        static trampoline_end: u8;
    }
    // SAFETY: page 8 is usable memory that nothing owns; the trampoline needs the identity map.
    unsafe {
        apic::start();
        layout::identity_map(true);
        let length = (&raw const trampoline_end).offset_from_unsigned(&raw const trampoline);
        ptr::copy_nonoverlapping(
            direct(&raw const trampoline as u64).cast_const(),
            direct(0x8000),
            length,
        );
    }
    for cpu in 1..count.min(MAX_CPUS as u32) {
        FURTHER_STACK.store(
            STACKS[cpu as usize].0.get() as u64 + STACK_BYTES as u64,
            Ordering::Release,
        );
        apic::send(CpuId::new(cpu), apic::INIT);
        wait(10_000_000, cpu);
        apic::send(CpuId::new(cpu), apic::START);
        if !wait(40_000_000_000, cpu) {
            break;
        }
    }
    let running = ONLINE.load(Ordering::Acquire);
    if running != count {
        crate::println!("{running} CPUs run, {count} were asked for");
        // With the identity map still there: the missing CPU may only be late, and would end the run without a word.
        console::exit(false);
    }
    // SAFETY: every CPU has left the trampoline.
    unsafe { layout::identity_map(false) };
}

/// Waits until `cpu` is online, at most so many ticks of the time-stamp counter.
fn wait(ticks: u64, cpu: u32) -> bool {
    // SAFETY: reading the counter has no effect.
    let now = || unsafe { core::arch::x86_64::_rdtsc() };
    let begin = now();
    while now() - begin < ticks {
        if ONLINE.load(Ordering::Acquire) > cpu {
            return true;
        }
        core::hint::spin_loop();
    }
    false
}

/// What CPUs do outside of interrupts, and in which round.
static WORK: AtomicUsize = AtomicUsize::new(0);
static ROUND: AtomicU32 = AtomicU32::new(0);
static FINISHED: AtomicU32 = AtomicU32::new(0);

/// Runs `work` on every online CPU at once, as a task would, with interrupts on; waits for all.
pub fn each(work: fn(CpuId)) {
    let others = ONLINE.load(Ordering::Acquire) - 1;
    WORK.store(work as usize, Ordering::Relaxed);
    FINISHED.store(0, Ordering::Relaxed);
    ROUND.fetch_add(1, Ordering::Release);
    let _ = Machine.run_on(&online(), &|_| {}); // an interrupt wakes those that sleep
    work(this_cpu());
    while FINISHED.load(Ordering::Acquire) != others {
        core::hint::spin_loop();
    }
}

/// Where a further CPU begins.
#[unsafe(no_mangle)]
extern "C" fn further_main() -> ! {
    let number = ONLINE.load(Ordering::Acquire) as usize;
    // SAFETY: once on this CPU, with the number after the last one; CPUs are started one at a time.
    unsafe {
        cpu::install(number);
        traps::install(number);
        tlb::start(number);
        memory::load_kernel_table();
        apic::start();
    }
    ONLINE.store(number as u32 + 1, Ordering::Release);
    let mut done = 0;
    loop {
        let round = ROUND.load(Ordering::Acquire);
        if round != done {
            done = round;
            // SAFETY: `each` stored such a function before it began the round.
            let work: fn(CpuId) = unsafe { core::mem::transmute(WORK.load(Ordering::Relaxed)) };
            work(CpuId::new(number as u32));
            FINISHED.fetch_add(1, Ordering::Release);
        }
        if !sched::run_one() {
            cpu::sleep_unless(|| ROUND.load(Ordering::Acquire) != done || sched::has_work());
        }
    }
}

/// What the broken shootdown of `plant.rs` has other CPUs do some timer interrupts later.
static POSTED: [AtomicPtr<Flush>; MAX_CPUS] = [const { AtomicPtr::new(ptr::null_mut()) }; MAX_CPUS];
type Flush = &'static (dyn Fn(CpuId) + Sync);

/// Leaves `flush` for other CPUs, and does not wait.
pub fn post(cpus: &CpuSet, flush: &'static (dyn Fn(CpuId) + Sync)) {
    let flush = alloc::boxed::Box::into_raw(alloc::boxed::Box::new(flush));
    for cpu in cpus.iter() {
        POSTED[cpu.index()].store(flush, Ordering::Release);
    }
}

/// Timer interrupts from [`post`] to the flush.
const LATE: u64 = 8;

/// Does what [`post`] left, in every eighth timer interrupt.
pub fn do_posted(tick: u64) {
    let cpu = this_cpu();
    if !tick.is_multiple_of(LATE) {
        return;
    }
    let flush = POSTED[cpu.index()].swap(ptr::null_mut(), Ordering::Acquire);
    // SAFETY: `post` leaked it.
    if let Some(flush) = unsafe { flush.as_ref() } {
        flush(cpu);
    }
}
