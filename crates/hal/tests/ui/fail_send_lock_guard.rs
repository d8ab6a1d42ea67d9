//! A lock is let go on the CPU that took it: its state is that CPU's interrupt flag.
use kmem_hal::{IrqSafe, Lock};

fn send(lock: &'static Lock<u32, IrqSafe>) {
    let guard = lock.lock();
    std::thread::spawn(move || drop(guard));
}

fn main() {}
