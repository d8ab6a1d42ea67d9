// A small machine for tests: an arena as memory, frames that are counted, an MMU that writes down what it is asked.
use std::alloc::{Layout, alloc_zeroed};
use std::sync::Mutex;

use kmem_hal::{
    AllocError, FlushRequest, Frame, FrameRange, FrameRequest, FrameSink, FrameSource, Mmu, Order,
    OwnedFrame, PhysAddr, PhysMap, Root, SingleCpu, SingleGrace,
};
use kmem_paging::Parts;
use kmem_testkit::SlotArena;

/// Memory of `frames` frames that starts at physical address 0.
pub struct Arena {
    base: *mut u8,
    frames: u64,
}

// SAFETY: the memory is plain bytes, reached by atomics or by the owner of a frame.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

// SAFETY: P1 to P5: one allocation of `frames` frames, never freed, at a fixed offset.
unsafe impl PhysMap for Arena {
    fn reach(&self) -> FrameRange {
        FrameRange::from_numbers(0, self.frames).unwrap()
    }
    fn to_ptr(&self, address: PhysAddr) -> *mut u8 {
        self.base.wrapping_add(address.as_u64() as usize)
    }
    fn to_phys(&self, pointer: *const u8) -> PhysAddr {
        PhysAddr::new(pointer as u64 - self.base as u64)
    }
}

/// Frames of the arena, with a count, a limit that fails on purpose, and a check of double frees.
pub struct Frames {
    state: Mutex<State>,
    map: &'static Arena,
}

struct State {
    free: Vec<u64>,
    out: std::collections::BTreeSet<u64>,
    /// Allocations until the next one fails.
    fuse: Option<usize>,
    calls: usize,
    /// Whether there was no frame left for an allocation.
    exhausted: bool,
}

impl Frames {
    /// Frames given out and not freed.
    #[allow(dead_code)]
    pub fn out(&self) -> usize {
        self.state.lock().unwrap().out.len()
    }
    /// Allocations asked for.
    #[allow(dead_code)]
    pub fn calls(&self) -> usize {
        self.state.lock().unwrap().calls
    }
    /// Whether there was no frame left for an allocation since this was asked last.
    #[allow(dead_code)]
    pub fn was_exhausted(&self) -> bool {
        std::mem::take(&mut self.state.lock().unwrap().exhausted)
    }
    /// Makes every allocation after `count` more fail; `None` makes all succeed.
    #[allow(dead_code)]
    pub fn set_fuse(&self, count: Option<usize>) {
        self.state.lock().unwrap().fuse = count;
    }
}

// SAFETY: F1: a number is in `free` or in `out`, never in both; F2: checked below; F3: nothing changes on failure.
unsafe impl FrameSource for Frames {
    fn alloc(&self, request: &FrameRequest) -> Result<OwnedFrame, AllocError> {
        let mut state = self.state.lock().unwrap();
        state.calls += 1;
        if let Some(left) = &mut state.fuse {
            if *left == 0 {
                return Err(AllocError::OutOfMemory);
            }
            *left -= 1;
        }
        assert_eq!(request.order, Order::ZERO);
        let limit = request.max_address.as_u64() >> 12;
        let at = state.free.iter().rposition(|&frame| frame <= limit);
        let Some(at) = at else {
            state.exhausted = true;
            return Err(AllocError::OutOfMemory);
        };
        let number = state.free.remove(at);
        state.out.insert(number);
        // SAFETY: O1, O3: the number was free; O2: order 0.
        let frame = unsafe { OwnedFrame::from_raw(Frame::new(number).unwrap(), Order::ZERO) };
        let byte = if request.zeroed { 0 } else { 0xcc };
        // SAFETY: the frame is ours and in the arena.
        unsafe {
            self.map
                .to_ptr(frame.first().start())
                .write_bytes(byte, 4096)
        };
        Ok(frame)
    }
}

impl FrameSink for Frames {
    fn free(&self, frame: OwnedFrame) {
        let mut state = self.state.lock().unwrap();
        for number in frame.range().iter() {
            assert!(state.out.remove(&number.number()), "{number:?} freed twice");
            state.free.push(number.number());
        }
    }
}

/// Writes down what it is asked to flush. Once, somebody else may come before a flush that drops entries above the leaves.
#[derive(Default)]
pub struct Flushes(
    pub Mutex<Vec<FlushRequest>>,
    pub Mutex<Option<Box<dyn FnOnce() + Send>>>,
);

// SAFETY: M1 to M4: no CPU walks these tables.
unsafe impl Mmu for Flushes {
    unsafe fn load_root(&self, _root: Root, _keep: bool) {}
    fn flush_local(&self, request: &FlushRequest) {
        if request.tables_freed {
            let meanwhile = self.1.lock().unwrap().take();
            meanwhile.into_iter().for_each(|come| come());
        }
        self.0.lock().unwrap().push(*request);
    }
}

pub type TestEnv =
    Parts<'static, &'static Arena, &'static Frames, &'static Flushes, SingleGrace, SingleCpu>;

pub struct Machine {
    #[allow(dead_code)]
    pub map: &'static Arena,
    pub frames: &'static Frames,
    #[allow(dead_code)]
    pub flushes: &'static Flushes,
    env: &'static TestEnv,
}

fn leak<T>(value: T) -> &'static T {
    Box::leak(Box::new(value))
}

impl Machine {
    /// A machine of `count` frames; it is never taken down.
    pub fn new(count: u64) -> Self {
        let layout = Layout::from_size_align(count as usize * 4096, 4096).unwrap();
        let map = leak(Arena {
            // SAFETY: the layout is not empty.
            base: unsafe { alloc_zeroed(layout) },
            frames: count,
        });
        let frames = leak(Frames {
            state: Mutex::new(State {
                free: (1..count).rev().collect(),
                out: Default::default(),
                fuse: None,
                calls: 0,
                exhausted: false,
            }),
            map,
        });
        let slots = leak(SlotArena::new(map.reach()));
        let flushes = leak(Flushes::default());
        // SAFETY: E2, E3: the only frame table, and no MMU walks; one thread uses a machine.
        let env = unsafe {
            Parts::new(
                map,
                frames,
                flushes,
                SingleGrace::new(),
                SingleCpu::new(),
                slots,
            )
        };
        Self {
            map,
            frames,
            flushes,
            env: leak(env),
        }
    }

    pub fn env(&self) -> &'static TestEnv {
        self.env
    }

    #[allow(dead_code)]
    pub fn frames(&self) -> &'static Frames {
        self.frames
    }
}
