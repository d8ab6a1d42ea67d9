//! Protection keys: a thread forbids itself what its mappings allow.

mod common;

use common::{PAGE, Program, RW, World, check_counters, signal};
use kmem_cow_mm::{Errno, MapRequest, Prot, Signal};
use kmem_mock_x86::manual::cr4;

const AT: u64 = 0x7000_0000;

#[test]
fn a_key_forbids_and_the_signal_names_it() {
    let world = World::new();
    let program = Program::new(world.mm());
    let space = &program.space;
    space
        .mmap(&MapRequest::anonymous(4 * PAGE, RW).at(AT))
        .unwrap();
    program.store(AT, 1).unwrap();
    let key = space.pkey_alloc(0, 0).unwrap();
    assert_eq!(key, 1, "0 is everybody's");
    space
        .pkey_mprotect(AT, 2 * PAGE, RW, i32::from(key))
        .unwrap();
    assert_eq!(space.map_count(), 2, "another key, another mapping");
    let cpu = world.machine.cpu(0);
    cpu.write_cr4(cpu.registers().cr4 | cr4::PKE).unwrap();
    // Write-disable for key 1.
    cpu.write_pkru(2 << 2).unwrap();
    assert_eq!(program.load(AT), Ok(1));
    assert_eq!(program.store(AT, 2), Err(signal(Signal::KeyError(1), AT)));
    program.store(AT + 2 * PAGE, 2).unwrap();
    // A page that comes later has the key from the start, and a child has it too.
    assert_eq!(program.load(AT + PAGE), Ok(0));
    assert_eq!(
        program.store(AT + PAGE, 2),
        Err(signal(Signal::KeyError(1), AT + PAGE))
    );
    let child = program.fork().unwrap();
    assert_eq!(child.store(AT, 2), Err(signal(Signal::KeyError(1), AT)));
    assert_eq!(
        child.space.pkey_alloc(0, 0),
        Ok(2),
        "the child knows which keys are taken"
    );
    child.exit();
    cpu.write_pkru(1 << 2).unwrap();
    assert_eq!(program.load(AT), Err(signal(Signal::KeyError(1), AT)));
    cpu.write_pkru(0).unwrap();
    program.store(AT, 3).unwrap();
    // Plain mprotect keeps the key; the first key takes it away, and the two are one again.
    space.mprotect(AT, 2 * PAGE, Prot::READ).unwrap();
    assert_eq!(space.vma_at(AT.into()).unwrap().flags.key(), 1);
    space.pkey_mprotect(AT, 2 * PAGE, RW, 0).unwrap();
    cpu.write_pkru(3 << 2).unwrap();
    program.store(AT, 4).unwrap();
    check_counters([&program]);
    program.exit();
}

#[test]
fn keys_are_handed_out_and_taken_back() {
    let program = Program::new(World::new().mm());
    let space = &program.space;
    space.mmap(&MapRequest::anonymous(PAGE, RW).at(AT)).unwrap();
    assert_eq!(space.pkey_mprotect(AT, PAGE, RW, 1), Err(Errno::EINVAL));
    for key in 1..16 {
        assert_eq!(space.pkey_alloc(0, 3), Ok(key));
    }
    assert_eq!(space.pkey_alloc(0, 0), Err(Errno::ENOSPC));
    assert_eq!(
        (space.pkey_alloc(1, 0), space.pkey_alloc(0, 4)),
        (Err(Errno::EINVAL), Err(Errno::EINVAL))
    );
    space.pkey_free(7).unwrap();
    assert_eq!(
        (space.pkey_free(7), space.pkey_free(-1), space.pkey_free(16)),
        (Err(Errno::EINVAL), Err(Errno::EINVAL), Err(Errno::EINVAL))
    );
    assert_eq!(space.pkey_alloc(0, 0), Ok(7));
    space.pkey_mprotect(AT, PAGE, RW, -1).unwrap();
    program.exit();
}
