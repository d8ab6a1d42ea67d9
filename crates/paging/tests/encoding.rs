//! Words of the formats, bit by bit, with numbers from the manual (Intel SDM volume 3A, tables 4-3 to 4-20).

#![cfg(not(loom))]

#[path = "common/machine.rs"]
mod machine;

use kmem_hal::{Frame, Order};
use kmem_paging::format::{
    Aarch64, Format, Kind, ProtectionKey, RiscvSv39, RiscvSv48, RiscvSv57, X86_64, X86_64La57,
    X86_PAT, X86Pae, X86Pse36, X86TwoLevel,
};
use kmem_paging::{Attributes, MemoryType, Payload, Rights, SoftBit};

const P: u64 = 1;
const W: u64 = 1 << 1;
const U: u64 = 1 << 2;
const PWT: u64 = 1 << 3;
const PCD: u64 = 1 << 4;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const G: u64 = 1 << 8;
const XD: u64 = 1 << 63;

fn leaf<F: Format>(level: usize, frame: u64, attributes: Attributes) -> u64 {
    let frame = Frame::from_number(frame);
    assert!(F::can_encode(level, frame, &attributes));
    let word = F::leaf(level, frame, &attributes);
    assert_eq!(F::kind(level, word), Kind::Leaf);
    assert_eq!(F::leaf_frame(level, word), frame);
    let read = F::attributes(level, word);
    assert_eq!(F::leaf(level, frame, &read), word);
    word
}

#[test]
fn leaves_of_long_mode() {
    let data = Attributes::new(Rights::USER_DATA);
    assert_eq!(leaf::<X86_64>(1, 0x1234, data), 0x123_4000 | P | W | U | XD);
    assert_eq!(
        leaf::<X86_64La57>(1, 0x1234, data),
        0x123_4000 | P | W | U | XD
    );
    let code = Attributes::new(Rights::USER_CODE | Rights::GLOBAL)
        .accessed()
        .dirty();
    assert_eq!(leaf::<X86_64>(1, 1, code), 0x1000 | P | U | A | D | G);
    assert_eq!(
        leaf::<X86_64>(2, 0x200, code),
        0x20_0000 | P | U | A | D | PS | G
    );
    assert_eq!(
        leaf::<X86_64>(3, 1 << 18, code),
        1 << 30 | P | U | A | D | PS | G
    );
    let key = Attributes::new(Rights::READ).pkey(9);
    assert_eq!(leaf::<X86_64>(1, 0, key), P | XD | 9 << 59);
    let soft = Attributes::new(Rights::READ | Rights::EXECUTE)
        .soft(SoftBit::<X86_64, 0>::BIT | SoftBit::<X86_64, 9>::BIT);
    assert_eq!(leaf::<X86_64>(1, 0, soft), P | 1 << 9 | 1 << 58);
    // The last frame of 52 bits.
    assert_eq!(
        leaf::<X86_64>(1, (1 << 40) - 1, data) & 0x000f_ffff_ffff_f000,
        0x000f_ffff_ffff_f000
    );
    assert!(!X86_64::can_encode(1, Frame::from_number(1 << 40), &data));
    assert!(
        !X86_64::can_encode(2, Frame::from_number(1), &data),
        "not aligned"
    );
}

#[test]
fn memory_types_pick_entries_of_the_pat() {
    let of = |memory_type| {
        Attributes::new(Rights::KERNEL_DATA | Rights::EXECUTE).memory_type(memory_type)
    };
    let index = |word: u64, pat: u64| {
        (word & pat != 0) as u32 * 4 + (word & PCD != 0) as u32 * 2 + (word & PWT != 0) as u32
    };
    // Table 12-10: 0 UC, 1 WC, 4 WT, 6 WB.
    for (memory_type, code) in [
        (MemoryType::WriteBack, 6),
        (MemoryType::WriteThrough, 4),
        (MemoryType::Uncached, 0),
        (MemoryType::WriteCombining, 1),
    ] {
        // PAT is bit 7 of a PTE and bit 12 of a huge leaf.
        let small = leaf::<X86_64>(1, 0, of(memory_type));
        assert_eq!(
            X86_PAT >> (8 * index(small, 1 << 7)) & 0xff,
            code,
            "{memory_type:?}"
        );
        for (word, level) in [
            (leaf::<X86_64>(2, 0x200, of(memory_type)), 2),
            (leaf::<X86Pae>(2, 0x200, of(memory_type)), 2),
            (leaf::<X86TwoLevel>(2, 0x400, of(memory_type)), 2),
            (leaf::<X86_64>(3, 1 << 18, of(memory_type)), 3),
        ] {
            assert_eq!(word & PS, PS, "level {level}");
            assert_eq!(
                X86_PAT >> (8 * index(word, 1 << 12)) & 0xff,
                code,
                "{memory_type:?}"
            );
        }
    }
}

