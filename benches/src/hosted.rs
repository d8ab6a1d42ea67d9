//! Whole programs whose global allocator is the heap that is measured.
//!
//! `compare` starts itself once more for every figure, with the heap's name in the environment; the first allocation of that process reads it, so
//! that every byte of the process comes from that heap, those before `main` included. All heaps stand behind the same [`Switch`], one
//! predictable branch a call.
//!
//! | program | what it does |
//! |---|---|
//! | `sort` | makes N strings of 8 to 31 letters in random order, sorts them, and drops them |
//! | `json` | parses an array of N records into a tree of values, walks it, and drops it (the text is made before) |
//!
//! What counts is the CPU time of the thread, page faults included: heaps take their memory from the host as they like. Whether that is in pages of 2 MiB
//! decides more than most of what a heap does, so that every program runs both ways ([`HostPages`]).

use std::alloc::{GlobalAlloc, Layout, System};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicU8, Ordering};

use kmem_host::HostHeap;

use crate::clock::Watch;
use crate::rng::Rng;

/// What `compare` is started with to be such a program: this, the program's name, N.
pub const FLAG: &str = "--hosted";

const VARIABLE: &std::ffi::CStr = c"KMEM_HOSTED_HEAP";

const UNSET: u8 = 0;

static KMEM: HostHeap = HostHeap::new();

