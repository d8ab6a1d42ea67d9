//! Random schedules of pools, reserves and counted pages.
#![cfg(shuttle)]

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use kmem_hal::{FixedPool, FrameSlot, FrameTag, ObjectAlloc, Order, Reserve, UserSlot};

#[test]
fn shuttle_a_pool_gives_each_object_to_one() {
    let model = || {
        let pool = Arc::new(FixedPool::<u64, 70>::new());
        let out = Arc::new(Mutex::new(BTreeSet::new()));
        let threads: Vec<_> = (0..4)
            .map(|thread| {
                let (pool, out) = (pool.clone(), out.clone());
                shuttle::thread::spawn(move || {
                    for round in 0..4 {
                        let Ok(mut reserve) =
                            Reserve::<u64, _, 40>::new(&*pool, 15 + thread + round)
                        else {
                            continue;
                        };
                        let object = reserve.take().unwrap();
                        assert!(out.lock().unwrap().insert(object.as_ptr().addr()));
                        assert!(out.lock().unwrap().remove(&object.as_ptr().addr()));
                        // SAFETY: from the pool, freed once; the rest goes back with the reserve.
                        unsafe { pool.free(object) };
                    }
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(pool.in_use(), 0);
    };
    shuttle::check_random(model, 100);
}

#[test]
fn shuttle_mappings_and_references_agree_in_the_end() {
    let model = || {
        let slot = Arc::new(FrameSlot::new());
        let _ = UserSlot::claim(&slot, FrameTag::Anon, Order::ZERO, 1, 0).unwrap();
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let slot = slot.clone();
                shuttle::thread::spawn(move || {
                    let page = slot.as_user().unwrap();
                    for _ in 0..5 {
                        page.add_mapping().unwrap();
                        assert!(page.references() >= 2, "a mapping without its reference");
                        page.sub_mapping().unwrap();
                    }
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        let page = slot.as_user().unwrap();
        assert_eq!((page.mappings(), page.references()), (0, 1));
    };
    shuttle::check_random(model, 300);
}
