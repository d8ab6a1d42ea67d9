//! An NMI at the worst instant: the CPU that it interrupts holds a zone's lock. It allocates and frees, and never waits for it.

mod common;

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use common::machine::{map, one_zone};
use common::played::{Played, become_cpu};
use common::window::Window;
use kmem_buddy::{Buddy, FreeError, Reservation};
use kmem_hal::{
    AllocError, CpuId, Frame, FrameRequest, FrameSink, FrameSource, NoCpuCall, NoPressure, Order,
    OwnedFrame, PhysAddr, PhysMap, RawLock,
};

thread_local! {
    static NMI: RefCell<Option<Box<dyn Fn()>>> = const { RefCell::new(None) };
    static STRUCK: Cell<u32> = const { Cell::new(0) };
}

/// A lock in whose hold the NMI strikes, and which knows who would wait for ever.
struct Struck(Cell<bool>);

// SAFETY: the tests run on one thread.
unsafe impl Sync for Struck {}

// SAFETY: K1: the flag, on one thread; a second holder is a panic.
unsafe impl RawLock for Struck {
    type State = ();
    const INIT: Self = Self(Cell::new(false));
    fn lock(&self) {
        assert!(!self.0.get(), "waits for ever for what it interrupted");
        self.0.set(true);
        let nmi = NMI.with(|armed| armed.borrow_mut().take());
        if let Some(nmi) = nmi {
            nmi();
            STRUCK.set(STRUCK.get() + 1);
            NMI.with(|armed| *armed.borrow_mut() = Some(nmi));
        }
    }
    fn try_lock(&self) -> Option<()> {
        (!self.0.replace(true)).then_some(())
    }
    unsafe fn unlock(&self, (): ()) {
        self.0.set(false);
    }
}

type Frames = Buddy<Window, Played<3>, Struck, NoCpuCall, NoPressure>;

const FRAMES: u64 = 8192;

fn boot() -> &'static Frames {
    boot_online(2)
}

/// A machine with so many CPUs online.
fn boot_online(cpus: u32) -> &'static Frames {
    become_cpu(0);
    let mut map = map(&[(0, FRAMES << 12)]);
    map.reserve(PhysAddr::new(0), 1 << 20, Reservation::BootStructures)
        .unwrap();
    let window = Window::new(FRAMES << 12, FRAMES << 12);
    let buddy = Box::leak(Box::new(Buddy::new(window, Played)));
    // SAFETY: X1: the test's own memory, which only this allocator has.
    unsafe { buddy.init(&mut map, &one_zone().cpus(cpus)) }.unwrap();
    buddy
}

/// Runs `call` with an NMI that allocates and frees inside each lock that it takes.
fn strike<R>(buddy: &'static Frames, call: impl FnOnce() -> R) -> R {
    let large = FrameRequest::new(Order::new(7).unwrap());
    let frees: Rc<RefCell<Vec<OwnedFrame>>> = Rc::default();
    for _ in 0..16 {
        frees.borrow_mut().push(buddy.alloc(&large).unwrap());
    }
    let rest = frees.clone();
    let nmi = move || {
        match buddy.alloc(&large) {
            // The lock that is held is no zone's.
            Ok(frame) => buddy.free(frame),
            Err(error) => assert_eq!(error, AllocError::Busy),
        }
        if let Some(frame) = frees.borrow_mut().pop() {
            buddy.free(frame);
        }
    };
    let result = strike_with(nmi, call);
    for frame in rest.borrow_mut().drain(..) {
        buddy.free(frame);
    }
    result
}

/// Runs `call` with this NMI inside each lock that it takes.
fn strike_with<R>(nmi: impl Fn() + 'static, call: impl FnOnce() -> R) -> R {
    NMI.with(|armed| *armed.borrow_mut() = Some(Box::new(nmi)));
    STRUCK.set(0);
    let result = call();
    NMI.with(|armed| armed.borrow_mut().take());
    assert!(STRUCK.get() > 0, "no lock was taken");
    result
}

