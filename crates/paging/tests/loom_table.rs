//! Models of the table locks, of detaching, and of readers without a lock.
//!
//! The format is the smallest there can be: two levels of two entries. A frame that is freed is at once somebody
//! else's, who writes words into it that look like entries: a reader that is still in it comes back with a frame that
//! nobody mapped.
#![cfg(loom)]

use loom::sync::Mutex;
use std::sync::atomic::AtomicBool as PlainBool;

use kmem_hal::sync::{AtomicU32, AtomicU64, AtomicUsize, Ordering, fence, spin_loop};
use kmem_hal::{
    AllocError, Canonical, Cpu, Deferred, FlushRequest, Frame, FrameRange, FrameRequest, FrameSink,
    FrameSlot, FrameSource, FrameTable, Grace, Mmu, NoTrace, Order, OwnedFrame, Page, PageRange,
    PhysAddr, PhysMap, Root, SECTION_FRAMES, Section,
};
use kmem_paging::format::{Format, Kind, Level};
use kmem_paging::{Attributes, Entry, Env, PageTable, Payload, Rights, TableCache};
use kmem_testkit::model::{ModelCpu, explore};

#[derive(Clone, Copy, Debug)]
struct Tiny;

// SAFETY: F1 to F3: bit 0 is set in every word, bit 1 tells tables from leaves; F4: there is no hardware.
unsafe impl Format for Tiny {
    type Word = u64;
    const NAME: &'static str = "two levels of two entries";
    const LEVELS: &'static [Level] = &[
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
    ];
    const MIN_LEVELS: usize = 2;
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
    fn leaf(_level: usize, frame: Frame, _attributes: &Attributes) -> u64 {
        frame.start().as_u64() | 1
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
    fn attributes(_level: usize, _word: u64) -> Attributes {
        Attributes::new(Rights::READ)
    }
    fn payload_of(_word: u64) -> Payload {
        unreachable!("no payloads in this model")
    }
    fn is_settled(_word: u64) -> bool {
        true
    }
}

/// Tables are in the frames below this number; leaves map others, which have no memory.
const TABLES: u64 = SECTION_FRAMES;

/// What a stranger leaves in a frame that was freed: a leaf of a frame that nobody maps.
const STRANGER: u64 = 0xbad << 12 | 1;

struct World {
    words: Vec<[AtomicU64; 2]>,
    /// Added to whenever a table is looked at. Loom finds the schedules worth trying from the last access of each word
    /// alone, so a load that another thread's own load follows would hide; an addition does not.
    looks: Vec<AtomicUsize>,
    free: Mutex<Vec<u64>>,
    slots: FrameTable,
    cache: TableCache,
    readers: [AtomicUsize; 2],
    /// Plants a bug: grace periods that do not wait.
    hasty: PlainBool,
    cpu: ModelCpu,
    trace: NoTrace,
}

