//! The traced side: sets the world up, lets itself be stepped through the operation, checks, exits.

use std::ffi::c_int;
use std::ptr::null_mut;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering::Relaxed, compiler_fence};

use super::board::{Board, IDLE, RUNNING};

/// Exit codes of a child.
pub const PANICKED: i32 = 1;
pub const REFUSED: i32 = 2;
pub const SPUN: i32 = 3;

const TRAP_FLAG: i64 = 1 << 8;

/// What the signal handler needs; lives on the child's stack, below everything that is stepped.
struct Entered<'a> {
    board: &'a Board,
    interrupt: &'a dyn Fn(),
    alone: bool,
}

static ENTERED: AtomicPtr<Entered<'static>> = AtomicPtr::new(null_mut());
/// Whether this process is a copy that takes one interrupt and is not traced.
static COPY: AtomicBool = AtomicBool::new(false);

/// The board of this process, if it is a child.
static BOARD: AtomicPtr<Board> = AtomicPtr::new(null_mut());

/// Makes a panic in a child end it with a message on its board, without unwinding through a signal frame.
///
/// Called in the parent: in a child the hook's lock may be one that a thread of the parent held when it forked.
pub fn hook_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            // SAFETY: the board is mapped for as long as the process lives.
            let Some(board) = (unsafe { BOARD.load(Relaxed).as_ref() }) else {
                return before(info);
            };
            board.phase.store(IDLE, Relaxed);
            board.note(&info.to_string());
            // SAFETY: ends the process.
            unsafe { libc::_exit(PANICKED) };
        }));
    });
}

/// Runs everything in the process that was just forked.
pub fn run<W>(
    board: &Board,
    alone: bool,
    setup: impl FnOnce() -> W,
    operation: impl FnOnce(&W),
    interrupt: impl Fn(&W),
    check: impl FnOnce(&W),
) -> ! {
    // SAFETY: asks for the parent as tracer, and stops until it has looked.
    unsafe {
        if libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) != 0 {
            libc::_exit(REFUSED);
        }
        libc::raise(libc::SIGSTOP);
    }
    BOARD.store(std::ptr::from_ref(board).cast_mut(), Relaxed);
    watch(1, 20);
    let world = setup();
    let enter = || interrupt(&world);
    let entered = Entered {
        board,
        interrupt: &enter,
        alone,
    };
    ENTERED.store(std::ptr::from_ref(&entered).cast_mut().cast(), Relaxed);
    install();
    board.phase.store(RUNNING, Relaxed);
    compiler_fence(std::sync::atomic::Ordering::SeqCst);
    // The tracer answers this trap with the first signal.
    // SAFETY: a breakpoint, which the tracer takes.
    unsafe { std::arch::asm!("int3") };
    operation(&world);
    compiler_fence(std::sync::atomic::Ordering::SeqCst);
    if !COPY.load(Relaxed) {
        board.phase.store(IDLE, Relaxed);
    }
    check(&world);
    // SAFETY: ends the copy of the test's process without its destructors.
    unsafe { libc::_exit(0) }
}

/// Makes SIGUSR1 the interrupt.
fn install() {
    // SAFETY: an action of zeroes with a handler of the right kind.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_signal;
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigaction(libc::SIGUSR1, &action, null_mut());
        // A thread of the test harness may run with signals blocked.
        let mut set: libc::sigset_t = std::mem::zeroed();
        for signal in [libc::SIGUSR1, libc::SIGVTALRM, libc::SIGALRM, libc::SIGTRAP] {
            libc::sigaddset(&mut set, signal);
        }
        libc::sigprocmask(libc::SIG_UNBLOCK, &set, null_mut());
    }
}

/// Sends SIGVTALRM each `user` seconds of this process's own time and SIGALRM each `real` seconds of all time.
fn watch(user: i64, real: i64) {
    for (which, seconds) in [(libc::ITIMER_VIRTUAL, user), (libc::ITIMER_REAL, real)] {
        let time = libc::timeval {
            tv_sec: seconds,
            tv_usec: 0,
        };
        let timer = libc::itimerval {
            it_interval: time,
            it_value: time,
        };
        // SAFETY: a valid timer; the old one is not asked for.
        unsafe { libc::setitimer(which as _, &timer, null_mut()) };
    }
}

/// The interrupt: enters the test's code, then lets one more instruction of the operation run.
extern "C" fn on_signal(_: c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: a handler with SA_SIGINFO gets the interrupted context, which is its own to change.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    // SAFETY: set before the first signal is sent; `run` never returns.
    let Some(entered) = (unsafe { ENTERED.load(Relaxed).as_ref() }) else {
        return;
    };
    let board = entered.board;
    let flags = libc::REG_EFL as usize;
    if board.phase.load(Relaxed) != RUNNING {
        registers[flags] &= !TRAP_FLAG;
        return;
    }
    board
        .address
        .store(registers[libc::REG_RIP as usize] as u64, Relaxed);
    let step = board.steps.fetch_add(1, Relaxed) + 1;
    if !(step - 1).is_multiple_of(board.stride.load(Relaxed)) {
        registers[flags] |= TRAP_FLAG;
        return;
    }
    board.interrupts.fetch_add(1, Relaxed);
    // SAFETY: `errno` is the interrupted code's.
    let errno = unsafe { *libc::__errno_location() };
    if !entered.alone {
        (entered.interrupt)();
        registers[flags] |= TRAP_FLAG;
    } else if fork_silently() == 0 {
        COPY.store(true, Relaxed);
        watch(2, 20);
        (entered.interrupt)();
        // At full speed from here on.
        registers[flags] &= !TRAP_FLAG;
    } else {
        wait_for_copy(board, step);
        registers[flags] |= TRAP_FLAG;
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// A copy of this process whose end sends no signal, made without the host library's hooks: the operation may be inside of them.
fn fork_silently() -> i64 {
    // SAFETY: clone with no flags is fork; the copy goes on with a stack of its own, copied at the first write.
    let pid = unsafe { libc::syscall(libc::SYS_clone, 0, 0, 0, 0, 0) };
    if pid < 0 {
        super::board::say("no process for a copy\n");
        // SAFETY: ends the process.
        unsafe { libc::_exit(PANICKED) };
    }
    pid
}

/// Waits until the only copy has ended; ends this process as it did where it did not end well.
fn wait_for_copy(board: &Board, step: u64) {
    let mut status = 0;
    // SAFETY: waits for any child; there is one. Interrupted waits are taken up again.
    while unsafe { libc::wait4(-1, &mut status, libc::__WALL, null_mut()) } < 0 {
        // SAFETY: reads this thread's word.
        if unsafe { *libc::__errno_location() } != libc::EINTR {
            board.note("the copy was lost");
            // SAFETY: ends the process.
            unsafe { libc::_exit(PANICKED) };
        }
    }
    let code = if libc::WIFEXITED(status) {
        libc::WEXITSTATUS(status)
    } else {
        match libc::WTERMSIG(status) {
            libc::SIGVTALRM | libc::SIGALRM => SPUN,
            signal => {
                board.note(match signal {
                    libc::SIGSEGV => "a wrong access (signal 11)",
                    libc::SIGABRT => "an abort (signal 6)",
                    _ => "a signal",
                });
                PANICKED
            }
        }
    };
    if code != 0 {
        board.failed_at.store(step, Relaxed);
        board.phase.store(IDLE, Relaxed);
        // SAFETY: ends the process.
        unsafe { libc::_exit(code) };
    }
}
