//! Areas live as long as the grace periods that use them.
use kmem_hal::{CachePadded, EpochArea, EpochGrace, SingleCpu, Spin};

fn init(grace: &EpochGrace<'static, SingleCpu, Spin>) {
    let areas = [CachePadded::new(EpochArea::new())];
    grace.init(&areas);
}

fn main() {}
