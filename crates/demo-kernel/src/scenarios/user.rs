//! Scenarios that are programs of user mode (`user/*.c`): run one, look at how it ended and at what it left.

use crate::process::{self, OUT_OF_MEMORY};
use crate::pvh::Boot;
use crate::scenarios::{end, start};
use crate::{console, cpu, file, println, sched};
use core::sync::atomic::Ordering;

/// Runs the program of that name; `None` where there is none.
pub fn run(name: &str, boot: &Boot) -> Option<bool> {
    let path = file::PROGRAMS
        .iter()
        .map(|inode| inode.path)
        .find(|path| path.strip_prefix("/bin/") == Some(name))?;
    if file::find(path).is_none() {
        console::skip("the C compiler has no static C library");
    }
    let baseline = start(boot);
    // Arguments: the path, and that this is not Linux.
    let arguments: &[&[u8]] = match name {
        "exec" | "maps" => &[path.as_bytes()],
        "shared" => &[path.as_bytes(), b"/tmp/scratch"],
        _ => &[path.as_bytes(), b"kmem"],
    };
    let repeat = boot.word("repeat=").and_then(|word| word.parse().ok());
    let mut success = true;
    for _ in 0..repeat.unwrap_or(1) {
        let status = wait(process::spawn(path, arguments));
        println!("{path} ended with status {status:?}");
        success &= status == Some(0);
    }
    if name == "oom" {
        let count = OUT_OF_MEMORY.load(Ordering::Relaxed);
        println!("{count} processes ran out of memory");
        success &= count >= 2;
    }
    Some(end(baseline) && success)
}

/// Works as one of the CPUs until the program has ended.
fn wait(started: Result<u32, crate::error::Error>) -> Option<process::Status> {
    let pid = match started {
        Ok(pid) => pid,
        Err(error) => {
            println!("not started: {error:?}");
            return None;
        }
    };
    loop {
        if let Some(status) = process::reap(pid) {
            return Some(status);
        }
        if !sched::run_one() {
            cpu::sleep_unless(sched::has_work);
        }
    }
}
