//! A read section ends on the CPU on which it began.
use kmem_hal::{EpochGrace, Grace, IrqSafe, SingleCpu};

fn send(grace: &'static EpochGrace<'static, SingleCpu, IrqSafe>) {
    let guard = grace.read();
    std::thread::spawn(move || drop(guard));
}

fn main() {}
