//! kmalloc: a pair of 64 bytes, and 1000 objects allocated and then freed.
#![allow(missing_docs, reason = "criterion's macros make public functions")]

use std::alloc::Layout;

use criterion::{Criterion, criterion_group, criterion_main};
use kmem_benches::platform::{Machine, Region};

fn objects(c: &mut Criterion) {
    let machine = Machine::leak(Region::new(1 << 14).touched());
    let slab = &machine.slab;
    let layout = Layout::new::<[u64; 8]>();
    c.bench_function("slab/pair64", |b| {
        b.iter(|| {
            let memory = std::hint::black_box(slab.alloc(layout));
            assert!(!memory.is_null());
            // SAFETY: just allocated with this layout.
            unsafe { slab.dealloc(memory, layout) };
        });
    });
    let mut objects = Vec::with_capacity(1000);
    c.bench_function("slab/batch_of_1000", |b| {
        b.iter(|| {
            objects.extend((0..1000).map(|_| slab.alloc(layout)));
            for memory in objects.drain(..) {
                assert!(!memory.is_null());
                // SAFETY: allocated above with this layout.
                unsafe { slab.dealloc(memory, layout) };
            }
        });
    });
}

criterion_group!(benches, objects);
criterion_main!(benches);
