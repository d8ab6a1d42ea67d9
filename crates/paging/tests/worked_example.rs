//! The worked examples of operating-systems courses, number by number: a machine with 16-bit addresses, 4 KiB pages and
//! 32 KiB of memory (a format and a mode of their own, which shows that neither trait nor walker knows x86), the split
//! of a 32-bit address, and one address in two processes.

#![cfg(not(loom))]

#[path = "common/hostile_env.rs"]
mod hostile_env;
#[path = "common/machine.rs"]
mod machine;

use hostile_env::HostileEnv;
use kmem_hal::{
    BlockDevice, Canonical, Frame, FrameHandle, FrameRequest, FrameSink, FrameSource, IoState, Mmu,
    Order, OwnedFrame, Page, PageRange,
};
use kmem_mock_x86::{
    Adversary, Disk, Fault, Level as ModeLevel, Machine, MemoryKind, MemoryMap, MemoryRange, Mode,
    Registers, manual::pf,
};
use kmem_paging::format::{Format, Kind, Level, X86_64, X86TwoLevel};
use kmem_paging::{
    Attributes, Entry, MemoryType, PageTable, Payload, Rights, Soft, TableCache, TableError,
};

/// One table of 16 entries; a frame number has three bits.
///
/// ```text
///   present   31 .. 15 14 .. 12 11 .. 7  6 5 4 3 2 1 0
///               0       frame      0     D A 0 0 1 W 1
///   absent      payload (bits 12 and up)      0 .. 1 0 0
///   no access   0       frame      0     D A 0 0 0 1 0
/// ```
#[derive(Clone, Copy, Debug)]
struct Course16;

const PRESENT: u64 = 1;
const WRITE: u64 = 2;
const USER: u64 = 4;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;

// SAFETY: F1: every constructor sets one of the bits 0 to 2; F2: bit 0 tells leaves from the rest, bit 1 leaves without access from
// payloads, and there are no tables below the root; F3: bit 0; F4: the machine sets A and D where they are clear.
unsafe impl Format for Course16 {
    type Word = u32;
    const NAME: &'static str = "the course's 16-bit machine";
    const LEVELS: &'static [Level] = &[Level::new(0, 4, true)];
    const MIN_LEVELS: usize = 1;
    const SOFT_BITS: u32 = 0;
    const PAYLOAD_BITS: u32 = 20;
    /// 32 KiB.
    const FRAME_LIMIT: u64 = 8;
    /// The table lies elsewhere: in the MMU, as far as the course tells.
    const TABLE_FRAME_LIMIT: u64 = 16;
    const ROOT_FRAME_LIMIT: u64 = 16;
    const CACHES_ABSENT: bool = false;
    const FIXED_TOP: bool = false;

    fn canonical(_levels: usize) -> Canonical {
        Canonical::zero_extended(16)
    }
    fn can_encode(_level: usize, frame: Frame, attributes: &Attributes) -> bool {
        frame.number() < 8
            && attributes.soft == Soft::NONE
            && attributes.pkey == 0
            && attributes.memory_type == MemoryType::WriteBack
    }
    fn leaf(_level: usize, frame: Frame, attributes: &Attributes) -> u64 {
        let mut word = frame.number() << 12;
        if attributes.accessed {
            word |= ACCESSED;
        }
        if attributes.dirty {
            word |= DIRTY;
        }
        if !attributes.rights.grants_access() {
            return word | WRITE;
        }
        if attributes.rights.contains(Rights::WRITE) {
            word |= WRITE;
        }
        word | USER | PRESENT
    }
    fn table(_level: usize, _frame: Frame) -> u64 {
        unreachable!("one level")
    }
    fn payload(payload: Payload) -> u64 {
        payload.number() << 12 | USER
    }
    fn kind(_level: usize, word: u64) -> Kind {
        match (word, word & PRESENT, word & WRITE) {
            (0, ..) => Kind::Empty,
            (_, 1, _) | (_, 0, WRITE) => Kind::Leaf,
            _ => Kind::Payload,
        }
    }
    fn table_frame(_word: u64) -> Frame {
        unreachable!("one level")
    }
    fn leaf_frame(_level: usize, word: u64) -> Frame {
        Frame::from_number(word >> 12)
    }
    fn attributes(_level: usize, word: u64) -> Attributes {
        let mut rights = Rights::empty();
        if word & PRESENT != 0 {
            rights = Rights::READ | Rights::EXECUTE | Rights::USER;
            if word & WRITE != 0 {
                rights |= Rights::WRITE;
            }
        }
        let mut attributes = Attributes::new(rights);
        attributes.accessed = word & ACCESSED != 0;
        attributes.dirty = word & DIRTY != 0;
        attributes
    }
    fn payload_of(word: u64) -> Payload {
        Payload::new::<Self>(word >> 12).expect("20 bits")
    }
    fn is_settled(word: u64) -> bool {
        word & PRESENT == 0 || word & ACCESSED != 0 && (word & DIRTY != 0 || word & WRITE == 0)
    }
}