#[test]
fn leaves_of_the_32_bit_modes() {
    let data = Attributes::new(Rights::USER_DATA);
    assert_eq!(
        leaf::<X86TwoLevel>(1, 0xf_ffff, data),
        0xffff_f000 | P | W | U
    );
    assert_eq!(
        leaf::<X86TwoLevel>(2, 0x400, data),
        0x40_0000 | P | W | U | PS
    );
    assert!(!X86TwoLevel::can_encode(
        1,
        Frame::from_number(1 << 20),
        &data
    ));
    assert!(!X86TwoLevel::can_encode(1, Frame::ZERO, &data.pkey(1)));
    assert_eq!(leaf::<X86Pae>(1, 1 << 30, data), 1 << 42 | P | W | U | XD);
    assert!(!X86Pae::can_encode(1, Frame::ZERO, &data.pkey(1)));
    // Page-directory-pointer entries: bits 1, 2 and 8..5 are reserved.
    assert_eq!(X86Pae::table(3, Frame::from_number(5)), 0x5000 | P);
    assert_eq!(X86Pae::table(2, Frame::from_number(5)), 0x5000 | P | W | U);
}

#[test]
fn leaves_of_pse36() {
    let data = Attributes::new(Rights::USER_DATA);
    // Table 4-4: bits 20:13 are address bits 39:32, bit 21 is reserved, bit 12 is PAT.
    let high = 0x9a << 20 | 0x400;
    assert_eq!(
        leaf::<X86Pse36>(2, high, data),
        0x40_0000 | 0x9a << 13 | P | W | U | PS
    );
    let write_combining = data.memory_type(MemoryType::WriteCombining);
    assert_eq!(
        leaf::<X86Pse36>(2, high, write_combining),
        0x40_0000 | 0x9a << 13 | P | W | U | PS | PWT | 1 << 12
    );
    assert_eq!(
        leaf::<X86Pse36>(2, 0x400, data),
        leaf::<X86TwoLevel>(2, 0x400, data)
    );
    assert!(!X86Pse36::can_encode(2, Frame::from_number(1 << 28), &data));
    assert!(!X86Pse36::can_encode(2, Frame::from_number(1), &data));
    assert!(
        !X86Pse36::can_encode(1, Frame::from_number(1 << 20), &data),
        "a small leaf has no room"
    );
    let template = X86Pse36::leaf(2, Frame::ZERO, &data);
    for frame in [0, 0x400, high, (1 << 28) - 0x400] {
        let frame = Frame::from_number(frame);
        let word = X86Pse36::leaf(2, frame, &data);
        assert_eq!(X86Pse36::relocate(2, template, frame), word);
        let hidden = X86Pse36::with_rights(2, word, Rights::empty());
        assert_eq!(hidden & P, 0);
        assert_eq!(X86Pse36::leaf_frame(2, hidden), frame);
        assert_eq!(
            hidden & 0xffdf_e000 & !(1 << 21),
            !word & 0xffdf_e000 & !(1 << 21),
            "inverted"
        );
        assert_eq!(X86Pse36::with_rights(2, hidden, Rights::USER_DATA), word);
        let hidden_template = X86Pse36::leaf(2, Frame::ZERO, &Rights::empty().into());
        assert_eq!(
            X86Pse36::relocate(2, hidden_template, frame),
            X86Pse36::leaf(2, frame, &Rights::empty().into())
        );
    }
}

