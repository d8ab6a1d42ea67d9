//! A guard does not make a value shared that may not be.
use std::cell::Cell;

use kmem_hal::{Lock, Spin};

fn share(lock: &Lock<Cell<u32>, Spin>) {
    let guard = lock.lock();
    std::thread::scope(|scope| {
        scope.spawn(|| guard.set(1));
    });
}

fn main() {}
