//! Nobody else says what a cursor may assume of the processors.
//~ error[E0277]
//~ quiescent::sealed::Sealed` is not satisfied
//~ `Liveness` is a "sealed trait"
use kmem_paging::Liveness;

struct Asleep;

impl Liveness for Asleep {
    const QUIESCENT: bool = true;
}

fn main() {}
