//! The list's part about memory that is short: what was lost, leaked or seen by the wrong process when pages went and came back.

use kmem_cow_mm::replacement::{Clock, Fifo};
use kmem_cow_mm::{Advice, MapFlags, Mm, Outcome, Reclaimer, Signal};
use kmem_hal::{Access, FrameRequest, FrameSink, FrameSource, Migrate, VirtAddr};
use kmem_mock_x86::{Adversary, Machine, MemoryMap};

use super::common::{PAGE, Program, RW, World};
use super::list::Regression;

/// All of them.
pub const ALL: &[Regression] = &[
    (
        "a_page_comes_back_from_swap_as_it_went",
        a_page_comes_back_from_swap_as_it_went,
        &["swapped-page-not-written"],
    ),
    (
        "a_copied_entry_of_swap_is_counted",
        a_copied_entry_of_swap_is_counted,
        &["copied-swap-entry-not-counted"],
    ),
    (
        "a_failed_read_is_no_page",
        a_failed_read_is_no_page,
        &["failed-read-is-up-to-date"],
    ),
    (
        "an_entry_in_a_shared_table_is_flushed_for_all",
        an_entry_in_a_shared_table_is_flushed_for_all,
        &["shared-entry-flushed-for-one"],
    ),
    (
        "no_dirty_bit_is_lost_by_write_back",
        no_dirty_bit_is_lost_by_write_back,
        &["cleaned-page-stays-writable"],
    ),
    (
        "what_is_written_after_madv_free_stays",
        what_is_written_after_madv_free_stays,
        &["lazily-freed-though-written"],
    ),
    (
        "what_the_kernel_writes_after_madv_free_stays",
        what_the_kernel_writes_after_madv_free_stays,
        &["kernel-write-is-not-noted"],
    ),
    (
        "what_a_pin_writes_after_madv_free_stays",
        what_a_pin_writes_after_madv_free_stays,
        &["pinned-write-is-not-noted"],
    ),
    (
        "locked_memory_is_not_reclaimed",
        locked_memory_is_not_reclaimed,
        &["locked-page-goes"],
    ),
    (
        "a_moved_page_takes_its_bytes_along",
        a_moved_page_takes_its_bytes_along,
        &["moved-page-not-copied"],
    ),
    (
        "an_entry_of_swap_names_no_memory",
        an_entry_of_swap_names_no_memory,
        &["paging:format-payload-names-memory"],
    ),
];

/// A program with so many pages of memory, and where they are; there are 16 slots of swap.
fn swapping(pages: u64) -> (&'static World, &'static Mm<'static, World>, Program, u64) {
    let world = World::new();
    let mm = world.mm();
    world.disk(mm, 16);
    let program = Program::new(mm);
    let start = program.map(pages);
    (world, mm, program, start)
}

fn out(mm: &Mm<'static, World>) {
    Reclaimer::new(Fifo).reclaim(mm, 1024);
    while mm.poll_swap().is_some() {}
    Reclaimer::new(Fifo).reclaim(mm, 1024);
}

pub fn a_page_comes_back_from_swap_as_it_went() {
    let (_, mm, program, start) = swapping(1);
    program.store(start, 0x5eed).unwrap();
    out(mm);
    assert_eq!(program.frame_at(start), None);
    assert_eq!(program.load(start), Ok(0x5eed));
    program.exit();
}

pub fn a_copied_entry_of_swap_is_counted() {
    let (_, mm, parent, start) = swapping(2);
    parent.store(start, 1).unwrap();
    parent.store(start + PAGE, 2).unwrap();
    out(mm);
    let child = parent.fork().unwrap();
    // A write takes a copy of the table, entries of swap included; then the parent needs the slots no more.
    parent.store(start, 10).unwrap();
    parent.store(start + PAGE, 20).unwrap();
    let stranger = Program::new(mm);
    let other = stranger.map(2);
    stranger.store(other, 666).unwrap();
    stranger.store(other + PAGE, 666).unwrap();
    out(mm);
    assert_eq!(child.load(start), Ok(1));
    assert_eq!(child.load(start + PAGE), Ok(2));
    assert_eq!(parent.load(start), Ok(10));
    parent.exit();
    child.exit();
    stranger.exit();
    assert_eq!(mm.meminfo().swap.free, 16);
}

pub fn a_failed_read_is_no_page() {
    let (world, mm, program, start) = swapping(1);
    let disk = world.disk(mm, 16);
    program.store(start, 77).unwrap();
    out(mm);
    disk.set_latency(2);
    disk.fail_at(1);
    let failed = program.load(start);
    let bus = |outcome: &Outcome| {
        matches!(
            outcome,
            Outcome::Signal {
                signal: Signal::BusError,
                ..
            }
        )
    };
    assert!(failed.as_ref().is_err_and(bus), "{failed:?}");
    assert_eq!(program.load(start), Ok(77));
    program.exit();
}

pub fn an_entry_in_a_shared_table_is_flushed_for_all() {
    let machine = Machine::builder()
        .memory(MemoryMap::pc(32 << 20))
        .cpus(2)
        .adversary(Adversary::OFF)
        .build();
    let machine: &'static Machine = Box::leak(Box::new(machine.unwrap()));
    let world = World::on(machine);
    let mm = world.mm();
    let parent = Program::new(mm);
    let start = parent.map(1);
    parent.store(start, 1).unwrap();
    let child = parent.fork().unwrap();
    // Each runs on a processor of its own, which remembers where the page is.
    for (cpu, program) in [&parent, &child].into_iter().enumerate() {
        program.run_on(cpu);
        let word = machine.on_cpu(cpu, || machine.cpu(cpu).user().read_u64(start));
        assert_eq!(word, Ok(1));
    }
    let frames = world.frames();
    let to = frames.alloc(&FrameRequest::ONE).unwrap();
    let old = mm.migrate(parent.frame_at(start).unwrap(), to).unwrap();
    // The frame is somebody else's now.
    let there = old.first().start().as_u64();
    assert!(machine.memory().write(there, &666u64.to_le_bytes()));
    for cpu in 0..2 {
        let word = machine.on_cpu(cpu, || machine.cpu(cpu).user().read_u64(start));
        assert_eq!(word, Ok(1), "processor {cpu}");
    }
    frames.free(old);
    parent.exit();
    child.exit();
}

