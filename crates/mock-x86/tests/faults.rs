//! Every bit of the page-fault error code, and what is #GP instead.

mod common;

use common::{P, PS, RW, Tables, US, XD, builder};
use kmem_mock_x86::manual::{cr0, cr4, efer, pf};
use kmem_mock_x86::{Descriptor, Fault, Features, Invpcid, Machine, Registers, Selector};

const VA: u64 = 0x40_0000;
const PAGE: u64 = 0x80_0000;

/// One CPU with one 4 KiB page at `VA`, entries as given.
fn machine(registers: Registers, leaf: u64) -> Machine {
    let machine = builder().registers(registers).build().unwrap();
    let mut tables = Tables::new(&machine, 0x20_0000);
    tables.map(VA, PAGE, 12, leaf);
    tables.load(0);
    machine
}

fn code<T: std::fmt::Debug>(outcome: Result<T, Fault>) -> u32 {
    match outcome {
        Err(Fault::Page { address, code }) => {
            assert_eq!(address & !0xfff, VA);
            code
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn not_present() {
    let machine = machine(Registers::LONG, 0);
    let cpu = machine.cpu(0);
    assert_eq!(code(cpu.read_u8(VA)), 0);
    assert_eq!(code(cpu.write_u8(VA + 5, 1)), pf::W);
    assert_eq!(
        machine.cpu(0).registers().cr2,
        VA + 5,
        "CR2 is the exact address"
    );
    assert_eq!(code(cpu.fetch(VA)), pf::I);
    assert_eq!(code(cpu.user().read_u8(VA)), pf::U);
    assert_eq!(code(cpu.user().write_u8(VA, 1)), pf::U | pf::W);
    assert_eq!(code(cpu.user().fetch(VA)), pf::U | pf::I);
}

#[test]
fn user_may_not_touch_supervisor_pages() {
    let machine = machine(Registers::LONG, P | RW);
    let cpu = machine.cpu(0);
    assert!(cpu.read_u8(VA).is_ok());
    assert_eq!(code(cpu.user().read_u8(VA)), pf::P | pf::U);
    assert_eq!(code(cpu.user().write_u8(VA, 0)), pf::P | pf::U | pf::W);
    assert_eq!(code(cpu.user().fetch(VA)), pf::P | pf::U | pf::I);
    assert!(
        cpu.user().implicit().read_u8(VA).is_ok(),
        "the processor's own accesses are supervisor's"
    );
}

#[test]
fn the_upper_entries_count_too() {
    for (missing, user_read, user_write) in [(US, false, false), (RW, true, false)] {
        let machine = builder().build().unwrap();
        let mut tables = Tables::new(&machine, 0x20_0000);
        tables.upper &= !missing;
        tables.map(VA, PAGE, 12, P | RW | US);
        tables.load(0);
        assert_eq!(machine.cpu(0).user().read_u8(VA).is_ok(), user_read);
        assert_eq!(machine.cpu(0).user().write_u8(VA, 0).is_ok(), user_write);
    }
}

#[test]
fn write_protection_and_cr0_wp() {
    let machine = machine(Registers::LONG, P | US);
    let cpu = machine.cpu(0);
    assert_eq!(code(cpu.user().write_u8(VA, 0)), pf::P | pf::U | pf::W);
    assert_eq!(code(cpu.write_u8(VA, 0)), pf::P | pf::W);
    cpu.write_cr0(cpu.registers().cr0 & !cr0::WP).unwrap();
    assert_eq!(cpu.write_u8(VA, 7), Ok(()));
    assert_eq!(code(cpu.user().write_u8(VA, 0)), pf::P | pf::U | pf::W);
}

#[test]
fn execute_disable_needs_nxe() {
    let machine = machine(Registers::LONG, P | RW | US | XD);
    let cpu = machine.cpu(0);
    assert_eq!(code(cpu.fetch(VA)), pf::P | pf::I);
    assert_eq!(code(cpu.user().fetch(VA)), pf::P | pf::U | pf::I);
    assert!(cpu.user().read_u8(VA).is_ok());
    // Without NXE the same bit is reserved, and I is not reported.
    cpu.write_efer(cpu.registers().efer & !efer::NXE).unwrap();
    cpu.write_cr3(cpu.registers().cr3).unwrap();
    assert_eq!(code(cpu.fetch(VA)), pf::P | pf::RSVD);
    assert_eq!(code(cpu.user().read_u8(VA)), pf::P | pf::RSVD | pf::U);
}

#[test]
fn reserved_bits_by_maxphyaddr() {
    for (bits, physical_bit, reserved) in [
        (40, 41, true),
        (46, 45, false),
        (46, 46, true),
        (52, 51, false),
    ] {
        let machine = builder()
            .features(Features {
                max_phys_bits: bits,
                ..Features::default()
            })
            .build()
            .unwrap();
        let mut tables = Tables::new(&machine, 0x20_0000);
        let leaf = tables.map(VA, PAGE, 12, P | RW);
        tables.load(0);
        tables.set(leaf, PAGE | P | RW | 1 << physical_bit);
        let outcome = machine.cpu(0).read_u8(VA);
        if reserved {
            assert_eq!(code(outcome), pf::P | pf::RSVD, "MAXPHYADDR {bits}");
            assert_eq!(machine.take_violations().len(), 0);
        } else {
            assert_eq!(outcome, Ok(0xff), "a hole answers with ones");
            assert_eq!(
                machine.take_violations().len(),
                1,
                "and that is a violation"
            );
        }
    }
}

#[test]
fn reserved_bits_of_large_pages_and_upper_entries() {
    let machine = builder().build().unwrap();
    let mut tables = Tables::new(&machine, 0x20_0000);
    let pde = tables.map(VA, PAGE, 21, P | RW);
    tables.load(0);
    assert!(machine.cpu(0).read_u8(VA).is_ok());
    for bit in 13..21 {
        tables.set(pde, PAGE | P | RW | PS | 1 << bit);
        machine.cpu(0).invlpg(VA).unwrap();
        assert_eq!(
            code(machine.cpu(0).read_u8(VA)),
            pf::P | pf::RSVD,
            "bit {bit} of a 2 MiB leaf"
        );
    }
    let top = tables.entry(VA, 39);
    tables.set(top, tables.get(top) | PS);
    machine.cpu(0).write_cr3(tables.root).unwrap();
    assert_eq!(
        code(machine.cpu(0).write_u8(VA, 0)),
        pf::P | pf::RSVD | pf::W,
        "PS in a PML4E"
    );
}

#[test]
fn gigabyte_pages_only_where_the_processor_has_them() {
    for gigabyte_pages in [true, false] {
        let machine = builder()
            .features(Features {
                gigabyte_pages,
                ..Features::default()
            })
            .build()
            .unwrap();
        let mut tables = Tables::new(&machine, 0x20_0000);
        tables.map(0, 0, 30, P | RW);
        tables.load(0);
        let outcome = machine.cpu(0).read_u8(VA);
        assert_eq!(outcome.is_ok(), gigabyte_pages);
        if !gigabyte_pages {
            assert_eq!(code(outcome), pf::P | pf::RSVD);
        }
    }
}

#[test]
fn smep_and_smap() {
    let machine = machine(Registers::LONG, P | RW | US);
    let cpu = machine.cpu(0);
    assert!(cpu.fetch(VA).is_ok() && cpu.read_u8(VA).is_ok());
    cpu.write_cr4(cpu.registers().cr4 | cr4::SMEP | cr4::SMAP)
        .unwrap();
    assert_eq!(code(cpu.fetch(VA)), pf::P | pf::I);
    assert!(cpu.user().fetch(VA).is_ok());
    assert_eq!(code(cpu.read_u8(VA)), pf::P);
    assert_eq!(code(cpu.write_u8(VA, 0)), pf::P | pf::W);
    cpu.set_ac(true).unwrap();
    assert!(cpu.read_u8(VA).is_ok() && cpu.write_u8(VA, 0).is_ok());
    assert_eq!(
        code(cpu.implicit().read_u8(VA)),
        pf::P,
        "AC does not help implicit accesses"
    );
    assert_eq!(code(cpu.fetch(VA)), pf::P | pf::I, "nor fetches");
    cpu.set_ac(false).unwrap();
    assert!(cpu.user().write_u8(VA, 0).is_ok());
}

#[test]
fn smep_alone_makes_the_fetch_bit_known() {
    let registers = Registers {
        efer: Registers::LONG.efer & !efer::NXE,
        ..Registers::LONG
    };
    let machine = machine(registers, 0);
    let cpu = machine.cpu(0);
    assert_eq!(code(cpu.fetch(VA)), 0);
    cpu.write_cr4(cpu.registers().cr4 | cr4::SMEP).unwrap();
    assert_eq!(code(cpu.fetch(VA)), pf::I);
}

#[test]
fn protection_keys() {
    let registers = Registers {
        pkru: 1 << 10,
        ..Registers::LONG
    };
    let machine = machine(registers, P | RW | US | 5 << 59);
    let cpu = machine.cpu(0);
    assert_eq!(
        cpu.write_pkru(0),
        Err(Fault::InvalidOpcode),
        "WRPKRU needs CR4.PKE"
    );
    assert!(
        cpu.user().read_u8(VA).is_ok(),
        "PKRU without CR4.PKE means nothing"
    );
    cpu.write_cr4(cpu.registers().cr4 | cr4::PKE).unwrap();
    assert_eq!(code(cpu.user().read_u8(VA)), pf::P | pf::U | pf::PK);
    assert_eq!(code(cpu.read_u8(VA)), pf::P | pf::PK);
    assert!(cpu.user().fetch(VA).is_ok(), "keys judge data only");
    cpu.user().write_pkru(2 << 10).unwrap();
    assert!(cpu.user().read_u8(VA).is_ok());
    assert_eq!(
        code(cpu.user().write_u8(VA, 0)),
        pf::P | pf::U | pf::W | pf::PK
    );
    assert_eq!(code(cpu.write_u8(VA, 0)), pf::P | pf::W | pf::PK);
    cpu.write_cr0(cpu.registers().cr0 & !cr0::WP).unwrap();
    assert_eq!(
        cpu.write_u8(VA, 0),
        Ok(()),
        "write-disable binds the supervisor only under WP"
    );
    cpu.write_pkru(3 << 8).unwrap();
    assert!(cpu.user().write_u8(VA, 0).is_ok(), "another key's bits");
}

#[test]
fn addresses_that_are_not_canonical() {
    let machine = machine(Registers::LONG, P);
    let cpu = machine.cpu(0);
    for bad in [
        0x0000_8000_0000_0000,
        0xffff_7fff_ffff_ffff,
        0x1000_0000_0040_0000,
    ] {
        assert_eq!(
            cpu.read_u8(bad),
            Err(Fault::GeneralProtection { value: bad })
        );
    }
    assert!(matches!(
        cpu.read_u8(0xffff_8000_0000_0000),
        Err(Fault::Page { code: 0, .. })
    ));
    // The last byte of the lower half and the first behind it: one access, two kinds of fault.
    assert!(matches!(
        cpu.read_u64(0x0000_7fff_ffff_fffc),
        Err(Fault::Page { .. })
    ));
}

#[test]
fn an_access_over_a_page_boundary_faults_on_the_second_page_and_writes_nothing() {
    let machine = machine(Registers::LONG, P | RW);
    let cpu = machine.cpu(0);
    let across = VA + 0xffc;
    assert_eq!(
        cpu.write_u64(across, u64::MAX),
        Err(Fault::Page {
            address: VA + 0x1000,
            code: pf::W
        })
    );
    assert_eq!(cpu.registers().cr2, VA + 0x1000);
    assert_eq!(cpu.read_u32(across), Ok(0));
    assert_eq!(
        cpu.write(across, &[1; 8]),
        Err((
            4,
            Fault::Page {
                address: VA + 0x1000,
                code: pf::W
            }
        ))
    );
    assert_eq!(cpu.read_u32(across), Ok(0x0101_0101));
}

#[test]
fn control_registers_refuse_what_the_manual_refuses() {
    let machine = machine(Registers::LONG, P);
    let cpu = machine.cpu(0);
    let regs = cpu.registers();
    let refused =
        |outcome: Result<(), Fault>| matches!(outcome, Err(Fault::GeneralProtection { .. }));
    assert!(refused(cpu.write_cr3(1 << 46)), "above MAXPHYADDR");
    assert!(
        refused(cpu.write_cr3(regs.cr3 | 1 << 63)),
        "no-flush without PCIDE"
    );
    assert!(
        refused(cpu.write_cr4(regs.cr4 & !cr4::PAE)),
        "PAE in IA-32e mode"
    );
    assert!(
        refused(cpu.write_cr4(regs.cr4 ^ cr4::LA57)),
        "LA57 in IA-32e mode"
    );
    assert!(refused(cpu.write_cr4(regs.cr4 | 1 << 40)), "an unknown bit");
    assert!(refused(cpu.write_cr0(cr0::PG)), "paging without protection");
    assert!(
        refused(cpu.write_cr0(regs.cr0 | 1 << 32)),
        "bits 63:32 of CR0"
    );
    assert!(
        refused(cpu.write_cr0(regs.cr0 | cr0::NW)),
        "NW = 1 with CD = 0"
    );
    assert!(cpu.write_cr0(regs.cr0 | cr0::NW | cr0::CD).is_ok());
    assert!(cpu.write_cr0(regs.cr0 | cr0::CD).is_ok());
    assert!(
        refused(cpu.write_cr0(regs.cr0 & !cr0::PG)),
        "paging off in 64-bit mode"
    );
    assert!(
        refused(cpu.write_efer(regs.efer & !efer::LME)),
        "LME while paging"
    );
    cpu.write_cr3(regs.cr3 | 0x18).unwrap();
    assert!(
        refused(cpu.write_cr4(regs.cr4 | cr4::PCIDE)),
        "PCIDE with CR3[11:0] not 0"
    );
    cpu.write_cr3(regs.cr3).unwrap();
    cpu.write_cr4(regs.cr4 | cr4::PCIDE).unwrap();
    let code = Descriptor::segment(0, u32::MAX, 0xa, 0);
    let data = Descriptor::segment(0, u32::MAX, 0x2, 0);
    cpu.segments()
        .start((Selector::gdt(1, 0), code), (Selector::gdt(2, 0), data));
    assert!(
        refused(cpu.write_cr0(regs.cr0 & !cr0::PG)),
        "paging off with PCIDE"
    );
    assert_eq!(cpu.registers().cr4, regs.cr4 | cr4::PCIDE);
    assert!(cpu.read_u8(VA).is_ok());
}

#[test]
fn a_program_executes_no_instruction_of_the_kernels() {
    let machine = machine(Registers::LONG, P | US);
    let cpu = machine.cpu(0);
    cpu.read_u8(VA).unwrap();
    let (user, before) = (cpu.user(), cpu.registers());
    let general = Err(Fault::Selector {
        vector: 13,
        code: 0,
    });
    assert_eq!(user.write_cr0(before.cr0), general);
    assert_eq!(user.write_cr3(before.cr3), general);
    assert_eq!(user.write_cr4(before.cr4 ^ cr4::PGE), general);
    assert_eq!(user.write_efer(before.efer), general);
    assert_eq!(user.invlpg(VA), general);
    assert_eq!(user.invpcid(Invpcid::AllWithGlobal), general);
    assert_eq!(user.set_interrupts(false).map(drop), general);
    assert_eq!(user.set_ac(true).map(drop), Err(Fault::InvalidOpcode));
    assert_eq!(user.segments().lgdt(0, 0), general);
    assert_eq!(cpu.registers(), before);
    assert!(cpu.holds(VA), "nothing was flushed");
    let old = builder()
        .features(Features {
            pcid: false,
            ..Features::default()
        })
        .build()
        .unwrap();
    assert_eq!(
        old.cpu(0).user().invpcid(Invpcid::All),
        Err(Fault::InvalidOpcode),
        "an instruction that is not there is so at every privilege"
    );
}
