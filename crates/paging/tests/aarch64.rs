//! AArch64's words and a walk, with numbers from the Arm Architecture Reference Manual (DDI 0487, D8.2 to D8.6) alone.

#![cfg(not(loom))]

#[path = "common/machine.rs"]
mod machine;

use kmem_hal::{Canonical, DeviceFrame, Frame, Order, Page, PageRange, PhysAddr, PhysMap};
use kmem_paging::format::{AARCH64_MAIR, Aarch64, Format, Kind};
use kmem_paging::{Attributes, MemoryType, PageTable, Rights, Soft, SoftBit, TableError};
use machine::Machine;

// D8.3.1, "Descriptor encodings, 4KB granule".
const VALID: u64 = 1 << 0;
const TABLE: u64 = 1 << 1;
const AP_EL0: u64 = 1 << 6;
const AP_RO: u64 = 1 << 7;
const SH_INNER: u64 = 0b11 << 8;
const AF: u64 = 1 << 10;
const NG: u64 = 1 << 11;
const DBM: u64 = 1 << 51;
const PXN: u64 = 1 << 53;
const UXN: u64 = 1 << 54;

fn leaf(level: usize, frame: u64, attributes: Attributes) -> u64 {
    let frame = Frame::from_number(frame);
    assert!(Aarch64::can_encode(level, frame, &attributes));
    let word = Aarch64::leaf(level, frame, &attributes);
    assert_eq!(Aarch64::kind(level, word), Kind::Leaf);
    assert_eq!(Aarch64::leaf_frame(level, word), frame);
    let read = Aarch64::attributes(level, word);
    assert_eq!(Aarch64::leaf(level, frame, &read), word);
    word
}

#[test]
fn descriptors_are_the_manuals() {
    let data = Attributes::new(Rights::USER_DATA);
    let common = SH_INNER | NG;
    assert_eq!(
        leaf(1, 0x1234, data),
        0x123_4000 | common | VALID | TABLE | AP_EL0 | AP_RO | DBM | PXN | UXN,
        "a clean page that may be written is read-only with DBM"
    );
    assert_eq!(
        leaf(1, 0x1234, data.accessed().dirty()),
        0x123_4000 | common | VALID | TABLE | AP_EL0 | AF | DBM | PXN | UXN
    );
    let code = Attributes::new(Rights::USER_CODE).accessed();
    assert_eq!(
        leaf(2, 0x200, code),
        0x20_0000 | common | VALID | AP_EL0 | AP_RO | AF | PXN,
        "a block has bit 1 clear; the kernel does not execute user code"
    );
    let kernel = Attributes::new(Rights::READ | Rights::EXECUTE | Rights::GLOBAL);
    assert_eq!(
        leaf(3, 1 << 18, kernel),
        1 << 30 | SH_INNER | VALID | AP_RO | UXN
    );
    assert_eq!(
        Aarch64::table(4, Frame::from_number(5)),
        0x5000 | VALID | TABLE
    );
    assert_eq!(Aarch64::kind(2, 0x5000 | VALID | TABLE), Kind::Table);
    assert_eq!(Aarch64::kind(1, 0x5000 | VALID | TABLE), Kind::Leaf);
    // Bits 58:55 are the software's, of which this format keeps bit 55.
    let soft = data.soft(SoftBit::<Aarch64, 0>::BIT | SoftBit::<Aarch64, 2>::BIT);
    assert_eq!(leaf(1, 0, soft) ^ leaf(1, 0, data), 1 << 56 | 1 << 58);
    assert!(!Aarch64::can_encode(1, Frame::from_number(1 << 36), &data));
    assert!(!Aarch64::can_encode(1, Frame::ZERO, &data.pkey(1)));
    let hidden = leaf(2, 0x200, Attributes::new(Rights::empty()).dirty());
    assert_eq!(hidden & VALID, 0, "the hardware ignores the rest");
    assert!(Aarch64::attributes(2, hidden).dirty);
}

