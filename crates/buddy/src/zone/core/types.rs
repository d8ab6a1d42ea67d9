//! What page blocks are for: changing their type, keeping them off all lists for a while.

use kmem_hal::sync::Ordering;

use super::super::bits;
use super::super::kind::{MigrateType, UNMANAGED};
use super::super::segment::Segment;
use super::Core;

impl Core {
    /// Notes that a block has frames that are not the allocator's: frees into it are checked more closely.
    pub fn set_unmanaged(&mut self, block: usize, flag: bool) {
        let byte = self.types[block].load(Ordering::Relaxed) & !UNMANAGED;
        let byte = byte | if flag { UNMANAGED } else { 0 };
        self.types[block].store(byte, Ordering::Relaxed);
    }

    pub fn type_of(&self, block: usize) -> MigrateType {
        MigrateType::from_byte(self.types[block].load(Ordering::Relaxed))
    }

    /// Changes a block's type and moves its runs to the lists of the new one.
    pub fn set_type(&mut self, segment: &Segment, block: usize, to: MigrateType) {
        let from = self.type_of(block);
        if from == to {
            return;
        }
        let free = self.free_in(block);
        let mask = bits::orders(self.summaries[block]) & 0x1ff;
        if self.is_whole(block) {
            self.unlist_whole(segment, block);
        }
        for order in (0..9).filter(|order| mask >> order & 1 != 0) {
            let row = self.row_of(block, order);
            if let Some(set) = from.hint_set() {
                self.hint_clear(set, row, block);
            }
            if let Some(set) = to.hint_set() {
                self.hint_set(set, row, block);
            }
        }
        if from == MigrateType::Cma {
            self.free_cma -= free;
        }
        if to == MigrateType::Cma {
            self.free_cma += free;
        }
        let flag = self.types[block].load(Ordering::Relaxed) & UNMANAGED;
        self.types[block].store(to as u8 | flag, Ordering::Relaxed);
        if self.is_whole(block) {
            self.list_whole(segment, block);
        }
    }

    /// Takes a block off all lists; it remembers its type.
    pub fn isolate_block(&mut self, segment: &Segment, block: usize) {
        let from = self.type_of(block);
        self.set_type(segment, block, MigrateType::Isolate);
        let byte = self.types[block].load(Ordering::Relaxed);
        self.types[block].store(byte | (from as u8) << 3, Ordering::Relaxed);
    }

    /// Puts an isolated block back on the lists of its old type.
    pub fn restore_block(&mut self, segment: &Segment, block: usize) {
        if self.type_of(block) == MigrateType::Isolate {
            let byte = self.types[block].load(Ordering::Relaxed);
            self.set_type(segment, block, MigrateType::from_byte(byte >> 3 & 7));
        }
    }
}
