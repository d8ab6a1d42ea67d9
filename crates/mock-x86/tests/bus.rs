//! Ports, registers in memory, and a DMA engine that knows physical addresses alone.

mod common;

use common::*;
use kmem_mock_x86::{
    Device, Dma, DmaError, Fault, Machine, MemoryKind, MemoryMap, MemoryRange, OnViolation,
    ViolationKind,
};
use std::sync::{Arc, Mutex};

const REGISTERS: u64 = 0xfee0_0000;

/// Four registers that remember; the second counts reads.
#[derive(Clone, Default)]
struct Registers(Arc<Mutex<[u64; 4]>>);

impl Device for Registers {
    fn read(&mut self, offset: u64, bytes: u32) -> u64 {
        let mut registers = self.0.lock().unwrap();
        if offset == 8 {
            registers[1] += 1;
        }
        assert!(bytes <= 8);
        registers[offset as usize / 8]
    }
    fn write(&mut self, offset: u64, _bytes: u32, value: u64) {
        self.0.lock().unwrap()[offset as usize / 8] = value;
    }
}

fn machine() -> Machine {
    let range = |start, end, kind| MemoryRange {
        start,
        end,
        kind,
        node: 0,
    };
    let map = MemoryMap::new(&[
        range(0, 32 << 20, MemoryKind::Ram),
        range(REGISTERS, REGISTERS + 0x1000, MemoryKind::Device),
    ]);
    builder().memory(map.unwrap()).build().unwrap()
}

#[test]
fn ports_answer_the_kernel_alone() {
    let machine = machine();
    let device = Registers::default();
    machine.attach_ports(0x60, 0x7f, device.clone());
    let cpu = machine.cpu(0);
    cpu.port_out(0x60, 1, 0xab).unwrap();
    assert_eq!(cpu.port_in(0x60, 1), Ok(0xab));
    assert_eq!(cpu.port_in(0x68, 4), Ok(1));
    assert_eq!(device.0.lock().unwrap()[..2], [0xab, 1]);
    assert_eq!(cpu.port_in(0x80, 1), Ok(0xff), "nothing answers");
    assert_eq!(cpu.port_in(0x80, 4), Ok(u32::MAX));
    cpu.port_out(0x80, 2, 1).unwrap();
    let refused = Fault::Selector {
        vector: 13,
        code: 0,
    };
    assert_eq!(cpu.user().port_in(0x60, 1), Err(refused));
    assert_eq!(cpu.user().port_out(0x60, 1, 0), Err(refused));
    assert_eq!(device.0.lock().unwrap()[0], 0xab);
    let twice = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        machine.attach_ports(0x7f, 0x80, Registers::default());
    }));
    assert!(twice.is_err());
}

#[test]
fn registers_in_memory_are_reached_through_the_tables() {
    let machine = machine();
    let device = Registers::default();
    machine.attach_memory(REGISTERS, REGISTERS + 0x1f, device.clone());
    let mut tables = Tables::new(&machine, 0x20_0000);
    tables.map(0x40_0000, REGISTERS, 12, P | RW | 1 << 4 | 1 << 3);
    tables.load(0);
    let cpu = machine.cpu(0);
    cpu.write_u32(0x40_0000, 0x1234).unwrap();
    assert_eq!(cpu.read_u64(0x40_0000), Ok(0x1234));
    assert_eq!(cpu.read_u32(0x40_0008), Ok(1));
    assert_eq!(cpu.read_u32(0x40_0008), Ok(2), "a read may do something");
    assert!(cpu.user().read_u32(0x40_0000).is_err());
    assert!(machine.take_violations().is_empty());
    // Beyond the registers nothing answers.
    assert_eq!(cpu.read_u32(0x40_0100), Ok(u32::MAX));
    assert_eq!(machine.take_violations()[0].kind, ViolationKind::NoMemory);
    let over_memory = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        machine.attach_memory(0x1000, 0x1fff, Registers::default());
    }));
    assert!(over_memory.is_err());
}

#[test]
fn the_dma_engine_has_24_bits_and_no_mmu() {
    let machine = machine();
    let mut dma = machine.dma();
    assert_eq!(dma.program(Dma::LIMIT - 1, 2), Err(DmaError::BeyondReach));
    assert_eq!(dma.program(u64::MAX, 2), Err(DmaError::BeyondReach));
    assert_eq!(dma.program(0x1_fff0, 0x20), Err(DmaError::CrossesBoundary));
    assert_eq!(dma.program(0x1_0000, 0), Err(DmaError::Nothing));
    assert_eq!(dma.device_to_memory(b"x"), Err(DmaError::Nothing));
    // Two pages that are neighbours for the program and strangers in memory.
    let mut tables = Tables::new(&machine, 0x20_0000);
    tables.map(0x40_0000, 0x5000, 12, P | RW);
    tables.map(0x40_1000, 0x9000, 12, P | RW);
    tables.load(0);
    let cpu = machine.cpu(0);
    cpu.write_u64(0x40_1000, 0x1111).unwrap();
    dma.program(0x5ff8, 16).unwrap();
    assert_eq!(dma.device_to_memory(&[0xee; 16]), Ok(16));
    assert_eq!(cpu.read_u64(0x40_0ff8), Ok(0xeeee_eeee_eeee_eeee));
    assert_eq!(
        cpu.read_u64(0x40_1000),
        Ok(0x1111),
        "the rest went to frame 6"
    );
    assert_eq!(
        machine.memory().load(0x6000, 8),
        Some(0xeeee_eeee_eeee_eeee)
    );
    let mut back = [0; 8];
    dma.program(0x9000, 8).unwrap();
    assert_eq!(dma.memory_to_device(&mut back), Ok(8));
    assert_eq!(back, 0x1111u64.to_le_bytes());
}

#[test]
fn a_buffer_that_is_freed_under_the_engine_is_a_violation() {
    let machine = Machine::builder()
        .on_violation(OnViolation::Record)
        .build()
        .unwrap();
    machine.note_allocated(0x10, 2);
    let mut dma = machine.dma();
    dma.program(0x1_0800, 0x1000).unwrap();
    machine.note_freed(0x11, 1);
    assert_eq!(dma.device_to_memory(&[1; 0x1000]), Ok(0x1000));
    let found = machine.take_violations();
    assert_eq!(found.len(), 1);
    assert_eq!(
        (found[0].kind, found[0].frame),
        (ViolationKind::DeviceFreedFrame, Some(0x11))
    );
    assert!(
        found[0]
            .to_string()
            .contains("the DMA engine wrote to frame 0x11")
    );
}
