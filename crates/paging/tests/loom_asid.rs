//! The model of `AsidMmu`: a CPU comes back to a space while another flushes it.
//!
//! ```text
//!   CPU 0   entry = new, flush_targets, interrupt whom it must, done
//!   CPU 1   load the space again (or leave lazy mode), keep what the tag holds, take interrupts
//! ```
//!
//! When both are through, CPU 1 must not hold the old entry.
#![cfg(loom)]

use std::ptr;
use std::sync::Mutex;

use kmem_hal::sync::{AtomicU64, AtomicUsize, Ordering, spin_loop};
use kmem_hal::{
    Asid, CachePadded, Cpu, CpuCall, CpuCallError, CpuId, CpuSet, FlushRequest, FlushScope, Frame,
    Mmu, Page, PageRange, Root, Tlb,
};
use kmem_paging::{AsidArea, AsidMmu};
use kmem_testkit::model::{ModelCpu, explore};

const OLD: u64 = 1;
const NEW: u64 = 2;

/// One entry of one space, in memory and in CPU 1's cache (0: not there).
struct World {
    entry: AtomicU64,
    cached: Mutex<u64>,
    cpu: ModelCpu,
    mail: AtomicUsize,
    call: Mutex<Option<Call>>,
}

#[derive(Clone, Copy)]
struct Call(*const (dyn Fn(CpuId) + Sync));
// SAFETY: the sender waits until the call was made.
unsafe impl Send for Call {}

#[derive(Clone, Copy)]
struct Here(&'static World);

// SAFETY: a model: CPU 1 alone has a cache, of one entry under one tag that no other root gets.
unsafe impl Tlb for Here {
    fn tags(&self) -> u16 {
        64
    }
    unsafe fn load(&self, _root: Root, keep: bool) {
        if !keep {
            self.drop_current();
        }
    }
    fn drop_page(&self, _page: Page) {
        self.drop_current();
    }
    fn drop_current(&self) {
        if self.0.cpu.id(&()) == CpuId::new(1) {
            *self.0.cached.lock().unwrap() = 0;
        }
    }
    fn drop_all(&self) {
        self.drop_current();
    }
}

// SAFETY: the model's.
unsafe impl Cpu for Here {
    type Guard<'a> = ();
    fn raw_pin(&self) {}
    fn id<'a>(&'a self, (): &()) -> CpuId {
        self.0.cpu.id(&())
    }
    fn count(&self) -> u32 {
        2
    }
}

// SAFETY: CPU 0 sends to CPU 1, which answers in `take`.
unsafe impl CpuCall for Here {
    fn run_on(&self, cpus: &CpuSet, f: &(dyn Fn(CpuId) + Sync)) -> Result<(), CpuCallError> {
        if !cpus.contains(CpuId::new(1)) {
            return Ok(());
        }
        let call: *const (dyn Fn(CpuId) + Sync) = ptr::from_ref(f);
        // SAFETY: only the lifetime changes, and this function waits.
        let call: *const (dyn Fn(CpuId) + Sync + 'static) = unsafe { std::mem::transmute(call) };
        *self.0.call.lock().unwrap() = Some(Call(call));
        self.0.mail.store(1, Ordering::Release);
        while self.0.mail.load(Ordering::Acquire) != 2 {
            spin_loop();
        }
        Ok(())
    }
}

/// CPU 1 takes its interrupts until CPU 0 is done.
fn take(world: &World, done: &AtomicUsize) {
    loop {
        if world.mail.load(Ordering::Acquire) == 1 {
            let call = world.call.lock().unwrap().take();
            if let Some(call) = call {
                // SAFETY: the sender waits.
                unsafe { (*call.0)(CpuId::new(1)) };
            }
            world.mail.store(2, Ordering::Release);
        }
        if done.load(Ordering::Acquire) == 1 {
            return;
        }
        spin_loop();
    }
}

fn root(number: u64) -> Root {
    Root {
        frame: Frame::from_number(number),
        asid: Asid::ZERO,
    }
}

/// CPU 1 has the entry cached in a space that `prepare` leaves and `come_back` loads again.
fn race(
    prepare: fn(&AsidMmu<'static, Here, Here>),
    come_back: fn(&AsidMmu<'static, Here, Here>),
) -> impl Fn() + Sync + Send + 'static {
    #[cfg(kmem_mutants)]
    if let Ok(name) = std::env::var("KMEM_MUTANT") {
        kmem_paging::mutants::select(&name);
    }
    move || {
        ModelCpu::bind(1);
        let world: &'static World = Box::leak(Box::new(World {
            entry: AtomicU64::new(OLD),
            cached: Mutex::new(0),
            cpu: ModelCpu::new(2),
            mail: AtomicUsize::new(0),
            call: Mutex::new(None),
        }));
        let done: &'static AtomicUsize = Box::leak(Box::new(AtomicUsize::new(0)));
        let areas: Vec<CachePadded<AsidArea>> =
            (0..2).map(|_| CachePadded::new(AsidArea::new())).collect();
        let counters = vec![AtomicU64::new(0)];
        // SAFETY: an area a CPU, and nobody else uses them.
        let mmu: &'static AsidMmu<'static, Here, Here> = Box::leak(Box::new(unsafe {
            AsidMmu::new(
                Here(world),
                Here(world),
                Box::leak(areas.into_boxed_slice()),
                Box::leak(counters.into_boxed_slice()),
            )
        }));
        // SAFETY: a model.
        unsafe { mmu.load_root(root(10), true) };
        *world.cached.lock().unwrap() = OLD;
        prepare(mmu);
        let other = loom::thread::spawn(move || {
            ModelCpu::bind(0);
            world.entry.store(NEW, Ordering::Relaxed);
            let range = PageRange::single(Page::new(5).unwrap());
            let request = FlushRequest {
                root: root(10),
                scope: FlushScope::Pages { range, stride: 1 },
                global: false,
                tables_freed: false,
            };
            let mut cpus = mmu.flush_targets(&request);
            cpus.remove(CpuId::new(0));
            let sent = mmu.shootdown(&cpus, &request);
            mmu.flush_local(&request);
            mmu.complete(sent);
            done.store(1, Ordering::Release);
        });
        come_back(mmu);
        take(world, done);
        other.join().unwrap();
        assert_ne!(*world.cached.lock().unwrap(), OLD, "a stale entry is left");
    }
}

fn become_lazy(mmu: &AsidMmu<'static, Here, Here>) {
    // SAFETY: a model.
    unsafe { mmu.set_kernel_root(root(1)) };
    mmu.enter_lazy().unwrap();
}

#[test]
fn a_cpu_comes_back_to_a_space_that_is_flushed() {
    explore(
        3,
        race(
            // SAFETY: a model.
            |mmu| unsafe { mmu.load_root(root(20), true) },
            |mmu| unsafe { mmu.load_root(root(10), true) },
        ),
    );
}

#[test]
fn a_lazy_cpu_comes_back() {
    explore(
        3,
        race(
            become_lazy,
            // SAFETY: a model.
            |mmu| unsafe { mmu.load_root(root(10), true) },
        ),
    );
}

#[test]
fn a_cpu_becomes_lazy_and_comes_back() {
    explore(
        3,
        race(
            |_| {},
            |mmu| {
                become_lazy(mmu);
                // SAFETY: a model.
                unsafe { mmu.load_root(root(10), true) };
            },
        ),
    );
}
