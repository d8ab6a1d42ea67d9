//! Frames: a pair of order 0 and of order 9, and a batch.
#![allow(missing_docs, reason = "criterion's macros make public functions")]

use criterion::{Criterion, criterion_group, criterion_main};
use kmem_benches::mixed::Frames;
use kmem_benches::platform::{Region, buddy};

fn frames(c: &mut Criterion) {
    let frames = buddy(Region::leak(1 << 18));
    for order in [0, 9] {
        c.bench_function(&format!("buddy/pair_o{order}"), |b| {
            b.iter(|| {
                let frame = Frames::alloc(frames, order).expect("memory is free");
                Frames::free(frames, frame, order);
            });
        });
    }
    let mut batch = Vec::with_capacity(64);
    c.bench_function("buddy/batch_of_64", |b| {
        b.iter(|| {
            Frames::alloc_batch(frames, &mut batch, 64);
            Frames::free_batch(frames, &mut batch);
        });
    });
}

criterion_group!(benches, frames);
criterion_main!(benches);
