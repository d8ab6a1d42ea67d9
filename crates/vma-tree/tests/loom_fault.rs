//! Models of faults that hold a VMA's lock and not the space's: what an address space builds on [`VmaLock`], in worlds of one or two pages.
//!
//! The tree is a word for each page, a VMA says itself which page it has, and the table is two words under a lock, as in a leaf table. Each model
//! is run with a mistake as well, and has to find it.
#![cfg(loom)]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use kmem_hal::sync::{AtomicUsize, Ordering, UnsafeCell, spin_loop};
use kmem_vma_tree::{SpaceSeq, VmaLock};
use loom::sync::Mutex;

/// What a leaf table of one page and its slot say.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Table {
    /// The frame of page 0; 0 for none.
    frame: usize,
    writable: bool,
    shares: usize,
    pins: usize,
}

struct Space {
    seq: SpaceSeq,
    /// The VMA that the tree leads to, plus 1, for each page.
    tree: [AtomicUsize; 2],
    lock: VmaLock,
    /// Which page the VMA has; `None` in the stock.
    vma: UnsafeCell<Option<usize>>,
    table: Mutex<Table>,
}

// SAFETY: that the cell is read under the lock or written by the one writer is what the models check.
unsafe impl Sync for Space {}
// SAFETY: as above.
unsafe impl Send for Space {}

impl Space {
    fn new(table: Table) -> Arc<Self> {
        Arc::new(Self {
            seq: SpaceSeq::new(),
            tree: [AtomicUsize::new(1), AtomicUsize::new(0)],
            lock: VmaLock::new(),
            vma: UnsafeCell::new(Some(0)),
            table: Mutex::new(table),
        })
    }

    /// Runs `fault` with the VMA of page 0 held; `None` where it is not there or is being changed. `looks`: whether the VMA is asked
    /// for its page.
    fn in_vma<R>(&self, looks: bool, fault: impl FnOnce() -> R) -> Option<R> {
        if self.tree[0].load(Ordering::Acquire) == 0 {
            return None;
        }
        let guard = self.lock.try_read(&self.seq)?;
        // SAFETY: the model's question: the guard keeps the writer out.
        let page = self.vma.with(|vma| unsafe { *vma });
        if looks && page != Some(0) {
            return None;
        }
        let result = fault();
        drop(guard);
        Some(result)
    }

    fn start_write(&self) {
        self.lock.start_write(&self.seq, &mut spin_loop);
    }

    fn write_vma(&self, page: Option<usize>) {
        // SAFETY: the model's question: the VMA is write-locked.
        self.vma.with_mut(|vma| unsafe { *vma = page });
    }
}

fn explore(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(Some(3));
    builder.check(model);
}

fn finds(model: impl Fn() + Sync + Send + 'static) {
    let found = catch_unwind(AssertUnwindSafe(|| explore(model)));
    assert!(found.is_err(), "the model does not find the mistake");
}

/// munmap takes the VMA out and makes another mapping's of its memory, while a fault has found it.
fn fault_against_munmap(looks: bool) -> impl Fn() + Sync + Send + 'static {
    move || {
        let space = Space::new(Table::default());
        let other = Arc::clone(&space);
        let fault = loom::thread::spawn(move || {
            other.in_vma(looks, || other.table.lock().unwrap().frame = 7);
        });
        space.start_write();
        space.tree[0].store(0, Ordering::Release);
        space.write_vma(None);
        space.table.lock().unwrap().frame = 0;
        // The memory is the next mapping's.
        space.write_vma(Some(1));
        space.tree[1].store(1, Ordering::Release);
        space.seq.end_write_all();
        fault.join().unwrap();
        assert_eq!(space.table.lock().unwrap().frame, 0, "a page in no mapping");
    }
}

#[test]
fn a_fault_leaves_no_page_where_munmap_was() {
    explore(fault_against_munmap(true));
}

#[test]
fn a_fault_that_does_not_ask_the_vma_is_found() {
    finds(fault_against_munmap(false));
}