#[test]
fn attribute_indices_pick_bytes_of_the_mair() {
    // D8.6.2 and the description of MAIR_EL1.
    for (memory_type, byte) in [
        (MemoryType::WriteBack, 0xff),
        (MemoryType::WriteThrough, 0xbb),
        (MemoryType::Uncached, 0x00),
        (MemoryType::WriteCombining, 0x44),
    ] {
        let word = leaf(1, 0, Attributes::new(Rights::READ).memory_type(memory_type));
        assert_eq!(
            AARCH64_MAIR >> (8 * (word >> 2 & 7)) & 0xff,
            byte,
            "{memory_type:?}"
        );
    }
}

#[test]
fn flushes_are_asked_for_where_the_manual_wants_them() {
    let word = |rights: Rights| leaf(1, 7, Attributes::new(rights).accessed().dirty());
    let (read, write) = (word(Rights::READ | Rights::USER), word(Rights::USER_DATA));
    let none = word(Rights::empty());
    assert!(Aarch64::needs_flush(1, write, read));
    assert!(
        Aarch64::needs_flush(1, read, write),
        "a cached fault of permission stays"
    );
    assert!(
        !Aarch64::needs_flush(1, none, write),
        "what faults is not cached"
    );
    assert!(Aarch64::needs_flush(1, write, none));
    let clean = leaf(1, 7, Attributes::new(Rights::USER_DATA).accessed());
    assert!(
        Aarch64::needs_flush(1, write, clean),
        "a CPU that has it dirty would not say so again"
    );
    let old = leaf(1, 7, Attributes::new(Rights::USER_DATA).dirty());
    assert!(!Aarch64::needs_flush(1, write, old), "ageing");
    assert!(!Aarch64::is_settled(clean) && Aarch64::is_settled(write) && Aarch64::is_settled(none));
    assert!(!Aarch64::is_settled(old), "AF is still to be set");
}

/// What the hardware finds: the address, and whether (EL0 read, EL0 write, EL0 execute, EL1 write, EL1 execute) are allowed.
type Found = (u64, [bool; 5]);

/// D8.2.9 and D8.4: a walk of `levels` levels from TTBR0 or TTBR1, each half with 2^47 (2^38) bytes, one root for both.
fn walk(map: &machine::Arena, root: u64, levels: u32, address: u64) -> Option<Found> {
    let half_bits = 12 + 9 * levels - 1;
    let upper = address >> 63 != 0;
    let rest = address >> half_bits;
    if rest != if upper { u64::MAX >> half_bits } else { 0 } {
        return None;
    }
    // TTBR1_EL1 is the root plus half a table; the first index has eight bits.
    let mut table = root + if upper { 2048 } else { 0 };
    for lookup in 4 - levels..4 {
        let low = 12 + 9 * (3 - lookup);
        let bits = if lookup == 4 - levels { 8 } else { 9 };
        let index = address >> low & ((1 << bits) - 1);
        let entry = map.to_ptr(PhysAddr::new(table + 8 * index)).cast::<u64>();
        // SAFETY: a table of the arena; one thread.
        let descriptor = unsafe { entry.read() };
        if descriptor & VALID == 0 {
            return None;
        }
        let output = descriptor & 0x0000_ffff_ffff_f000;
        let last = lookup == 3;
        if !last && descriptor & TABLE != 0 {
            assert_eq!(descriptor >> 59, 0, "no hierarchical restrictions");
            table = output;
            continue;
        }
        // A block at lookup level 0, and a last-level descriptor with bit 1 clear, are reserved.
        assert!(
            lookup > 0 && (last || descriptor & TABLE == 0) && (!last || descriptor & TABLE != 0)
        );
        let offset = (1u64 << low) - 1;
        assert_eq!(output & offset & !0xfff, 0, "a block's address is aligned");
        let el0 = descriptor & AP_EL0 != 0;
        // With hardware management of the dirty state RO of a leaf with DBM does not refuse a write (D8.5.2).
        let write = descriptor & AP_RO == 0 || descriptor & DBM != 0;
        return Some((
            output & !offset | address & offset,
            [
                el0,
                el0 && write,
                el0 && descriptor & UXN == 0,
                write,
                // What EL0 may write EL1 never executes (D8.4.3).
                descriptor & PXN == 0 && !(el0 && write),
            ],
        ));
    }
    unreachable!("the last lookup returns")
}

