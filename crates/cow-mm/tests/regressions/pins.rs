//! The list's part about pinned pages: each run is a bug that a kernel had.

use kmem_cow_mm::Env as _;
use kmem_cow_mm::{Advice, MapFlags, MapRequest, PinError, Prot, RemapFlags};
use kmem_hal::{Access, VirtAddr};
use kmem_paging::Env as _;

use super::common::{PAGE, Program, RW, World};
use super::list::Regression;

/// All of them.
pub const ALL: &[Regression] = &[
    (
        "a_child_with_a_read_pin_does_not_see_what_its_parent_writes_later",
        a_child_with_a_read_pin_does_not_see_what_its_parent_writes_later,
        &["mappings-alone-decide"],
    ),
    (
        "a_pinned_page_stays_its_owners_over_fork",
        a_pinned_page_stays_its_owners_over_fork,
        &["pins-not-counted"],
    ),
    (
        "a_pin_in_a_shared_table_makes_the_table_the_pinners",
        a_pin_in_a_shared_table_makes_the_table_the_pinners,
        &["pins-not-counted"],
    ),
    (
        "a_pinned_page_that_moved_stays_its_owners",
        a_pinned_page_that_moved_stays_its_owners,
        &["moved-pins-not-counted"],
    ),
    (
        "a_write_through_a_pin_never_reaches_the_file_of_a_private_mapping",
        a_write_through_a_pin_never_reaches_the_file_of_a_private_mapping,
        &["write-intent-is-lost"],
    ),
    (
        "what_a_program_may_not_access_is_not_pinned",
        what_a_program_may_not_access_is_not_pinned,
        &["shared-page-is-pinned"],
    ),
    (
        "a_read_pin_of_a_read_only_shared_mapping_is_of_the_files_page",
        a_read_pin_of_a_read_only_shared_mapping_is_of_the_files_page,
        &["file-page-is-copied-for-a-pin"],
    ),
    (
        "a_thousand_references_are_no_pin",
        a_thousand_references_are_no_pin,
        &["references-are-pins"],
    ),
];

fn word(bytes: [u8; 8]) -> u64 {
    u64::from_le_bytes(bytes)
}

/// CVE-2020-29374: the child takes a read reference to a shared page and unmaps it; the parent is then the only mapper. Were the page
/// reused in place, the child would read the parent's secret through its reference.
fn a_child_with_a_read_pin_does_not_see_what_its_parent_writes_later() {
    let world = World::new();
    let parent = Program::new(world.mm());
    let address = parent.map(1);
    parent.store(address, 1).unwrap();
    let child = parent.fork().unwrap();
    {
        let pin = child
            .space
            .pin(VirtAddr::new(address), Access::Read)
            .unwrap();
        child.space.munmap(address, PAGE).unwrap();
        parent.store(address, 2).unwrap();
        let mut bytes = [0; 8];
        pin.read(0, &mut bytes);
        assert_eq!(word(bytes), 1, "the child saw the parent's secret");
        assert_eq!(child.space.pins(), 1);
    }
    assert_eq!(child.space.pins(), 0);
    assert_eq!(parent.load(address), Ok(2));
    child.exit();
    parent.exit();
}

/// A device works on a page when the process forks and writes: were the page copied on the parent's write, the device would go on with
/// the old frame, which is the child's alone by then.
fn a_pinned_page_stays_its_owners_over_fork() {
    let world = World::new();
    let parent = Program::new(world.mm());
    let address = parent.map(2);
    parent.store(address, 1).unwrap();
    parent.store(address + PAGE, 10).unwrap();
    {
        let pin = parent
            .space
            .pin(VirtAddr::new(address), Access::Write)
            .unwrap();
        let child = parent.fork().unwrap();
        parent.store(address, 2).unwrap();
        let mut bytes = [0; 8];
        pin.read(0, &mut bytes);
        assert_eq!(
            word(bytes),
            2,
            "the device does not see what the program writes"
        );
        assert!(pin.write(0, &3u64.to_le_bytes()));
        assert_eq!(
            parent.load(address),
            Ok(3),
            "the program does not see the device's data"
        );
        assert_eq!(
            child.load(address),
            Ok(1),
            "the child sees its parent's device"
        );
        // The neighbour in the same table is copied on write as ever.
        child.store(address + PAGE, 11).unwrap();
        assert_eq!(parent.load(address + PAGE), Ok(10));
        child.exit();
    }
    // Unpinned, its table is shared again.
    let child = parent.fork().unwrap();
    parent.store(address, 4).unwrap();
    assert_eq!(child.load(address), Ok(3));
    child.exit();
    parent.exit();
}

