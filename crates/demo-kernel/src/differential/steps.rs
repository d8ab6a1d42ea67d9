//! Random short programs of page-table changes, flushes and accesses: the same on every machine.
//!
//! ```text
//!   seed ── Random ── steps ──┬── Bench on QEMU's MMU   (this kernel)      ── words ─┐
//!                             └── Bench on mock-x86     (oracle/, a host)  ── words ─┴─ compared by xtask
//! ```
//!
//! The tables are kmem's own, made by the same code on both sides; what differs is who walks them. A program sees one
//! word for each access (what was read, or the fault's error code and address) and, at its end, the words of all table
//! entries on the way to its pages, A and D included.
//!
//! Flushed programs flush every change at once: then hardware has no choice, and both machines must agree in every
//! bit. Lazy programs change entries and leave the TLB alone: then the other machine's outcome must be one of those that
//! the manual allows.

use kmem_hal::{
    DeviceFrame, Frame, FrameHandle, Order, Page, PageRange, PhysAddr, PhysMap, VirtAddr,
};
use kmem_paging::format::X86_64La57;
use kmem_paging::{Divisible, Env, Harvest, PageTable, Rights};

/// Flushed programs of a whole run.
pub const FLUSHED: u64 = 10_000;
/// Lazy programs of a whole run.
pub const LAZY: u64 = 500;

/// Pages of 4 KiB that a program maps: the last of one leaf table and the first of the next.
const SMALL: u64 = 8;
const SMALL_BASE: u64 = 0x40_0020_0000 - (SMALL / 2) * 4096;
/// Pages of 2 MiB, behind them.
const LARGE: u64 = 2;
const LARGE_BASE: u64 = 0x40_0040_0000;
/// Where the user-mode code of a machine may lie: below another top-level entry.
#[allow(dead_code)] // the mock needs none
pub const STUB: u64 = 0x80_0000_0000;
/// Frames of 4 KiB, and blocks of 2 MiB, that a machine gives.
pub const FRAMES: usize = 8;
/// See [`FRAMES`].
pub const BLOCKS: usize = 2;
/// The pages of a block that are accessed.
const BLOCK_PAGES: [u64; 3] = [0, 5, 511];
/// Where in a page the code lies that user mode, and the kernel, execute: `mov eax, ID` and SYSCALL or RET.
const USER_CODE: u64 = 128;
const KERNEL_CODE: u64 = 192;

/// A leaf to memory that the bench owns.
#[derive(Debug)]
pub struct Window(DeviceFrame);
// SAFETY: H1, H2: as the frame inside.
unsafe impl FrameHandle for Window {
    fn into_entry(self) -> (Frame, Order) {
        self.0.into_entry()
    }
    unsafe fn from_entry(first: Frame, order: Order) -> Self {
        // SAFETY: passed on.
        Self(unsafe { DeviceFrame::from_entry(first, order) })
    }
}
// SAFETY: D1: nothing is owned.
unsafe impl Divisible for Window {}

/// The tables that a program works on.
pub type Tables<E> = PageTable<X86_64La57, E, Window>;

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Reads 8 bytes.
    Read,
    /// Writes 8 bytes.
    Write,
    /// Executes; gives the ID of the code.
    Execute,
}

/// Who accesses, and how.
#[derive(Clone, Copy, Debug)]
pub struct Access {
    /// What.
    pub kind: Kind,
    /// In user mode.
    pub user: bool,
    /// With EFLAGS.AC set, which lets the kernel pass SMAP.
    pub ac: bool,
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The value read; 0 for a write.
    Value(u64),
    /// A page fault: error code and CR2.
    Fault(u32, u64),
}

/// A processor.
pub trait Processor {
    /// Makes an access.
    fn access(&mut self, access: Access, address: u64, value: u64) -> Outcome;
    /// Sets CR0.WP, CR4.SMEP and CR4.SMAP.
    fn control(&mut self, wp: bool, smep: bool, smap: bool);
    /// INVLPG.
    fn invlpg(&mut self, address: u64);
    /// Drops everything, global entries too.
    fn flush_all(&mut self);
}

/// SplitMix64 (Steele, Lea, Flood, 2014).
pub struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn rights(&mut self) -> Rights {
        let mut rights = Rights::READ;
        rights.set(Rights::WRITE, !self.one_in(3));
        rights.set(Rights::EXECUTE, self.one_in(2));
        rights.set(Rights::USER, !self.one_in(3));
        rights.set(Rights::GLOBAL, self.one_in(6));
        rights
    }
}

const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
/// Above every MAXPHYADDR of these machines: reserved.
const RESERVED: u64 = 1 << 51;
const NO_EXECUTE: u64 = 1 << 63;

/// A program's machine: tables, memory and a processor.
pub struct Bench<'a, E: Env, P: Processor> {
    /// Empty tables, loaded.
    pub tables: &'a Tables<E>,
    /// Frames of 4 KiB.
    pub frames: [Frame; FRAMES],
    /// First frames of blocks of 2 MiB.
    pub blocks: [Frame; BLOCKS],
    /// Who walks the tables.
    pub processor: P,
}

