//! Each flush: what it must drop is gone, what it may keep is still there.

mod common;

use common::{G, P, RW, Tables, US, builder};
use kmem_mock_x86::manual::cr4;
use kmem_mock_x86::{
    Adversary, Descriptor, Fault, Features, Invpcid, Machine, Registers, Selector,
};

const ONE: u64 = 0x40_0000;
const TWO: u64 = 0x40_1000;
const SHARED: u64 = 0x60_0000;
const FAR: u64 = 0x80_4000_0000;

/// PCID 1 and PCID 2 with the same tables; in each, `ONE`, `TWO`, `FAR` and the global `SHARED` are cached. PCID 1 is current.
fn machine() -> (Machine, u64) {
    let machine = builder().registers(Registers::LONG_PCID).build().unwrap();
    let mut tables = Tables::new(&machine, 0x20_0000);
    for (page, flags) in [(ONE, 0), (TWO, 0), (FAR, 0), (SHARED, G)] {
        tables.map(
            page,
            0x80_0000 + (page & 0xff_f000),
            12,
            P | RW | US | flags,
        );
    }
    let root = tables.root;
    let cpu = machine.cpu(0);
    for pcid in [2, 1] {
        cpu.write_cr3(root | pcid).unwrap();
        for page in [ONE, TWO, FAR, SHARED] {
            cpu.read_u8(page).unwrap();
        }
    }
    (machine, root)
}

/// Which of `ONE`, `TWO`, `FAR`, `SHARED` are cached for PCID 1 and PCID 2, and how many entries of walk caches of each are used.
fn held(machine: &Machine, root: u64) -> [[bool; 4]; 2] {
    [1, 2].map(|pcid| {
        machine.cpu(0).write_cr3(root | pcid | 1 << 63).unwrap();
        [ONE, TWO, FAR, SHARED].map(|page| machine.cpu(0).holds(page))
    })
}

const ALL: [bool; 4] = [true; 4];
const GLOBAL_ONLY: [bool; 4] = [false, false, false, true];
const NONE: [bool; 4] = [false; 4];

/// Whether the next walk to `page` under `pcid` can start in a walk cache.
fn short_walk(machine: &Machine, root: u64, pcid: u64, page: u64) -> bool {
    machine.cpu(0).write_cr3(root | pcid | 1 << 63).unwrap();
    let before = machine.stats();
    machine.cpu(0).read_u8(page ^ 0x3000).unwrap_err();
    // The access is refused at last from the root: one walk more than the short one.
    machine.stats().short_walks > before.short_walks
}

#[test]
fn everything_stays_without_a_flush() {
    let (machine, root) = machine();
    assert_eq!(held(&machine, root), [ALL, ALL]);
    assert!(short_walk(&machine, root, 2, ONE));
}

#[test]
fn invlpg_drops_the_page_in_the_current_pcid_and_global_pages() {
    let (machine, root) = machine();
    machine.cpu(0).invlpg(ONE + 0x123).unwrap();
    assert_eq!(held(&machine, root), [[false, true, true, true], ALL]);
    machine.cpu(0).write_cr3(root | 1 | 1 << 63).unwrap();
    machine.cpu(0).invlpg(SHARED).unwrap();
    assert_eq!(
        held(&machine, root),
        [[false, true, true, false], [true, true, true, false]]
    );
}

#[test]
fn invlpg_drops_every_walk_cache_entry_of_the_pcid_whatever_the_address() {
    let (machine, root) = machine();
    machine.cpu(0).invlpg(ONE).unwrap();
    assert!(!short_walk(&machine, root, 1, FAR));
    assert!(short_walk(&machine, root, 2, FAR));
}

#[test]
fn invpcid_of_an_address_spares_global_pages_and_other_walk_cache_entries() {
    let (machine, root) = machine();
    machine
        .cpu(0)
        .invpcid(Invpcid::Address {
            pcid: 2,
            linear: ONE,
        })
        .unwrap();
    machine
        .cpu(0)
        .invpcid(Invpcid::Address {
            pcid: 2,
            linear: SHARED,
        })
        .unwrap();
    assert_eq!(held(&machine, root), [ALL, [false, true, true, true]]);
    assert!(!short_walk(&machine, root, 2, ONE));
    assert!(
        short_walk(&machine, root, 2, FAR),
        "type 0 drops only what is used for the address"
    );
}

