//! Two CPUs in one allocator, every interleaving: no frame has two owners, none is lost, a refusal is honest.
#![cfg(loom)]

#[path = "common/models.rs"]
mod models;

use kmem_buddy::Reservation;
use kmem_hal::sync::{AtomicU32, Ordering};
use kmem_hal::{
    AllocError, CpuCall, CpuCallError, CpuId, CpuSet, Frame, FrameRange, FrameRequest, FrameSink,
    FrameSource, NoCpuCall, Order, OwnedFrame, RawLock, Spin,
};
use kmem_testkit::model::ModelCpu;
use loom::thread;
use models::*;

#[test]
fn two_allocations_of_the_last_two_frames() {
    explore(|| {
        let buddy = boot();
        let _rest = fill(buddy, 2);
        let held = on_two_cpus(move || one(buddy), move || one(buddy));
        // One CPU's refill may have taken both frames: then the other was told that it was not asked.
        assert!(!held.is_empty());
        settled(buddy, held, 2);
    });
}

#[test]
fn an_allocation_beside_a_free_of_a_large_block() {
    explore(|| {
        let buddy = boot();
        let mut rest = fill(buddy, 0);
        let large = block_of(&mut rest, 5);
        let held = on_two_cpus(
            move || ask(buddy, order(5)),
            move || {
                buddy.free(large);
                Vec::new()
            },
        );
        settled(buddy, held, 32);
    });
}

#[test]
fn a_release_beside_a_free_into_its_block() {
    explore(|| {
        let buddy = boot();
        let mut rest = fill(buddy, 0);
        // A frame of the block whose first three frames were reserved at boot: its free looks at the reserved list.
        let at = rest
            .iter()
            .position(|block| block.first().number() == FIRST + 3)
            .unwrap();
        let neighbour = rest.swap_remove(at);
        let count = neighbour.order().frames();
        let held = on_two_cpus(
            move || {
                buddy.free(neighbour);
                Vec::new()
            },
            move || {
                // SAFETY: nobody uses the simulated initrd.
                assert_eq!(unsafe { buddy.release(Reservation::Initrd) }, 3);
                Vec::new()
            },
        );
        settled(buddy, held, count + 3);
    });
}

#[test]
fn two_cpus_free_into_one_word() {
    explore(|| {
        let buddy = boot();
        let mut rest = fill(buddy, 0);
        let (lower, upper) = block_of(&mut rest, 6).split().unwrap();
        let held = on_two_cpus(
            move || {
                buddy.free(lower);
                Vec::new()
            },
            move || {
                buddy.free(upper);
                Vec::new()
            },
        );
        // The halves have merged: the whole can be had.
        let whole = buddy.alloc(&order(6)).unwrap();
        buddy.free(whole);
        settled(buddy, held, 64);
    });
}

fn release_beside_a_wrong_free() {
    {
        let buddy = boot();
        let rest = fill(buddy, 0);
        let held = on_two_cpus(
            move || {
                let middle = FrameRange::from_numbers(FIRST + 1, FIRST + 2).unwrap();
                // SAFETY: nobody uses the simulated initrd.
                assert_eq!(unsafe { buddy.release_range(middle) }, Ok(1));
                Vec::new()
            },
            move || {
                // SAFETY: the wrong free is what is tested.
                let reserved =
                    unsafe { OwnedFrame::from_raw(Frame::new(FIRST + 2).unwrap(), Order::ZERO) };
                assert!(
                    buddy.try_free(reserved).is_err(),
                    "a reserved frame was taken for free"
                );
                Vec::new()
            },
        );
        drop(rest);
        settled(buddy, held, 1);
    }
}

#[test]
fn a_reserved_frame_is_refused_while_its_neighbour_is_released() {
    explore(release_beside_a_wrong_free);
}