/// fork shares the table while a fault makes a page writable in place. `waits`: whether fork locks the VMA.
fn fault_against_fork(waits: bool) -> impl Fn() + Sync + Send + 'static {
    move || {
        let space = Space::new(Table {
            frame: 7,
            shares: 1,
            ..Table::default()
        });
        let other = Arc::clone(&space);
        let fault = loom::thread::spawn(move || {
            other.in_vma(true, || {
                // The path is looked at, then the entry, as a cursor does.
                let alone = other.table.lock().unwrap().shares == 1;
                if alone {
                    other.table.lock().unwrap().writable = true;
                }
            });
        });
        if waits {
            space.start_write();
        }
        {
            let mut table = space.table.lock().unwrap();
            table.shares = 2;
            table.writable = false;
        }
        if waits {
            space.seq.end_write_all();
        }
        fault.join().unwrap();
        let table = *space.table.lock().unwrap();
        assert!(
            !(table.shares == 2 && table.writable),
            "a shared page that one side writes to"
        );
    }
}

#[test]
fn no_page_is_writable_after_fork() {
    explore(fault_against_fork(true));
}

#[test]
fn a_fork_that_does_not_wait_for_faults_is_found() {
    finds(fault_against_fork(false));
}

/// fork looks for pins and shares the table while a page in it is being pinned.
fn pin_against_fork(waits: bool) -> impl Fn() + Sync + Send + 'static {
    move || {
        let space = Space::new(Table {
            frame: 7,
            writable: true,
            shares: 1,
            ..Table::default()
        });
        let other = Arc::clone(&space);
        let pin = loom::thread::spawn(move || {
            other.in_vma(true, || {
                let alone = other.table.lock().unwrap().shares == 1;
                if alone {
                    other.table.lock().unwrap().pins += 1;
                }
            });
        });
        if waits {
            space.start_write();
        }
        // The count of shares is changed without the table's lock, after a look at the pins.
        let pinned = space.table.lock().unwrap().pins > 0;
        if !pinned {
            space.table.lock().unwrap().shares = 2;
        }
        if waits {
            space.seq.end_write_all();
        }
        pin.join().unwrap();
        let table = *space.table.lock().unwrap();
        assert!(
            !(table.shares == 2 && table.pins > 0),
            "a pinned page in a shared table"
        );
    }
}

#[test]
fn no_pinned_page_is_shared() {
    explore(pin_against_fork(true));
}

#[test]
fn a_fork_that_does_not_wait_for_pins_is_found() {
    finds(pin_against_fork(false));
}

/// Two faults copy one page; the program writes after its own. `again`: whether the entry is looked at again under the table's lock.
fn fault_against_fault(again: bool) -> impl Fn() + Sync + Send + 'static {
    move || {
        let space = Space::new(Table {
            frame: 1,
            shares: 1,
            ..Table::default()
        });
        // What frame 2 and 3, the copies, hold: who wrote to them.
        let written = Arc::new([AtomicUsize::new(0), AtomicUsize::new(0)]);
        let fault = |copy: usize| {
            let (space, written) = (Arc::clone(&space), Arc::clone(&written));
            move || {
                space.in_vma(true, || {
                    let seen = *space.table.lock().unwrap();
                    if !seen.writable {
                        // The copy is made without the lock.
                        let mut table = space.table.lock().unwrap();
                        if !again || table.frame == seen.frame && !table.writable {
                            table.frame = copy;
                            table.writable = true;
                        }
                    }
                });
                // The access is made again.
                let table = *space.table.lock().unwrap();
                assert!(table.writable);
                written[table.frame - 2].fetch_add(1, Ordering::Relaxed);
            }
        };
        let first = loom::thread::spawn(fault(2));
        fault(3)();
        first.join().unwrap();
        let table = *space.table.lock().unwrap();
        let seen = written[table.frame - 2].load(Ordering::Relaxed);
        assert_eq!(seen, 2, "a write went to a page that was replaced");
    }
}

#[test]
fn two_faults_on_one_page_lose_no_write() {
    explore(fault_against_fault(true));
}

#[test]
fn a_fault_that_does_not_look_again_is_found() {
    finds(fault_against_fault(false));
}