pub fn no_dirty_bit_is_lost_by_write_back() {
    let world = World::new();
    let mm = world.mm();
    let (_, file) = world.file(mm, &[0; 4096]);
    let program = Program::new(mm);
    let start = program.map_file(file, 1, RW, MapFlags::SHARED);
    program.store(start, 1).unwrap();
    program.space.msync(start, PAGE).unwrap();
    program.store(start, 2).unwrap();
    program.space.msync(start, PAGE).unwrap();
    program.space.munmap(start, PAGE).unwrap();
    // What the file's provider has is what comes back when the cache has let the page go.
    Reclaimer::new(Fifo).reclaim(mm, 64);
    assert_eq!(mm.cached_pages(file.file), 0);
    let mut word = [0; 8];
    let _ = mm.read_file(file.file, 0, &mut word).unwrap();
    assert_eq!(u64::from_le_bytes(word), 2);
    program.exit();
    mm.close(file.file);
}

pub fn what_is_written_after_madv_free_stays() {
    let (_, mm, program, start) = swapping(1);
    program.store(start, 1).unwrap();
    program.space.madvise(start, PAGE, Advice::Free).unwrap();
    program.store(start, 2).unwrap();
    out(mm);
    assert_eq!(program.load(start), Ok(2));
    program.exit();
}

/// A write of the kernel's sets no dirty bit of the processor's: `process_vm_writev`, `ptrace`, a signal's frame.
pub fn what_the_kernel_writes_after_madv_free_stays() {
    let (_, mm, program, start) = swapping(2);
    program.store(start, 1).unwrap();
    program.store(start + PAGE, 1).unwrap();
    program.store(start + PAGE + 8, 9).unwrap();
    let freed = program.space.madvise(start, 2 * PAGE, Advice::Free);
    freed.unwrap();
    let bytes = 2u64.to_le_bytes();
    program
        .space
        .write_memory(VirtAddr::new(start), &bytes)
        .unwrap();
    let second = VirtAddr::new(start + PAGE);
    program.space.zero_memory(second, 8).unwrap();
    out(mm);
    assert_eq!(program.load(start), Ok(2));
    assert_eq!(program.load(start + PAGE + 8), Ok(9));
    // Given up again, it goes as before.
    program.space.madvise(start, PAGE, Advice::Free).unwrap();
    out(mm);
    assert_eq!(program.load(start), Ok(0));
    program.exit();
}

/// As above, through a pin, which is gone when memory gets short.
pub fn what_a_pin_writes_after_madv_free_stays() {
    let (_, mm, program, start) = swapping(1);
    program.store(start, 1).unwrap();
    program.space.madvise(start, PAGE, Advice::Free).unwrap();
    let pin = program.space.pin(VirtAddr::new(start), Access::Write);
    let pin = pin.unwrap();
    assert!(pin.write(0, &2u64.to_le_bytes()));
    drop(pin);
    out(mm);
    assert_eq!(program.load(start), Ok(2));
    program.exit();
}

pub fn locked_memory_is_not_reclaimed() {
    let (_, mm, program, start) = swapping(1);
    program.space.mlock(start, PAGE).unwrap();
    program.store(start, 1).unwrap();
    for _ in 0..4 {
        Reclaimer::new(Clock).reclaim(mm, 16);
        out(mm);
    }
    assert!(program.frame_at(start).is_some());
    program.exit();
}

pub fn a_moved_page_takes_its_bytes_along() {
    let (world, mm, program, start) = swapping(1);
    program.store(start, 1234).unwrap();
    let to = world.frames().alloc(&FrameRequest::ONE.zeroed()).unwrap();
    let old = mm.migrate(program.frame_at(start).unwrap(), to).unwrap();
    world.frames().free(old);
    assert_eq!(program.load(start), Ok(1234));
    program.exit();
}

/// L1TF (CVE-2018-3620): a processor that looks past "not present" reads what the address bits name, if there is such memory.
pub fn an_entry_of_swap_names_no_memory() {
    let (world, mm, program, start) = swapping(1);
    program.store(start, 1).unwrap();
    out(mm);
    // The last level's entry, as it stands in memory.
    let mut table = program.space.root().frame.start().as_u64();
    for level in (1..4).rev() {
        let mut word = [0; 8];
        let index = start >> (12 + 9 * level) & 511;
        assert!(world.machine.memory().read(table + index * 8, &mut word));
        table = u64::from_le_bytes(word) & 0x000f_ffff_ffff_f000;
    }
    let mut word = [0; 8];
    assert!(
        world
            .machine
            .memory()
            .read(table + (start >> 12 & 511) * 8, &mut word)
    );
    let entry = u64::from_le_bytes(word);
    assert!(entry != 0 && entry & 1 == 0, "{entry:#x}");
    let named = (entry & 0x000f_ffff_ffff_f000) >> 12;
    assert!(named >= world.machine.memory().frame_limit(), "{entry:#x}");
    program.exit();
}
