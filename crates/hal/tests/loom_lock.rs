//! Models of the locks: one at a time, and what one wrote the next one sees. loom's cell catches two at once.
#![cfg(loom)]

use std::sync::Arc;

use kmem_hal::lock::{Lock, RawLock, RawSleepLock, SleepLock, Spin, SpinWait};
use kmem_hal::{IrqSafe, Wait};
use kmem_testkit::model::explore;

fn excludes<L: RawLock + Send + Sync + 'static>() {
    explore(3, || {
        let lock = Arc::new(Lock::<u64, L>::new(0));
        let others: Vec<_> = (0..2)
            .map(|_| {
                let lock = lock.clone();
                loom::thread::spawn(move || *lock.lock() += 1)
            })
            .collect();
        if let Some(mut value) = lock.try_lock() {
            *value += 10;
            drop(value);
        }
        for other in others {
            other.join().unwrap();
        }
        let end = *lock.lock();
        assert!(end == 2 || end == 12, "an increment was lost: {end}");
    });
}

#[test]
fn loom_spin_excludes() {
    excludes::<Spin>();
}

#[test]
fn loom_irq_safe_excludes() {
    excludes::<IrqSafe>();
}

#[test]
fn loom_spin_wait_readers_share_and_writers_exclude() {
    explore(3, || {
        let lock = Arc::new(SleepLock::<(u32, u32), SpinWait>::new((0, 0)));
        let writer = {
            let lock = lock.clone();
            loom::thread::spawn(move || {
                let mut value = lock.write();
                value.0 += 1;
                value.1 += 1;
            })
        };
        // Two threads only: more that spin give loom nothing but longer paths.
        {
            let value = lock.read();
            assert_eq!(value.0, value.1, "half a write was read");
        }
        if let Some(mut value) = lock.try_write() {
            value.0 += 1;
            value.1 += 1;
        }
        if let Some(value) = lock.try_read() {
            assert_eq!(value.0, value.1);
        }
        writer.join().unwrap();
        // Every share and the exclusive hold were given back.
        assert!(lock.try_write().is_some());
    });
}

#[test]
fn loom_spin_wait_readers_share() {
    explore(3, || {
        let lock = Arc::new(SleepLock::<u32, SpinWait>::new(0));
        let reader = {
            let lock = lock.clone();
            loom::thread::spawn(move || lock.try_read().is_some())
        };
        // Two readers never refuse each other.
        assert!(lock.try_read().is_some());
        assert!(reader.join().unwrap());
        assert!(lock.try_write().is_some());
    });
}

#[test]
fn loom_spin_wait_waits_for_what_it_is_asked() {
    use kmem_hal::sync::{AtomicBool, Ordering};
    explore(3, || {
        let wait = Arc::new(SpinWait::init());
        let done = Arc::new(AtomicBool::new(false));
        let other = {
            let (wait, done) = (wait.clone(), done.clone());
            loom::thread::spawn(move || {
                done.store(true, Ordering::Release);
                wait.wake(1);
            })
        };
        wait.wait_until(1, &|| done.load(Ordering::Acquire));
        assert!(done.load(Ordering::Relaxed));
        other.join().unwrap();
    });
}
