//! Models of `FixedPool`: an object has one owner, and the next one sees what the last one did to it.
#![cfg(loom)]

use std::ptr::NonNull;
use std::sync::Arc;

use kmem_hal::sync::UnsafeCell;
use kmem_hal::{AllocError, FixedPool, ObjectAlloc};
use kmem_testkit::model::explore;

/// Objects are told apart by address; what an owner does with one happens in loom's cell of the same number.
struct World {
    pool: FixedPool<u64, 2>,
    cells: [UnsafeCell<u32>; 2],
}

// SAFETY: that an object has one owner at a time is what the model checks.
unsafe impl Sync for World {}
// SAFETY: as above.
unsafe impl Send for World {}

impl World {
    fn use_one(&self, base: usize) -> Result<(), AllocError> {
        let object: NonNull<u64> = self.pool.alloc()?;
        let index = (object.as_ptr().addr() - base) / size_of::<u64>();
        // SAFETY: this thread owns the object.
        self.cells[index].with_mut(|cell| unsafe { *cell += 1 });
        // SAFETY: from the pool, freed once.
        unsafe { self.pool.free(object) };
        Ok(())
    }
}

#[test]
fn loom_an_object_has_one_owner_at_a_time() {
    explore(3, || {
        let world = Arc::new(World {
            pool: FixedPool::new(),
            cells: [UnsafeCell::new(0), UnsafeCell::new(0)],
        });
        // The lowest object is given first: its address is the array's.
        let first: NonNull<u64> = world.pool.alloc().unwrap();
        let base = first.as_ptr().addr();
        // SAFETY: from the pool, freed once.
        unsafe { world.pool.free(first) };
        let others: Vec<_> = (0..2)
            .map(|_| {
                let world = world.clone();
                loom::thread::spawn(move || world.use_one(base))
            })
            .collect();
        let mut served = u32::from(world.use_one(base).is_ok());
        for other in others {
            served += u32::from(other.join().unwrap().is_ok());
        }
        assert!(served >= 2, "two objects serve at least two of three");
        assert_eq!(world.pool.in_use(), 0);
        let uses: u32 = world
            .cells
            .iter()
            // SAFETY: the threads have ended.
            .map(|cell| cell.with(|cell| unsafe { *cell }))
            .sum();
        assert_eq!(uses, served);
    });
}