/// The same, as the machine sees it.
static COURSE_MODE: Mode = Mode {
    name: "16-bit",
    linear_bits: 16,
    entry_bytes: 4,
    canonical: false,
    has_xd: false,
    has_pkey: false,
    levels: &[ModeLevel {
        shift: 12,
        bits: 4,
        leaf: true,
        accessed: true,
        name: "PTE",
    }],
};

/// Which page is in which frame; pages that are not listed are on disk or nowhere.
const MAP: [(u64, u64); 8] = [
    (0, 2),
    (1, 1),
    (2, 6),
    (3, 0),
    (4, 4),
    (5, 3),
    (9, 5),
    (11, 7),
];

fn at(page: u64) -> Page {
    Page::new(page).unwrap()
}

fn frame(number: u64) -> OwnedFrame {
    // SAFETY: frames 0 to 7 belong to this test alone: the pool starts at 8.
    unsafe { OwnedFrame::from_raw(Frame::from_number(number), Order::ZERO) }
}

#[test]
fn sixteen_bits_of_address_and_32_kib_of_memory() {
    let ram = |start, end| MemoryRange {
        start,
        end,
        kind: MemoryKind::Ram,
        node: 0,
    };
    // 32 KiB, and behind it the store in which the MMU keeps its table.
    let map = MemoryMap::new(&[ram(0, 0x8000), ram(0x8000, 0x1_0000)]).unwrap();
    let machine = Machine::builder()
        .memory(map)
        .registers(Registers {
            cr0: Registers::LONG.cr0,
            ..Registers::PROTECTED
        })
        .mode(&COURSE_MODE)
        .adversary(Adversary::FULL)
        .seed(16)
        .build()
        .unwrap();
    let env = HostileEnv::new(machine, 8, 0);
    let machine = env.machine;
    let table = PageTable::<Course16, &HostileEnv, OwnedFrame>::new(env).unwrap();
    machine.note_allocated(0, 8);
    let all = PageRange::with_count(Page::ZERO, 16).unwrap();
    let mut cursor = table.cursor(all).unwrap();
    for (page, number) in MAP {
        cursor
            .map(at(page), frame(number), Rights::USER_DATA)
            .unwrap();
    }
    drop(cursor);
    // SAFETY: the machine runs no code from this table.
    unsafe { env.mmu.load_root(table.root(), false) };
    let cpu = machine.cpu(0).user();
    let physical = |linear: u64| cpu.translate(linear, kmem_mock_x86::AccessKind::Read);

    // MOV REG, 0 and its friends: what leaves the MMU.
    assert_eq!(physical(0), Ok(8192));
    assert_eq!(physical(20500), Ok(12308));
    assert_eq!(physical(8196), Ok(24580));
    assert_eq!(physical(1026), Ok(9218));

    // Page 1 has a value, which must survive what follows.
    cpu.write_u16(4096 + 100, 0xbeef).unwrap();
    // MOV REG, 32780: byte 12 of page 8, which is not mapped.
    let fault = physical(32780).unwrap_err();
    assert_eq!(
        fault,
        Fault::Page {
            address: 32780,
            code: pf::U
        }
    );
    assert_eq!(machine.cpu(0).registers().cr2, 32780);

    // The kernel evicts page frame 1: it is written out, and the entry of page 1 says where to.
    let disk = Disk::in_memory(machine, 16);
    let evict = |page: u64, block: u64| -> OwnedFrame {
        let payload = Payload::new::<Course16>(block).unwrap();
        let mut gather = table.gather::<1>();
        let mut cursor = table.cursor(all).unwrap();
        let entry = cursor.set_payload(at(page), payload, &mut gather).unwrap();
        drop(cursor);
        let leaf = entry.leaf().expect("it was mapped");
        let mut freed = None;
        gather.commit(|frame| freed = Some(frame));
        if leaf.attributes.dirty {
            assert_eq!(disk.write(block, leaf.frame), Ok(IoState::Done));
        }
        freed.expect("the frame comes free with the commit")
    };
    let evicted = evict(1, 3);
    assert_eq!(evicted.first().number(), 1);
    assert!(machine.audit(0, 0xffff).is_empty());
    // Virtual page 8 gets it, and the instruction starts again.
    let mut cursor = table.cursor(all).unwrap();
    cursor.map(at(8), evicted, Rights::USER_DATA).unwrap();
    drop(cursor);
    assert_eq!(physical(32780), Ok(4108), "4096 + 12");
    cpu.write_u16(32780, 0x1234).unwrap();

    // Page 1 is wanted again: it faults, page 8 makes room, and what was written is read back.
    assert!(cpu.read_u16(4096 + 100).is_err());
    let Entry::Payload(block) = table.query(at(1)) else {
        panic!("page 1 is on disk");
    };
    let evicted = evict(8, 4);
    assert_eq!(
        disk.read(block.number(), evicted.first()),
        Ok(IoState::Done)
    );
    let mut cursor = table.cursor(all).unwrap();
    cursor
        .replace(at(1), evicted, Rights::USER_DATA)
        .unwrap_or_else(|_| panic!("the payload gives way"));
    drop(cursor);
    assert_eq!(cpu.read_u16(4096 + 100), Ok(0xbeef));
    assert_eq!(disk.transfers(), (1, 2));

    table.destroy(|_, frame| _ = frame.into_entry(), |_, _| {});
    TableCache::shrink(&env, usize::MAX);
    assert_eq!(env.pool.in_use(), 0);
    drop(disk);
    // SAFETY: nothing of this environment is left.
    unsafe { env.retire() };
}

