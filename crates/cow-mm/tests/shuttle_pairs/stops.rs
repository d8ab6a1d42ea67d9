//! A scheduler for races in which one thread stands still between two of its steps while another comes all the way.
//!
//! The places where it may stand are tried one after the other, a schedule each, so that what goes wrong in one of them is found by every run of
//! the test. It takes as many schedules as the thread has steps.

use shuttle::scheduler::{Schedule, Scheduler, Task, TaskId};

/// The main thread, which spawns the others and waits for them.
const MAIN: usize = 0;
/// The one that stands still.
const STANDS: usize = 1;
/// The one that comes all the way meanwhile.
const PASSES: usize = 2;

/// Lets the first thread that is spawned make some steps, then the second come to its end or to where it waits for the first.
#[derive(Default)]
pub struct Stops {
    /// The schedule's number, from 1 on; the first thread stands still before this step of its.
    schedule: usize,
    /// Steps that it has made.
    made: usize,
}

impl Scheduler for Stops {
    fn new_execution(&mut self) -> Option<Schedule> {
        // The last one ended before it stood still: there is no place left.
        if self.schedule > 0 && self.made < self.schedule {
            return None;
        }
        self.schedule += 1;
        self.made = 0;
        Some(Schedule::new(self.schedule as u64))
    }

    fn next_task(
        &mut self,
        runnable: &[&Task],
        current: Option<TaskId>,
        is_yielding: bool,
    ) -> Option<TaskId> {
        let wanted = match self.made < self.schedule {
            true => [MAIN, STANDS, PASSES],
            false => [MAIN, PASSES, STANDS],
        };
        let runs = |&&wanted: &&usize| {
            let found = |task: &&Task| usize::from(task.id()) == wanted;
            runnable.iter().any(found)
        };
        // Who yields waits for another one.
        let waits = current.filter(|_| is_yielding).map(usize::from);
        let able = wanted.iter().filter(runs);
        let chosen = able.clone().find(|&&task| Some(task) != waits);
        let chosen = *chosen.or(able.clone().next())?;
        self.made += usize::from(chosen == STANDS);
        Some(TaskId::from(chosen))
    }

    fn next_u64(&mut self) -> u64 {
        0
    }
}
