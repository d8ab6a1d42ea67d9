//! What page blocks are for: changing their type, keeping them off all lists for a while.

use kmem_hal::sync::Ordering;

use super::super::bits;
use super::super::kind::{MigrateType, UNMANAGED};
use super::super::segment::{self, Segment};
use super::Core;

impl Core {
    /// Notes that a block has frames that are not the allocator's: frees into it are checked more closely.
    pub fn set_unmanaged(&mut self, block: usize, flag: bool) {
        let byte = self.types[block].load(Ordering::Relaxed) & !UNMANAGED;
        let byte = byte | if flag { UNMANAGED } else { 0 };
        self.types[block].store(byte, Ordering::Relaxed);
    }

    /// Whether a block has frames that are not the allocator's.
    pub fn is_unmanaged(&self, block: usize) -> bool {
        self.types[block].load(Ordering::Relaxed) & UNMANAGED != 0
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
        let mask = bits::orders(self.summaries_of(block)) & 0x1ff;
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
        self.high_atomic -= u64::from(from == MigrateType::HighAtomic);
        self.high_atomic += u64::from(to == MigrateType::HighAtomic);
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

    /// Keeps the page block of frame `first` for high-order requests that cannot wait, unless `most` are kept already.
    ///
    /// Source: Linux mm/page_alloc.c, `reserve_highatomic_pageblock`.
    pub fn reserve_high_atomic(&mut self, first: u64, most: u64) {
        let Some(segment) = segment::find(self.segments, first) else {
            return;
        };
        let block = segment.block_of(first);
        let plain = matches!(
            self.type_of(block),
            MigrateType::Unmovable | MigrateType::Movable | MigrateType::Reclaimable
        );
        if plain && self.high_atomic < most {
            self.set_type(segment, block, MigrateType::HighAtomic);
        }
    }

    /// Lets everybody have the blocks that were kept; whether there were any.
    ///
    /// Source: Linux mm/page_alloc.c, `unreserve_highatomic_pageblock`, which lets go one at a time.
    pub fn release_high_atomic(&mut self, to: MigrateType) -> bool {
        let any = self.high_atomic > 0;
        for segment in self.segments {
            for block in segment.block as usize..segment.block_end() {
                if self.high_atomic == 0 {
                    break;
                }
                if self.type_of(block) == MigrateType::HighAtomic {
                    self.set_type(segment, block, to);
                }
            }
        }
        any
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
