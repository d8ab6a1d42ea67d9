//! Programs on a processor that remembers what it refused until it is told to forget, as RISC-V's and AArch64's may: an entry that gets a right
//! is flushed, or the access faults for ever.

#[path = "../../paging/tests/common/absent.rs"]
mod absent;
mod common;

use absent::X86Absent;
use common::{PAGE, RW, World, check_counters};
use kmem_cow_mm::{Advice, MapFlags, Prot};
use kmem_mock_x86::{Machine, MemoryMap};

type Program = common::Program<X86Absent>;

fn world() -> &'static World<X86Absent> {
    let machine = Machine::builder().memory(MemoryMap::pc(16 << 20));
    let machine = machine.cpus(2).caches_absent(true).build().unwrap();
    World::with(common::kept::keep(Box::new(machine)))
}

/// Each access may be made by another CPU, which has its own memory of what was refused; `Program` gives up after 64 faults.
fn see_and_write(program: &Program, address: u64, before: u64) {
    for _ in 0..2 {
        assert_eq!(program.load(address), Ok(before));
    }
    program.store(address, before + 1).unwrap();
    for _ in 0..2 {
        assert_eq!(program.load(address), Ok(before + 1));
    }
    program.store(address, before + 2).unwrap();
}

#[test]
fn the_last_of_a_family_writes_its_pages_where_they_are() {
    let world = world();
    let parent = Program::new(world.mm());
    let start = parent.map(2);
    see_and_write(&parent, start, 0);
    let child = parent.fork().unwrap();
    see_and_write(&child, start, 2);
    child.exit();
    see_and_write(&parent, start, 2);
    see_and_write(&parent, start + PAGE, 0);
    check_counters([&parent]);
    parent.exit();
}

#[test]
fn rights_that_mprotect_gives_back_are_used() {
    let world = world();
    let program = Program::new(world.mm());
    let start = program.map(1);
    program.store(start, 5).unwrap();
    for prot in [Prot::READ, Prot::empty()] {
        program.space.mprotect(start, PAGE, prot).unwrap();
        for _ in 0..2 {
            assert!(program.store(start, 6).is_err());
        }
        program.space.mprotect(start, PAGE, RW).unwrap();
        see_and_write(&program, start, 5);
        program.store(start, 5).unwrap();
    }
    program.exit();
}

#[test]
fn a_page_that_comes_back_from_swap_is_written() {
    let world = world();
    let mm = world.mm();
    world.disk(mm, 16);
    let program = Program::new(mm);
    let start = program.map(1);
    program.store(start, 7).unwrap();
    program.space.madvise(start, PAGE, Advice::PageOut).unwrap();
    while mm.poll_swap().is_some() {}
    see_and_write(&program, start, 7);
    program.exit();
}

#[test]
fn the_first_write_to_a_page_of_a_file_is_made() {
    let world = world();
    let mm = world.mm();
    let (_, file) = world.file(mm, &[0; PAGE as usize]);
    let program = Program::new(mm);
    let start = program.map_file(file, 1, RW, MapFlags::SHARED);
    see_and_write(&program, start, 0);
    mm.sync_file(file.file).unwrap();
    see_and_write(&program, start, 2);
    program.exit();
}
