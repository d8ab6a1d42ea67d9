//! Machines that differ from the usual one: without caches, with cached absence, with an eye on the kernel's own accesses.

mod common;

use common::*;
use kmem_hal::{PhysAddr, PhysMap};
use kmem_mock_x86::{AccessKind, Adversary, Fault, MachineBuilder, ViolationKind, manual::pf};

const PAGE: u64 = 0x40_0000;

fn mapped(builder: MachineBuilder) -> (kmem_mock_x86::Machine, u64, u64) {
    let machine = builder.build().unwrap();
    let mut tables = Tables::new(&machine, 0x10_0000);
    let entry = tables.map(PAGE, 0x80_0000, 12, P | RW | US);
    tables.load(0);
    let root = tables.root;
    (machine, root, entry)
}

#[test]
fn without_caches_nothing_is_ever_stale() {
    let (machine, _, entry) = mapped(builder().caching(false).adversary(Adversary::FULL));
    machine.note_allocated(0x800, 1);
    assert_eq!(machine.cpu(0).user().write_u64(PAGE, 7), Ok(()));
    assert!(machine.memory().store(entry, 8, 0));
    machine.note_freed(0x800, 1);
    assert!(machine.cpu(0).user().read_u64(PAGE).is_err());
    assert_eq!(machine.cpu(0).cached_entries(), 0);
    assert!(machine.take_violations().is_empty());
    // The same with caches is a crime.
    let (machine, _, entry) = mapped(builder());
    machine.note_allocated(0x800, 1);
    assert_eq!(machine.cpu(0).user().write_u64(PAGE, 7), Ok(()));
    assert!(machine.memory().store(entry, 8, 0));
    machine.note_freed(0x800, 1);
    assert_eq!(machine.cpu(0).user().read_u64(PAGE), Ok(7));
    assert_eq!(machine.take_violations()[0].kind, ViolationKind::FreedFrame);
}

#[test]
fn an_absent_entry_is_remembered_until_it_is_flushed() {
    let (machine, _, entry) = mapped(builder().caches_absent(true));
    let cpu = machine.cpu(0).user();
    let neighbour = PAGE + 0x1000;
    let refused = Err(Fault::Page {
        address: neighbour,
        code: pf::U,
    });
    assert_eq!(cpu.read_u64(neighbour), refused);
    assert_eq!(cpu.registers().cr2, neighbour);
    assert!(
        machine
            .memory()
            .store(entry + 8, 8, 0x90_0000 | P | RW | US)
    );
    for _ in 0..3 {
        assert_eq!(
            cpu.read_u64(neighbour),
            refused,
            "a fault drops nothing here"
        );
    }
    assert_eq!(machine.stats().stale_absent, 3);
    machine.cpu(0).invlpg(PAGE).unwrap();
    assert_eq!(cpu.read_u64(neighbour), refused, "another page's flush");
    machine.cpu(0).invlpg(neighbour).unwrap();
    assert!(cpu.read_u64(neighbour).is_ok());
    // A right that was raised is refused as long.
    assert!(machine.memory().store(entry, 8, 0x80_0000 | P | US));
    machine.cpu(0).invlpg(PAGE).unwrap();
    assert!(cpu.read_u64(PAGE).is_ok());
    assert!(machine.memory().store(entry, 8, 0x80_0000 | P | RW | US));
    assert!(cpu.write_u64(PAGE, 1).is_err() && cpu.write_u64(PAGE, 1).is_err());
    machine.cpu(0).invlpg(PAGE).unwrap();
    assert!(cpu.write_u64(PAGE, 1).is_ok());
    // On x86 none of this is cached.
    let (machine, _, entry) = mapped(builder());
    let cpu = machine.cpu(0).user();
    assert_eq!(cpu.read_u64(neighbour), refused);
    assert!(
        machine
            .memory()
            .store(entry + 8, 8, 0x90_0000 | P | RW | US)
    );
    assert!(cpu.read_u64(neighbour).is_ok());
}

#[test]
fn an_absent_upper_entry_goes_with_any_flush_of_the_space() {
    let (machine, root, _) = mapped(builder().caches_absent(true));
    let cpu = machine.cpu(0).user();
    let far = 0x80_0000_0000;
    assert!(cpu.read_u64(far).is_err());
    let mut tables = Tables::new(&machine, 0x10_0000);
    tables.next = 0x20_0000;
    tables.map(far, 0x80_0000, 12, P | RW | US);
    assert_eq!(tables.root, root);
    assert!(cpu.read_u64(far).is_err(), "the top entry was not there");
    machine.cpu(0).invlpg(PAGE).unwrap();
    assert!(cpu.read_u64(far).is_ok());
    assert!(cpu.read_u64(far + 0x1000).is_err());
    machine.cpu(0).write_cr3(root).unwrap();
    assert!(machine.cpu(0).cached_entries() == 0);
}

#[test]
fn the_kernel_may_not_reach_for_a_free_frame() {
    let machine = builder().watch_kernel(true).build().unwrap();
    machine.note_allocated(0x500, 1);
    machine.to_ptr(PhysAddr::new(0x50_0010));
    assert!(machine.take_violations().is_empty());
    machine.note_freed(0x500, 1);
    machine.to_ptr(PhysAddr::new(0x50_0010));
    let found = machine.take_violations();
    assert_eq!(found[0].kind, ViolationKind::KernelFreedFrame);
    let story = found[0].to_string();
    assert!(
        story.contains("0x500010") && story.contains("freed at step"),
        "{story}"
    );
    // Frames that nobody spoke of are not judged, and without the watch nothing is.
    machine.to_ptr(PhysAddr::new(0x60_0000));
    assert!(machine.take_violations().is_empty());
    let machine = builder().build().unwrap();
    machine.note_allocated(0x500, 1);
    machine.note_freed(0x500, 1);
    machine.to_ptr(PhysAddr::new(0x50_0010));
    assert!(machine.take_violations().is_empty());
}

#[test]
fn the_audit_sees_changed_memory_types_and_lost_globality() {
    for (before, after) in [
        (P | RW | US, P | RW | US | 1 << 4),
        (P | RW | US | 1 << 7, P | RW | US),
        (P | RW | US | G, P | RW | US),
    ] {
        let machine = builder().build().unwrap();
        let mut tables = Tables::new(&machine, 0x10_0000);
        let entry = tables.map(PAGE, 0x80_0000, 12, before);
        tables.load(0);
        machine.cpu(0).translate(PAGE, AccessKind::Read).unwrap();
        assert!(machine.audit(0, u64::MAX).is_empty());
        tables.set(entry, 0x80_0000 | after | A);
        assert_eq!(
            machine.audit(0, u64::MAX).len(),
            1,
            "{before:#x} to {after:#x}"
        );
        machine.cpu(0).invlpg(PAGE).unwrap();
        assert!(machine.audit(0, u64::MAX).is_empty());
    }
}