#[test]
fn invpcid_of_a_context_and_of_all() {
    for (kind, expected) in [
        (Invpcid::Context { pcid: 2 }, [ALL, GLOBAL_ONLY]),
        (Invpcid::Context { pcid: 1 }, [GLOBAL_ONLY, ALL]),
        (Invpcid::All, [GLOBAL_ONLY, GLOBAL_ONLY]),
        (Invpcid::AllWithGlobal, [NONE, NONE]),
    ] {
        let (machine, root) = machine();
        machine.cpu(0).invpcid(kind).unwrap();
        assert_eq!(held(&machine, root), expected, "{kind:?}");
        let kept = expected[1] == ALL;
        assert_eq!(short_walk(&machine, root, 2, FAR), kept, "{kind:?}");
    }
}

#[test]
fn loads_of_cr3() {
    // With bit 63: nothing goes.
    let (machine, root) = machine();
    machine.cpu(0).write_cr3(root | 2 | 1 << 63).unwrap();
    assert_eq!(
        machine.cpu(0).registers().cr3,
        root | 2,
        "bit 63 is not stored"
    );
    assert_eq!(held(&machine, root), [ALL, ALL]);
    // Without: the PCID that is loaded, not the one that is left.
    machine.cpu(0).write_cr3(root | 1 | 1 << 63).unwrap();
    machine.cpu(0).write_cr3(root | 2).unwrap();
    assert_eq!(held(&machine, root), [ALL, GLOBAL_ONLY]);
}

#[test]
fn loads_of_cr3_without_pcids_drop_all_but_global_pages() {
    let machine = builder().build().unwrap();
    let mut tables = Tables::new(&machine, 0x20_0000);
    tables.map(ONE, 0x80_0000, 12, P);
    tables.map(SHARED, 0x90_0000, 12, P | G);
    tables.load(0);
    let cpu = machine.cpu(0);
    cpu.read_u8(ONE).unwrap();
    cpu.read_u8(SHARED).unwrap();
    tables.load(0);
    assert!(!cpu.holds(ONE) && cpu.holds(SHARED));
}

#[test]
fn changes_of_cr4() {
    for (flip, expected) in [
        (cr4::PGE, [NONE, NONE]),
        (cr4::PCIDE, [NONE, NONE]),
        (cr4::SMEP, [GLOBAL_ONLY, ALL]),
        (cr4::SMAP, [ALL, ALL]),
        (cr4::PKE, [ALL, ALL]),
    ] {
        let (machine, root) = machine();
        let cpu = machine.cpu(0);
        let old = cpu.registers().cr4;
        cpu.write_cr4(old ^ flip).unwrap();
        if flip == cr4::PCIDE {
            assert_eq!(cpu.cached_entries(), 0);
            continue;
        }
        assert_eq!(held(&machine, root), expected, "{flip:#x}");
        // SMEP from 1 to 0 drops nothing.
        if flip == cr4::SMEP {
            cpu.write_cr3(root | 2 | 1 << 63).unwrap();
            cpu.write_cr4(old).unwrap();
            assert_eq!(held(&machine, root), expected);
        }
    }
}

#[test]
fn paging_off_drops_everything() {
    let machine = builder().build().unwrap();
    let mut tables = Tables::new(&machine, 0x20_0000);
    tables.map(SHARED, 0x90_0000, 12, P | G);
    tables.load(0);
    let cpu = machine.cpu(0);
    cpu.read_u8(SHARED).unwrap();
    let cr0 = cpu.registers().cr0;
    // 64-bit code cannot turn paging off: through a code segment of compatibility mode.
    let code = Descriptor::segment(0, u32::MAX, 0xa, 0);
    let data = Descriptor::segment(0, u32::MAX, 0x2, 0);
    cpu.segments()
        .start((Selector::gdt(1, 0), code), (Selector::gdt(2, 0), data));
    cpu.write_cr0(cr0 & !(1 << 31)).unwrap();
    assert_eq!(cpu.cached_entries(), 0);
    cpu.write_u8(0x90_0000, 7).unwrap();
    cpu.write_cr0(cr0).unwrap();
    assert_eq!(cpu.read_u8(SHARED), Ok(7));
}

#[test]
fn a_page_fault_drops_what_caused_it() {
    let machine = builder().build().unwrap();
    let mut tables = Tables::new(&machine, 0x20_0000);
    let one = tables.map(ONE, 0x80_0000, 12, P);
    tables.map(TWO, 0x80_1000, 12, P);
    tables.load(0);
    let cpu = machine.cpu(0);
    cpu.read_u8(ONE).unwrap();
    cpu.read_u8(TWO).unwrap();
    assert!(matches!(cpu.write_u8(ONE, 1), Err(Fault::Page { .. })));
    assert!(!cpu.holds(ONE) && cpu.holds(TWO));
    // Raising a permission needs no flush: the second try sees it.
    tables.set(one, tables.get(one) | RW);
    assert_eq!(cpu.write_u8(ONE, 1), Ok(()));
}

