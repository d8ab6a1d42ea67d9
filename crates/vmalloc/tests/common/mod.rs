//! The kernel's table on the mock machine, in each mode of the processor, with low and high memory.
#![allow(dead_code, reason = "each test uses a part")]

use kmem_hal::{
    AllocError, Asid, Frame, FrameRange, FrameRequest, FrameSink, FrameSource, Mmu, OwnedFrame,
    PageRange, PhysAddr, PhysMap, Root, SingleGrace, Spin,
};
use kmem_mock_x86::{Adversary, FramePool, Machine, MemoryMap, Registers};
use kmem_paging::format::{Format, X86_64, X86Pae, X86TwoLevel};
use kmem_paging::{PageTable, Parts, TableCache};
use kmem_testkit::{FailPlan, Failing, FailingObjects, HeapObjects, SlotArena};
use kmem_vma_tree::Node;
use kmem_vmalloc::{KernelLayout, KernelPage, Vmalloc};

/// Frames from both sides of the border between low and high memory, as a zone list gives them.
pub struct Zones<'m> {
    low: FramePool<'m>,
    high: FramePool<'m>,
    border: u64,
}

impl Zones<'_> {
    pub fn in_use(&self) -> u64 {
        self.low.in_use() + self.high.in_use()
    }
}

// SAFETY: F1 to F3: the two pools keep them, and they never give the same frame: one is bounded from above, the other begins there.
unsafe impl FrameSource for Zones<'_> {
    fn alloc(&self, request: &FrameRequest) -> Result<OwnedFrame, AllocError> {
        if request.high
            && let Ok(frame) = self.high.alloc(request)
        {
            return Ok(frame);
        }
        let last = PhysAddr::new((self.border << 12) - 1);
        self.low.alloc(&FrameRequest {
            max_address: request.max_address.min(last),
            ..*request
        })
    }
}

impl FrameSink for Zones<'_> {
    fn free(&self, frame: OwnedFrame) {
        if frame.first().number() < self.border {
            self.low.free(frame);
        } else {
            self.high.free(frame);
        }
    }
}

/// The memory that the linear map holds.
#[derive(Clone, Copy)]
pub struct Low<'m> {
    machine: &'m Machine,
    frames: u64,
}

// SAFETY: P1 to P4, P6: the machine's own map, as far as low memory goes; P5: the default serves what is in reach.
unsafe impl PhysMap for Low<'_> {
    fn reach(&self) -> FrameRange {
        FrameRange::from_numbers(0, self.frames).unwrap()
    }
    fn to_ptr(&self, address: PhysAddr) -> *mut u8 {
        assert!(
            address.as_u64() >> 12 < self.frames,
            "{address} is high memory"
        );
        PhysMap::to_ptr(self.machine, address)
    }
    fn to_phys(&self, pointer: *const u8) -> PhysAddr {
        PhysMap::to_phys(self.machine, pointer)
    }
}

pub type Frames<'m> = Failing<'m, Zones<'m>>;
pub type Env<'m> =
    Parts<'m, Low<'m>, Frames<'m>, &'m Machine, SingleGrace, &'m Machine, &'m Machine>;
pub type Table<'m, F> = PageTable<F, &'m Env<'m>, KernelPage>;
pub type Nodes<'m> = FailingObjects<'m, &'m HeapObjects<Node>>;
pub type Kernel<'m, F = X86_64> = Vmalloc<'m, F, &'m Env<'m>, Nodes<'m>, Spin>;

/// A machine and how its kernel lays itself out.
#[derive(Clone, Copy)]
pub struct Setup {
    pub memory: u64,
    pub registers: Registers,
    pub layout: KernelLayout,
    pub adversary: Adversary,
    pub seed: u64,
}

impl Setup {
    /// 64-bit, 64 MiB.
    pub fn long() -> Self {
        Self {
            memory: 64 << 20,
            registers: Registers::LONG,
            layout: KernelLayout::x86_64(),
            adversary: Adversary::OFF,
            seed: 1,
        }
    }