fn a_walk_finds_what_was_mapped(levels: usize) {
    let machine = Machine::new(128);
    let table = PageTable::<Aarch64, _, DeviceFrame>::with_levels(machine.env(), levels).unwrap();
    let root = table.root().frame.start().as_u64();
    let lower_end = Aarch64::canonical(levels).lower_end().as_u64() >> 12;
    let upper = Aarch64::canonical(levels).upper_start().unwrap().as_u64() >> 12;
    let top = (1u64 << 52) - 1;
    let user = [true, true, false, true, false];
    let cases = [
        (5, 77, Order::ZERO, Rights::USER_DATA, user),
        (
            0x400,
            0x600,
            Order::HUGE_2M,
            Rights::USER_CODE,
            [true, false, true, false, false],
        ),
        (1 << 18, 3 << 18, Order::HUGE_1G, Rights::USER_DATA, user),
        (
            lower_end,
            99,
            Order::ZERO,
            Rights::READ | Rights::USER,
            [true, false, false, false, false],
        ),
        (
            upper,
            100,
            Order::ZERO,
            Rights::KERNEL_DATA,
            [false, false, false, true, false],
        ),
        (
            top - 511,
            0x800,
            Order::HUGE_2M,
            Rights::READ | Rights::EXECUTE,
            [false, false, false, false, true],
        ),
    ];
    for (page, frame, order, rights, allowed) in cases {
        let block = DeviceFrame::new(Frame::from_number(frame), order).unwrap();
        let page = Page::new(page).unwrap();
        let range = PageRange::with_count(page, order.frames()).unwrap();
        table
            .cursor(range)
            .unwrap()
            .map(page, block, rights)
            .unwrap();
        for offset in [0, order.frames() - 1] {
            let address = (page.number() + offset) << 12 | 0x345;
            let expected = ((frame + offset) << 12 | 0x345, allowed);
            assert_eq!(
                walk(machine.map, root, levels as u32, address),
                Some(expected),
                "{rights:?}"
            );
        }
    }
    assert_eq!(walk(machine.map, root, levels as u32, 6 << 12), None);
    assert_eq!(
        walk(machine.map, root, levels as u32, (lower_end + 1) << 12),
        None,
        "the hole"
    );
    assert_eq!(Aarch64::canonical(levels).bits() as usize, 12 + 9 * levels);
    table.destroy(|_, _| {}, |_, _| {});
}

#[test]
fn four_levels_by_the_manual() {
    a_walk_finds_what_was_mapped(4);
}

#[test]
fn three_levels_by_the_manual() {
    a_walk_finds_what_was_mapped(3);
}

#[test]
fn the_number_of_levels_is_checked() {
    let machine = Machine::new(8);
    for levels in [0, 1, 2, 5, 6] {
        let table = PageTable::<Aarch64, _, DeviceFrame>::with_levels(machine.env(), levels);
        assert!(matches!(table, Err(TableError::BadLevels)), "{levels}");
    }
    assert_eq!(machine.frames().out(), 0);
    assert_eq!(Canonical::AARCH64_48, Aarch64::canonical(4));
    assert_eq!(
        SoftBit::<Aarch64, 2>::BIT.without(SoftBit::<Aarch64, 2>::BIT),
        Soft::NONE
    );
}

/// A CPU that does not set the dirty state itself faults at the first write; a cached entry without the right is used until it is dropped.
#[test]
fn the_first_write_makes_a_page_writable_on_every_cpu() {
    let machine = Machine::new(64);
    let table = PageTable::<Aarch64, _, DeviceFrame>::new(machine.env()).unwrap();
    let _ = table.root();
    let page = Page::new(0x400).unwrap();
    let clean = Attributes::new(Rights::USER_DATA).accessed();
    let frame = DeviceFrame::new(Frame::from_number(0x8000), Order::ZERO).unwrap();
    let mut cursor = table.cursor(PageRange::single(page)).unwrap();
    cursor.map(page, frame, clean).unwrap();
    drop(cursor);
    let flushes = || machine.flushes.0.lock().unwrap().len();
    let before = flushes();
    let mut entry = table.lock_entry(page).unwrap();
    assert!(entry.relax(clean.rights, true));
    assert_eq!(entry.get().leaf().unwrap().attributes, clean.dirty());
    assert_eq!(flushes(), before + 1);
    // The accessed bit is never missing in what is cached.
    assert!(entry.relax(clean.rights, true));
    assert_eq!(flushes(), before + 1);
}
