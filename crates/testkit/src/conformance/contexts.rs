//! What a check of concurrency runs on: threads of a host, CPUs of a machine, threads of a model.

/// Several contexts that run at once. A kernel's test image implements this with its own CPUs.
pub trait Contexts: Sync {
    /// How many can run at once; at least 1.
    fn count(&self) -> u32;

    /// Runs `body(0)` .. `body(count - 1)` at once, each in a context of its own, until all have ended.
    fn run(&self, body: &(dyn Fn(u32) + Sync));

    /// Lets other contexts run: called where a check waits for one.
    fn relax(&self);

    /// How often a check repeats what contexts do to each other.
    fn rounds(&self) -> u32 {
        6
    }

    /// How often a check relaxes while it waits for another context to come where it should not. 0 where every
    /// interleaving is tried anyway.
    fn patience(&self) -> u32 {
        40
    }

    /// Relaxes until `done()`, or until the patience is at an end.
    fn wait_for(&self, done: &dyn Fn() -> bool) {
        for _ in 0..self.patience() {
            if done() {
                return;
            }
            self.relax();
        }
    }
}

/// Threads of the host.
#[derive(Clone, Copy, Debug)]
pub struct HostThreads {
    count: u32,
}

impl HostThreads {
    /// `count` threads, at least one.
    #[must_use]
    pub const fn new(count: u32) -> Self {
        Self {
            count: if count == 0 { 1 } else { count },
        }
    }
}

impl Contexts for HostThreads {
    fn count(&self) -> u32 {
        self.count
    }

    fn run(&self, body: &(dyn Fn(u32) + Sync)) {
        // Nobody begins before all are there.
        let start = std::sync::Barrier::new(self.count as usize);
        std::thread::scope(|scope| {
            for number in 1..self.count {
                let start = &start;
                scope.spawn(move || {
                    start.wait();
                    body(number);
                });
            }
            start.wait();
            body(0);
        });
    }

    fn relax(&self) {
        for _ in 0..50 {
            std::hint::spin_loop();
        }
        std::thread::yield_now();
    }
}

/// Threads of a loom model. Each is bound to the CPU of its number.
#[cfg(loom)]
#[derive(Clone, Copy, Debug)]
pub struct LoomThreads {
    count: u32,
}

#[cfg(loom)]
impl LoomThreads {
    /// `count` threads, one of them the model's own.
    #[must_use]
    pub const fn new(count: u32) -> Self {
        Self { count }
    }
}

#[cfg(loom)]
impl Contexts for LoomThreads {
    fn count(&self) -> u32 {
        self.count
    }

    fn run(&self, body: &(dyn Fn(u32) + Sync)) {
        // SAFETY: only the lifetime changes, and every thread is joined before this returns.
        let body: &'static (dyn Fn(u32) + Sync) = unsafe { std::mem::transmute(body) };
        let threads: Vec<_> = (1..self.count)
            .map(|number| {
                loom::thread::spawn(move || {
                    crate::model::ModelCpu::bind(number);
                    body(number);
                })
            })
            .collect();
        body(0);
        for thread in threads {
            thread.join().unwrap();
        }
    }

    fn relax(&self) {
        loom::thread::yield_now();
    }

    fn rounds(&self) -> u32 {
        1
    }

    fn patience(&self) -> u32 {
        0
    }
}