#[test]
fn an_nmi_inside_a_view_does_not_wait() {
    let buddy = boot();
    let total = buddy.recount().managed;
    let views: [(&str, &dyn Fn() -> String); 10] = [
        ("zones", &|| format!("{:?}", buddy.zones().next())),
        ("buddyinfo", &|| buddy.buddy_info().to_string()),
        ("zoneinfo", &|| buddy.zone_info().to_string()),
        ("pagetypeinfo", &|| buddy.page_type_info().to_string()),
        ("unusable", &|| buddy.unusable_index().to_string()),
        ("show_mem", &|| buddy.show_mem().to_string()),
        ("picture", &|| buddy.picture().to_string()),
        ("meminfo", &|| buddy.mem_info().to_string()),
        ("recount", &|| format!("{:?}", buddy.recount())),
        ("check", &|| format!("{:?}", buddy.check())),
    ];
    for cpu in [0, 2] {
        become_cpu(cpu);
        for (name, view) in views {
            let text = strike(buddy, view);
            assert!(!text.is_empty(), "{name}");
        }
    }
    become_cpu(0);
    buddy.drain_local();
    assert_eq!(buddy.misuse(), None);
    assert_eq!((buddy.recount().free, buddy.lost()), (total, 0));
    buddy.check().unwrap();
}

#[test]
fn an_nmi_inside_the_draining_of_another_cpu_does_not_wait() {
    let buddy = boot();
    let total = buddy.recount().free;
    for here in [0, 2] {
        become_cpu(1);
        let frame = buddy.alloc(&FrameRequest::ONE).unwrap();
        buddy.free(frame);
        assert!(buddy.mem_info().cached > 0);
        become_cpu(here);
        // SAFETY: nobody plays CPU 1 now.
        assert!(strike(buddy, || unsafe {
            buddy.cpu_offline(CpuId::new(1))
        }));
        assert_eq!(buddy.mem_info().cached, 0);
    }
    let info = buddy.mem_info();
    assert_eq!((info.free + info.cached, buddy.lost()), (total, 0));
    buddy.check().unwrap();
}

/// It would wait for the lock that it interrupted.
#[test]
fn an_nmi_inside_a_lock_empties_no_other_cpu() {
    let buddy = boot();
    become_cpu(1);
    let frame = buddy.alloc(&FrameRequest::ONE).unwrap();
    buddy.free(frame);
    let cached = buddy.mem_info().cached;
    let large = FrameRequest::new(Order::new(7).unwrap());
    for here in [0, 2] {
        become_cpu(here);
        // SAFETY: nobody plays CPU 1 now.
        let nmi = || assert!(!unsafe { buddy.cpu_offline(CpuId::new(1)) });
        let frame = strike_with(nmi, || buddy.alloc(&large).unwrap());
        buddy.free(frame);
        assert_eq!(buddy.mem_info().cached, cached);
    }
    // SAFETY: nobody plays CPU 1 now.
    assert!(unsafe { buddy.cpu_offline(CpuId::new(1)) });
    buddy.check().unwrap();
}

/// A CPU's arrays are empty or not; what waits for an interrupted call is nobody's array, and not in the zones either.
#[test]
fn a_block_that_waits_is_in_no_array() {
    let buddy = boot_online(1);
    let large = FrameRequest::new(Order::new(7).unwrap());
    let frame = RefCell::new(Some(buddy.alloc(&large).unwrap()));
    let nmi = move || {
        if let Some(frame) = frame.borrow_mut().take() {
            assert!(buddy.drain_all());
            buddy.free(frame);
            assert!(buddy.drain_local());
            assert!(!buddy.drain_all());
        }
    };
    assert!(buddy.drain_all());
    strike_with(nmi, || drop(buddy.buddy_info().to_string()));
    assert!(buddy.drain_all());
    buddy.check().unwrap();
}

#[test]
fn an_nmi_on_a_cpu_that_is_not_online_does_not_wait() {
    let buddy = boot();
    become_cpu(2);
    let frame = strike(buddy, || buddy.alloc(&FrameRequest::ONE).unwrap());
    strike(buddy, || buddy.free(frame));
    strike(buddy, || {
        // SAFETY: nobody uses the boot structures of this map.
        unsafe { buddy.release(Reservation::BootStructures) }
    });
    // It comes online, and is interrupted as the others are.
    strike(buddy, || buddy.cpu_online(CpuId::new(2)).unwrap());
    let large = FrameRequest::new(Order::new(7).unwrap());
    let frame = strike(buddy, || buddy.alloc(&large).unwrap());
    strike(buddy, || buddy.free(frame));
    assert_eq!(buddy.lost(), 0);
    buddy.check().unwrap();
}

