//! Taking a whole table down.
//!
//! One flush, then entry by entry from the leaves up. A table that other spaces share is left to them; one that they have left to this space
//! alone comes down with it, after a grace period, since their readers may be in it still.

use kmem_hal::sync::Ordering;
use kmem_hal::{Frame, FrameHandle, Grace, Order, OwnedFrame, Page};

use super::{Entry, MAX_LEVELS, PageTable, decode};
use crate::attributes::{Leaf, Payload};
use crate::cache;
use crate::env::Env;
use crate::format::{Format, Word, level};
use crate::mutants::mutant;
use crate::node::{self, Node, Slots};

impl<F: Format, E: Env, H: FrameHandle> PageTable<F, E, H> {
    /// Takes everything down: every handle goes to `leaves`, every payload to `payloads`, every table back.
    ///
    /// Whoever loaded the root promised that the tables stay while it is loaded
    /// ([`Mmu::load_root`](kmem_hal::Mmu::load_root)); so it is loaded nowhere.
    ///
    /// A table that was lent from is leaked instead: other tables point into it.
    ///
    /// Context: outside of read sections of the environment's `Grace`; waits for a grace period where tables were shared.
    #[doc(alias = "exit_mmap")]
    #[doc(alias = "free_pgtables")]
    pub fn destroy(self, mut leaves: impl FnMut(Leaf, H), mut payloads: impl FnMut(Page, Payload)) {
        if self.is_lent() {
            return;
        }
        while let Some(spare) = self.take_spare() {
            cache::give(&self.env, spare);
        }
        // Nobody loads the root any more, so what is dropped now does not come back.
        if self.exposed.load(Ordering::Relaxed) && !mutant!("destroy-does-not-flush") {
            self.flush(None, true, 0);
        }
        let mut node = self.root_node();
        let mut slots = Slots::new(&self.env);
        let mut indices = [0usize; MAX_LEVELS + 1];
        let mut parents = [Frame::ZERO; MAX_LEVELS + 2];
        let mut first = 0u64;
        loop {
            let number = node.level;
            let entries = if number == self.levels && !mutant!("destroy-takes-what-is-borrowed") {
                level::<F>(number).entries().min(self.borrowed_from)
            } else {
                level::<F>(number).entries() - usize::from(mutant!("destroy-forgets-an-entry"))
            };
            let shift = level::<F>(number).shift;
            let mut below = None;
            if indices[number] == 0 && number > 1 {
                // Who gave its share of these tables up may have readers that are in them still.
                if drop_shares(&node, entries, &mut slots) {
                    self.env.grace().synchronize();
                }
            }
            // Entries are cleared and counted down, so that the rest of an empty table is not looked at.
            while indices[number] < entries && node.live() > 0 {
                let index = indices[number];
                indices[number] += 1;
                let word = node.load(index);
                if word == 0 {
                    continue;
                }
                node.store(index, 0);
                node.sub_live(1);
                let page = Page::containing(
                    F::canonical(self.levels)
                        .sign_extend(Page::from_number(first | (index as u64) << shift).start()),
                );
                match decode::<F>(page, number, word) {
                    Entry::Leaf(leaf) => {
                        // SAFETY: the entry is gone, and every translation was flushed above, after the root was
                        // loaded for the last time.
                        let handle = unsafe { H::from_entry(leaf.frame, leaf.order) };
                        leaves(leaf, handle);
                    }
                    Entry::Payload(payload) => payloads(page, payload),
                    Entry::Empty => {
                        below = Some((F::table_frame(word), index));
                        break;
                    }
                }
            }
            match below {
                Some((frame, index)) => {
                    parents[number] = node.frame;
                    first |= (index as u64) << shift;
                    indices[number - 1] = 0;
                    // SAFETY: an entry of an attached table pointed to it, and this is the only user left.
                    node = unsafe { Node::new(&self.env, frame, number - 1) };
                }
                None => {
                    for index in entries..level::<F>(number).entries() {
                        if number == self.levels {
                            node.store(index, 0);
                        }
                    }
                    self.discount_table(node.frame, number);
                    if number == self.levels {
                        self.drop_user_root();
                    }
                    // SAFETY: O1: nothing points to the table any more, no reader has a reference to `self`, and those of spaces that
                    // shared the table were waited for; O3: as above. It holds zeros.
                    cache::give(&self.env, unsafe {
                        OwnedFrame::from_raw(node.frame, Order::ZERO)
                    });
                    if number == self.levels {
                        return;
                    }
                    let shift = level::<F>(number + 1).shift;
                    first &= !((1u64 << (shift + level::<F>(number + 1).bits)) - 1);
                    // SAFETY: the parent is given back only after this child.
                    node = unsafe { Node::new(&self.env, parents[number + 1], number + 1) };
                }
            }
        }
    }
}

/// Gives up the shares of tables to which the first `count` entries of a table point, and clears those that point to other spaces' tables
/// now. Whether one that other spaces had shared is left to this one alone.
fn drop_shares<F: Format>(node: &Node<'_, F>, count: usize, slots: &mut Slots<'_>) -> bool {
    let mut left = node.live();
    let mut dropped = 0;
    let mut inherited = false;
    for entry in node.entries(0, count) {
        let word = F::Word::load(entry);
        if word == 0 {
            continue;
        }
        if F::is_table(node.level, word) && F::is_shared_table(node.level, word) {
            if node::drop_share(slots.of(F::table_frame(word))) {
                F::Word::store(entry, 0);
                dropped += 1;
            } else {
                inherited = true;
            }
        }
        left = left.saturating_sub(1);
        if left == 0 {
            break;
        }
    }
    node.sub_live(dropped);
    inherited
}
