//! Blocks that are mapped as many leaves, and addresses that are translated: the same as leaf by leaf, in every format.

#![cfg(not(loom))]

#[path = "common/machine.rs"]
mod machine;

use kmem_hal::{DeviceFrame, Frame, FrameRange, Order, Page, PageRange, PhysAddr, VirtAddr};
use kmem_paging::format::{
    Aarch64, Format, RiscvSv39, RiscvSv57, X86_64, X86_64La57, X86Pae, X86Pse36, X86TwoLevel,
};
use kmem_paging::{Attributes, Entry, MapError, MemoryType, PageTable, Rights, TableCache};
use machine::{Machine, TestEnv};

type Table<F> = PageTable<F, &'static TestEnv, DeviceFrame>;

fn page(number: u64) -> Page {
    Page::new(number).unwrap()
}

fn order(order: u8) -> Order {
    Order::new(order).unwrap()
}

fn block(first: u64, size: u8) -> DeviceFrame {
    DeviceFrame::new(Frame::from_number(first), order(size)).unwrap()
}

fn finish<F: Format>(machine: &Machine, table: Table<F>) {
    table.destroy(|_, _| {}, |_, _| {});
    TableCache::shrink(machine.env(), usize::MAX);
    assert_eq!(machine.frames.out(), 0, "frames leaked");
}

/// Every page of the range translates to where its entry says, by the page and by the address.
fn translates<F: Format>(table: &Table<F>, range: PageRange) {
    for page in range.iter() {
        let address = VirtAddr::new(page.start().as_u64() + 0x123);
        let expected = table.query(page).leaf().and_then(|leaf| {
            let seen = leaf.attributes.rights.grants_access();
            let frame = leaf.frame_of(page)?;
            seen.then(|| PhysAddr::new(frame.start().as_u64() + 0x123))
        });
        assert_eq!(table.translate(address), expected, "{page:?}");
    }
}

/// Maps a block by one call and leaf by leaf, and compares.
fn same_as_leaves<F: Format>(
    first: u64,
    frame: u64,
    size: u8,
    largest: Order,
    attributes: Attributes,
) {
    let machine = Machine::new(256);
    let [divided, single] = [0; 2].map(|_| Table::<F>::new(machine.env()).unwrap());
    let range = PageRange::with_count(page(first), 1 << size).unwrap();
    let mut cursor = divided.cursor(range).unwrap();
    cursor
        .map_divided(page(first), block(frame, size), largest, attributes)
        .unwrap();
    drop(cursor);
    let leaf = divided.query(page(first)).leaf().unwrap();
    let aligned = (first | frame).trailing_zeros().min(u32::from(size));
    let expected = F::LEVELS
        .iter()
        .filter(|level| level.leaf && level.shift <= aligned.min(u32::from(largest.get())))
        .map(|level| level.order())
        .next_back();
    assert_eq!(Some(leaf.order), expected, "{first:#x} {frame:#x} {size}");
    let mut cursor = single.cursor(range).unwrap();
    for at in (0..1 << size).step_by(leaf.order.frames() as usize) {
        let handle = block(frame + at, leaf.order.get());
        cursor.map(page(first + at), handle, attributes).unwrap();
    }
    drop(cursor);
    for page in range.iter() {
        assert_eq!(divided.query(page), single.query(page), "{page:?}");
    }
    assert_eq!(divided.table_count(), single.table_count());
    translates(&divided, range);
    divided.destroy(|_, _| {}, |_, _| {});
    finish(&machine, single);
}

fn in_all_sizes<F: Format>() {
    let used = Attributes::new(Rights::USER_DATA).accessed().dirty();
    let device = Attributes::new(Rights::KERNEL_DATA).memory_type(MemoryType::Uncached);
    let nobody = Attributes::new(Rights::empty());
    for attributes in [used, device, nobody] {
        // Forced small ones, across tables, from the middle of one.
        same_as_leaves::<F>(0x40000, 0x2000, 11, Order::ZERO, attributes);
        same_as_leaves::<F>(0x40123, 0x2000, 11, Order::ZERO, attributes);
        // As large as alignment allows.
        same_as_leaves::<F>(0x40000, 0x2000, 11, Order::MAX, attributes);
        same_as_leaves::<F>(0x40200, 0x2000, 11, Order::MAX, attributes);
        same_as_leaves::<F>(0x40001, 0x2000, 11, Order::MAX, attributes);
        same_as_leaves::<F>(0x40000, 0x2000, 0, Order::MAX, attributes);
    }
}

#[test]
fn a_block_is_what_its_leaves_are() {
    in_all_sizes::<X86_64>();
    in_all_sizes::<X86_64La57>();
    in_all_sizes::<X86Pae>();
    in_all_sizes::<X86TwoLevel>();
    in_all_sizes::<X86Pse36>();
    in_all_sizes::<RiscvSv39>();
    in_all_sizes::<RiscvSv57>();
    in_all_sizes::<Aarch64>();
}

