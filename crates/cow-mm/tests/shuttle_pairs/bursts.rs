//! A scheduler for races that need a thread to come a long way while another stands still.

use kmem_mock_x86::SeededRng;
use shuttle::scheduler::{Schedule, Scheduler, Task, TaskId};

/// Lets a thread run on for a while, as long on average as each schedule has it: from two steps to a thousand. A race needs both a thread that
/// stands still and another that comes a long way meanwhile.
pub struct Bursts {
    name: String,
    seed: u64,
    left: usize,
    random: SeededRng,
    /// A thread is exchanged for another at one of `2^scale` steps.
    scale: u32,
}

impl Bursts {
    /// So many schedules from a seed on; `name` is what a failing one is run again by.
    pub fn new(name: String, seed: u64, schedules: usize) -> Self {
        Self {
            name,
            seed,
            left: schedules,
            random: SeededRng::new(seed),
            scale: 0,
        }
    }
}

impl Scheduler for Bursts {
    fn new_execution(&mut self) -> Option<Schedule> {
        self.left = self.left.checked_sub(1)?;
        self.random = SeededRng::new(self.seed);
        self.scale = (self.random.next() % 11) as u32;
        self.seed += 1;
        Some(Schedule::new(self.seed - 1))
    }

    fn next_task(
        &mut self,
        runnable: &[&Task],
        current: Option<TaskId>,
        is_yielding: bool,
    ) -> Option<TaskId> {
        let here = current.filter(|id| runnable.iter().any(|task| task.id() == *id));
        let others = runnable.iter().filter(|task| Some(task.id()) != here);
        let others: Vec<TaskId> = others.map(|task| task.id()).collect();
        match here {
            Some(here) if others.is_empty() => Some(here),
            Some(here) if !is_yielding && self.random.next() >> (64 - self.scale.max(1)) != 0 => {
                Some(here)
            }
            _ => Some(others[self.random.next() as usize % others.len()]),
        }
    }

    fn next_u64(&mut self) -> u64 {
        self.random.next()
    }
}

impl Drop for Bursts {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "KMEM_PAIR={} KMEM_SEED={} KMEM_PAIRS=1",
                self.name,
                self.seed - 1
            );
        }
    }
}
