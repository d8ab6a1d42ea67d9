// Where the situations happen: a machine in plain mode, with two CPUs in one space.

use kmem_hal::{Asid, FrameRequest, FrameSink, FrameSource, Mmu, Order, OwnedFrame, PageRange};
use kmem_mock_x86::{AccessKind, Adversary, Machine, MemoryMap, Registers};
use kmem_paging::format::{Format, X86_64};
use kmem_paging::{PageTable, Rights, TableCache};

use super::super::hostile_env::HostileEnv;
use super::{at, pages};

/// A machine in plain mode, with two CPUs in one space.
pub(super) struct Room<F: Format = X86_64> {
    pub(super) env: &'static HostileEnv,
    pub(super) table: PageTable<F, &'static HostileEnv, OwnedFrame>,
}

impl Room {
    pub(super) fn new() -> Self {
        Self::with(Registers::LONG)
    }

    pub(super) fn with(registers: Registers) -> Self {
        Self::of(registers)
    }
}

impl<F: Format> Room<F> {
    pub(super) fn of(registers: Registers) -> Self {
        Self::keeping(registers, 0)
    }

    /// With a cache of this many emptied tables.
    pub(super) fn keeping(registers: Registers, cache: usize) -> Self {
        let machine = Machine::builder()
            .memory(MemoryMap::pc(32 << 20))
            .cpus(2)
            .registers(registers)
            .adversary(Adversary::OFF)
            .caching(std::env::var_os("KMEM_MOCK_WITHOUT_TLB").is_none())
            .caches_absent(F::CACHES_ABSENT)
            .watch_kernel(true)
            .build()
            .unwrap();
        let env = HostileEnv::new(machine, 0x400, cache);
        let mut table = PageTable::new(env).unwrap();
        if registers == Registers::LONG_PCID {
            table.set_asid(Asid::new(1)).unwrap();
        }
        for cpu in 0..2 {
            // SAFETY: the machine runs no code from these tables, and they are taken down after the last access.
            env.machine
                .on_cpu(cpu, || unsafe { env.mmu.load_root(table.root(), false) });
        }
        Self { env, table }
    }

    pub(super) fn alloc(&self, order: Order) -> OwnedFrame {
        self.env.pool.alloc(&FrameRequest::new(order)).unwrap()
    }

    pub(super) fn free(&self, frame: OwnedFrame) {
        self.env.pool.free(frame);
    }

    pub(super) fn map(&self, page: u64, rights: Rights) -> u64 {
        let frame = self.alloc(Order::ZERO);
        let number = frame.first().number();
        let mut cursor = self.table.cursor(pages(page, 1)).unwrap();
        cursor.map(at(page), frame, rights).unwrap();
        number
    }

    pub(super) fn touch(&self, cpu: usize, page: u64, kind: AccessKind) -> Option<u64> {
        let cpu = self.env.machine.cpu(cpu).user();
        let seen = cpu.translate(page << 12, kind);
        seen.ok().map(|address| address >> 12)
    }

    pub(super) fn write(&self, cpu: usize, page: u64) -> Option<u64> {
        self.touch(cpu, page, AccessKind::Write)
    }

    pub(super) fn unmap(&self, range: PageRange) {
        let mut gather = self.table.gather::<256>();
        self.table
            .cursor(range)
            .unwrap()
            .unmap(range, &mut gather)
            .unwrap();
        gather.commit_to(&self.env.pool);
    }

    /// Gives a range other rights, flushed where that is due.
    pub(super) fn protect(&self, range: PageRange, rights: Rights) {
        let mut gather = self.table.gather::<1>();
        self.table
            .cursor(range)
            .unwrap()
            .protect(range, rights, &mut gather)
            .unwrap();
        gather.commit(drop);
    }

    pub(super) fn quiet(&self) {
        let stale = self.env.machine.audit(0, u64::MAX);
        assert!(stale.is_empty(), "{}", stale[0]);
    }

    pub(super) fn finish(self) {
        let Self { env, table } = self;
        let idle = PageTable::<F, _, OwnedFrame>::new(env).unwrap();
        for cpu in 0..2 {
            // SAFETY: as in `keeping`.
            env.machine
                .on_cpu(cpu, || unsafe { env.mmu.load_root(idle.root(), false) });
        }
        table.destroy(|_, frame| env.pool.free(frame), |_, _| {});
        idle.destroy(|_, _| {}, |_, _| {});
        TableCache::shrink(&env, usize::MAX);
        assert_eq!(env.pool.in_use(), 0, "frames leaked");
        // SAFETY: nothing of this environment is left.
        unsafe { env.retire() };
    }
}
