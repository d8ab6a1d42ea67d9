//! The first pages are nobody's: no call gets round `vm.mmap_min_addr`, and no stack grows below where its pages are numbered from.

mod common;

use common::{PAGE, Program, RW, World, signal};
use kmem_cow_mm::{Errno, MapFlags, MapRequest, RemapFlags, Signal};

const AT: u64 = 0x1000_0000;
const LOWEST: u64 = 0x1_0000;
const MOVE: RemapFlags = RemapFlags::MAYMOVE.union(RemapFlags::FIXED);

/// A stack of one page, written.
fn stack_at(address: u64) -> Program {
    let program = Program::new(World::new().mm());
    let mut request = MapRequest::anonymous(PAGE, RW).at(address);
    request.flags |= MapFlags::GROWSDOWN;
    program.space.mmap(&request).unwrap();
    program.store(address, 1).unwrap();
    program
}

#[test]
fn mremap_moves_nothing_to_the_first_pages() {
    let program = Program::new(World::new().mm());
    let space = &program.space;
    space
        .mmap(&MapRequest::anonymous(2 * PAGE, RW).at(AT))
        .unwrap();
    program.store(AT, 7).unwrap();
    for target in [0, PAGE, LOWEST - PAGE] {
        for (old, new) in [(1, 1), (2, 1), (1, 2)] {
            assert_eq!(
                space.mremap(AT, old * PAGE, new * PAGE, MOVE, target),
                Err(Errno::EPERM)
            );
            // What shrinks was cut before.
            assert_eq!(space.map_count(), 1);
        }
    }
    assert_eq!(program.load(AT), Ok(7));
    assert_eq!(space.mremap(AT, PAGE, PAGE, MOVE, LOWEST), Ok(LOWEST));
    assert_eq!(program.load(LOWEST), Ok(7));
    program.exit();
}

#[test]
fn a_stack_does_not_grow_into_the_first_pages() {
    let program = stack_at(LOWEST + PAGE);
    assert_eq!(program.store(LOWEST, 1), Ok(()));
    for address in [LOWEST - PAGE, PAGE, 0] {
        let refused = Err(signal(Signal::MapError, address));
        assert_eq!(program.store(address, 1), refused);
    }
    program.exit();
}

#[test]
fn a_stack_that_was_moved_grows_to_its_page_number_zero() {
    let program = stack_at(LOWEST);
    assert_eq!(program.space.mremap(LOWEST, PAGE, PAGE, MOVE, AT), Ok(AT));
    let below = AT - 17 * PAGE;
    assert_eq!(
        program.store(below, 1),
        Err(signal(Signal::MapError, below))
    );
    for page in 1..=16 {
        assert_eq!(program.store(AT - page * PAGE, page), Ok(()));
    }
    assert_eq!(program.space.vma_at(AT.into()).unwrap().offset, 0);
    program.exit();
}
