//! Tables written by hand, entry by entry, with numbers from the manual.
#![allow(dead_code)]

use kmem_mock_x86::{Machine, MachineBuilder, MemoryMap, OnViolation};

pub const P: u64 = 1;
pub const RW: u64 = 2;
pub const US: u64 = 4;
pub const A: u64 = 1 << 5;
pub const D: u64 = 1 << 6;
pub const PS: u64 = 1 << 7;
pub const G: u64 = 1 << 8;
pub const XD: u64 = 1 << 63;

/// Root and next free table of a four-level space.
pub struct Tables<'m> {
    pub machine: &'m Machine,
    pub root: u64,
    pub next: u64,
    pub upper: u64,
}

impl<'m> Tables<'m> {
    /// Tables from physical address `base` on, each frame used once.
    pub fn new(machine: &'m Machine, base: u64) -> Self {
        Self {
            machine,
            root: base,
            next: base + 0x1000,
            upper: P | RW | US,
        }
    }

    /// The address of the entry for `linear` whose index starts at bit `shift`; makes the tables above.
    pub fn entry(&mut self, linear: u64, shift: u32) -> u64 {
        let memory = self.machine.memory();
        let mut table = self.root;
        let mut at = 39;
        loop {
            let address = table + (linear >> at & 511) * 8;
            if at == shift {
                return address;
            }
            let mut entry = memory.load(address, 8).unwrap();
            if entry & P == 0 {
                entry = self.next | self.upper;
                self.next += 0x1000;
                assert!(memory.store(address, 8, entry));
            }
            table = entry & 0x000f_ffff_ffff_f000;
            at -= 9;
        }
    }

    /// Maps one page of 2^shift bytes.
    pub fn map(&mut self, linear: u64, physical: u64, shift: u32, flags: u64) -> u64 {
        let at = self.entry(linear, shift);
        let ps = if shift > 12 { PS } else { 0 };
        assert!(self.machine.memory().store(at, 8, physical | flags | ps));
        at
    }

    pub fn get(&self, at: u64) -> u64 {
        self.machine.memory().load(at, 8).unwrap()
    }

    pub fn set(&self, at: u64, value: u64) {
        assert!(self.machine.memory().store(at, 8, value));
    }

    pub fn load(&self, cpu: usize) {
        self.machine.cpu(cpu).write_cr3(self.root).unwrap();
    }
}

pub fn builder() -> MachineBuilder {
    Machine::builder()
        .memory(MemoryMap::pc(64 << 20))
        .on_violation(OnViolation::Record)
}
