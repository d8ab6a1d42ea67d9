// A world for models: the smallest formats there can be, two levels of two entries or three, in memory whose free frames are at once somebody else's, who
// writes words into them that look like entries.
#![allow(dead_code)]

use loom::sync::Mutex;
use std::sync::atomic::AtomicBool as PlainBool;

use kmem_hal::sync::{AtomicU32, AtomicU64, AtomicUsize, Ordering, fence, spin_loop};
use kmem_hal::{
    AllocError, Canonical, Cpu, Deferred, FlushRequest, Frame, FrameRange, FrameRequest, FrameSink,
    FrameSlot, FrameSource, FrameTable, Grace, Mmu, NoTrace, Order, OwnedFrame, PhysAddr, PhysMap,
    Root, SECTION_FRAMES, Section,
};
use kmem_paging::format::{Format, Kind, Level};
use kmem_paging::{Attributes, Env, Payload, Rights, TableCache};
use kmem_testkit::model::ModelCpu;

#[derive(Clone, Copy, Debug)]
pub struct TinyOf<const LEVELS: usize>;

/// Two levels.
pub type Tiny = TinyOf<2>;

const LEVELS: [Level; 3] = [
    Level {
        shift: 0,
        bits: 1,
        leaf: true,
    },
    Level {
        shift: 1,
        bits: 1,
        leaf: false,
    },
    Level {
        shift: 2,
        bits: 1,
        leaf: false,
    },
];

/// Bit 0 is set in every word, bit 1 tells tables from leaves; bit 2 says that a table is shared, bit 3 that a leaf can be written.
// SAFETY: F1 to F3: as above; F4: there is no hardware.
unsafe impl<const N: usize> Format for TinyOf<N> {
    type Word = u64;
    const NAME: &'static str = "a few levels of two entries";
    const LEVELS: &'static [Level] = LEVELS.split_at(N).0;
    const MIN_LEVELS: usize = N;
    const SOFT_BITS: u32 = 0;
    const PAYLOAD_BITS: u32 = 0;
    const FRAME_LIMIT: u64 = 1 << 20;
    const TABLE_FRAME_LIMIT: u64 = 1 << 20;
    const ROOT_FRAME_LIMIT: u64 = 1 << 20;
    const CACHES_ABSENT: bool = false;
    const FIXED_TOP: bool = false;

    fn canonical(_levels: usize) -> Canonical {
        Canonical::zero_extended(14)
    }
    fn can_encode(_level: usize, _frame: Frame, _attributes: &Attributes) -> bool {
        true
    }
    fn leaf(_level: usize, frame: Frame, attributes: &Attributes) -> u64 {
        let writable = attributes.rights.contains(Rights::WRITE);
        frame.start().as_u64() | 1 | u64::from(writable) << 3
    }
    fn shared_table(_level: usize, word: u64) -> Option<u64> {
        Some(word | 4)
    }
    fn is_shared_table(_level: usize, word: u64) -> bool {
        word & 7 == 7
    }
    fn own_table(_level: usize, word: u64) -> u64 {
        word & !4
    }
    fn table(_level: usize, frame: Frame) -> u64 {
        frame.start().as_u64() | 3
    }
    fn payload(_payload: Payload) -> u64 {
        unreachable!("no payloads in this model")
    }
    fn kind(_level: usize, word: u64) -> Kind {
        match word & 3 {
            0 => Kind::Empty,
            1 => Kind::Leaf,
            _ => Kind::Table,
        }
    }
    fn table_frame(word: u64) -> Frame {
        Frame::from_number(word >> 12)
    }
    fn leaf_frame(_level: usize, word: u64) -> Frame {
        Frame::from_number(word >> 12)
    }
    fn attributes(_level: usize, word: u64) -> Attributes {
        let writable = word & 8 != 0;
        Attributes::new(if writable {
            Rights::READ | Rights::WRITE
        } else {
            Rights::READ
        })
    }
    fn payload_of(_word: u64) -> Payload {
        unreachable!("no payloads in this model")
    }
    fn is_settled(_word: u64) -> bool {
        true
    }
}

/// What a stranger leaves in a frame that was freed: a leaf of a frame that nobody maps.
const STRANGER: u64 = 0xbad << 12 | 1;

pub struct World {
    words: Vec<[AtomicU64; 2]>,
    /// Added to whenever a table is looked at. Loom finds the schedules worth trying from the last access of each word
    /// alone, so a load that another thread's own load follows would hide; an addition does not.
    looks: Vec<AtomicUsize>,
    pub free: Mutex<Vec<u64>>,
    /// Frames for tables.
    pub tables: u64,
    slots: FrameTable,
    cache: TableCache,
    readers: [AtomicUsize; 2],
    /// Plants a bug: grace periods that do not wait.
    pub hasty: PlainBool,
    cpu: ModelCpu,
    trace: NoTrace,
}