#[test]
fn keys_and_bits_have_room_where_they_say() {
    const KEY: u8 = ProtectionKey::<X86_64La57, 15>::KEY;
    assert_eq!(KEY, 15);
    for key in [0, 1, 15] {
        let word = leaf::<X86_64>(1, 0, Attributes::new(Rights::READ).pkey(key));
        assert_eq!(word >> 59 & 15, u64::from(key));
    }
    assert!(!X86_64::can_encode(
        1,
        Frame::ZERO,
        &Attributes::new(Rights::READ).pkey(16)
    ));
    fn softest<F: Format>() {
        // Every software bit is kept through a leaf, with and without access, and touches nothing else.
        for bit in 0..F::SOFT_BITS {
            for rights in [Rights::USER_DATA, Rights::empty()] {
                let plain = F::leaf(1, Frame::from_number(3), &rights.into());
                let mut found = Vec::new();
                for other in 0..64 {
                    let word = plain ^ 1 << other;
                    let read = F::attributes(1, word);
                    if read.soft.bits() == 1 << bit
                        && F::kind(1, word) == Kind::Leaf
                        && F::leaf(1, Frame::from_number(3), &read) == word
                    {
                        found.push(other);
                    }
                }
                assert_eq!(found.len(), 1, "{} software bit {bit}: {found:?}", F::NAME);
            }
        }
    }
    softest::<X86TwoLevel>();
    softest::<X86Pse36>();
    softest::<X86Pae>();
    softest::<X86_64>();
    softest::<RiscvSv39>();
    softest::<Aarch64>();
}

#[test]
fn words_that_are_not_present_name_no_memory() {
    // L1TF: a processor that ignores P must find address bits that no memory has.
    let hidden = leaf::<X86_64>(1, 0x1234, Attributes::new(Rights::empty()).dirty());
    assert_eq!(hidden & P, 0);
    assert_eq!(
        hidden & 0x000f_ffff_ffff_f000,
        !(0x123_4000u64) & 0x000f_ffff_ffff_f000
    );
    for number in [0, 1, 0xffff, (1 << X86_64::PAYLOAD_BITS) - 1] {
        let payload = Payload::new::<X86_64>(number).unwrap();
        let word = X86_64::payload(payload);
        assert_eq!(
            (X86_64::kind(1, word), X86_64::payload_of(word)),
            (Kind::Payload, payload)
        );
        assert_eq!(word & P, 0);
        if number < 1 << 20 {
            assert!(word & 0x000f_ffff_ffff_f000 > 1 << 50);
        }
    }
    assert_eq!(Payload::new::<X86_64>(1 << X86_64::PAYLOAD_BITS), None);
    let payload = Payload::new::<X86TwoLevel>((1 << 28) - 1).unwrap();
    let word = X86TwoLevel::payload(payload);
    assert!(word < 1 << 32 && word & P == 0);
    assert_eq!(X86TwoLevel::payload_of(word), payload);
}

#[test]
fn every_level_is_as_wide_as_its_table() {
    fn check<F: Format>(bits: u32, word_bytes: usize) {
        let mut shift = 0;
        for level in F::LEVELS {
            assert_eq!(level.shift, shift);
            assert!(level.entries() * word_bytes <= 4096);
            shift += level.bits;
        }
        assert_eq!(shift + 12, bits);
        assert_eq!(F::canonical(F::LEVELS.len()).bits(), bits);
        assert_eq!(F::LEVELS[0].order(), Order::ZERO);
    }
    check::<X86_64>(48, 8);
    check::<X86_64La57>(57, 8);
    check::<X86Pae>(32, 8);
    check::<X86TwoLevel>(32, 4);
    check::<RiscvSv39>(39, 8);
    check::<RiscvSv48>(48, 8);
    check::<RiscvSv57>(57, 8);
    check::<X86Pse36>(32, 4);
    check::<Aarch64>(48, 8);
}

#[test]
fn words_of_risc_v() {
    // The RISC-V Instruction Set Manual volume II, figures of Sv39: V R W X U G A D are bits 0 to 7.
    let data = Attributes::new(Rights::USER_DATA).accessed().dirty();
    assert_eq!(leaf::<RiscvSv39>(1, 0x8_0000, data), 0x2000_0000 | 0xd7);
    let code = Attributes::new(Rights::READ | Rights::EXECUTE | Rights::GLOBAL);
    assert_eq!(leaf::<RiscvSv48>(2, 0x200, code), 0x200 << 10 | 0x2b);
    assert_eq!(RiscvSv57::table(5, Frame::from_number(7)), 7 << 10 | 1);
    assert_eq!(RiscvSv57::kind(5, 7 << 10 | 1), Kind::Table);
    // Svpbmt: 1 non-cacheable, 2 I/O.
    let device = Attributes::new(Rights::KERNEL_DATA).memory_type(MemoryType::Uncached);
    assert_eq!(leaf::<RiscvSv39>(1, 1, device), 2 << 61 | 1 << 10 | 7);
    let through = Attributes::new(Rights::READ).memory_type(MemoryType::WriteThrough);
    assert!(!RiscvSv39::can_encode(1, Frame::ZERO, &through));
    // Writing without reading is reserved, so it is widened.
    let only = RiscvSv39::expressible(1, &Attributes::new(Rights::WRITE));
    assert_eq!(only.rights, Rights::READ | Rights::WRITE);
    let only = RiscvSv39::expressible(1, &Attributes::new(Rights::EXECUTE));
    assert_eq!(only.rights, Rights::EXECUTE);
    let hidden = leaf::<RiscvSv39>(3, 1 << 18, Attributes::new(Rights::empty()).dirty());
    assert_eq!(hidden & 1, 0);
}

