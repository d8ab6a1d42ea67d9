//! The other paging modes: 32-bit with and without PSE, PAE, five levels, and the way into them.

mod common;

use common::{A, D, P, PS, RW, US, XD, builder};
use kmem_mock_x86::manual::{cr0, cr4, efer, pf};
use kmem_mock_x86::{Descriptor, Fault, LINUX_GDT_64, Machine, Registers, Selector};

const PAGE: u64 = 0x80_0000;

fn store(machine: &Machine, at: u64, bytes: u64, value: u64) {
    assert!(machine.memory().store(at, bytes, value));
}

fn load(machine: &Machine, at: u64, bytes: u64) -> u64 {
    machine.memory().load(at, bytes).unwrap()
}

/// A CPU in protected mode with this CR4 and EFER, then CR3, then paging on.
fn boot(cr4: u64, efer: u64, cr3: u64, prepare: impl FnOnce(&Machine)) -> Machine {
    let machine = builder().registers(Registers::PROTECTED).build().unwrap();
    prepare(&machine);
    let cpu = machine.cpu(0);
    cpu.write_cr4(cr4).unwrap();
    cpu.write_efer(efer).unwrap();
    cpu.write_cr3(cr3).unwrap();
    cpu.write_cr0(cr0::PE | cr0::PG | cr0::WP).unwrap();
    machine
}

#[test]
fn two_levels_of_32_bits() {
    let va = 0xb700_1008;
    let machine = boot(0, 0, 0x20_0000, |m| {
        store(m, 0x20_0000 + 4 * (va >> 22), 4, 0x20_1000 | P | RW | US);
        store(m, 0x20_1000 + 4 * (va >> 12 & 0x3ff), 4, 0x2000 | P | RW);
        store(m, 0x2008, 4, 0xdead_beef);
    });
    let cpu = machine.cpu(0);
    assert_eq!(cpu.read_u32(va), Ok(0xdead_beef));
    assert_eq!(
        cpu.read_u32(0xffff_ffff_0000_0000 | va),
        Ok(0xdead_beef),
        "addresses have 32 bits"
    );
    cpu.write_u8(va, 1).unwrap();
    assert_eq!(
        load(&machine, 0x20_1000 + 4 * (va >> 12 & 0x3ff), 4) & (A | D),
        A | D
    );
    assert_eq!(load(&machine, 0x20_0000 + 4 * (va >> 22), 4) & (A | D), A);
    assert_eq!(
        cpu.user().read_u8(va),
        Err(Fault::Page {
            address: va,
            code: pf::P | pf::U
        })
    );
    // No NX in this mode: a fetch is told from a read by nothing.
    assert!(cpu.fetch(va).is_ok());
    assert_eq!(
        cpu.fetch(0x1000),
        Err(Fault::Page {
            address: 0x1000,
            code: 0
        })
    );
}

#[test]
fn four_mebibyte_pages_with_pse_and_beyond_4_gib_with_pse_36() {
    let va = 0x0040_0000;
    // Without CR4.PSE bit 7 is ignored: the entry leads to a table.
    let machine = boot(0, 0, 0x20_0000, |m| {
        store(m, 0x20_0004, 4, 0x20_1000 | P | RW | PS);
        store(m, 0x20_1000, 4, PAGE | P | RW);
        store(m, PAGE, 4, 5);
    });
    assert_eq!(machine.cpu(0).read_u32(va), Ok(5));
    let machine = boot(cr4::PSE, 0, 0x20_0000, |m| {
        store(m, 0x20_0004, 4, PAGE | P | RW | PS);
        store(m, PAGE + 0x12_3454, 4, 6);
    });
    assert_eq!(machine.cpu(0).read_u32(va + 0x12_3454), Ok(6));
    assert_eq!(load(&machine, 0x20_0004, 4) & (A | D), A);
    store(&machine, 0x20_0004, 4, PAGE | P | RW | PS | 1 << 21);
    machine.cpu(0).invlpg(va).unwrap();
    assert_eq!(
        machine.cpu(0).read_u8(va),
        Err(Fault::Page {
            address: va,
            code: pf::P | pf::RSVD
        })
    );
    // Bits 20:13 are address bits 39:32.
    store(&machine, 0x20_0004, 4, PAGE | P | RW | PS | 1 << 13);
    assert_eq!(
        machine
            .cpu(0)
            .translate(va + 4, kmem_mock_x86::AccessKind::Read),
        Ok(0x1_0000_0000 | PAGE | 4)
    );
}

