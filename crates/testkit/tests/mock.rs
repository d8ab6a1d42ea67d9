//! The mock machine keeps hal's contracts, as the conformance suite checks them: its CPUs are the suite's contexts.
#![cfg(not(any(loom, shuttle, kmem_counting)))]

use kmem_hal::{
    Asid, CpuSet, Frame, FrameRange, FrameRequest, FrameSink, FrameSource, Order, Page, Root,
    VirtAddr,
};
use kmem_mock_x86::{
    Adversary, Disk, DiskImage, FramePool, Machine, MachineLock, MachineSleepLock, MachineUser,
    Scheduler,
};
use kmem_testkit::conformance::mmu::Probe;
use kmem_testkit::conformance::user_access::UserAddresses;
use kmem_testkit::conformance::{
    Contexts, Report, clock, cpu, cpu_call, frame_source, mmu, pages, phys_map, raw_lock,
    raw_sleep_lock, user_access,
};

const VA: u64 = 0x40_0000;
const TABLES: u64 = 0x20_0000;
const PRESENT_WRITE_USER: u64 = 7;

fn machine(cpus: usize) -> Machine {
    Machine::builder()
        .memory(kmem_mock_x86::MemoryMap::pc(16 << 20))
        .cpus(cpus)
        .build()
        .unwrap()
}

/// The machine's CPUs, each with a task of its own under one seeded schedule.
struct Cpus<'m> {
    machine: &'m Machine,
    seed: u64,
}

impl Contexts for Cpus<'_> {
    fn count(&self) -> u32 {
        self.machine.cpu_count() as u32
    }
    fn run(&self, body: &(dyn Fn(u32) + Sync)) {
        let mut scheduler = Scheduler::new(self.machine, self.seed);
        for number in 0..self.machine.cpu_count() {
            scheduler.spawn(number, move || body(number as u32));
        }
        scheduler.run();
    }
    fn relax(&self) {
        self.machine.yield_now();
    }
}

/// A four-level space with one page at `VA`, written by hand; returns the address of its leaf entry.
fn space(machine: &Machine) -> u64 {
    let memory = machine.memory();
    let mut table = TABLES;
    for shift in [39, 30, 21] {
        let next = table + 0x1000;
        let at = table + (VA >> shift & 511) * 8;
        assert!(memory.store(at, 8, next | PRESENT_WRITE_USER));
        table = next;
    }
    table + (VA >> 12 & 511) * 8
}

struct Leaf<'m> {
    machine: &'m Machine,
    entry: u64,
}

impl Probe for Leaf<'_> {
    fn root(&self) -> Root {
        Root {
            frame: Frame::from_number(TABLES >> 12),
            asid: Asid::ZERO,
        }
    }
    fn page(&self) -> Page {
        Page::containing(VirtAddr::new(VA))
    }
    fn point_at(&self, frame: usize) {
        let value = (0x800 + frame as u64) << 12 | PRESENT_WRITE_USER;
        assert!(self.machine.memory().store(self.entry, 8, value));
    }
    fn read(&self) -> Option<usize> {
        let cpu = self.machine.cpu(self.machine.current_cpu());
        cpu.user().read_u64(VA).ok().map(|word| word as usize)
    }
}

#[test]
fn memory_cpus_and_locks() {
    let report = Report::new();
    for seed in 0..8 {
        let machine = machine(3);
        let cpus = Cpus {
            machine: &machine,
            seed,
        };
        cpu::check(&report, &cpus, &machine);
        clock::check(&report, &cpus, &machine);
        cpu_call::check(&report, &machine, &machine, &CpuSet::first(3));
        raw_lock::check::<MachineLock>(&report, &cpus, None);
        raw_sleep_lock::check::<MachineSleepLock>(&report, &cpus);
    }
    let machine = machine(1);
    let scratch = FrameRange::new(Frame::from_number(0x400), 8).unwrap();
    // SAFETY: memory of the test's own machine.
    unsafe { phys_map::check(&report, &machine, scratch) };
    let pool = FramePool::new(&machine, 0x500);
    frame_source::check(&report, &pool, &machine, Order::HUGE_2M);
    assert_eq!(pool.in_use(), 0);
    report.assert_ok();
}

#[test]
fn flushes_under_many_schedules() {
    for seed in 0..12 {
        let report = Report::new();
        let machine = machine(3);
        if seed % 2 == 1 {
            machine.set_adversary(Adversary::default());
        }
        let entry = space(&machine);
        for frame in 0..2u64 {
            machine.memory().store((0x800 + frame) << 12, 8, frame);
        }
        let probe = Leaf {
            machine: &machine,
            entry,
        };
        let cpus = Cpus {
            machine: &machine,
            seed,
        };
        // SAFETY: the machine's code is not in its memory, so any tables will do.
        unsafe { mmu::check(&report, &cpus, &machine, &machine, &probe) };
        report.assert_ok();
        assert_eq!(report.checked().len(), 4);
    }
}

#[test]
fn disks_and_users() {
    let report = Report::new();
    let machine = machine(1);
    let pool = FramePool::new(&machine, 0x900);
    let blocks = [0, 1].map(|_| pool.alloc(&FrameRequest::ONE).unwrap());
    let frames = [blocks[0].first(), blocks[1].first()];
    for latency in [0, 3] {
        let disk = Disk::in_memory(&machine, 5);
        let file = DiskImage::from_bytes(&machine, &[9; 10_000]);
        disk.set_latency(latency);
        file.set_latency(latency);
        // SAFETY: both frames are the test's.
        unsafe {
            pages::check_device(&report, &disk, &machine, frames, &|| machine.yield_now());
            pages::check_provider(&report, &file, &machine, frames, &|| machine.yield_now());
        }
    }
    for block in blocks {
        pool.free(block);
    }

    let entry = space(&machine);
    machine
        .memory()
        .store(entry, 8, 0x800 << 12 | PRESENT_WRITE_USER);
    // The next page may be read by users, the one after it by the kernel.
    machine.memory().store(entry + 16, 8, 0x801 << 12 | 5);
    machine.memory().store(entry + 24, 8, 0x802 << 12 | 3);
    machine.cpu(0).write_cr3(TABLES).unwrap();
    let users = MachineUser::new(&machine, |_| false);
    let addresses = UserAddresses {
        end_of_writable: VirtAddr::new(VA + 0x1000),
        read_only: Some(VirtAddr::new(VA + 0x2000)),
        kernel: Some(VirtAddr::new(VA + 0x3000)),
    };
    user_access::check(&report, &users, &addresses);
    report.assert_ok();
}
