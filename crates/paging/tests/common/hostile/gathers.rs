// Gathers that are committed at once or some operations later, and the pages that wait meanwhile: on those a CPU may see what was or
// what is.

use kmem_paging::format::Format;

use super::{Pending, World};

impl<F: Format> World<F> {
    /// Commits a gather, now or some operations later.
    pub(super) fn settle(&mut self, space: usize, gather: Pending<F>, first: u64, count: u64) {
        let patience = self.rng.below(4) == 0;
        let of = &mut self.spaces[space];
        if patience && of.gathers.len() < 2 {
            if !gather.is_empty() {
                of.wait(first, count);
                of.gathers.push(gather);
            }
            return;
        }
        self.commit(space, gather);
    }

    fn commit(&mut self, space: usize, mut gather: Pending<F>) {
        let of = &mut self.spaces[space];
        let flushes = !gather.is_empty();
        gather.commit_to(&self.env.pool);
        if flushes {
            // Where others wait, a commit flushes their pages too.
            of.waiting.clear();
        }
    }

    pub(super) fn commit_all(&mut self, space: usize) {
        while let Some(gather) = self.spaces[space].gathers.pop() {
            self.commit(space, gather);
        }
        self.spaces[space].waiting.clear();
    }

    /// A filled hole is what it says at once, whatever waits.
    pub(super) fn filled(&mut self, space: usize, page: u64, count: u64) {
        for page in page..page + count {
            self.spaces[space].waiting.remove(&page);
        }
    }

    /// The pages that a change of a range may have left stale: whole huge leaves that it cut.
    pub(super) fn touched(&self, page: u64, count: u64) -> (u64, u64) {
        let order = F::LEVELS[1].order();
        let (first, end) = (page, page + count);
        (
            first >> order.get() << order.get(),
            end.next_multiple_of(order.frames()),
        )
    }
}