/// Looks an address up as the manual's algorithm says (volume II, 12.3.2), in memory.
#[test]
fn a_walk_by_the_manual_finds_what_was_mapped() {
    use kmem_hal::{DeviceFrame, Page, PageRange, PhysMap};
    use kmem_paging::PageTable;

    let machine = machine::Machine::new(64);
    let table = PageTable::<RiscvSv39, _, DeviceFrame>::new(machine.env()).unwrap();
    let walk = |address: u64| {
        let mut a = table.root().frame.start();
        for i in (0..3).rev() {
            let vpn = address >> (12 + 9 * i) & 0x1ff;
            let entry = machine.map.to_ptr(a).cast::<u64>();
            // SAFETY: a table of the arena; one thread.
            let pte = unsafe { entry.add(vpn as usize).read() };
            if pte & 1 == 0 || pte & 6 == 4 {
                return None;
            }
            let ppn = pte >> 10 & ((1 << 44) - 1);
            if pte & 0xe != 0 {
                let low = (1u64 << (9 * i)) - 1;
                // A misaligned superpage faults.
                return (ppn & low == 0)
                    .then_some((ppn | (address >> 12 & low)) << 12 | address & 0xfff);
            }
            a = kmem_hal::PhysAddr::new(ppn << 12);
        }
        None
    };
    let top = Page::new((1 << 52) - 1).unwrap();
    for (page, frame, order) in [
        (Page::new(5).unwrap(), 77, Order::ZERO),
        (Page::new(0x400).unwrap(), 0x600, Order::HUGE_2M),
        (Page::new(1 << 18).unwrap(), 3 << 18, Order::HUGE_1G),
        (top, 99, Order::ZERO),
    ] {
        let block = DeviceFrame::new(Frame::from_number(frame), order).unwrap();
        let range = PageRange::with_count(page, order.frames()).unwrap();
        let mut cursor = table.cursor(range).unwrap();
        cursor.map(page, block, Rights::KERNEL_DATA).unwrap();
        drop(cursor);
        for offset in [0, order.frames() - 1] {
            let address = (page.number() + offset) << 12 | 0x345;
            assert_eq!(walk(address), Some((frame + offset) << 12 | 0x345));
        }
    }
    assert_eq!(walk(6 << 12), None);
    table.destroy(|_, _| {}, |_, _| {});
}

#[test]
fn the_graph_has_a_box_for_each_table() {
    use kmem_hal::{DeviceFrame, Page, PageRange};
    use kmem_paging::PageTable;

    let machine = machine::Machine::new(64);
    let table = PageTable::<X86_64, _, DeviceFrame>::new(machine.env()).unwrap();
    for page in [0x400, 0x401, 1 << 27] {
        let page = Page::new(page).unwrap();
        let block = DeviceFrame::new(Frame::from_number(7), Order::ZERO).unwrap();
        let mut cursor = table.cursor(PageRange::single(page)).unwrap();
        cursor.map(page, block, Rights::READ).unwrap();
    }
    let graph = table.graph().to_string();
    assert!(
        graph.starts_with("digraph") && graph.ends_with("}\n"),
        "{graph}"
    );
    assert_eq!(
        graph.matches("[label=\"level ").count(),
        table.table_count()
    );
    assert_eq!(graph.matches(" -> ").count(), table.table_count() - 1);
    assert_eq!(graph.matches("2 leaves, 0 payloads").count(), 1, "{graph}");
    assert_eq!(graph.matches("level 1\\n").count(), 2);
    table.destroy(|_, _| {}, |_, _| {});
}
