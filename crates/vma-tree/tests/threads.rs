//! Readers on real threads beside a writer. Not under loom: what it explores, these only try, on larger trees.
#![cfg(not(any(loom, shuttle)))]

mod common;

use std::alloc::{Layout, alloc, dealloc};
use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};

use common::{count, page};
use kmem_hal::{AllocError, Deferred, Grace, ObjectAlloc, Page};
use kmem_vma_tree::{Entry, Finger, Lockable, LookupError, SharedTree, SpaceSeq, Value, VmaLock};

/// The host's heap; freed memory is overwritten.
struct Heap;

// SAFETY: B1: the host's heap; B2: changes nothing on failure; B3: not type-stable.
unsafe impl<T> ObjectAlloc<T> for Heap {
    const TYPE_STABLE: bool = false;
    fn alloc(&self) -> Result<NonNull<T>, AllocError> {
        // SAFETY: nodes have a size.
        NonNull::new(unsafe { alloc(Layout::new::<T>()) }.cast()).ok_or(AllocError::OutOfMemory)
    }
    unsafe fn free(&self, object: NonNull<T>) {
        // SAFETY: the object came from `alloc`, and nobody looks at it any more.
        unsafe {
            object
                .as_ptr()
                .cast::<u8>()
                .write_bytes(0xa5, size_of::<T>());
            dealloc(object.as_ptr().cast(), Layout::new::<T>());
        }
    }
}

/// A count of readers; calls wait until it is zero. Whoever waits keeps new readers out, or it would wait for ever.
#[derive(Default)]
struct Count {
    waiting: AtomicBool,
    inside: AtomicUsize,
    calls: Mutex<Vec<Deferred>>,
}

struct Inside<'a>(&'a Count);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.inside.fetch_sub(1, Ordering::Release);
    }
}

// SAFETY: G1, G2: either the writer counts a reader or the reader does not find what was unlinked (the fences); G3:
// Release and Acquire on the count. G4 is not kept, and not needed here.
unsafe impl Grace for Count {
    type Guard<'a> = Inside<'a>;
    fn read(&self) -> Inside<'_> {
        while self.waiting.load(Ordering::Relaxed) {
            std::thread::yield_now();
        }
        self.inside.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        Inside(self)
    }
    fn defer(&self, call: Deferred) -> Result<(), Deferred> {
        self.calls.lock().unwrap().push(call);
        Ok(())
    }
    fn poll(&self) -> usize {
        let mut calls = self.calls.lock().unwrap();
        fence(Ordering::SeqCst);
        if self.inside.load(Ordering::Acquire) != 0 {
            return 0;
        }
        let made = calls.len();
        for call in calls.drain(..) {
            // SAFETY: nobody is inside.
            unsafe { call.run() };
        }
        made
    }
    fn synchronize(&self) {
        self.waiting.store(true, Ordering::Relaxed);
        while self.pending() != 0 {
            self.poll();
            std::thread::yield_now();
        }
        self.waiting.store(false, Ordering::Relaxed);
    }
    fn pending(&self) -> usize {
        self.calls.lock().unwrap().len()
    }
}

const RANGES: u64 = 300;
#[cfg(not(miri))]
const EDITS: u64 = 20_000;
#[cfg(miri)]
const EDITS: u64 = 200;

