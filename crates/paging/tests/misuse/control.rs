//! The right order: this one compiles.
use kmem_hal::{FrameSink, OwnedFrame, Page, PageRange};
use kmem_paging::{Env, PageTable, Rights, Soft, SoftBit, format::{X86_64, X86TwoLevel}};

const THIRD: Soft = SoftBit::<X86TwoLevel, 2>::BIT;

fn right<E: Env>(table: PageTable<X86_64, E, OwnedFrame>, page: Page, frame: OwnedFrame, sink: &impl FrameSink) {
    let mut gather = table.gather::<8>();
    let mut cursor = table.cursor(PageRange::single(page)).unwrap();
    let _ = cursor.map(page, frame, Rights::USER_DATA);
    let _ = cursor.unmap(PageRange::single(page), &mut gather);
    drop(cursor);
    gather.commit(|frame| sink.free(frame));
    drop(gather);
    table.destroy(|_, frame| sink.free(frame), |_, _| {});
}

fn main() {
    println!("{THIRD:?}");
}
