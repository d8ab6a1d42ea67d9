//! A program whose address space is limited (`ulimit -v`) has a heap too, a smaller one.

use std::os::unix::process::CommandExt;
use std::process::Command;

use kmem_host::HostHeap;

#[global_allocator]
static HEAP: HostHeap = HostHeap::new();

const CHILD: &str = "KMEM_LIMITED_CHILD";

/// Without the variable, nothing; with it, what a limited process does.
#[test]
fn child() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let words: Vec<String> = (0..10_000).map(|n| format!("word-{n}")).collect();
    assert!(
        words
            .iter()
            .enumerate()
            .all(|(n, word)| *word == format!("word-{n}"))
    );
    println!("arena of {} bytes.", HEAP.arena().unwrap().bytes());
}

#[test]
#[cfg_attr(
    kmem_asan,
    ignore = "AddressSanitizer takes terabytes of address space"
)]
fn a_heap_starts_in_what_the_address_space_has_room_for() {
    for (limit, least) in [(400, 128), (100, 32)] {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", "child", "--nocapture"])
            .env(CHILD, "1");
        let limit_space = move || {
            let bytes = limit << 20;
            let limit = libc::rlimit {
                rlim_cur: bytes,
                rlim_max: bytes,
            };
            // SAFETY: a limit of the own process.
            match unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const limit) } {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        };
        // SAFETY: only a system call between fork and exec.
        unsafe { command.pre_exec(limit_space) };
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{limit} MiB: {output:?}");
        let bytes = said
            .split_once("arena of ")
            .and_then(|(_, rest)| rest.split(' ').next()?.parse::<u64>().ok());
        let bytes = bytes.expect("the child ran");
        assert!(
            (least << 20..limit << 20).contains(&bytes),
            "{limit} MiB: {bytes}"
        );
        assert!(
            bytes <= limit << 19,
            "{bytes} of {limit} MiB leave less than half to others"
        );
    }
}
