//! Page tables: a page mapped, looked up and unmapped.
#![allow(missing_docs, reason = "criterion's macros make public functions")]

use criterion::{Criterion, criterion_group, criterion_main};
use kmem_benches::platform::{Machine, NoWalks, Region, ThreadCpus, grace};
use kmem_hal::{DeviceFrame, Frame, Order, Page, PageRange};
use kmem_paging::format::X86_64;
use kmem_paging::{PageTable, Parts, Rights};

fn pages(c: &mut Criterion) {
    let machine = Machine::leak(Region::new(1 << 12).touched());
    let (region, table) = (machine.region, machine.table);
    // SAFETY: the machine's only frame table, and no MMU walks.
    let parts = unsafe {
        Parts::new(
            region,
            machine.buddy,
            NoWalks,
            grace(),
            ThreadCpus::all(),
            table,
        )
    };
    let table = PageTable::<X86_64, _, DeviceFrame>::new(parts).expect("memory for a root");
    let first = Page::from_number(1 << 20);
    let range = PageRange::with_count(first, 512).expect("not empty");
    let frame = DeviceFrame::new(Frame::from_number(1 << 24), Order::ZERO).expect("order 0");
    let mut cursor = table.cursor(range).expect("a valid range");
    cursor
        .map(range.last(), frame, Rights::USER_DATA)
        .expect("the place is free");
    let mut gather = table.gather::<8>();
    c.bench_function("paging/map_unmap", |b| {
        b.iter(|| {
            cursor
                .map(first, frame, Rights::USER_DATA)
                .expect("the place is free");
            cursor
                .unmap(PageRange::single(first), &mut gather)
                .expect("the gather has room");
            cursor.release();
            gather.commit(|_| {});
        });
    });
    c.bench_function("paging/query", |b| {
        b.iter(|| table.query(std::hint::black_box(range.last())));
    });
    drop((cursor, gather));
    table.destroy(|_leaf, _frame| {}, |_page, _payload| {});
}

criterion_group!(benches, pages);
criterion_main!(benches);