/// There is no table below the root that others could share.
#[test]
fn a_machine_of_one_table_lends_nothing() {
    let machine = machine::Machine::new(16);
    let table = PageTable::<Course16, _, OwnedFrame>::new(machine.env()).unwrap();
    for page in [0, 9, 15] {
        assert_eq!(table.lend_from(at(page)), Err(TableError::CannotShare));
    }
    let shared = PageTable::<Course16, _, OwnedFrame>::sharing(machine.env(), &table, at(0));
    assert_eq!(shared.unwrap_err(), TableError::CannotShare);
    let mut cursor = table.cursor(PageRange::single(at(9))).unwrap();
    cursor.map(at(9), frame(5), Rights::USER_DATA).unwrap();
    drop(cursor);
    table.destroy(|_, frame| _ = frame.into_entry(), |_, _| {});
    TableCache::shrink(machine.env(), usize::MAX);
    assert_eq!(machine.frames.out(), 0);
}

fn two_level_machine() -> &'static HostileEnv {
    let machine = Machine::builder()
        .memory(MemoryMap::pc(16 << 20))
        .registers(Registers {
            cr0: Registers::LONG.cr0,
            cr4: 1 << 4,
            ..Registers::PROTECTED
        })
        .adversary(Adversary::FULL)
        .seed(32)
        .build()
        .unwrap();
    HostileEnv::new(machine, 0x400, 0)
}

