//! The tracing side: answers each trap with the next signal, and notices what stands still.

use std::ffi::c_int;
use std::ptr::null_mut;
use std::sync::atomic::Ordering::Relaxed;

use super::board::{Board, RUNNING};

/// How the child ended.
pub enum Ended {
    Exit(i32),
    Signal(c_int),
    Spun,
    TooLong,
}

/// Lets the child go on, delivering `signal` where it is not 0.
fn resume(pid: libc::pid_t, signal: c_int) {
    // SAFETY: the child of this thread is stopped; no memory of this process is named.
    unsafe { libc::ptrace(libc::PTRACE_CONT, pid, 0, libc::c_long::from(signal)) };
}

/// Waits for the next event.
fn wait(pid: libc::pid_t) -> c_int {
    let mut status = 0;
    loop {
        // SAFETY: waits for the child of this thread.
        let result = unsafe { libc::waitpid(pid, &mut status, libc::__WALL) };
        // SAFETY: reads this thread's word.
        if result == pid || unsafe { *libc::__errno_location() } != libc::EINTR {
            return status;
        }
    }
}

/// Ends the child.
fn kill(pid: libc::pid_t) {
    // SAFETY: the child of this process, which nobody else has waited for.
    unsafe {
        libc::kill(pid, libc::SIGKILL);
        libc::waitpid(pid, null_mut(), libc::__WALL);
    }
}

/// Steps the child to its end.
pub fn run(pid: libc::pid_t, board: &Board, limit: u64) -> Ended {
    let mut seen = u64::MAX;
    loop {
        let status = wait(pid);
        if libc::WIFEXITED(status) {
            return Ended::Exit(libc::WEXITSTATUS(status));
        }
        if libc::WIFSIGNALED(status) {
            return Ended::Signal(libc::WTERMSIG(status));
        }
        let signal = libc::WSTOPSIG(status);
        match signal {
            libc::SIGSTOP => {
                // SAFETY: as in `resume`: a child that outlives its tracer is of no use.
                unsafe {
                    let options = libc::c_long::from(libc::PTRACE_O_EXITKILL);
                    libc::ptrace(libc::PTRACE_SETOPTIONS, pid, 0, options);
                }
                resume(pid, 0);
            }
            // The interrupt, or with the operation over, the end of stepping.
            libc::SIGTRAP => {
                if board.phase.load(Relaxed) == RUNNING && board.steps.load(Relaxed) >= limit {
                    kill(pid);
                    return Ended::TooLong;
                }
                resume(pid, libc::SIGUSR1);
            }
            // S2: no instruction since the last time.
            libc::SIGVTALRM | libc::SIGALRM => {
                let steps = board.steps.load(Relaxed);
                let running = board.phase.load(Relaxed) == RUNNING;
                // A check may take its time, as long as it is not asleep.
                if steps == seen && (running || signal == libc::SIGALRM) {
                    kill(pid);
                    return Ended::Spun;
                }
                seen = steps;
                resume(pid, 0);
            }
            other => resume(pid, other),
        }
    }
}

/// An address as an offset into the executable's file, as this process and its children have it mapped.
pub fn offset(address: u64) -> u64 {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let exe = std::env::current_exe().unwrap_or_default();
    let base = maps
        .lines()
        .filter(|line| line.ends_with(&*exe.to_string_lossy()))
        .find_map(|line| u64::from_str_radix(line.split('-').next()?, 16).ok());
    address.saturating_sub(base.unwrap_or(0))
}