impl<E: Env, P: Processor> Bench<'_, E, P> {
    /// Runs the program of a number; every word that it sees goes to `see`, outcomes first.
    pub fn run(&mut self, number: u64, lazy: bool, see: &mut impl FnMut(Seen)) {
        let mut random = Random(number << 1 | u64::from(lazy));
        self.fill();
        self.processor.control(true, false, false);
        let steps = 16 + random.below(16);
        for step in 0..steps {
            self.step(&mut random, lazy, step, see);
        }
        self.look(see);
        self.processor.control(true, false, false);
        self.clear();
    }

    /// A page's address: `SMALL` small pages, then the large ones.
    fn address(&self, slot: u64) -> (u64, Order) {
        if slot < SMALL {
            (SMALL_BASE + slot * 4096, Order::ZERO)
        } else {
            (
                LARGE_BASE + (slot - SMALL) * (2 << 20),
                Order::new(9).expect("an order"),
            )
        }
    }

    fn range(&self, slot: u64) -> PageRange {
        let (address, order) = self.address(slot);
        let first = Page::containing(VirtAddr::new(address));
        PageRange::with_count(first, order.frames()).expect("pages")
    }

    fn step(&mut self, random: &mut Random, lazy: bool, step: u64, see: &mut impl FnMut(Seen)) {
        let slot = random.below(SMALL + LARGE);
        let choice = random.below(if lazy { 20 } else { 18 });
        match choice {
            _ if step < 3 => self.map(slot, random),
            0 | 1 => self.map(slot, random),
            2 => self.unmap(slot),
            3 => {
                let rights = random.rights();
                let mut gather = self.tables.gather::<4>();
                let range = self.range(slot);
                let mut cursor = self.tables.cursor(range).expect("a range of the table");
                let _ = cursor.protect(range, rights, &mut gather);
                drop(cursor);
                gather.commit(drop);
            }
            4 => {
                let bits = if random.one_in(2) {
                    Harvest::ACCESSED
                } else {
                    Harvest::DIRTY
                };
                let mut gather = self.tables.gather::<4>();
                let range = self.range(slot);
                let mut cursor = self.tables.cursor(range).expect("a range of the table");
                let _ = cursor.harvest(range, bits, &mut gather, |_| {});
                drop(cursor);
                gather.commit(drop);
                // Clearing A alone asks for no flush: a translation may stay and not set it again.
                self.processor.invlpg(self.address(slot).0);
            }
            5 => {
                let bits = random.below(8);
                self.processor
                    .control(bits & 1 == 0, bits & 2 != 0, bits & 4 != 0);
            }
            6 => {
                let bits = [WRITE, USER, ACCESSED, DIRTY, NO_EXECUTE][random.below(5) as usize];
                self.poke(slot, |word| word ^ bits);
                self.processor.invlpg(self.address(slot).0);
            }
            7 => {
                // A reserved bit, for one access.
                self.poke(slot, |word| word ^ RESERVED);
                self.processor.invlpg(self.address(slot).0);
                self.access(slot, random, see);
                self.poke(slot, |word| word ^ RESERVED);
                self.processor.invlpg(self.address(slot).0);
            }
            18 => {
                let bits = [WRITE, USER, DIRTY, NO_EXECUTE][random.below(4) as usize];
                self.poke(slot, |word| word ^ bits);
            }
            19 => {
                let frame = self.frames[random.below(FRAMES as u64) as usize];
                if slot < SMALL {
                    let address = frame.start().as_u64();
                    self.poke(slot, |word| word & !0xf_ffff_ffff_f000 | address);
                }
            }
            _ => self.access(slot, random, see),
        }
    }

    fn map(&mut self, slot: u64, random: &mut Random) {
        let rights = random.rights();
        let pick = random.next() as usize;
        let (_, order) = self.address(slot);
        let frame = if slot < SMALL {
            self.frames[pick % FRAMES]
        } else {
            self.blocks[pick % BLOCKS]
        };
        let range = self.range(slot);
        let mut cursor = self.tables.cursor(range).expect("a range of the table");
        let window = Window(DeviceFrame::new(frame, order).expect("aligned"));
        let _ = cursor.map(range.first(), window, rights); // refused where something is mapped
    }

    fn unmap(&mut self, slot: u64) {
        let range = self.range(slot);
        let mut gather = self.tables.gather::<4>();
        let mut cursor = self.tables.cursor(range).expect("a range of the table");
        let _ = cursor.unmap(range, &mut gather);
        drop(cursor);
        gather.commit(drop);
    }

    fn access(&mut self, slot: u64, random: &mut Random, see: &mut impl FnMut(Seen)) {
        let kind = [Kind::Read, Kind::Write, Kind::Execute][random.below(3) as usize];
        let access = Access {
            kind,
            user: !random.one_in(3),
            ac: random.one_in(3),
        };
        let part = BLOCK_PAGES[random.below(3) as usize];
        // QEMU 7.2 keeps translated code of a large page except in the 4 KiB that an invlpg names, so that code is run in
        // the first alone.
        let first = slot < SMALL || kind == Kind::Execute;
        let page = if first { 0 } else { part * 4096 };
        let offset = match kind {
            Kind::Execute if access.user => USER_CODE,
            Kind::Execute => KERNEL_CODE,
            _ => 0,
        };
        let value = random.next();
        let at = self.address(slot).0 + page + offset;
        let outcome = self.processor.access(access, at, value);
        see(Seen::Access(access, at, outcome));
    }

    fn memory(&self, physical: u64) -> *mut u64 {
        self.tables
            .env()
            .map()
            .to_ptr(PhysAddr::new(physical))
            .cast()
    }

    /// The words on the way from the root to a page's leaf, with their places: levels from the top.
    fn walk(&self, address: u64, mut visit: impl FnMut(usize, *mut u64, u64)) {
        let mut table = self.tables.root().frame.start().as_u64();
        for level in (1..=self.tables.levels()).rev() {
            let index = address >> (12 + 9 * (level - 1)) & 511;
            let place = self.memory(table + index * 8);
            // SAFETY: an entry of a table in reach; the only CPU that uses it runs this.
            let word = unsafe { place.read_volatile() };
            visit(level, place, word);
            if word & 1 == 0 || level > 1 && word & 1 << 7 != 0 {
                return;
            }
            table = word & 0xf_ffff_ffff_f000;
        }
    }

    /// Changes a leaf's word behind everybody's back.
    fn poke(&self, slot: u64, change: impl Fn(u64) -> u64) {
        let (address, order) = self.address(slot);
        let leaf = if order == Order::ZERO { 1 } else { 2 };
        self.walk(address, |level, place, word| {
            if level == leaf && word & 1 != 0 {
                // SAFETY: as in `walk`.
                unsafe { place.write_volatile(change(word)) };
            }
        });
    }

    /// All table words below the top level; frames as their place in the bench, addresses of tables left out.
    fn look(&self, see: &mut impl FnMut(Seen)) {
        for slot in 0..SMALL + LARGE {
            let (address, _) = self.address(slot);
            self.walk(address, |level, _, word| {
                let leaf = level == 1 || word & 1 << 7 != 0;
                let frame = Frame::containing(PhysAddr::new(word & 0x7_ffff_ffff_f000));
                let known = self.frames.iter().chain(&self.blocks);
                let id = known.clone().position(|known| *known == frame);
                let flags = word & (0xfff | NO_EXECUTE);
                if level < 5 {
                    let id = if leaf && word & 1 != 0 {
                        id.map_or(0xff, |id| id as u64)
                    } else {
                        0
                    };
                    see(Seen::Entry(slot, level, flags | id << 12));
                }
            });
        }
    }

    /// Gives every page its own contents.
    fn fill(&mut self) {
        let small = self.frames.iter().map(|frame| frame.start().as_u64());
        let large = self.blocks.iter().flat_map(|block| {
            BLOCK_PAGES
                .iter()
                .map(|page| block.start().as_u64() + page * 4096)
        });
        for (id, page) in small.chain(large).enumerate() {
            let id = id as u64 + 1;
            let code = |end: u64| 0xb8 | id << 8 | end << 40; // mov eax, imm32
            // SAFETY: the bench's own memory.
            unsafe {
                self.memory(page).write_volatile(id << 32 | id);
                self.memory(page + USER_CODE).write_volatile(code(0x050f)); // SYSCALL
                self.memory(page + KERNEL_CODE).write_volatile(code(0xc3)); // RET
            }
        }
    }

    /// Leaves empty tables and empty TLBs.
    fn clear(&mut self) {
        for slot in 0..SMALL + LARGE {
            self.unmap(slot);
        }
        self.processor.flush_all();
    }
}

/// What a program saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// An access and its outcome.
    Access(Access, u64, Outcome),
    /// At the end: a page's number, a level, and the entry there.
    Entry(u64, usize, u64),
}

impl PartialEq for Access {
    fn eq(&self, other: &Self) -> bool {
        (self.kind, self.user, self.ac) == (other.kind, other.user, other.ac)
    }
}
impl Eq for Access {}

impl Seen {
    /// As one number, to be hashed.
    fn word(self) -> u64 {
        match self {
            Self::Access(_, _, Outcome::Value(value)) => value,
            Self::Access(_, _, Outcome::Fault(code, address)) => {
                1 << 63 | u64::from(code) << 48 | address & 0xffff_ffff_ffff
            }
            Self::Entry(slot, level, word) => word ^ slot << 40 ^ (level as u64) << 50,
        }
    }
}

/// FNV-1a over words.
pub struct Digest(pub u64);

impl Digest {
    /// Of nothing.
    pub const EMPTY: Self = Self(0xcbf2_9ce4_8422_2325);

    /// Takes one more.
    pub fn add(&mut self, seen: Seen) {
        for byte in seen.word().to_le_bytes() {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        }
    }
}
