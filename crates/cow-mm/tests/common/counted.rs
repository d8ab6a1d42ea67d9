//! The sizes of mappings out of a recount, to be held against what the space remembers.

use kmem_cow_mm::{Counters, Usage};

pub fn counted(usage: &Usage) -> Counters {
    Counters {
        total: usage.total,
        locked: usage.locked,
        data: usage.data,
        exec: usage.exec,
        stack: usage.stack,
        accounted: usage.accounted,
    }
}