impl World {
    fn new() -> &'static Self {
        let section = Section::absent();
        let slots: Vec<FrameSlot> = (0..SECTION_FRAMES).map(|_| FrameSlot::new()).collect();
        section.set_ready(Box::leak(slots.into_boxed_slice()));
        let table = FrameTable::new();
        table.init(Box::leak(Box::new([section])));
        Box::leak(Box::new(Self {
            words: (0..TABLES)
                .map(|_| [AtomicU64::new(0), AtomicU64::new(0)])
                .collect(),
            looks: (0..TABLES).map(|_| AtomicUsize::new(0)).collect(),
            free: Mutex::new((0..TABLES).rev().collect()),
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
        FrameRange::from_numbers(0, TABLES).unwrap()
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

struct Section1<'a>(&'a AtomicUsize);

impl Drop for Section1<'_> {
    fn drop(&mut self) {
        self.0.store(0, Ordering::Release);
    }
}

// SAFETY: G1: calls are refused; G2: `synchronize` waits until each reader was seen gone, unless the bug is planted; G3: acquire pairs with
// release. Sections do not nest in these models.
unsafe impl Grace for World {
    type Guard<'a> = Section1<'a>;

    fn read(&self) -> Section1<'_> {
        let mine = &self.readers[self.cpu.id(&()).index()];
        mine.store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        Section1(mine)
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
            while reader.load(Ordering::Acquire) != 0 {
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

type Table = PageTable<Tiny, &'static World, OwnedFrame>;

fn page(number: u64) -> Page {
    Page::new(number).unwrap()
}

/// A frame to be mapped; nobody reads it.
fn frame(number: u64) -> OwnedFrame {
    // SAFETY: each model uses a number once at a time.
    unsafe { OwnedFrame::from_raw(Frame::from_number(0x100 + number), Order::ZERO) }
}

fn map(table: &Table, number: u64) {
    table
        .cursor(PageRange::single(page(number)))
        .unwrap()
        .map(page(number), frame(number), Rights::READ)
        .unwrap();
}

fn unmap(table: &Table, number: u64) -> u64 {
    let range = PageRange::single(page(number));
    let mut gather = table.gather::<1>();
    let unmapped = table.cursor(range).unwrap().unmap(range, &mut gather);
    let mut count = 0;
    gather.commit(|frame| {
        assert_eq!(frame.first().number(), 0x100 + number);
        count += 1;
        let _ = frame.into_raw();
    });
    assert_eq!(unmapped, Ok(count));
    count
}

/// What a page may be: its own frame, or nothing.
fn check(entry: Entry, number: u64) -> bool {
    match entry {
        Entry::Empty => false,
        Entry::Leaf(leaf) => {
            assert_eq!(
                leaf.frame.number(),
                0x100 + number,
                "page {number} was read out of a table that is somebody else's"
            );
            true
        }
        Entry::Payload(_) => unreachable!(),
    }
}

/// Nothing is left but what was there before.
fn finish(world: &'static World, table: Table) {
    table.destroy(|_, frame| _ = frame.into_raw(), |_, _| {});
    assert_eq!(
        world.free.lock().unwrap().len() as u64,
        TABLES,
        "tables leaked"
    );
}

/// Runs two closures as CPUs 0 and 1 over one table that `prepare` filled.
fn two(
    hasty: bool,
    prepare: fn(&Table),
    first: fn(&Table),
    second: fn(&Table),
    after: fn(&Table),
) -> impl Fn() + Sync + Send + 'static {
    move || {
        ModelCpu::bind(0);
        let world = World::new();
        world
            .hasty
            .store(hasty, std::sync::atomic::Ordering::Relaxed);
        let table: &'static Table = Box::leak(Box::new(Table::new(world).unwrap()));
        prepare(table);
        let other = loom::thread::spawn(move || {
            ModelCpu::bind(1);
            second(table);
        });
        first(table);
        other.join().unwrap();
        after(table);
        // SAFETY: the box was leaked above, and the other thread is gone.
        finish(world, *unsafe {
            Box::from_raw(std::ptr::from_ref(table).cast_mut())
        });
    }
}

fn walk_against_free(hasty: bool) {
    explore(
        3,
        two(
            hasty,
            |table| map(table, 0),
            |table| {
                check(table.query(page(0)), 0);
            },
            |table| assert_eq!(unmap(table, 0), 1),
            |table| assert_eq!(table.table_count(), 1),
        ),
    );
}

#[test]
fn a_reader_is_never_in_a_table_that_was_freed() {
    walk_against_free(false);
}

#[test]
#[should_panic(expected = "somebody else's")]
fn a_table_freed_without_a_grace_period_is_found() {
    walk_against_free(true);
}

#[test]
fn two_map_in_one_table_that_does_not_exist_yet() {
    explore(
        3,
        two(
            false,
            |_| {},
            |table| map(table, 0),
            |table| map(table, 1),
            |table| {
                assert!(check(table.query(page(0)), 0));
                assert!(check(table.query(page(1)), 1));
                assert_eq!(table.table_count(), 2);
            },
        ),
    );
}

#[test]
fn one_maps_while_the_other_empties_the_table() {
    explore(
        3,
        two(
            false,
            |table| map(table, 0),
            |table| map(table, 1),
            |table| assert_eq!(unmap(table, 0), 1),
            |table| {
                assert!(!check(table.query(page(0)), 0));
                assert!(check(table.query(page(1)), 1));
                assert_eq!(table.table_count(), 2);
            },
        ),
    );
}

#[test]
fn two_empty_one_table() {
    explore(
        3,
        two(
            false,
            |table| {
                map(table, 0);
                map(table, 1);
            },
            |table| assert_eq!(unmap(table, 0), 1),
            |table| assert_eq!(unmap(table, 1), 1),
            |table| assert_eq!(table.table_count(), 1),
        ),
    );
}

#[test]
fn two_unmap_one_page() {
    explore(
        3,
        two(
            false,
            |table| {
                map(table, 0);
                map(table, 2);
            },
            |table| {
                unmap(table, 0);
            },
            |table| {
                unmap(table, 0);
            },
            |table| {
                assert!(!check(table.query(page(0)), 0));
                assert_eq!(table.table_count(), 2);
            },
        ),
    );
}