/// However many blocks an NMI frees, on a CPU with an area or without: the interrupted call takes all of them along.
#[test]
fn nothing_that_an_nmi_frees_is_lost() {
    let buddy = boot();
    let total = buddy.recount().free;
    for cpu in [0, 2] {
        become_cpu(cpu);
        for order in [0, 3, 7] {
            let request = FrameRequest::new(Order::new(order).unwrap());
            let count = if order == 7 { 40 } else { 300 };
            let held: Vec<_> = (0..count).map(|_| buddy.alloc(&request).unwrap()).collect();
            // An allocation that finds nothing, a view, and a drain.
            let calls: [&dyn Fn(); 3] = [
                &|| drop(buddy.alloc(&FrameRequest::new(Order::new(12).unwrap()))),
                &|| drop(buddy.buddy_info().to_string()),
                &|| assert!(buddy.drain_local() || cpu == 2),
            ];
            let held = Rc::new(RefCell::new(held));
            STRUCK.set(0);
            for call in calls {
                let rest = held.clone();
                let all = move || {
                    let many = rest.borrow().len() * 2 / 3;
                    for frame in rest.borrow_mut().drain(..many) {
                        buddy.free(frame);
                    }
                };
                NMI.with(|armed| *armed.borrow_mut() = Some(Box::new(all)));
                call();
                NMI.with(|armed| armed.borrow_mut().take());
                buddy.check().unwrap();
            }
            assert!(STRUCK.get() > 0, "no lock was taken");
            for frame in held.borrow_mut().drain(..) {
                buddy.free(frame);
            }
            buddy.drain_local();
            assert_eq!((buddy.recount().free, buddy.lost()), (total, 0), "{cpu}");
        }
    }
    assert_eq!(buddy.misuse(), None);
}

/// So many blocks of order 7, and an NMI that frees all of them inside a lock, and then runs `wrong`.
fn strike_and_free(
    buddy: &'static Frames,
    count: usize,
    wrong: impl Fn(&[Frame]) + 'static,
) -> Vec<Frame> {
    let request = FrameRequest::new(Order::new(7).unwrap());
    let held: Vec<_> = (0..count).map(|_| buddy.alloc(&request).unwrap()).collect();
    let firsts: Vec<_> = held.iter().map(OwnedFrame::first).collect();
    let held = RefCell::new(held);
    let freed = firsts.clone();
    let nmi = move || {
        if !held.borrow().is_empty() {
            held.borrow_mut()
                .drain(..)
                .for_each(|frame| buddy.free(frame));
            wrong(&freed);
        }
    };
    strike_with(nmi, || drop(buddy.buddy_info().to_string()));
    firsts
}

fn free_again(buddy: &Frames, first: Frame, order: u8) {
    // SAFETY: none; the wrong free is what is tested.
    buddy.free(unsafe { OwnedFrame::from_raw(first, Order::new(order).unwrap()) });
}

/// Whether it waits in a slot or on the chain, first or last, and whatever order it is freed with the second time.
#[test]
fn a_block_that_nmis_free_twice_is_found_and_given_once() {
    for (at, order) in [(0, 7), (31, 7), (32, 7), (35, 7), (39, 7), (36, 8)] {
        let buddy = boot();
        let total = buddy.recount().free;
        let blocks = strike_and_free(buddy, 40, move |freed| free_again(buddy, freed[at], order));
        let misuse = buddy.misuse().unwrap();
        assert_eq!((misuse.count, misuse.first), (1, blocks[at]), "{at}");
        assert_eq!(misuse.error, FreeError::DoubleFree);
        assert_eq!((buddy.recount().free, buddy.lost()), (total, 0), "{at}");
        buddy.check().unwrap();
    }
}

/// Who has a block that somebody else frees goes on writing to it. Nothing that he writes is followed.
#[test]
fn a_block_on_the_chain_that_somebody_else_has_leads_nowhere() {
    let buddy = boot_online(1);
    let live = buddy
        .alloc(&FrameRequest::new(Order::new(7).unwrap()))
        .unwrap();
    let total = buddy.recount().free;
    let (target, at) = (live.first().number(), 37);
    let blocks = strike_and_free(buddy, 40, move |freed| {
        let words: *mut u64 = buddy.memory().to_ptr(freed[at].start()).cast();
        // SAFETY: the window backs it.
        unsafe { words.write(target << 7 | 7 << 1 | 1) };
    });
    let misuse = buddy.misuse().unwrap();
    assert_eq!((misuse.count, misuse.first), (1, blocks[at]));
    // It is kept out of use, and so are those beyond it: 32 to 36.
    let out = 6 * 128;
    assert_eq!((buddy.recount().free, buddy.lost()), (total - out, 5));
    while let Ok(frame) = buddy.alloc(&FrameRequest::new(Order::new(7).unwrap())) {
        assert_ne!(frame.first(), live.first(), "it is somebody's");
    }
    // Nothing waits any more.
    assert!(buddy.drain_all());
    buddy.check().unwrap();
}