#[test]
fn a_huge_request_against_a_small_one() {
    explore(|| {
        let buddy = boot();
        let mut rest = fill(buddy, 0);
        let large = block_of(&mut rest, 5);
        buddy.free(large);
        let held = on_two_cpus(move || ask(buddy, order(5)), move || ask(buddy, order(4)));
        // Whoever came first was served, and the other was not given a part of it.
        assert_eq!(held.len(), 1);
        settled(buddy, held, 32);
    });
}

#[test]
fn two_blocks_at_one_place() {
    explore(|| {
        let buddy = boot();
        let mut rest = fill(buddy, 0);
        let large = block_of(&mut rest, 5);
        let place = large.first();
        buddy.free(large);
        let at = move || -> Vec<OwnedFrame> {
            buddy
                .alloc_at(place, Order::new(5).unwrap())
                .into_iter()
                .collect()
        };
        let held = on_two_cpus(at, at);
        assert_eq!(held.len(), 1, "a place has two owners, or none");
        settled(buddy, held, 32);
    });
}

#[test]
fn a_drain_beside_an_allocation() {
    // Ends in a refusal, as the batches do.
    explore_to(3, || {
        let buddy = boot();
        let mut rest = fill(buddy, 0);
        let (lower, upper) = block_of(&mut rest, 2).split().unwrap();
        // Both halves lie in the array of CPU 0.
        buddy.free(lower);
        buddy.free(upper);
        let held = on_two_cpus(
            move || {
                assert!(buddy.drain_local());
                Vec::new()
            },
            move || ask(buddy, order(1)),
        );
        settled(buddy, held, 4);
    });
}

#[test]
fn a_type_is_stolen_beside_an_allocation() {
    explore(|| {
        let buddy = boot();
        let mut rest = fill(buddy, 0);
        buddy.free(block_of(&mut rest, 5));
        // Both types have nothing of their own: the block of the other's type is taken, or changes sides.
        let held = on_two_cpus(
            move || ask(buddy, order(4).movable()),
            move || ask(buddy, order(4)),
        );
        assert_eq!(held.len(), 2, "there was room for both");
        settled(buddy, held, 32);
    });
}

#[test]
fn a_refill_beside_a_flush() {
    explore(|| {
        let buddy = boot();
        let mut rest = fill(buddy, 0);
        let (lower, upper) = block_of(&mut rest, 2).split().unwrap();
        let (first, second) = lower.split().unwrap();
        let (third, fourth) = upper.split().unwrap();
        buddy.free(first);
        buddy.free(second);
        // CPU 0's array is full: one more is a flush.
        let mut held = on_two_cpus(
            move || {
                buddy.free(third);
                Vec::new()
            },
            move || ask(buddy, FrameRequest::ONE),
        );
        held.push(fourth);
        settled(buddy, held, 4);
    });
}

#[test]
fn a_range_beside_the_free_that_completes_it() {
    explore(|| {
        let buddy = boot();
        let mut rest = fill(buddy, 0);
        let (lower, upper) = block_of(&mut rest, 6).split().unwrap();
        buddy.free(lower);
        let held = on_two_cpus(
            move || match buddy.alloc_range(48, Order::ZERO, &FrameRequest::ONE) {
                Ok(range) => range.into_blocks(Order::MAX_BUDDY).collect(),
                Err(error) => refused(error),
            },
            move || {
                buddy.free(upper);
                Vec::new()
            },
        );
        let frames: u64 = held.iter().map(|block| block.order().frames()).sum();
        assert!(frames == 0 || frames == 48);
        settled(buddy, held, 64);
    });
}

#[test]
fn a_claim_beside_a_free() {
    explore_to(3, || {
        let buddy = boot();
        let mut rest = fill(buddy, 0);
        let (lower, upper) = block_of(&mut rest, 6).split().unwrap();
        let range = FrameRange::new(lower.first(), 64).unwrap();
        buddy.free(lower);
        // A frame to move to, in another page block.
        let spare = rest.pop().unwrap();
        let spares = spare.order().frames();
        buddy.free(spare);
        let held = on_two_cpus(
            move || match buddy.claim(range, &Immovable) {
                Ok(range) => range.into_blocks(Order::MAX_BUDDY).collect(),
                Err(_) => Vec::new(),
            },
            move || {
                buddy.free(upper);
                Vec::new()
            },
        );
        let frames: u64 = held.iter().map(|block| block.order().frames()).sum();
        assert!(frames == 0 || frames == 64);
        settled(buddy, held, 64 + spares);
    });
}

