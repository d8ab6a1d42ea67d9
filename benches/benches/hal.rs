//! Pins, locks and objects from a fixed pool.
#![allow(missing_docs, reason = "criterion's macros make public functions")]

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use kmem_hal::{Cpu, FixedPool, Lock, ObjectAlloc, SingleCpu, Spin};

fn hal(c: &mut Criterion) {
    // SAFETY: one thread.
    let cpu = unsafe { SingleCpu::new() };
    c.bench_function("hal/pin", |b| b.iter(|| black_box(&cpu).pin().id()));
    let lock = Lock::<u64, Spin>::new(0);
    c.bench_function("hal/lock_spin", |b| {
        b.iter(|| *black_box(&lock).lock() += 1)
    });
    static POOL: FixedPool<u64, 256> = FixedPool::new();
    c.bench_function("hal/pool_pair", |b| {
        b.iter(|| {
            let object = black_box(&POOL).alloc().expect("256 objects");
            // SAFETY: just given, freed once.
            unsafe { POOL.free(black_box(object)) };
        });
    });
}

criterion_group!(benches, hal);
criterion_main!(benches);
