//! The calls of one CPU that wait for a grace period.

use super::Deferred;

/// Calls that wait, oldest first, each with the epoch of its `defer`.
#[derive(Debug)]
pub(super) struct Queue<const Q: usize> {
    calls: [Option<(u64, Deferred)>; Q],
    front: usize,
    pub len: usize,
}

impl<const Q: usize> Queue<Q> {
    pub const fn new() -> Self {
        Self {
            calls: [const { None }; Q],
            front: 0,
            len: 0,
        }
    }

    /// Adds a call; gives it back where there is no room.
    pub fn push(&mut self, tag: u64, call: Deferred) -> Result<(), Deferred> {
        if self.len == Q {
            return Err(call);
        }
        self.calls[(self.front + self.len) % Q] = Some((tag, call));
        self.len += 1;
        Ok(())
    }

    /// The oldest call, if its tag is at most `tag`.
    pub fn pop(&mut self, tag: u64) -> Option<Deferred> {
        let place = self.calls.get_mut(self.front)?;
        let (_, call) = place.take_if(|(found, _)| *found <= tag)?;
        self.front = (self.front + 1) % Q;
        self.len -= 1;
        Some(call)
    }
}