#[test]
fn a_claim_beside_an_allocation() {
    explore_to(2, || {
        let buddy = boot();
        let mut rest = fill(buddy, 0);
        let whole = block_of(&mut rest, 6);
        let range = whole.range();
        buddy.free(whole);
        let held = on_two_cpus(
            move || match buddy.claim(range, &Immovable) {
                Ok(range) => range.into_blocks(Order::MAX_BUDDY).collect(),
                Err(_) => Vec::new(),
            },
            move || ask(buddy, order(5)),
        );
        // One of the two at least; never both.
        let frames: u64 = held.iter().map(|block| block.order().frames()).sum();
        assert!(frames <= 64);
        settled(buddy, held, 64);
    });
}

#[test]
fn a_batch_beside_a_batch_of_frees() {
    // Ends in a refusal, whose words both CPUs touch: all interleavings are too many.
    explore_to(3, || {
        let buddy = boot();
        let mut rest = fill(buddy, 2);
        let (first, second) = block_of(&mut rest, 1).split().unwrap();
        let mut blocks = vec![first, second];
        let held = on_two_cpus(
            move || {
                let mut got = Vec::new();
                let result = buddy.alloc_batch(&FrameRequest::ONE, 3, &mut |frame| got.push(frame));
                assert_eq!(result.unwrap_or(0), got.len());
                assert!(got.len() >= 2, "two were free all the time");
                got
            },
            move || {
                buddy.free_batch(&mut || blocks.pop());
                Vec::new()
            },
        );
        settled(buddy, held, 4);
    });
}

#[test]
fn three_cpus_and_two_frames() {
    explore_to(2, || {
        let buddy = boot();
        let mut rest = fill(buddy, 1);
        let last = block_of(&mut rest, 0);
        let third = thread::spawn(move || {
            ModelCpu::bind(2);
            buddy.free(last);
            assert!(buddy.drain_local());
        });
        let held = on_two_cpus(
            move || ask(buddy, FrameRequest::ONE),
            move || ask(buddy, FrameRequest::ONE),
        );
        third.join().unwrap();
        // One frame was free all the time; a refill may have taken both.
        assert!(!held.is_empty());
        settled(buddy, held, 2);
    });
}

#[test]
fn figures_beside_an_allocation_and_a_free() {
    explore(|| {
        let buddy = boot();
        let mut rest = fill(buddy, 0);
        let large = block_of(&mut rest, 5);
        let held = on_two_cpus(
            move || {
                let zone = buddy.zones().next().unwrap();
                assert_eq!(zone.sum(), zone.free, "the lists and the count differ");
                assert!(zone.free == 0 || zone.free == 32);
                Vec::new()
            },
            move || {
                buddy.free(large);
                Vec::new()
            },
        );
        settled(buddy, held, 32);
    });
}

/// The other CPU finds the allocator in the middle of its start: refused, or served like anybody.
fn start_beside_an_allocation() {
    let buddy: &'static Machine =
        Box::leak(Box::new(Machine::new(Memory::new(), ModelCpu::new(3))));
    let held = on_two_cpus(
        move || {
            initialise(buddy);
            Vec::new()
        },
        move || match buddy.alloc(&order(4)) {
            Ok(block) => vec![block],
            Err(error) => {
                assert_eq!(error, AllocError::NotInitialised);
                Vec::new()
            }
        },
    );
    let total = buddy.mem_info().total;
    settled(buddy, held, total);
}

#[test]
fn a_start_beside_an_allocation() {
    explore_to(2, start_beside_an_allocation);
}