/// A table is shared, then a page in it is pinned by one side: that side's table is its own from then on.
fn a_pin_in_a_shared_table_makes_the_table_the_pinners() {
    let world = World::new();
    let parent = Program::new(world.mm());
    let address = parent.map(4);
    for page in 0..4 {
        parent.store(address + page * PAGE, page + 1).unwrap();
    }
    let child = parent.fork().unwrap();
    {
        let pin = child
            .space
            .pin(VirtAddr::new(address), Access::Write)
            .unwrap();
        assert!(pin.write(0, &9u64.to_le_bytes()));
        assert_eq!(
            parent.load(address),
            Ok(1),
            "the pin was of the parent's page"
        );
        assert_eq!(child.load(address), Ok(9));
        // And a grandchild gets a copy.
        let grandchild = child.fork().unwrap();
        assert!(pin.write(0, &10u64.to_le_bytes()));
        assert_eq!(grandchild.load(address), Ok(9));
        assert_eq!(child.load(address), Ok(10));
        grandchild.exit();
    }
    child.exit();
    parent.exit();
}

/// A pinned page that mremap moved to another table is not shared with that table.
fn a_pinned_page_that_moved_stays_its_owners() {
    let world = World::new();
    let parent = Program::new(world.mm());
    let address = parent.map(1);
    parent.store(address, 1).unwrap();
    {
        let pin = parent
            .space
            .pin(VirtAddr::new(address), Access::Write)
            .unwrap();
        let target = address - (64 << 20);
        let flags = RemapFlags::MAYMOVE | RemapFlags::FIXED;
        parent
            .space
            .mremap(address, PAGE, PAGE, flags, target)
            .unwrap();
        let child = parent.fork().unwrap();
        parent.store(target, 2).unwrap();
        let mut bytes = [0; 8];
        pin.read(0, &mut bytes);
        assert_eq!(word(bytes), 2);
        assert_eq!(child.load(target), Ok(1));
        child.exit();
    }
    parent.exit();
}

/// Dirty COW (CVE-2016-5195): the kernel writes to a private mapping of a file while the page is dropped under it. The write must go to
/// a copy of the page that is there now, and never to the file's.
fn a_write_through_a_pin_never_reaches_the_file_of_a_private_mapping() {
    let world = World::new();
    let mm = world.mm();
    let (_image, file) = world.file(mm, &[7; 4096]);
    let program = Program::new(mm);
    let request = MapRequest {
        flags: MapFlags::PRIVATE,
        file: Some(file),
        ..MapRequest::anonymous(PAGE, RW)
    };
    let address = program.space.mmap(&request).unwrap().as_u64();
    let at = VirtAddr::new(address);
    assert_eq!(program.load(address), Ok(0x0707_0707_0707_0707));
    for value in 1..4u64 {
        {
            let pin = program.space.pin(at, Access::Write).unwrap();
            // The page goes between the look-up and the write.
            program
                .space
                .madvise(address, PAGE, Advice::DontNeed)
                .unwrap();
            assert!(pin.write(0, &value.to_le_bytes()));
        }
        assert_eq!(program.load(address), Ok(0x0707_0707_0707_0707));
        program
            .space
            .write_memory(at, &value.to_le_bytes())
            .unwrap();
        assert_eq!(program.load(address), Ok(value));
        program
            .space
            .madvise(address, PAGE, Advice::DontNeed)
            .unwrap();
    }
    // Another mapping of the file sees what the file holds.
    let request = MapRequest {
        flags: MapFlags::SHARED,
        ..request
    };
    let shared = program.space.mmap(&request).unwrap().as_u64();
    assert_eq!(program.load(shared), Ok(0x0707_0707_0707_0707));
    program.exit();
}