    /// 32-bit two-level tables, 1 GiB: 128 MiB of it are high memory.
    pub fn classic() -> Self {
        Self {
            memory: 1 << 30,
            registers: Registers {
                cr0: Registers::LONG.cr0,
                cr4: 1 << 4 | 1 << 7,
                ..Registers::PROTECTED
            },
            layout: KernelLayout::x86_32(),
            ..Self::long()
        }
    }

    /// 32-bit PAE tables, 5 GiB: some of it above 4 GiB.
    pub fn pae() -> Self {
        Self {
            memory: 5 << 30,
            registers: Registers {
                cr0: Registers::LONG.cr0,
                cr4: 1 << 5 | 1 << 7,
                efer: 1 << 11,
                ..Registers::PROTECTED
            },
            layout: KernelLayout::x86_32_pae(),
            ..Self::long()
        }
    }

    pub fn adversarial(self, seed: u64) -> Self {
        Self {
            adversary: Adversary::FULL,
            seed,
            ..self
        }
    }
}

/// Runs `test` on a machine of two CPUs, in a table that both have loaded, and checks that nothing is left behind.
pub fn on_table<F: Format>(setup: Setup, test: impl FnOnce(&Machine, &Table<'_, F>, &FailPlan)) {
    let machine = Machine::builder()
        .memory(MemoryMap::pc(setup.memory))
        .cpus(2)
        .registers(setup.registers)
        .seed(setup.seed)
        .adversary(setup.adversary)
        .build()
        .unwrap();
    let all = FrameRange::from_numbers(0, machine.memory().frame_limit()).unwrap();
    let slots = SlotArena::new(all);
    let plan = FailPlan::new();
    let border = setup.layout.low_memory().end_number().min(all.end_number());
    let zones = Zones {
        low: FramePool::new(&machine, 256),
        high: FramePool::new(&machine, border),
        border,
    };
    let frames = Failing::new(zones, &plan);
    let low = Low {
        machine: &machine,
        frames: border,
    };
    // SAFETY: one thread, and the parts belong to one machine.
    let env: Env<'_> =
        unsafe { Parts::new(low, frames, &machine, SingleGrace::new(), &machine, &slots) }
            .with_trace(&machine);
    let table: Table<'_, F> = PageTable::new(&env).unwrap();
    let load = |root| {
        for cpu in 0..2 {
            // SAFETY: the mock's kernel code does not run in the tables.
            machine.on_cpu(cpu, || unsafe { machine.load_root(root, false) });
        }
    };
    load(table.root());
    test(&machine, &table, &plan);
    load(Root {
        frame: Frame::ZERO,
        asid: Asid::ZERO,
    });
    table.destroy(|_, page| panic!("{page:?} was left mapped"), |_, _| {});
    TableCache::shrink(&env, usize::MAX);
    use kmem_paging::Env as _;
    assert_eq!(env.frames().inner().in_use(), 0, "frames leak");
}

/// Runs `test` with the first `pages` pages of the layout's vmalloc area, and checks that all of it comes back.
pub fn on_window<F: Format>(
    setup: Setup,
    pages: u64,
    test: impl FnOnce(&Machine, &Kernel<'_, F>, &FailPlan),
) {
    on_table::<F>(setup, |machine, table, plan| {
        let objects = HeapObjects::new();
        let nodes = FailingObjects::new(&objects, plan);
        let window = PageRange::with_count(setup.layout.vmalloc.first(), pages).unwrap();
        let vmalloc = Vmalloc::new(table, window, nodes).with_high_memory();
        test(machine, &vmalloc, plan);
        vmalloc.purge();
        assert_eq!(
            vmalloc.used(),
            (0, 0),
            "areas are left:\n{}",
            vmalloc.info()
        );
        drop(vmalloc);
        objects.assert_all_free();
    });
}

/// The 64-bit machine in plain mode.
pub fn on_machine(pages: u64, test: impl FnOnce(&Machine, &Kernel<'_>, &FailPlan)) {
    on_window::<X86_64>(Setup::long(), pages, test);
}

pub type Two = X86TwoLevel;
pub type Pae = X86Pae;
