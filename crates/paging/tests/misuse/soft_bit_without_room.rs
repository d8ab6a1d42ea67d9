//! Two-level tables have three software bits.
//~ error[E0080]
//~ this page-table format has no room for that software bit
use kmem_paging::{Soft, SoftBit, format::X86TwoLevel};

const FOURTH: Soft = SoftBit::<X86TwoLevel, 3>::BIT;

fn main() {
    println!("{FOURTH:?}");
}
