//! Further CPUs: starting them, and running functions on them.
//!
//! A call is a mailbox for each CPU and an interrupt. Whoever waits answers its own mailbox meanwhile, so that two CPUs
//! that call each other with interrupts off do not wait for ever.
//!
//! Invariant `S1`: a mailbox that is not null points to a [`Call`] on the stack of a CPU that waits for it.

use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};

use kmem::hal::{CpuId, CpuSet};

use crate::platform::{self, MAX_CPUS, direct, this_cpu};
use crate::{console, traps};

/// Registers of the local interrupt controller, at its reset address (processor manual volume 3, chapter 12).
const LAPIC: u64 = 0xfee0_0000;
const END_OF_INTERRUPT: u64 = 0xb0;
const SPURIOUS: u64 = 0xf0;
const COMMAND_LOW: u64 = 0x300;
const COMMAND_HIGH: u64 = 0x310;

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

struct Call<'a> {
    function: &'a (dyn Fn(CpuId) + Sync),
    remaining: AtomicU32,
}
static MAILBOXES: [AtomicPtr<Call<'static>>; MAX_CPUS] =
    [const { AtomicPtr::new(ptr::null_mut()) }; MAX_CPUS];

fn lapic(register: u64) -> *mut u32 {
    direct(LAPIC + register).cast()
}

/// CPUs that take calls.
pub fn online() -> CpuSet {
    CpuSet::first(ONLINE.load(Ordering::Acquire))
}

/// Switches this CPU's interrupt controller and interrupts on.
///
/// # Safety
/// Once on each CPU, after `traps::install`.
unsafe fn take_interrupts() {
    // SAFETY: the old controller (ports 0x21 and 0xa1) is silenced, whose timer would arrive as vector 8; firmware leaves
    // the new one at its reset address; nothing makes spurious interrupts.
    unsafe {
        console::outb(0x21, 0xff);
        console::outb(0xa1, 0xff);
        lapic(SPURIOUS).write_volatile(0x1ff);
        core::arch::asm!("sti", options(nomem, nostack));
    }
}

/// Starts the other CPUs, one after the other, and gives how many run.
///
/// # Safety
/// Once, on the first CPU.
pub unsafe fn start(count: u32) -> u32 {
    unsafe extern "C" {
        static trampoline: u8;
        static trampoline_end: u8;
    }
    // SAFETY: page 8 is usable memory that nothing owns yet; the trampoline needs the identity map.
    unsafe {
        take_interrupts();
        platform::identity_map(true);
        let length = (&raw const trampoline_end).offset_from_unsigned(&raw const trampoline);
        ptr::copy_nonoverlapping(&raw const trampoline, direct(0x8000), length);
    }
    for cpu in 1..count.min(MAX_CPUS as u32) {
        FURTHER_STACK.store(
            STACKS[cpu as usize].0.get() as u64 + STACK_BYTES as u64,
            Ordering::Release,
        );
        send(CpuId::new(cpu), 0x4500); // INIT
        wait(10_000_000, cpu);
        send(CpuId::new(cpu), 0x4608); // start-up at page 8
        if !wait(2_000_000_000, cpu) {
            break;
        }
    }
    // SAFETY: every CPU has left the trampoline.
    unsafe { platform::identity_map(false) };
    ONLINE.load(Ordering::Acquire)
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
    call(&online(), &|_| {}); // an interrupt wakes those that sleep
    work(this_cpu());
    while FINISHED.load(Ordering::Acquire) != others {
        core::hint::spin_loop();
    }
}

/// Where a further CPU begins.
#[unsafe(no_mangle)]
extern "C" fn further_main() -> ! {
    let cpu = ONLINE.load(Ordering::Acquire) as usize;
    // SAFETY: once on this CPU, with the number after the last one; CPUs are started one at a time.
    unsafe {
        platform::set_this_cpu(cpu);
        traps::install(cpu);
        take_interrupts();
    }
    ONLINE.store(cpu as u32 + 1, Ordering::Release);
    let mut done = 0;
    loop {
        let round = ROUND.load(Ordering::Acquire);
        if round != done {
            done = round;
            // SAFETY: `each` stored such a function before it began the round.
            let work: fn(CpuId) = unsafe { core::mem::transmute(WORK.load(Ordering::Relaxed)) };
            work(CpuId::new(cpu as u32));
            FINISHED.fetch_add(1, Ordering::Release);
        }
        // SAFETY: sleeps until the next interrupt.
        unsafe { core::arch::asm!("hlt", options(nomem, nostack)) };
    }
}

fn send(cpu: CpuId, command: u32) {
    // SAFETY: QEMU numbers interrupt controllers as we number CPUs; a command touches no memory of ours.
    unsafe {
        lapic(COMMAND_HIGH).write_volatile(cpu.get() << 24);
        lapic(COMMAND_LOW).write_volatile(command);
        while lapic(COMMAND_LOW).read_volatile() & 1 << 12 != 0 {} // until it is delivered
    }
}

/// Makes this kernel forget its shootdowns, for scenario `stale`, which must fail.
pub static DEAF: AtomicBool = AtomicBool::new(false);

/// Has other CPUs drop translations, and waits for them.
pub fn shootdown(cpus: &CpuSet, flush: &(dyn Fn(CpuId) + Sync)) {
    if !DEAF.load(Ordering::Relaxed) {
        call(cpus, flush);
    }
}

/// Runs `function` on each online CPU of `cpus`, this one too if it is named, and waits for all.
pub fn call(cpus: &CpuSet, function: &(dyn Fn(CpuId) + Sync)) {
    let this = this_cpu();
    let online = ONLINE.load(Ordering::Acquire);
    let others = || {
        cpus.iter()
            .filter(move |cpu| *cpu != this && cpu.get() < online)
    };
    let call = Call {
        function,
        remaining: AtomicU32::new(others().count() as u32),
    };
    // The lifetime ends when `remaining` is 0, before which this function does not return (S1).
    let pointer = (&raw const call).cast_mut().cast::<Call<'static>>();
    for cpu in others() {
        let mailbox = &MAILBOXES[cpu.index()];
        while mailbox
            .compare_exchange(
                ptr::null_mut(),
                pointer,
                Ordering::Release,
                Ordering::Relaxed,
            )
            .is_err()
        {
            answer();
        }
        send(cpu, 0x4000 | traps::CALL_VECTOR as u32);
    }
    if cpus.contains(this) {
        function(this);
    }
    while call.remaining.load(Ordering::Acquire) != 0 {
        answer();
    }
}

/// Runs what stands in this CPU's mailbox.
fn answer() {
    let this = this_cpu();
    let call = MAILBOXES[this.index()].swap(ptr::null_mut(), Ordering::Acquire);
    if call.is_null() {
        core::hint::spin_loop();
        return;
    }
    // SAFETY: S1: the caller waits until `remaining` is 0, and the subtraction is the last use.
    unsafe {
        ((*call).function)(this);
        (*call).remaining.fetch_sub(1, Ordering::Release);
    }
}

/// The handler of the interrupt that `call` sends.
pub fn on_call_interrupt() {
    answer();
    // SAFETY: tells the controller that the interrupt is served.
    unsafe { lapic(END_OF_INTERRUPT).write_volatile(0) };
}

/// Ends with a message when a CPU is missing.
pub fn expect(running: u32, wanted: u32) {
    if running != wanted {
        crate::println!("{running} CPUs run, {wanted} were asked for");
        console::exit(false);
    }
}