/// A block that comes back at once is hot; a drain takes it along.
#[test]
fn a_hot_block_beside_another_cpu_that_takes() {
    explore_to(2, || {
        let buddy = boot();
        let _rest = fill(buddy, 2);
        // One entry of the array is lent and comes back.
        let lent = ask(buddy, FrameRequest::ONE).pop().unwrap();
        buddy.free(lent);
        let lent = ask(buddy, FrameRequest::ONE).pop().unwrap();
        buddy.free(lent);
        let held = on_two_cpus(
            move || {
                assert!(buddy.drain_local());
                ask(buddy, FrameRequest::ONE)
            },
            move || ask(buddy, FrameRequest::ONE),
        );
        settled(buddy, held, 2);
    });
}

/// Faults on purpose: each model must find its fault, or it proves nothing.
mod planted {
    use super::*;
    use kmem_buddy::plant::{Plant, plant};

    fn must_fail(model: impl Fn() + Sync + Send + 'static) {
        let run = std::panic::AssertUnwindSafe(|| explore_to(2, model));
        assert!(
            std::panic::catch_unwind(run).is_err(),
            "the model does not notice the fault"
        );
    }

    #[test]
    fn a_reserved_list_that_changes_before_it_says_so() {
        plant(Plant::ReservedWriterUnfenced);
        must_fail(release_beside_a_wrong_free);
    }

    #[test]
    fn a_reserved_list_whose_version_is_read_too_early() {
        plant(Plant::ReservedReaderUnfenced);
        must_fail(release_beside_a_wrong_free);
    }

    #[test]
    fn a_reserved_list_that_never_says_that_it_changes() {
        plant(Plant::ReservedVersionEven);
        must_fail(release_beside_a_wrong_free);
    }

    /// A lock whose release orders nothing: `K2` is broken.
    struct Hasty(AtomicU32);

    // SAFETY: none; the model must notice.
    unsafe impl RawLock for Hasty {
        type State = ();

        fn init() -> Self {
            Self(AtomicU32::new(0))
        }
        fn lock(&self) {
            while self.try_lock().is_none() {
                thread::yield_now();
            }
        }
        fn try_lock(&self) -> Option<()> {
            self.0
                .compare_exchange(0, 1, Ordering::Relaxed, Ordering::Relaxed)
                .ok()
                .map(|_| ())
        }
        unsafe fn unlock(&self, (): ()) {
            self.0.store(0, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_lock_that_orders_nothing() {
        must_fail(|| {
            let buddy = boot_with::<_, Hasty, _>(ModelCpu::new(3), NoCpuCall);
            let _rest = fill(buddy, 2);
            let held = on_two_cpus(
                move || ask(buddy, FrameRequest::ONE),
                move || ask(buddy, FrameRequest::ONE),
            );
            settled(buddy, held, 2);
        });
    }

    /// Runs everything here and now, whatever the other CPU does: `R1` is broken.
    struct Lying;

    // SAFETY: none; the model must notice.
    unsafe impl CpuCall for Lying {
        fn run_on(&self, cpus: &CpuSet, f: &(dyn Fn(CpuId) + Sync)) -> Result<(), CpuCallError> {
            (0..3)
                .map(CpuId::new)
                .filter(|&cpu| cpus.contains(cpu))
                .for_each(f);
            Ok(())
        }
    }

    #[test]
    fn a_call_that_does_not_interrupt_the_other_cpu() {
        must_fail(|| {
            let buddy = boot_with::<_, Spin, _>(ModelCpu::new(3), Lying);
            let mut rest = fill(buddy, 1);
            let last = block_of(&mut rest, 0);
            let held = on_two_cpus(
                move || {
                    buddy.drain_all();
                    Vec::new()
                },
                move || {
                    buddy.free(last);
                    ask(buddy, FrameRequest::ONE)
                },
            );
            settled(buddy, held, 2);
        });
    }
}