impl World {
    pub fn new() -> &'static Self {
        Self::with_sections(1)
    }

    /// With this many sections of frames.
    pub fn with_sections(count: u64) -> &'static Self {
        let sections: Vec<Section> = (0..count)
            .map(|_| {
                let section = Section::absent();
                let slots: Vec<FrameSlot> = (0..SECTION_FRAMES).map(|_| FrameSlot::new()).collect();
                section.set_ready(Box::leak(slots.into_boxed_slice()));
                section
            })
            .collect();
        let tables = count * SECTION_FRAMES;
        let table = FrameTable::new();
        table.init(Box::leak(sections.into_boxed_slice()));
        Box::leak(Box::new(Self {
            words: (0..tables)
                .map(|_| [AtomicU64::new(0), AtomicU64::new(0)])
                .collect(),
            looks: (0..tables).map(|_| AtomicUsize::new(0)).collect(),
            free: Mutex::new((0..tables).rev().collect()),
            tables,
            slots: table,
            cache: TableCache::new(0),
            readers: [AtomicUsize::new(0), AtomicUsize::new(0)],
            hasty: PlainBool::new(false),
            cpu: ModelCpu::new(2),
            trace: NoTrace,
        }))
    }
}

// SAFETY: P1 to P5 as far as a model needs them: `words` serves every table, and nothing else is read.
unsafe impl PhysMap for World {
    fn reach(&self) -> FrameRange {
        FrameRange::from_numbers(0, self.tables).unwrap()
    }
    fn to_ptr(&self, _address: PhysAddr) -> *mut u8 {
        unreachable!("memory is reached as words")
    }
    fn to_phys(&self, _pointer: *const u8) -> PhysAddr {
        unreachable!("memory is reached as words")
    }
    unsafe fn words(&self, frame: Frame) -> &[AtomicU64] {
        self.looks[frame.number() as usize].fetch_add(1, Ordering::Relaxed);
        &self.words[frame.number() as usize]
    }
    unsafe fn words32(&self, _frame: Frame) -> &[AtomicU32] {
        unreachable!("the format has words of 64 bits")
    }
}

// SAFETY: F1: a number is in the list or out; F2: zeroed here; F3: nothing changes on failure.
unsafe impl FrameSource for World {
    fn alloc(&self, _request: &FrameRequest) -> Result<OwnedFrame, AllocError> {
        let number = self
            .free
            .lock()
            .unwrap()
            .pop()
            .ok_or(AllocError::OutOfMemory)?;
        for word in &self.words[number as usize] {
            word.store(0, Ordering::Relaxed);
        }
        // SAFETY: O1 to O3: the number was free.
        Ok(unsafe { OwnedFrame::from_raw(Frame::from_number(number), Order::ZERO) })
    }
}

impl FrameSink for World {
    fn free(&self, frame: OwnedFrame) {
        let (frame, _) = frame.into_raw();
        for word in &self.words[frame.number() as usize] {
            word.store(STRANGER, Ordering::Relaxed);
        }
        self.free.lock().unwrap().push(frame.number());
    }
}

// SAFETY: M1 to M4: nothing walks these tables.
unsafe impl Mmu for World {
    unsafe fn load_root(&self, _root: Root, _keep: bool) {}
    fn flush_local(&self, _request: &FlushRequest) {}
}

/// A section, and the number that says that it is over. Numbers are odd inside.
pub struct Section1<'a>(&'a AtomicUsize, usize);

impl Drop for Section1<'_> {
    fn drop(&mut self) {
        self.0.store(self.1, Ordering::Release);
    }
}

// SAFETY: G1: calls are refused; G2: `synchronize` waits until each section that it saw is over, unless the bug is planted; G3: acquire pairs with
// release. Sections do not nest in these models.
unsafe impl Grace for World {
    type Guard<'a> = Section1<'a>;

    fn read(&self) -> Section1<'_> {
        let mine = &self.readers[self.cpu.id(&()).index()];
        let before = mine.load(Ordering::Relaxed);
        mine.store(before + 1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        Section1(mine, before + 2)
    }
    fn defer(&self, call: Deferred) -> Result<(), Deferred> {
        Err(call)
    }
    fn poll(&self) -> usize {
        0
    }
    fn synchronize(&self) {
        if self.hasty.load(std::sync::atomic::Ordering::Relaxed) {
            return;
        }
        fence(Ordering::SeqCst);
        for reader in &self.readers {
            let seen = reader.load(Ordering::Acquire);
            while seen % 2 == 1 && reader.load(Ordering::Acquire) == seen {
                spin_loop();
            }
        }
    }
    fn pending(&self) -> usize {
        0
    }
}

// SAFETY: E1 to E4: one world, for ever.
unsafe impl Env for World {
    type Map = World;
    type Frames = World;
    type Mmu = World;
    type Grace = World;
    type Cpu = ModelCpu;
    type Trace = NoTrace;

    fn map(&self) -> &World {
        self
    }
    fn frames(&self) -> &World {
        self
    }
    fn mmu(&self) -> &World {
        self
    }
    fn grace(&self) -> &World {
        self
    }
    fn cpu(&self) -> &ModelCpu {
        &self.cpu
    }
    fn trace(&self) -> &NoTrace {
        &self.trace
    }
    fn slots(&self) -> &FrameTable {
        &self.slots
    }
    fn cache(&self) -> &TableCache {
        &self.cache
    }
}
