//! Address spaces: an anonymous page mapped, faulted in and unmapped; a fork of a small space.
#![allow(missing_docs, reason = "criterion's macros make public functions")]

use criterion::{Criterion, criterion_group, criterion_main};
use kmem_benches::area::fork::Process;
use kmem_benches::platform::Region;

fn spaces(c: &mut Criterion) {
    let mm = kmem_benches::area::fork::mm(Region::new(1 << 14).touched());
    c.bench_function("cow_mm/map_64_pages_touch_unmap", |b| {
        b.iter(|| Process::touched(mm, 64));
    });
    let process = Process::touched(mm, 64);
    c.bench_function("cow_mm/fork_64_pages_exit", |b| b.iter(|| process.fork()));
}

criterion_group!(benches, spaces);
criterion_main!(benches);
