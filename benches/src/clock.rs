//! Clocks: the CPU time of one thread, and wall time for work on two.
//!
//! The CPU time of a thread stands still while another job has the processor, so that a shared machine disturbs it less than wall
//! time. Reading it is a system call of a few hundred nanoseconds: what is timed in one piece should take at least 20 µs.

use std::time::{Duration, Instant};

/// CPU time that this thread has used.
#[must_use]
pub fn thread_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the pointer is to a local of the right type.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    assert_eq!(result, 0, "the host has no clock of thread CPU time");
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Times the parts of a slice that count; what runs outside [`time`](Self::time) is preparation.
#[derive(Debug, Default)]
pub struct Watch {
    elapsed: Duration,
}

impl Watch {
    /// A watch that has measured nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Runs `work` and adds the CPU time that this thread spent in it.
    #[inline]
    pub fn time<R>(&mut self, work: impl FnOnce() -> R) -> R {
        let start = thread_time();
        let result = std::hint::black_box(work());
        self.elapsed += thread_time().saturating_sub(start);
        result
    }

    /// Adds time that was measured in another way.
    pub fn add(&mut self, elapsed: Duration) {
        self.elapsed += elapsed;
    }

    /// What was measured so far.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.elapsed
    }
}

/// Runs `work(0)` and `work(1)` on two threads at once; the wall time from the start of the first to the end of the last, and what
/// they answered.
///
/// Both threads are made and wait for each other before the clock starts.
pub fn race<R: Send>(work: impl Fn(usize) -> R + Sync) -> (Duration, [R; 2]) {
    let ready = std::sync::Barrier::new(2);
    let one = |index: usize| {
        ready.wait();
        let start = Instant::now();
        let result = work(index);
        (start, Instant::now(), result)
    };
    let (first, second) = std::thread::scope(|scope| {
        let other = scope.spawn(|| one(1));
        let first = one(0);
        (first, other.join().expect("the second thread panicked"))
    });
    let elapsed = first.1.max(second.1) - first.0.min(second.0);
    (elapsed, [first.2, second.2])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sleeping_costs_no_thread_time() {
        let mut watch = Watch::new();
        watch.time(|| std::thread::sleep(Duration::from_millis(50)));
        assert!(watch.elapsed() < Duration::from_millis(40));
    }

    #[test]
    fn what_is_outside_is_not_counted() {
        let mut watch = Watch::new();
        let mut x = 1u64;
        for i in 0..5_000_000u64 {
            x = std::hint::black_box(x.wrapping_mul(i | 1));
        }
        assert_eq!(watch.elapsed(), Duration::ZERO);
        watch.time(|| {
            for i in 0..1_000_000u64 {
                x = std::hint::black_box(x.wrapping_mul(i | 1));
            }
        });
        assert!(watch.elapsed() > Duration::ZERO);
    }

    #[test]
    fn both_sides_of_a_race_run() {
        let (elapsed, answers) = race(|index| index + 10);
        assert_eq!(answers, [10, 11]);
        assert!(elapsed < Duration::from_secs(60));
    }
}
