//! Which CPUs `Mmu::active_cpus` must name (clause M3): every root whose translations a CPU may hold, through all that changes its tags.

mod common;

use common::builder;
use kmem_hal::{Asid, CpuId, Frame, Mmu, Root};
use kmem_mock_x86::manual::cr4;
use kmem_mock_x86::{Invpcid, Machine, Registers, VirtualCpu};

const ONE: u64 = 0x20_0000;
const TWO: u64 = 0x30_0000;
const KEEP: u64 = 1 << 63;

fn machine(registers: Registers) -> Machine {
    builder().cpus(2).registers(registers).build().unwrap()
}

/// Whether a shootdown of the space with this root would go to CPU 1.
fn reaches(machine: &Machine, root: u64) -> bool {
    let root = Root {
        frame: Frame::from_number(root >> 12),
        asid: Asid::new(0),
    };
    machine.active_cpus(root).contains(CpuId::new(1))
}

/// CPU 1 loads the first root, then the second under the same PCID, and keeps what the first has left.
fn two_under_one_tag() -> Machine {
    let machine = machine(Registers::LONG_PCID);
    let cpu = machine.cpu(1);
    cpu.write_cr3(ONE | 5).unwrap();
    cpu.write_cr3(TWO | 5 | KEEP).unwrap();
    machine
}

#[test]
fn a_load_that_keeps_the_tag_leaves_the_root_before() {
    let machine = two_under_one_tag();
    assert!(reaches(&machine, ONE) && reaches(&machine, TWO));
    // A load without bit 63 drops the tag, hence the other root.
    machine.cpu(1).write_cr3(TWO | 5).unwrap();
    assert!(!reaches(&machine, ONE) && reaches(&machine, TWO));
}

#[test]
fn what_drops_the_tag_forgets_all_but_the_loaded_root() {
    type Drops = fn(VirtualCpu);
    let drops: [Drops; 5] = [
        |cpu| cpu.invpcid(Invpcid::Context { pcid: 5 }).unwrap(),
        |cpu| cpu.invpcid(Invpcid::All).unwrap(),
        |cpu| cpu.invpcid(Invpcid::AllWithGlobal).unwrap(),
        |cpu| cpu.write_cr4(cpu.registers().cr4 ^ cr4::PGE).unwrap(),
        |cpu| cpu.write_cr4(cpu.registers().cr4 | cr4::SMEP).unwrap(),
    ];
    for (number, drop) in drops.into_iter().enumerate() {
        let machine = two_under_one_tag();
        drop(machine.cpu(1));
        assert!(!reaches(&machine, ONE), "{number}");
        assert!(reaches(&machine, TWO), "{number}");
    }
}

#[test]
fn the_root_that_a_machine_starts_with_is_loaded() {
    for registers in [Registers::LONG, Registers::LONG_PCID] {
        let machine = machine(Registers {
            cr3: ONE,
            ..registers
        });
        assert!(reaches(&machine, ONE));
        assert!(!reaches(&machine, TWO));
    }
}

#[test]
fn a_root_outlives_the_end_of_its_tag() {
    for kind in [
        Invpcid::All,
        Invpcid::AllWithGlobal,
        Invpcid::Context { pcid: 0 },
    ] {
        let machine = machine(Registers::LONG_PCID);
        let cpu = machine.cpu(1);
        cpu.write_cr3(ONE | 5).unwrap();
        // Without PCIDs everything has tag 0; bits 11:0 stay what they were.
        cpu.write_cr4(cpu.registers().cr4 & !cr4::PCIDE).unwrap();
        cpu.invpcid(kind).unwrap();
        assert!(reaches(&machine, ONE), "{kind:?}");
        cpu.write_cr3(TWO).unwrap();
        assert!(!reaches(&machine, ONE) && reaches(&machine, TWO));
    }
}