fn what_a_program_may_not_access_is_not_pinned() {
    let world = World::new();
    let program = Program::new(world.mm());
    let request = MapRequest::anonymous(PAGE, Prot::READ);
    let address = program.space.mmap(&request).unwrap();
    let fault = |access| program.space.pin(address, access).map(|_| ()).unwrap_err();
    assert_eq!(fault(Access::Write), PinError::Fault(address));
    let beyond = VirtAddr::new(address.as_u64() + PAGE);
    let outcome = program.space.pin(beyond, Access::Read).map(|_| ());
    assert_eq!(outcome, Err(PinError::Fault(beyond)));
    // The zero page is not pinned: what the program writes later is seen.
    let pin = program.space.pin(address, Access::Read).unwrap();
    program.space.mprotect(address.as_u64(), PAGE, RW).unwrap();
    program.store(address.as_u64(), 5).unwrap();
    let mut bytes = [0; 8];
    pin.read(0, &mut bytes);
    assert_eq!(word(bytes), 5);
    assert!(!pin.write(0, &bytes), "it was pinned to be read");
    drop(pin);
    program.exit();
}

/// A file that was opened to be read is mapped "shared" without the right to write ever: others write to it, and a pin sees that.
fn a_read_pin_of_a_read_only_shared_mapping_is_of_the_files_page() {
    let world = World::new();
    let mm = world.mm();
    let (_image, file) = world.file(mm, &[7; 4096]);
    let reader = Program::new(mm);
    let writer = Program::new(mm);
    let request = MapRequest {
        flags: MapFlags::SHARED,
        file: Some(file),
        ..MapRequest::anonymous(PAGE, RW)
    };
    let to_write = writer.space.mmap(&request).unwrap().as_u64();
    let file = kmem_cow_mm::OpenFile {
        writable: false,
        ..file
    };
    let request = MapRequest {
        file: Some(file),
        prot: Prot::READ,
        ..request
    };
    let to_read = reader.space.mmap(&request).unwrap().as_u64();
    assert_eq!(reader.load(to_read), Ok(0x0707_0707_0707_0707));
    let pin = reader.space.pin(VirtAddr::new(to_read), Access::Read);
    let pin = pin.unwrap();
    writer.store(to_write, 5).unwrap();
    let mut bytes = [0; 8];
    pin.read(0, &mut bytes);
    assert_eq!(word(bytes), 5, "the pin is of a copy");
    assert_eq!(reader.load(to_read), Ok(5), "the mapping shows a copy");
    assert_eq!(reader.space.pins(), 0, "no anonymous page");
    drop(pin);
    let vma = reader.space.vma_at(VirtAddr::new(to_read)).unwrap();
    assert_eq!(vma.anon, None);
    reader.exit();
    writer.exit();
}

/// Who looks at a page a thousand times over has not pinned it: were it taken for pinned, a write would reach all of them.
fn a_thousand_references_are_no_pin() {
    let world = World::new();
    let parent = Program::new(world.mm());
    let address = parent.map(2);
    parent.store(address, 1).unwrap();
    // A child with a table of its own: the page is mapped twice for a while, and becomes writable again only by a fault.
    let had_a_child = || {
        let child = parent.fork().unwrap();
        child.store(address + PAGE, 9).unwrap();
        child.exit();
    };
    had_a_child();
    let frame = parent.frame_at(address).unwrap();
    let slot = world.paging().slots().slot(frame).unwrap();
    let page = slot.as_user().unwrap();
    for _ in 0..1023 {
        page.add_reference().unwrap();
    }
    parent.store(address, 2).unwrap();
    assert_ne!(parent.frame_at(address), Some(frame), "written in place");
    let copy = parent.frame_at(address).unwrap();
    // With a pin the page stays where it is, whoever looks at it.
    had_a_child();
    {
        let at = VirtAddr::new(address);
        let pin = parent.space.pin(at, Access::Read).unwrap();
        assert_eq!(parent.frame_at(address), Some(copy));
        let slot = world.paging().slots().slot(copy).unwrap();
        let looked = slot.as_user().unwrap();
        for _ in 0..1023 {
            looked.add_reference().unwrap();
        }
        parent.store(address, 3).unwrap();
        assert_eq!(parent.frame_at(address), Some(pin.frame()));
        for _ in 0..1023 {
            looked.sub_reference().unwrap();
        }
    }
    parent.exit();
    for _ in 0..1022 {
        page.sub_reference().unwrap();
    }
    assert_eq!(page.references(), 1, "the test's own");
}