#[test]
fn pae_loads_its_four_registers_with_cr3() {
    let va = 0x4020_3000; // PDPTE 1, PDE 1, PTE 3.
    let tables = |m: &Machine| {
        store(m, 0x20_0028, 8, 0x20_1000 | P);
        store(m, 0x20_1008, 8, 0x20_2000 | P | RW | US);
        store(m, 0x20_2018, 8, PAGE | P | RW | US | XD);
        store(m, 0x20_1010, 8, PAGE | P | RW | PS);
    };
    // The registers are 32 bytes anywhere: CR3 bits 31:5.
    let machine = boot(cr4::PAE, efer::NXE, 0x20_0020, tables);
    let cpu = machine.cpu(0);
    assert!(cpu.user().write_u8(va, 1).is_ok());
    assert_eq!(
        cpu.user().fetch(va),
        Err(Fault::Page {
            address: va,
            code: pf::P | pf::U | pf::I
        })
    );
    assert!(
        cpu.write_u8(0x4040_0000 + 0x1f_ffff, 2).is_ok(),
        "a 2 MiB page"
    );
    assert_eq!(load(&machine, PAGE + 0x1f_ffff, 1), 2);
    assert_eq!(
        load(&machine, 0x20_0028, 8),
        0x20_1000 | P,
        "no A in a PDPTE"
    );
    // A change of a PDPTE in memory is seen only after a load of CR3.
    store(&machine, 0x20_0028, 8, 0);
    cpu.invlpg(va).unwrap();
    assert!(cpu.read_u8(va).is_ok());
    cpu.write_cr3(0x20_0020).unwrap();
    assert_eq!(
        cpu.read_u8(va),
        Err(Fault::Page {
            address: va,
            code: 0
        })
    );
    // A present PDPTE with a reserved bit is refused at the load.
    store(&machine, 0x20_0028, 8, 0x20_1000 | P | RW);
    assert!(matches!(
        cpu.write_cr3(0x20_0020),
        Err(Fault::GeneralProtection { .. })
    ));
    // Bits above MAXPHYADDR are reserved in a PTE, the ignored ones of long mode too.
    store(&machine, 0x20_0028, 8, 0x20_1000 | P);
    cpu.write_cr3(0x20_0020).unwrap();
    store(&machine, 0x20_2018, 8, PAGE | P | 1 << 60);
    assert_eq!(
        cpu.read_u8(va),
        Err(Fault::Page {
            address: va,
            code: pf::P | pf::RSVD
        })
    );
}

#[test]
fn five_levels() {
    let va = 0x00fe_8000_0040_0008;
    let machine = boot(
        cr4::PAE | cr4::LA57,
        efer::LME | efer::NXE,
        0x20_0000,
        |m| {
            for (level, shift) in [48, 39, 30, 21, 12].into_iter().enumerate() {
                let table = 0x20_0000 + 0x1000 * level as u64;
                let next = if shift == 12 { PAGE } else { table + 0x1000 };
                store(m, table + 8 * (va >> shift & 511), 8, next | P | RW | US);
            }
        },
    );
    let cpu = machine.cpu(0);
    assert_eq!(cpu.registers().efer & efer::LMA, efer::LMA);
    cpu.user().write_u64(va, 77).unwrap();
    assert_eq!(load(&machine, PAGE + 8, 8), 77);
    assert!(matches!(
        cpu.read_u8(0x0100_0000_0000_0000),
        Err(Fault::GeneralProtection { .. })
    ));
    assert!(matches!(
        cpu.read_u8(0xff00_0000_0000_0000),
        Err(Fault::Page { .. })
    ));
    // A walk below the cached PML4E starts there: four levels less to read.
    let before = machine.stats().short_walks;
    let _ = cpu.read_u8(va + 0x1000);
    assert_eq!(machine.stats().short_walks, before + 1);
}

#[test]
fn paging_off_is_the_identity() {
    let machine = builder().registers(Registers::PROTECTED).build().unwrap();
    let cpu = machine.cpu(0);
    cpu.write_u32(PAGE, 3).unwrap();
    assert_eq!(load(&machine, PAGE, 4), 3);
    assert_eq!(machine.take_violations().len(), 0);
    assert!(matches!(
        cpu.write_cr4(cr4::PCIDE),
        Err(Fault::GeneralProtection { .. })
    ));
}

#[test]
fn protection_keys_are_of_ia_32e_mode_alone() {
    let registers = Registers {
        pkru: 3,
        ..Registers::PROTECTED
    };
    let machine = builder().registers(registers).build().unwrap();
    let cpu = machine.cpu(0);
    store(&machine, 0x20_0000, 4, PAGE | P | RW | US | PS);
    cpu.write_cr4(cr4::PSE | cr4::PKE).unwrap();
    cpu.write_cr3(0x20_0000).unwrap();
    cpu.write_cr0(cr0::PE | cr0::PG).unwrap();
    assert_eq!(cpu.user().write_u8(8, 1), Ok(()));
}

#[test]
fn ia_32e_mode_is_entered_from_32_bit_code() {
    let machine = boot(cr4::PAE, efer::LME, 0x20_0000, |machine| {
        let long = Descriptor(LINUX_GDT_64[1]);
        let data = Descriptor(LINUX_GDT_64[2]);
        let cpu = machine.cpu(0);
        cpu.segments()
            .start((Selector::gdt(2, 0), long), (Selector::gdt(3, 0), data));
        cpu.write_cr4(cr4::PAE).unwrap();
        cpu.write_efer(efer::LME).unwrap();
        assert!(matches!(
            cpu.write_cr0(cr0::PE | cr0::PG),
            Err(Fault::GeneralProtection { .. })
        ));
        let code = Descriptor(LINUX_GDT_64[0]);
        cpu.segments()
            .start((Selector::gdt(1, 0), code), (Selector::gdt(3, 0), data));
        cpu.write_efer(0).unwrap();
    });
    assert_eq!(machine.cpu(0).registers().efer & efer::LMA, efer::LMA);
}
