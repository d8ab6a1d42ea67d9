//! Threads, their kernel stacks, and a round-robin scheduler for all CPUs.
//!
//! ```text
//!   CPU's own stack:  run_one ── switch ──> thread's kernel stack ── trap_return ──> user mode
//!                        ^                          │
//!                        └──── switch ── yield, wait, exit  (only here: kernel code is never preempted)
//! ```
//!
//! Invariants
//! - `T1`: a thread whose state is `READY` stands complete in its stack, or will as soon as `on_cpu` is false.
//! - `T2`: who turns `READY` into `RUNNING` runs the thread; who turns `FREE` into `NEW` owns the slot.
//! - `T3`: a stack is freed by a CPU that stands on its own.

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};

use kmem::VirtAddr;

use crate::platform::SPACES;
use crate::traps::{self, TrapFrame};
use crate::{cpu, memory, process};

/// Threads that the kernel has room for: what bounds a fork bomb.
pub const THREADS: usize = 64;
/// Pages of a kernel stack, with a guard page below.
pub const STACK_PAGES: u64 = 8;

const FREE: u32 = 0;
const NEW: u32 = 1;
const READY: u32 = 2;
const RUNNING: u32 = 3;
const WAITING: u32 = 4;
const DEAD: u32 = 5;

/// A thread of a process.
pub struct Thread {
    state: AtomicU32,
    /// A CPU stands on its stack.
    on_cpu: AtomicBool,
    /// Where the stack was left.
    saved: AtomicU64,
    /// Top of the kernel stack.
    stack: AtomicU64,
    /// The process's place in its table.
    pub process: AtomicUsize,
    /// What gettid gives.
    pub id: AtomicU32,
    /// The user's `fs` base.
    pub fs_base: AtomicU64,
    /// The access that faulted last, and how often in a row.
    pub last_fault: [AtomicU64; 3],
    /// A user word that becomes 0 when the thread ends (`set_tid_address`).
    pub clear_at_exit: AtomicU64,
}

static TABLE: [Thread; THREADS] = [const {
    Thread {
        state: AtomicU32::new(FREE),
        on_cpu: AtomicBool::new(false),
        saved: AtomicU64::new(0),
        stack: AtomicU64::new(0),
        process: AtomicUsize::new(0),
        id: AtomicU32::new(0),
        fs_base: AtomicU64::new(0),
        last_fault: [const { AtomicU64::new(0) }; 3],
        clear_at_exit: AtomicU64::new(0),
    }
}; THREADS];
static NEXT: AtomicUsize = AtomicUsize::new(0);
static NEXT_ID: AtomicU32 = AtomicU32::new(1);

/// A number for a process or thread.
pub fn next_id() -> u32 {
    NEXT_ID.fetch_add(1, Ordering::Relaxed)
}

/// Bytes of a frame and of the vector registers below it.
const ENTRY_BYTES: u64 = size_of::<TrapFrame>() as u64 + 512;

impl Thread {
    /// The frame with which the thread entered the kernel from user mode: at the top of its stack.
    fn frame(&self) -> *mut TrapFrame {
        let top = self.stack.load(Ordering::Relaxed);
        (top - size_of::<TrapFrame>() as u64) as *mut TrapFrame
    }

    /// The vector registers below that frame, as FXSAVE stores them.
    pub fn vectors(&self) -> *mut [u8; 512] {
        (self.stack.load(Ordering::Relaxed) - ENTRY_BYTES) as *mut [u8; 512]
    }

    /// Makes a waiting thread ready; for one that has not gone to sleep yet, sleep ends at once.
    pub fn wake(&self) {
        let _ = self
            .state
            .compare_exchange(WAITING, READY, Ordering::AcqRel, Ordering::Relaxed);
    }

    /// Frees a slot that [`prepare`] gave and that was not started.
    pub fn abandon(&self) {
        self.free();
    }

    fn free(&self) {
        let top = VirtAddr::new(self.stack.load(Ordering::Relaxed));
        memory::areas()
            .free_stack(top, STACK_PAGES)
            .expect("a stack of ours");
        self.state.store(FREE, Ordering::Release);
    }
}

/// Takes a free slot and a kernel stack; `None` where there is no more of one or the other.
pub fn prepare(process: usize) -> Option<&'static Thread> {
    let thread = TABLE.iter().find(|thread| {
        let taken = thread
            .state
            .compare_exchange(FREE, NEW, Ordering::Acquire, Ordering::Relaxed);
        taken.is_ok()
    })?;
    let Ok(stack) = memory::areas().alloc_stack(STACK_PAGES) else {
        thread.state.store(FREE, Ordering::Release);
        return None;
    };
    thread.stack.store(stack.as_u64(), Ordering::Relaxed);
    thread.process.store(process, Ordering::Relaxed);
    thread.clear_at_exit.store(0, Ordering::Relaxed);
    Some(thread)
}