#[test]
fn readers_see_whole_states() {
    let grace = Count::default();
    let mut tree: SharedTree<u64, _, _> = SharedTree::new_in(Heap, &grace);
    let (mut writer, readers) = tree.split();
    for i in 0..RANGES {
        writer
            .store(count(10 * i, 5), Some(i), &mut |_| ())
            .unwrap();
    }
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for seed in 1..3_u64 {
            let done = &done;
            scope.spawn(move || {
                let mut random = seed * 0x9e37_79b9;
                let mut finger = Finger::new();
                while !done.load(Ordering::Relaxed) {
                    let section = readers.read();
                    for _ in 0..20 {
                        random = random.wrapping_mul(6364136223846793005).wrapping_add(1);
                        let i = (random >> 33) % RANGES;
                        // Odd ranges never change.
                        let odd = i | 1;
                        let found = section.get(page(10 * odd + 2)).unwrap();
                        assert_eq!((found.range, found.value), (count(10 * odd, 5), odd));
                        let near = section.get_with(&mut finger, page(10 * odd)).unwrap();
                        assert_eq!(near.value, odd);
                        // Even ones are punched, filled with another value, and healed, each in one moment.
                        let even = i & !1;
                        if let Some(found) = section.get(page(10 * even + 2)) {
                            let whole = found.range == count(10 * even, 5) && found.value == even;
                            let other = found.range == count(10 * even + 2, 1)
                                && found.value == even + 1000;
                            assert!(whole || other, "{found:?}");
                        }
                    }
                    let (mut free, mut odd) = (0, 0);
                    for entry in section.entries_from(Page::ZERO) {
                        assert!(entry.first().number() >= free, "{entry:?}");
                        free = entry.last().number() + 1;
                        let i = entry.first().number() / 10;
                        odd += u64::from((entry.range, entry.value) == (count(10 * i, 5), i | 1));
                    }
                    // What never changes is given whole, every time (R3).
                    assert_eq!(odd, RANGES / 2);
                    assert!(free >= 10 * (RANGES - 1) + 5);
                }
            });
        }
        for i in 0..EDITS {
            let even = ((i * 7919) % RANGES) & !1;
            let hole = count(10 * even + 2, 1);
            // Readers that never pause let garbage pile up; then the writer waits.
            let mut store = |value| {
                while writer.store(hole, value, &mut |_| ()) == Err(AllocError::Busy) {
                    writer.quiesce();
                }
            };
            store(None);
            store(Some(even + 1000));
            while writer
                .store(count(10 * even, 5), Some(even), &mut |_| ())
                .is_err()
            {
                writer.quiesce();
            }
        }
        done.store(true, Ordering::Relaxed);
    });
    writer.check().unwrap();
    writer.quiesce();
    assert_eq!((writer.len() as u64, writer.garbage()), (RANGES, 0));
}

/// A VMA as a kernel would have it: a lock and what it guards.
struct Vma {
    lock: VmaLock,
    data: [AtomicUsize; 2],
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Handle(NonNull<Vma>);

// SAFETY: the VMAs of the test live longer than its threads.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Value for Handle {
    fn to_word(self) -> u64 {
        self.0.to_word()
    }
    fn from_word(word: u64) -> Self {
        Self(NonNull::from_word(word))
    }
}

// SAFETY: LV1: the VMAs live longer than the tree; LV2: the test write-locks before it changes one.
unsafe impl Lockable for Handle {
    unsafe fn lock<'v>(self) -> &'v VmaLock {
        // SAFETY: as above.
        unsafe { &self.0.as_ref().lock }
    }
}

#[test]
fn a_locked_vma_stays_as_it_is() {
    let vmas: Vec<Vma> = (0..20)
        .map(|_| Vma {
            lock: VmaLock::new(),
            data: [const { AtomicUsize::new(0) }; 2],
        })
        .collect();
    let grace = Count::default();
    let space = SpaceSeq::new();
    let mut tree: SharedTree<Handle, _, _> = SharedTree::new_in(Heap, &grace);
    let (mut writer, readers) = tree.split();
    for (i, vma) in vmas.iter().enumerate() {
        writer
            .store(
                count(10 * i as u64, 10),
                Some(Handle(NonNull::from(vma))),
                &mut |_| (),
            )
            .unwrap();
    }
    let done = AtomicBool::new(false);
    let (locked, refused) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let (done, locked, refused, space) = (&done, &locked, &refused, &space);
        scope.spawn(move || {
            let mut at = 0;
            while !done.load(Ordering::Relaxed) || locked.load(Ordering::Relaxed) == 0 {
                at = (at + 37) % 200;
                let section = readers.read();
                match section.lookup_locked(space, page(at)) {
                    Ok((Entry { value, .. }, guard)) => {
                        // SAFETY: the VMAs outlive the scope.
                        let vma = unsafe { value.0.as_ref() };
                        let seen = vma.data[0].load(Ordering::Relaxed);
                        assert_eq!(
                            seen,
                            vma.data[1].load(Ordering::Relaxed),
                            "half of a change"
                        );
                        drop(guard);
                        locked.fetch_add(1, Ordering::Relaxed);
                    }
                    Err(LookupError::WriteLocked | LookupError::Changed) => {
                        refused.fetch_add(1, Ordering::Relaxed);
                    }
                    Err(error) => panic!("{error}"),
                }
            }
        });
        for round in 0..EDITS as usize / 10 {
            let three = [round % 20, (round * 3 + 1) % 20, (round * 7 + 2) % 20];
            for at in three {
                vmas[at]
                    .lock
                    .start_write(space, &mut std::thread::yield_now);
                vmas[at].data[0].fetch_add(1, Ordering::Relaxed);
            }
            for at in three {
                vmas[at].data[1].fetch_add(1, Ordering::Relaxed);
            }
            assert!(vmas[three[0]].lock.is_write_locked(space));
            space.end_write_all();
            assert!(!vmas[three[0]].lock.is_write_locked(space));
        }
        done.store(true, Ordering::Relaxed);
    });
    assert!(locked.load(Ordering::Relaxed) > 0);
}

