// What the examples of the documentation begin with: tables of device frames on a small machine.
pub mod machine {
    include!(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/common/machine.rs"
    ));
}

use kmem_hal::{DeviceFrame, Frame, Order, Page, PageRange};
use kmem_paging::{PageTable, Rights, format::X86_64};

pub type Table = PageTable<X86_64, &'static machine::TestEnv, DeviceFrame>;

pub fn page(number: u64) -> Page {
    Page::new(number).unwrap()
}

pub fn pages(first: u64, count: u64) -> PageRange {
    PageRange::with_count(page(first), count).unwrap()
}

/// A frame of a device.
pub fn frame(number: u64) -> DeviceFrame {
    DeviceFrame::new(Frame::new(number).unwrap(), Order::ZERO).unwrap()
}

/// Frames of a device in a row.
pub fn block(first: u64, order: Order) -> DeviceFrame {
    DeviceFrame::new(Frame::new(first).unwrap(), order).unwrap()
}

pub fn table() -> Table {
    Table::new(machine::Machine::new(600).env()).unwrap()
}

/// A table that maps these pages for a program, page 0 to frame 0x10_0000 and so on.
pub fn mapped(range: PageRange) -> Table {
    let table = table();
    let mut cursor = table.cursor(range).unwrap();
    for page in range.iter() {
        let frame = frame(0x10_0000 + page.number());
        cursor.map(page, frame, Rights::USER_DATA).unwrap();
    }
    drop(cursor);
    table
}