#[test]
fn a_raised_permission_may_fault_once_and_only_once() {
    for global in [0, G] {
        let adversary = Adversary {
            stale_fault: 1024,
            ..Adversary::OFF
        };
        let machine = builder().adversary(adversary).build().unwrap();
        let mut tables = Tables::new(&machine, 0x20_0000);
        let one = tables.map(ONE, 0x80_0000, 12, P | global);
        tables.load(0);
        let cpu = machine.cpu(0);
        cpu.read_u8(ONE).unwrap();
        tables.set(one, tables.get(one) | RW);
        assert_eq!(
            cpu.write_u8(ONE, 1),
            Err(Fault::Page {
                address: ONE,
                code: 3
            })
        );
        assert_eq!(machine.stats().stale_faults, 1);
        assert_eq!(
            cpu.write_u8(ONE, 1),
            Ok(()),
            "the fault itself dropped the entry"
        );
    }
}

#[test]
fn a_right_raised_in_an_upper_entry_is_found_behind_a_walk_cache() {
    for (stale_fault, faults) in [(0, 0), (1024, 1)] {
        let adversary = Adversary {
            stale_fault,
            ..Adversary::OFF
        };
        let machine = builder().adversary(adversary).build().unwrap();
        let mut tables = Tables::new(&machine, 0x20_0000);
        tables.map(ONE, 0x80_0000, 12, P | RW);
        tables.map(TWO, 0x80_1000, 12, P | RW);
        let pde = tables.entry(ONE, 21);
        tables.set(pde, tables.get(pde) & !RW);
        tables.load(0);
        let cpu = machine.cpu(0);
        cpu.read_u8(TWO).unwrap();
        tables.set(pde, tables.get(pde) | RW);
        // The cached PDE forbids writing; plain hardware looks at the tables before it faults.
        for _ in 0..faults {
            assert_eq!(
                cpu.write_u8(ONE, 1),
                Err(Fault::Page {
                    address: ONE,
                    code: 3
                })
            );
        }
        assert_eq!(cpu.write_u8(ONE, 1), Ok(()));
        assert_eq!(machine.stats().stale_faults, faults);
    }
}

#[test]
fn a_large_page_is_one_entry_and_a_fractured_one_goes_as_a_whole() {
    for fracture in [0, 1024] {
        let adversary = Adversary {
            fracture,
            ..Adversary::OFF
        };
        let machine = builder().adversary(adversary).build().unwrap();
        let mut tables = Tables::new(&machine, 0x20_0000);
        tables.map(ONE, 0x80_0000, 21, P);
        tables.load(0);
        let cpu = machine.cpu(0);
        cpu.read_u8(ONE).unwrap();
        assert_eq!(cpu.holds(TWO), fracture == 0);
        cpu.read_u8(TWO).unwrap();
        assert_eq!(machine.stats().fractures, if fracture == 0 { 0 } else { 2 });
        cpu.invlpg(ONE + 0x5000).unwrap();
        assert!(!cpu.holds(ONE) && !cpu.holds(TWO), "fracture {fracture}");
    }
}

#[test]
fn invpcid_refuses_what_the_manual_refuses() {
    let machine = builder().build().unwrap();
    let cpu = machine.cpu(0);
    let gp = |outcome: Result<(), Fault>| matches!(outcome, Err(Fault::GeneralProtection { .. }));
    assert!(
        gp(cpu.invpcid(Invpcid::Address { pcid: 1, linear: 0 })),
        "a PCID without PCIDE"
    );
    assert!(gp(cpu.invpcid(Invpcid::Context { pcid: 0x1000 })));
    assert!(
        gp(cpu.invpcid(Invpcid::Address {
            pcid: 0,
            linear: 1 << 47
        })),
        "not canonical"
    );
    assert!(cpu.invpcid(Invpcid::Context { pcid: 0 }).is_ok());
    let old = builder()
        .features(Features {
            pcid: false,
            ..Features::default()
        })
        .build()
        .unwrap();
    assert_eq!(old.cpu(0).invpcid(Invpcid::All), Err(Fault::InvalidOpcode));
    // INVLPG of such an address is no error and does nothing.
    cpu.invlpg(1 << 47).unwrap();
}