#[test]
fn a_32_bit_address_is_two_indices_and_an_offset() {
    // 0xB7001008: entry 732 of the directory, entry 1 of the table, byte 8.
    let linear: u64 = 0xb700_1008;
    assert_eq!(
        (linear >> 22, linear >> 12 & 0x3ff, linear & 0xfff),
        (732, 1, 8)
    );
    let env = two_level_machine();
    let table = PageTable::<X86TwoLevel, &HostileEnv, OwnedFrame>::new(env).unwrap();
    let page = Page::new(linear >> 12).unwrap();
    let mut cursor = table.cursor(PageRange::single(page)).unwrap();
    cursor.map(page, frame(2), Rights::USER_DATA).unwrap();
    drop(cursor);
    // SAFETY: the machine runs no code from this table.
    unsafe { env.mmu.load_root(table.root(), false) };
    let cpu = env.machine.cpu(0).user();
    assert_eq!(
        cpu.translate(linear, kmem_mock_x86::AccessKind::Read),
        Ok(0x2008)
    );
    let story = env.machine.explain(0, linear);
    assert!(story.contains("PDE") && story.contains("PTE"), "{story}");
    let root = table.root().frame.start().as_u64();
    let word = |address| env.machine.memory().load(address, 4).unwrap();
    let directory = word(root + 732 * 4);
    assert_eq!(directory & 1, 1);
    let entry = word((directory & 0xffff_f000) + 4);
    assert_eq!(entry & 0xffff_f000, 0x2000);
    table.destroy(|_, frame| _ = frame.into_entry(), |_, _| {});
    TableCache::shrink(&env, usize::MAX);
    // SAFETY: nothing of this environment is left.
    unsafe { env.retire() };
}

#[test]
fn one_address_in_two_processes() {
    let env = two_level_machine();
    let linear: u64 = 0x0804_8000;
    let page = Page::new(linear >> 12).unwrap();
    let processes = [2, 5].map(|number| {
        let table = PageTable::<X86TwoLevel, &HostileEnv, OwnedFrame>::new(env).unwrap();
        let mut cursor = table.cursor(PageRange::single(page)).unwrap();
        cursor.map(page, frame(number), Rights::USER_DATA).unwrap();
        drop(cursor);
        (table, number)
    });
    let cpu = env.machine.cpu(0).user();
    for round in 0..2u32 {
        for (table, number) in &processes {
            // SAFETY: the machine runs no code from these tables.
            unsafe { env.mmu.load_root(table.root(), false) };
            if round == 0 {
                cpu.write_u32(linear, 0x1111 * *number as u32).unwrap();
            }
            assert_eq!(cpu.read_u32(linear), Ok(0x1111 * *number as u32));
            assert_eq!(
                cpu.translate(linear, kmem_mock_x86::AccessKind::Read),
                Ok(number << 12)
            );
        }
    }
    let idle = PageTable::<X86TwoLevel, &HostileEnv, OwnedFrame>::new(env).unwrap();
    // SAFETY: as above.
    unsafe { env.mmu.load_root(idle.root(), false) };
    for (table, _) in processes {
        table.destroy(|_, frame| _ = frame.into_entry(), |_, _| {});
    }
    idle.destroy(|_, _| {}, |_, _| {});
    TableCache::shrink(&env, usize::MAX);
    assert_eq!(env.pool.in_use(), 0);
    // SAFETY: nothing of this environment is left.
    unsafe { env.retire() };
}

/// A root that must lie low gets a low frame of the cache, though a high one was put there last.
#[test]
fn a_low_root_is_found_among_emptied_tables() {
    let machine = machine::Machine::new(64);
    let wide = PageTable::<X86_64, _, OwnedFrame>::new(machine.env()).unwrap();
    let reserve = |count, order| {
        let range = PageRange::with_count(Page::ZERO, count).unwrap();
        let mut cursor = wide.cursor(range).unwrap();
        cursor.reserve(range, order).unwrap()
    };
    // Frames are given out from the lowest on: 2 to 4 go to the cache, the others below 16 to the test.
    assert_eq!(reserve(1, Order::ZERO), 3);
    let held: Vec<_> = (5..24)
        .map(|_| machine.frames.alloc(&FrameRequest::ONE).unwrap())
        .collect();
    assert!(reserve(3000, Order::ZERO) > 3);
    machine.frames.set_fuse(Some(0));
    let low = PageTable::<Course16, _, OwnedFrame>::new(machine.env()).unwrap();
    assert!(low.root().frame.number() < Course16::ROOT_FRAME_LIMIT);
    machine.frames.set_fuse(None);
    low.destroy(|_, _| {}, |_, _| {});
    wide.destroy(|_, _| {}, |_, _| {});
    held.into_iter()
        .for_each(|frame| machine.frames.free(frame));
    TableCache::shrink(machine.env(), usize::MAX);
    assert_eq!(machine.frames.out(), 0, "the list lost a frame");
}