#[test]
fn frames_whose_number_is_in_two_pieces_of_the_word() {
    // PSE-36 has bits 32 to 35 of the address below the others: the words of a block across 4 GiB are no arithmetic progression.
    same_as_leaves::<X86Pse36>(
        0x40000,
        0x80000,
        19,
        Order::MAX,
        Attributes::new(Rights::USER_DATA),
    );
    same_as_leaves::<X86Pse36>(
        0x0,
        0x100000,
        20,
        Order::MAX,
        Attributes::new(Rights::USER_DATA),
    );
}

#[test]
fn an_occupied_page_ends_it_and_nothing_is_left() {
    let machine = Machine::new(64);
    let table = Table::<X86_64>::new(machine.env()).unwrap();
    let _ = table.root();
    let all = PageRange::with_count(page(0), 1 << 12).unwrap();
    let mut cursor = table.cursor(all).unwrap();
    cursor
        .map(page(1500), block(7, 0), Rights::KERNEL_DATA)
        .unwrap();
    let tables = table.table_count();
    let failed = cursor.map_divided(page(100), block(0x800, 11), Order::ZERO, Rights::USER_DATA);
    assert_eq!(failed, Err((MapError::Occupied, block(0x800, 11))));
    drop(cursor);
    assert_eq!(table.table_count(), tables, "tables are left");
    for page in all.iter() {
        let found = table.query(page) != Entry::Empty;
        assert_eq!(found, page.number() == 1500, "{page:?}");
    }
    let flushes = machine.flushes.0.lock().unwrap().len();
    assert!(flushes > 0, "what was mapped for a moment is flushed");
    finish(&machine, table);
}

#[test]
fn bad_arguments_and_want_of_memory_change_nothing() {
    let machine = Machine::new(64);
    let table = Table::<X86_64>::new(machine.env()).unwrap();
    let range = PageRange::with_count(page(0x1000), 1 << 11).unwrap();
    let mut cursor = table.cursor(range).unwrap();
    let handle = block(0x800, 11);
    let outside = cursor.map_divided(page(0x1001), handle, Order::ZERO, Rights::USER_DATA);
    assert_eq!(outside, Err((MapError::OutOfRange, handle)));
    let key = Attributes::new(Rights::USER_DATA).pkey(16);
    let unsayable = cursor.map_divided(page(0x1000), handle, Order::ZERO, key);
    assert_eq!(unsayable, Err((MapError::Unencodable, handle)));
    let far = block(X86_64::FRAME_LIMIT - 0x400, 10);
    let far_pages = cursor.map_divided(page(0x1000), far, Order::ZERO, Rights::USER_DATA);
    assert_eq!(far_pages, Ok(()), "the last frames there are");
    let mut gather = table.gather::<1>();
    while let Err(kmem_paging::ChangeError::Full { .. }) = cursor.unmap(range, &mut gather) {
        cursor.release();
        gather.commit(drop);
    }
    drop((cursor, gather));
    let empty = table.table_count();
    TableCache::shrink(machine.env(), usize::MAX);
    for fuse in 0.. {
        machine.frames.set_fuse(Some(fuse));
        let mut cursor = table.cursor(range).unwrap();
        let result = cursor.map_divided(page(0x1000), handle, Order::ZERO, Rights::USER_DATA);
        drop(cursor);
        machine.frames.set_fuse(None);
        match result {
            Ok(()) => {
                assert!(fuse >= 5, "four leaf tables and two above them");
                break;
            }
            Err((error, returned)) => {
                assert!(matches!(error, MapError::Memory(_)));
                assert_eq!(returned, handle);
                assert_eq!(table.table_count(), empty);
                assert!(range.iter().all(|page| table.query(page) == Entry::Empty));
            }
        }
        TableCache::shrink(machine.env(), usize::MAX);
    }
    finish(&machine, table);
}

#[test]
fn what_cannot_be_accessed_is_not_translated() {
    let machine = Machine::new(64);
    let table = Table::<X86_64>::new(machine.env()).unwrap();
    let range = PageRange::with_count(page(0), 1 << 18).unwrap();
    let mut cursor = table.cursor(range).unwrap();
    let gib = Order::new(18).unwrap();
    cursor
        .map_divided(page(0), block(1 << 18, 18), gib, Rights::KERNEL_DATA)
        .unwrap();
    drop(cursor);
    let address = VirtAddr::new(0x1234_5678);
    let expected = PhysAddr::new(0x4000_0000 + 0x1234_5678);
    assert_eq!(table.translate(address), Some(expected), "a leaf of 1 GiB");
    assert_eq!(table.translate(VirtAddr::new(1 << 30)), None, "a hole");
    let beside = PageRange::single(page(1 << 18));
    let mut cursor = table.cursor(beside).unwrap();
    cursor
        .map(beside.first(), block(7, 0), Rights::empty())
        .unwrap();
    drop(cursor);
    assert!(table.query(beside.first()).leaf().is_some());
    assert_eq!(
        table.translate(VirtAddr::new(1 << 30)),
        None,
        "mapped, and for nobody to touch"
    );
    assert_eq!(
        table.translate(VirtAddr::new(1 << 50)),
        None,
        "no address of the format"
    );
    finish(&machine, table);
}

