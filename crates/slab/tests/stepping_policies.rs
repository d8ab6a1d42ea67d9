//! As `stepping`, under each hardening policy: an NMI before instructions of allocations and frees, on the fast and on the slow paths.
//!
//! What a policy writes in and beside an object belongs to whoever has the object, and what it keeps for a cache lies under the depot's lock. So whatever an NMI
//! meets, nothing is reported that nobody did, each object has its owner's bytes, its size and its place, and what waits in quarantine is neither lost nor given.
#![cfg(all(
    target_os = "linux",
    target_arch = "x86_64",
    not(any(loom, shuttle, miri, kmem_counting))
))]

#[path = "common/source.rs"]
#[allow(dead_code)]
mod source;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ptr::NonNull;

use kmem_hal::{FrameTable, IrqSafe, OffsetMap, SingleCpu};
use kmem_slab::{
    CacheInfo, Check, Flags, Guard, Owner, Parts, Poison, Policy, Quarantine, Redzone, Shuffle,
    SlabSystem,
};
use kmem_testkit::step::Stepper;
use source::{Pages, Source};

type TestParts<H> =
    Parts<&'static Source, OffsetMap, SingleCpu, IrqSafe, Pages, &'static FrameTable, H>;

/// Bytes of objects whose arrays have 16 slots, and of others.
const LARGE: usize = 900;
const SMALL: usize = 24;

/// What waits in quarantine.
const WAIT: usize = 4;

/// An allocation: where it is, and what was asked for.
type Object = (NonNull<u8>, usize);
type Place = Cell<Option<Object>>;

/// A system with a policy, and objects that the operation holds, that the NMI frees, and that the NMI keeps.
struct World<H: Policy> {
    source: &'static Source,
    guarded: &'static Source,
    system: RefCell<SlabSystem<TestParts<H>>>,
    held: RefCell<Vec<Object>>,
    got: [Place; 2],
    to_free: [Place; 3],
    kept: [Place; 4],
    /// NMIs so far; one in so many shrinks.
    nmis: Cell<u32>,
    shrinks: u32,
}

impl<H: Policy> World<H> {
    fn new(shrinks: u32) -> Self {
        let (source, table) = Source::leaked();
        let (guarded, _) = Source::leaked();
        let system = SlabSystem::new();
        // SAFETY: the map and the table cover the arena; one thread, and NMIs that end before it goes on.
        let parts = unsafe {
            Parts::with_large(
                source,
                source.map(),
                SingleCpu::new(),
                table,
                Pages(guarded),
            )
        };
        system.init(parts).unwrap();
        let world = Self {
            source,
            guarded,
            system: RefCell::new(system),
            held: RefCell::default(),
            got: Default::default(),
            to_free: Default::default(),
            kept: Default::default(),
            nmis: Cell::new(0),
            shrinks,
        };
        for (place, size) in world.to_free.iter().zip([LARGE, LARGE, SMALL]) {
            place.set(world.alloc(size));
        }
        world
    }

    /// Both arrays of large objects are as good as full, and so is the quarantine; of small ones some are there.
    fn with_full_arrays(self) -> Self {
        for size in [LARGE, SMALL] {
            for _ in 0..60 {
                self.held.borrow_mut().extend(self.alloc(size));
            }
        }
        for _ in 0..20 {
            self.give();
        }
        self.held.borrow_mut().reverse();
        while self.in_arrays() < 31 {
            self.give();
        }
        self
    }

    fn in_arrays(&self) -> u64 {
        let mut most = 0;
        self.each_cache(|info| {
            if (LARGE..2 * LARGE).contains(&info.object_size) {
                most = most.max(info.in_arrays);
            }
        });
        most
    }

    fn each_cache(&self, each: impl FnMut(&CacheInfo)) {
        self.system.borrow().caches(each).unwrap();
    }

    fn alloc(&self, size: usize) -> Option<Object> {
        let memory = self.system.borrow().kmalloc(size, Flags::empty()).ok()?;
        let mark = Self::mark(memory);
        // SAFETY: `size` bytes that belong to the caller. What else is in there overwrites them, if they have two owners.
        unsafe {
            memory.cast::<u64>().write_unaligned(mark);
            memory.add(size - 8).cast::<u64>().write_unaligned(mark);
        }
        Some((memory, size))
    }

    fn mark(memory: NonNull<u8>) -> u64 {
        !(memory.as_ptr().addr() as u64)
    }

    fn free(&self, (memory, size): Object) {
        // SAFETY: allocated by `alloc` and held by the caller.
        unsafe {
            for at in [0, size - 8] {
                let mark = memory.add(at).cast::<u64>().read_unaligned();
                assert_eq!(mark, Self::mark(memory), "written by somebody else");
            }
            self.system.borrow().kfree(memory.as_ptr());
        }
    }