/// Lets a prepared thread begin in user mode with `frame`, and with `vectors` if it is a copy of another.
pub fn start(thread: &'static Thread, frame: &TrapFrame, vectors: Option<&[u8; 512]>) {
    unsafe extern "C" {
        static trap_return: u8;
    }
    let top = thread.stack.load(Ordering::Relaxed);
    let fresh = || {
        let mut area = [0; 512];
        area[..2].copy_from_slice(&0x37f_u16.to_le_bytes()); // FCW and MXCSR: all exceptions masked
        area[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes());
        area
    };
    // What `switch_stacks` pops: r15, r14, r13, r12, rbp, rbx, and the address to return to.
    let mut switch = [0u64; 7];
    switch[4] = thread.frame() as u64;
    switch[6] = &raw const trap_return as u64;
    // SAFETY: the stack is mapped and nobody stands on it.
    unsafe {
        thread.frame().write(*frame);
        thread
            .vectors()
            .write(vectors.copied().unwrap_or_else(fresh));
        let bottom = (top - ENTRY_BYTES) as *mut [u64; 7];
        bottom.sub(1).write(switch);
        thread.saved.store(bottom.sub(1) as u64, Ordering::Relaxed);
    }
    thread.state.store(READY, Ordering::Release);
}

/// Whether a thread is ready.
pub fn has_work() -> bool {
    TABLE
        .iter()
        .any(|thread| thread.state.load(Ordering::Relaxed) == READY)
}

/// Whether no thread is left.
pub fn is_empty() -> bool {
    TABLE
        .iter()
        .all(|thread| thread.state.load(Ordering::Acquire) == FREE)
}

unsafe extern "C" {
    fn switch_stacks(save: *mut u64, to: u64);
}

/// Runs the next ready thread until it gives up the CPU; false where there is none. On the CPU's own stack.
pub fn run_one() -> bool {
    let first = NEXT.fetch_add(1, Ordering::Relaxed);
    let ready = (0..THREADS)
        .map(|step| &TABLE[(first + step) % THREADS])
        .find(|thread| {
            let taken =
                thread
                    .state
                    .compare_exchange(READY, RUNNING, Ordering::Acquire, Ordering::Relaxed);
            taken.is_ok()
        });
    let Some(thread) = ready else {
        return false;
    };
    while thread.on_cpu.swap(true, Ordering::Acquire) {
        core::hint::spin_loop(); // another CPU is about to leave its stack (T1)
    }
    let area = cpu::area();
    process::enter_space(thread.process.load(Ordering::Relaxed));
    traps::set_kernel_stack(thread.stack.load(Ordering::Relaxed));
    cpu::set_fs_base(thread.fs_base.load(Ordering::Relaxed));
    area.share_used.store(false, Ordering::Relaxed);
    area.thread
        .store(core::ptr::from_ref(thread).cast_mut(), Ordering::Relaxed);
    // SAFETY: T1, T2: the thread stands complete in its stack, and only this CPU goes there.
    unsafe {
        switch_stacks(
            area.own_stack.as_ptr(),
            thread.saved.load(Ordering::Relaxed),
        )
    };
    area.thread.store(core::ptr::null_mut(), Ordering::Relaxed);
    // The thread's space stays loaded: the next thread may be of the same process, and the kernel needs none.
    let _ = SPACES.enter_lazy();
    let dead = thread.state.load(Ordering::Relaxed) == DEAD;
    thread.on_cpu.store(false, Ordering::Release);
    if dead {
        thread.free();
    }
    true
}

/// Leaves the running thread's stack; comes back when it is chosen again.
fn leave(thread: &Thread, state: u32) {
    thread.state.store(state, Ordering::Release);
    give_up_cpu(thread);
}

fn give_up_cpu(thread: &Thread) {
    // SAFETY: `run_one` stands on the CPU's own stack, in `switch_stacks`.
    unsafe {
        switch_stacks(
            thread.saved.as_ptr(),
            cpu::area().own_stack.load(Ordering::Relaxed),
        )
    };
}

/// Lets others run.
pub fn yield_now() {
    if let Some(thread) = cpu::thread() {
        leave(thread, READY);
    }
}

/// Says that the running thread is about to sleep: from now on [`Thread::wake`] finds it.
pub fn prepare_to_sleep(thread: &Thread) {
    thread.state.store(WAITING, Ordering::Release);
}

/// Sleeps after [`prepare_to_sleep`]; at once over if it was woken since.
pub fn sleep(thread: &Thread) {
    give_up_cpu(thread);
}

/// Ends the running thread.
pub fn end() -> ! {
    let thread = cpu::thread().expect("a thread ends itself");
    leave(thread, DEAD);
    unreachable!("a dead thread runs")
}

/// On the way to user mode: ends the thread of a process that was killed, and lets others run after a full share.
pub fn before_user() {
    while cpu::area().share_used.swap(false, Ordering::Relaxed) {
        process::end_if_killed();
        yield_now();
    }
    process::end_if_killed();
}