/// Maps frames that are no block; gives the orders of the leaves in a row, and how many of each, and the tables.
fn runs<F: Format>(first: u64, frame: u64, count: u64, largest: Order) -> (Vec<(u8, u64)>, usize) {
    let machine = Machine::new(64);
    let table = Table::<F>::new(machine.env()).unwrap();
    let range = PageRange::with_count(page(first), count).unwrap();
    let frames = FrameRange::from_numbers(frame, frame + count).unwrap();
    let mut cursor = table.cursor(range).unwrap();
    cursor
        .map_frames(page(first), frames, largest, Rights::KERNEL_DATA, |frame| {
            frame
        })
        .unwrap();
    drop(cursor);
    let mut found: Vec<(u8, u64)> = Vec::new();
    let mut at = first;
    while at < first + count {
        let leaf = table.query(page(at)).leaf().unwrap();
        assert_eq!(
            (leaf.page.number(), leaf.frame.number()),
            (at, frame + (at - first))
        );
        match found.last_mut() {
            Some((order, count)) if *order == leaf.order.get() => *count += 1,
            _ => found.push((leaf.order.get(), 1)),
        }
        at += leaf.order.frames();
    }
    assert_eq!(at, first + count);
    let tables = table.table_count();
    finish(&machine, table);
    (found, tables)
}

#[test]
fn frames_that_are_no_block_take_leaves_of_every_size() {
    let (giga, mega) = (1 << 18, 1 << 9);
    let first = giga - mega - 3;
    // Up: three pages, 2 MiB; a gigabyte; down: 2 MiB, five pages. A root, a level-3 table, two of level 2, two of level 1.
    let mixed = vec![(0, 3), (9, 1), (18, 1), (9, 1), (0, 5)];
    let count = 3 + mega + giga + mega + 5;
    assert_eq!(
        runs::<X86_64>(first, first, count, Order::MAX),
        (mixed.clone(), 6)
    );
    // The same where pages and frames are a gigabyte apart.
    assert_eq!(
        runs::<X86_64>(first, first + 4 * giga, count, Order::MAX).0,
        mixed
    );
    // 2 MiB apart, a gigabyte is never aligned; one page apart, nothing is.
    let flat = runs::<X86_64>(first, first + mega, count, Order::MAX).0;
    assert_eq!(flat, [(0, 3), (9, 514), (0, 5)]);
    let small = runs::<X86_64>(first, first + 1, 3 + mega + 5, Order::MAX).0;
    assert_eq!(small, [(0, 3 + mega + 5)]);
    // What the caller allows, and what the format has.
    let flat = runs::<X86_64>(first, first, count, Order::HUGE_2M).0;
    assert_eq!(flat, [(0, 3), (9, 514), (0, 5)]);
    assert_eq!(runs::<X86_64>(first, first, 12, Order::ZERO).0, [(0, 12)]);
    let two_level = runs::<X86TwoLevel>(0x3fe, 0x7fe, 2 + 0x400 + 1, Order::MAX).0;
    assert_eq!(two_level, [(0, 2), (10, 1), (0, 1)]);
    let pae = runs::<X86Pae>(0x1fe, 0x3fe, 2 + 0x400 + 1, Order::MAX).0;
    assert_eq!(pae, [(0, 2), (9, 2), (0, 1)]);
    // A range that ends where a larger leaf would, and one of a single page.
    assert_eq!(
        runs::<X86_64>(mega, mega, mega, Order::MAX),
        (vec![(9, 1)], 3)
    );
    assert_eq!(runs::<X86_64>(mega, mega, 1, Order::MAX).0, [(0, 1)]);
}

#[test]
fn frames_that_do_not_fit_say_how_far_they_came() {
    let machine = Machine::new(64);
    let table = Table::<X86_64>::new(machine.env()).unwrap();
    let range = PageRange::with_count(page(0x1ff), 0x202).unwrap();
    let frames = FrameRange::from_numbers(0x11ff, 0x11ff + 0x202).unwrap();
    let mut cursor = table.cursor(range).unwrap();
    let mut map = |first, frames| {
        let rights = Rights::KERNEL_DATA;
        cursor.map_frames(page(first), frames, Order::MAX, rights, |frame| frame)
    };
    let refused = map(0x200, frames).unwrap_err();
    assert_eq!(
        (refused.error, refused.at),
        (MapError::OutOfRange, page(0x200))
    );
    map(0x400, FrameRange::from_numbers(0x1400, 0x1401).unwrap()).unwrap();
    let refused = map(0x1ff, frames).unwrap_err();
    assert_eq!(
        (refused.error, refused.at),
        (MapError::Occupied, page(0x400))
    );
    assert!(refused.handle.is_some());
    assert_eq!(
        table.query(page(0x200)).leaf().unwrap().order,
        Order::HUGE_2M
    );
    drop(cursor);
    finish(&machine, table);
}
