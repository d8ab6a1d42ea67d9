//! A pin stays on the thread that made it.
use kmem_hal::{Cpu, Pinned};

fn send<C: Cpu + Sync>(cpu: &C) {
    let pin: Pinned<'_, C> = cpu.pin();
    std::thread::scope(|scope| {
        scope.spawn(move || drop(pin));
    });
}

fn main() {}