std::thread_local! {
    /// What happens between finding a VMA and locking it.
    static BETWEEN: std::cell::RefCell<Option<Box<dyn FnOnce()>>> = const { std::cell::RefCell::new(None) };
}

/// A handle whose lock is a while away: meanwhile the writer does what `BETWEEN` says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Slow(Handle);

impl Value for Slow {
    fn to_word(self) -> u64 {
        self.0.to_word()
    }
    fn from_word(word: u64) -> Self {
        Self(Handle::from_word(word))
    }
}

// SAFETY: as for `Handle`.
unsafe impl Lockable for Slow {
    unsafe fn lock<'v>(self) -> &'v VmaLock {
        if let Some(between) = BETWEEN.take() {
            between();
        }
        // SAFETY: as for `Handle`.
        unsafe { self.0.lock() }
    }
}

/// A VMA that changed between being found and being locked is not given out, whatever changed, and is free again.
#[test]
fn a_vma_that_changed_before_it_was_locked_is_not_given() {
    let vma = || Vma {
        lock: VmaLock::new(),
        data: [const { AtomicUsize::new(0) }; 2],
    };
    let vmas: [[Vma; 2]; 4] = std::array::from_fn(|_| [vma(), vma()]);
    let slow = |vma| Slow(Handle(NonNull::from(vma)));
    let whole = count(10, 10);
    // Unmapped, shortened, replaced, and cut off below.
    let changes = [
        (whole, false),
        (count(18, 2), false),
        (whole, true),
        (count(10, 1), true),
    ];
    for ((range, is_replaced), [old, new]) in changes.into_iter().zip(&vmas) {
        let value = is_replaced.then(|| slow(new));
        let grace = Count::default();
        let space = SpaceSeq::new();
        let tree: SharedTree<Slow, _, _> = SharedTree::new_in(Heap, &grace);
        // SAFETY: one writer at a time.
        let store = |range, value| unsafe { tree.writer() }.store(range, value, &mut |_| ());
        store(whole, Some(slow(old))).unwrap();
        let section = tree.read();
        let not_mapped = section.lookup_locked(&space, page(20)).err();
        assert_eq!(not_mapped, Some(LookupError::NotMapped));
        assert!(section.lookup_locked(&space, page(15)).is_ok());
        {
            let edit = || {
                old.lock.start_write(&space, &mut || ());
                store(range, value).unwrap();
                space.end_write_all();
            };
            let edit: Box<dyn FnOnce() + '_> = Box::new(edit);
            // SAFETY: it is called, and gone, before the call below returns.
            let edit: Box<dyn FnOnce()> = unsafe { std::mem::transmute(edit) };
            BETWEEN.set(Some(edit));
            let found = section.lookup_locked(&space, page(15));
            assert_eq!(found.err(), Some(LookupError::Changed), "{range:?}");
            assert!(BETWEEN.take().is_none());
        }
        assert_eq!((old.lock.readers(), new.lock.readers()), (0, 0));
        drop(section);
    }
}