macro_rules! heaps {
    ($($(#[$meta:meta])* $number:literal $name:literal $heap:expr;)+) => {
        /// The heaps, by the names of their rows.
        pub const HEAPS: &[&str] = &[$($(#[$meta])* $name),+];

        fn number_of(name: &[u8]) -> u8 {
            $($(#[$meta])* if name == $name.as_bytes() { return $number; })+
            1
        }

        macro_rules! with {
            ($chosen:expr, $each:ident => $call:expr) => {
                match $chosen {
                    $($(#[$meta])* $number => { let $each = &$heap; $call })+
                    _ => { let $each = &System; $call }
                }
            };
        }
    };
}

heaps! {
    1 "libc" System;
    2 "kmem" KMEM;
    #[cfg(feature = "c-peers")]
    3 "mimalloc" mimalloc::MiMalloc;
    #[cfg(feature = "c-peers")]
    4 "jemalloc" tikv_jemallocator::Jemalloc;
    #[cfg(feature = "c-peers")]
    5 "snmalloc" snmalloc_rs::SnMalloc;
}

/// The global allocator of `compare`: the heap that the environment names, the host's malloc where it names none.
#[derive(Debug)]
pub struct Switch {
    chosen: AtomicU8,
}

impl Switch {
    /// A switch that has not chosen.
    #[must_use]
    #[allow(clippy::new_without_default)]
    pub const fn new() -> Self {
        Self {
            chosen: AtomicU8::new(UNSET),
        }
    }

    #[inline(always)]
    fn chosen(&self) -> u8 {
        match self.chosen.load(Ordering::Relaxed) {
            UNSET => self.choose(),
            chosen => chosen,
        }
    }

    #[cold]
    fn choose(&self) -> u8 {
        // SAFETY: the name ends with a zero byte; nobody changes the environment this early, before the first allocation.
        let value = unsafe { libc::getenv(VARIABLE.as_ptr()) };
        let chosen = if value.is_null() {
            1
        } else {
            // SAFETY: a string of the environment, which nobody changes.
            number_of(unsafe { std::ffi::CStr::from_ptr(value) }.to_bytes())
        };
        self.chosen.store(chosen, Ordering::Relaxed);
        chosen
    }
}

// SAFETY: each call goes to one and the same allocator for the life of the process.
unsafe impl GlobalAlloc for Switch {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        with!(self.chosen(), heap => unsafe { heap.alloc(layout) })
    }
    #[inline]
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        with!(self.chosen(), heap => unsafe { heap.alloc_zeroed(layout) })
    }
    #[inline]
    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        with!(self.chosen(), heap => unsafe { heap.dealloc(memory, layout) })
    }
    #[inline]
    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's promise.
        with!(self.chosen(), heap => unsafe { heap.realloc(memory, layout, size) })
    }
}

/// The host's pages that the heaps of a run have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostPages {
    /// 2 MiB where they can be had: [`HostHeap`] asks for them always, mimalloc, jemalloc and the host's malloc by a variable of the environment. snmalloc
    /// has no such switch.
    Large,
    /// 4 KiB for every heap: the host gives the process no others, whatever is asked for.
    Small,
}

/// What makes heaps that do not by themselves ask the host for pages of 2 MiB.
const LARGE_PAGES: [(&str, &str); 3] = [
    ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"),
    ("MIMALLOC_ALLOW_LARGE_OS_PAGES", "1"),
    ("_RJEM_MALLOC_CONF", "thp:always"),
];

fn without_large_pages() -> std::io::Result<()> {
    let on: libc::c_ulong = 1;
    let none: libc::c_ulong = 0;
    // SAFETY: changes nothing but what pages this process gets, and those that take its place.
    match unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, on, none, none, none) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Runs a program in a process of its own over a heap; nanoseconds for each of the N, and what it computed.
///
/// # Errors
///
/// The process could not be started, or did not answer.
pub fn run(heap: &str, program: &str, n: u64, pages: HostPages) -> Result<(f64, u64), String> {
    let me = std::env::current_exe().map_err(|error| error.to_string())?;
    let mut command = Command::new(me);
    command
        .args([FLAG, program, &n.to_string()])
        .env(VARIABLE.to_str().unwrap_or_default(), heap);
    match pages {
        HostPages::Large => command.envs(LARGE_PAGES),
        // SAFETY: what runs between fork and exec is one system call.
        HostPages::Small => unsafe { command.pre_exec(without_large_pages) },
    };
    let answer = command.output().map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&answer.stdout);
    let mut words = text.split_whitespace();
    let time = words.next().and_then(|word| word.parse().ok());
    let check = words.next().and_then(|word| word.parse().ok());
    time.zip(check)
        .ok_or_else(|| format!("{program} over {heap}: {} {text}", answer.status))
}

/// What [`run`] starts: the program's name and N; `None` for a name that it does not know.
#[must_use]
pub fn answer(program: &str, n: u64) -> Option<String> {
    let mut watch = Watch::new();
    let check = match program {
        "sort" => watch.time(|| sort(n)),
        "json" => {
            let text = records(n);
            watch.time(|| walk_json(&text))
        }
        _ => return None,
    };
    let each = watch.elapsed().as_nanos() as f64 / n as f64;
    // Shows that the heap that was asked for did serve.
    let served = std::env::var(VARIABLE.to_str().ok()?).ok()?;
    if served == "kmem" && KMEM.memory().is_none() {
        return None;
    }
    Some(format!("{each} {check}"))
}

fn sort(n: u64) -> u64 {
    let mut rng = Rng::new(11);
    let mut strings = Vec::new();
    for _ in 0..n {
        let length = 8 + rng.below(24);
        let mut string = String::new();
        for _ in 0..length {
            string.push(char::from(b'a' + rng.below(26) as u8));
        }
        strings.push(string);
    }
    strings.sort_unstable();
    let ordered = strings.windows(2).filter(|pair| pair[0] <= pair[1]).count() as u64;
    assert_eq!(ordered + 1, n, "sorted");
    strings
        .iter()
        .step_by(1000)
        .map(|string| string.len() as u64)
        .sum()
}

/// JSON of N records.
fn records(n: u64) -> String {
    use std::fmt::Write as _;
    let mut rng = Rng::new(12);
    let mut text = String::from("[");
    for number in 0..n {
        if number > 0 {
            text.push(',');
        }
        let (a, b) = (rng.below(1 << 40), rng.below(100));
        let _ = write!(
            text,
            r#"{{"id":{number},"name":"record {a:x}","tags":["t{b}","u{b}"],"size":{a},"nested":{{"x":{b},"ok":true,"note":null}}}}"#
        );
    }
    text.push(']');
    text
}

fn walk_json(text: &str) -> u64 {
    fn count(value: &serde_json::Value) -> u64 {
        match value {
            serde_json::Value::Array(items) => items.iter().map(count).sum(),
            serde_json::Value::Object(fields) => {
                fields.values().map(count).sum::<u64>() + fields.len() as u64
            }
            serde_json::Value::String(text) => text.len() as u64,
            _ => 1,
        }
    }
    let value: serde_json::Value = serde_json::from_str(text).expect("valid JSON");
    count(&value)
}