    fn take(&self, size: usize) {
        let object = self.alloc(size).expect("memory is not short");
        self.got
            .iter()
            .find(|got| got.get().is_none())
            .unwrap()
            .set(Some(object));
    }

    fn give(&self) {
        let object = self.held.borrow_mut().pop().unwrap();
        self.free(object);
    }

    fn interrupt(&self) {
        self.nmis.set(self.nmis.get() + 1);
        // First of all what the interrupted call may have just let go: whoever writes there now writes into another's object.
        for (place, size) in self.kept.iter().zip([SMALL, LARGE, SMALL, LARGE]) {
            if place.get().is_none() {
                place.set(self.alloc(size));
            }
        }
        if let Some(object) = self.to_free.iter().find_map(Cell::take) {
            self.free(object);
        }
        for size in [LARGE, SMALL] {
            if let Some(object) = self.alloc(size) {
                self.free(object);
            }
        }
        if self.nmis.get().is_multiple_of(self.shrinks) {
            self.system.borrow().shrink();
        }
    }

    fn check(&self) {
        let mut owned = self.held.take();
        for places in [&self.got[..], &self.kept, &self.to_free] {
            owned.extend(places.iter().filter_map(Cell::take));
        }
        let sizes: BTreeMap<_, _> = owned
            .iter()
            .map(|&(at, size)| (at.as_ptr().addr(), size))
            .collect();
        assert_eq!(sizes.len(), owned.len(), "an object has two owners");
        let active = || {
            let mut active = u64::from(self.guarded.used());
            self.each_cache(|info| {
                assert_eq!(info.misuses, 0, "{info:?}");
                assert_eq!(info.allocs - info.frees, info.active_objects, "{info:?}");
                assert!(info.waiting <= WAIT as u64, "{info:?}");
                active += info.active_objects;
            });
            active
        };
        assert_eq!(active(), owned.len() as u64, "objects are lost");
        // Who owns what, where the policy knows.
        let mut named = 0;
        self.system.borrow_mut().owners(|object| {
            named += 1;
            assert_eq!(sizes.get(&object.address), Some(&object.size));
            assert_eq!(object.place.map(|place| place.file()), Some(file!()));
        });
        let known = match std::any::type_name::<H>().contains("Owner") {
            true => owned.len() as u32 - self.guarded.used(),
            false => 0,
        };
        assert_eq!(named, known, "so many have owners");
        for &object in &owned {
            self.free(object);
        }
        assert_eq!(active(), 0);
        self.system.borrow_mut().teardown().unwrap();
        assert_eq!(
            self.source.used() + self.guarded.used(),
            0,
            "frames are lost"
        );
    }
}

/// Steps through `operation` in a world that `prepare` makes of one with full arrays; each NMI shrinks where it is the only one.
fn step<H: Policy>(
    name: &str,
    [alone, together]: [u64; 2],
    prepare: impl Fn(&World<H>),
    operation: impl Fn(&World<H>),
) {
    let ways = [
        (Stepper::alone().stride(alone), 1),
        (Stepper::together().stride(together), 5),
    ];
    for (way, shrinks) in ways {
        let start = std::time::Instant::now();
        let setup = || {
            let world = World::<H>::new(shrinks).with_full_arrays();
            prepare(&world);
            world
        };
        match way.run(setup, &operation, World::interrupt, World::check) {
            Ok(Some(steps)) => println!("{name}: {steps:?} in {:?}", start.elapsed()),
            Ok(None) => {}
            Err(failure) => panic!("{name}: {failure}"),
        }
    }
}

/// Hits of the arrays, then what goes to the depot and the slabs, and what comes from there.
fn through_all_paths<H: Policy>() {
    let there_and_back = |world: &World<H>| {
        world.take(SMALL);
        world.free(world.got[0].take().unwrap());
    };
    step("hit", [13, 1], |_| {}, there_and_back);
    let give = |world: &World<H>| (0..2).for_each(|_| world.give());
    step("flush", [41, 3], |_| {}, give);
    let drain = |world: &World<H>| {
        world.system.borrow().shrink();
    };
    step("refill", [41, 3], drain, |world| world.take(LARGE));
}

macro_rules! policies {
    ($($name:ident: $policy:ty;)+) => {
        $(
            #[test]
            fn $name() {
                through_all_paths::<$policy>();
            }
        )+
    };
}

policies! {
    check: Check;
    redzone: Redzone;
    poison: Poison;
    quarantine: Quarantine<WAIT>;
    shuffle: Shuffle;
    owner: Owner;
    guard: Guard<2>;
    all_together: (Redzone, Poison, Quarantine<WAIT>, Shuffle, Owner, Guard<3>);
}
