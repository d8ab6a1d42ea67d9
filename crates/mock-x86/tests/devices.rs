//! hal's traits on the machine: disks, frames, user copies, MMU calls, the trace.

mod common;

use std::cell::RefCell;
use std::io::Write;

use common::{P, RW, Tables, US, builder};
use kmem_hal::{
    AllocError, Asid, BlockDevice, Clock, CpuId, FlushRequest, FlushScope, Frame, FrameRequest,
    FrameSink, FrameSource, IoError, IoState, Mmu, Order, Page, PageProvider, PageRange, PhysAddr,
    PhysMap, Rng, Root, Trace, TraceEvent, UserAccess, VirtAddr,
};
use kmem_mock_x86::{
    Disk, DiskImage, FramePool, Machine, MachineUser, Registers, Tracked, ViolationKind,
};

const VA: u64 = 0x40_0000;
const FRAME: Frame = Frame::from_number(0x800);

fn kinds(machine: &Machine) -> Vec<ViolationKind> {
    machine
        .take_violations()
        .iter()
        .map(|violation| violation.kind)
        .collect()
}

#[test]
fn a_disk_keeps_what_it_was_given() {
    let machine = builder().build().unwrap();
    let disk = Disk::in_memory(&machine, 1 << 30);
    assert_eq!(disk.blocks(), 1 << 30);
    let (one, two) = (Frame::from_number(0x801), Frame::from_number(0x802));
    assert!(machine.memory().write(0x80_1000, &[7; 4096]));
    assert_eq!(disk.write((1 << 30) - 1, one), Ok(IoState::Done));
    assert_eq!(disk.read((1 << 30) - 1, two), Ok(IoState::Done));
    assert_eq!(
        machine.memory().load(0x80_2ff8, 8),
        Some(0x0707_0707_0707_0707)
    );
    assert_eq!(disk.read(5, two), Ok(IoState::Done));
    assert_eq!(
        machine.memory().load(0x80_2000, 8),
        Some(0),
        "never written"
    );
    assert_eq!(disk.read(1 << 30, two), Err(IoError::OutOfRange));
    assert_eq!(disk.transfers(), (2, 1));
}

#[test]
fn a_slow_disk_moves_the_bytes_at_its_last_poll() {
    let machine = builder().build().unwrap();
    let disk = Disk::in_memory(&machine, 8);
    disk.set_latency(3);
    assert!(machine.memory().store(0x80_0000, 8, 1));
    let Ok(IoState::Pending(ticket)) = disk.write(0, FRAME) else {
        panic!()
    };
    assert_eq!(disk.poll(ticket), Ok(IoState::Pending(ticket)));
    assert!(machine.memory().store(0x80_0000, 8, 2));
    assert_eq!(disk.poll(ticket), Ok(IoState::Pending(ticket)));
    assert_eq!(disk.in_flight(), 1);
    assert_eq!(disk.poll(ticket), Ok(IoState::Done));
    assert_eq!(disk.poll(ticket), Err(IoError::UnknownTicket));
    disk.set_latency(0);
    assert_eq!(
        disk.read(0, FRAME.checked_add(1).unwrap()),
        Ok(IoState::Done)
    );
    assert_eq!(machine.memory().load(0x80_1000, 8), Some(2));
}

#[test]
fn a_disk_fails_when_told_and_only_then() {
    let machine = builder().build().unwrap();
    let disk = Disk::in_memory(&machine, 8);
    disk.fail_at(2);
    assert!(disk.read(0, FRAME).is_ok());
    assert_eq!(disk.read(0, FRAME), Err(IoError::Device));
    assert!(disk.read(0, FRAME).is_ok());
}

#[test]
fn a_transfer_to_a_free_frame_is_a_violation() {
    let machine = builder().build().unwrap();
    let disk = Disk::in_memory(&machine, 8);
    disk.set_latency(1);
    machine.note_allocated(FRAME.number(), 1);
    let Ok(IoState::Pending(ticket)) = disk.read(0, FRAME) else {
        panic!()
    };
    machine.note_freed(FRAME.number(), 1);
    assert_eq!(kinds(&machine), []);
    assert_eq!(disk.poll(ticket), Ok(IoState::Done));
    assert_eq!(kinds(&machine), [ViolationKind::DeviceFreedFrame]);
}

#[test]
fn files_in_memory_and_on_the_host_end_in_zeros() {
    let machine = builder().build().unwrap();
    let bytes: Vec<u8> = (0..5000u32).map(|byte| byte as u8 | 1).collect();
    let path = std::env::temp_dir().join(format!("kmem-mock-image-{}", std::process::id()));
    std::fs::File::create(&path)
        .unwrap()
        .write_all(&bytes)
        .unwrap();
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let images = [
        DiskImage::from_bytes(&machine, &bytes),
        DiskImage::on_file(&machine, file.try_clone().unwrap(), true).unwrap(),
        DiskImage::on_file(&machine, file, false).unwrap(),
    ];
    for image in &images {
        assert_eq!(image.size(), 5000);
        assert!(machine.memory().write(0x80_0000, &[0xee; 4096]));
        assert_eq!(image.read(1, FRAME), Ok(IoState::Done));
        let mut page = [0; 4096];
        assert!(machine.memory().read(0x80_0000, &mut page));
        assert_eq!(page[..904], bytes[4096..]);
        assert!(page[904..].iter().all(|&byte| byte == 0));
        assert_eq!(image.read(2, FRAME), Err(IoError::OutOfRange));
    }
    assert!(machine.memory().write(0x80_0000, &[0x55; 4096]));
    for image in &images[..2] {
        assert_eq!(image.write(1, FRAME), Ok(IoState::Done));
    }
    assert_eq!(images[2].write(1, FRAME), Err(IoError::ReadOnly));
    let read_only: Vec<_> = images.iter().map(PageProvider::is_read_only).collect();
    assert_eq!(read_only, [false, false, true]);
    assert_eq!(
        std::fs::metadata(&path).unwrap().len(),
        5000,
        "the file does not grow"
    );
    std::fs::remove_file(path).unwrap();
}

#[test]
fn the_pool_gives_what_is_asked_and_reuses_at_once() {
    let machine = builder().build().unwrap();
    let pool = FramePool::new(&machine, 0x100);
    let one = pool.alloc(&FrameRequest::ONE).unwrap();
    let first = one.first();
    assert_eq!(first.number(), 0x100);
    let big = pool.alloc(&FrameRequest::new(Order::HUGE_2M)).unwrap();
    assert!(big.first().is_aligned(Order::HUGE_2M));
    assert_eq!(pool.in_use(), 513);
    assert!(machine.memory().store(first.start().as_u64(), 8, 9));
    pool.free(one);
    let again = pool.alloc(&FrameRequest::ONE.zeroed()).unwrap();
    assert_eq!(again.first(), first);
    assert_eq!(machine.memory().load(first.start().as_u64(), 8), Some(0));
    let low = pool.alloc(&FrameRequest::ONE.below(PhysAddr::new(0x10_0000)));
    assert_eq!(low, Err(AllocError::OutOfMemory));
    assert!(pool.alloc(&FrameRequest::new(Order::HUGE_1G)).is_err());
    pool.free(again);
    pool.free(big);
    assert_eq!(pool.in_use(), 0);
    assert_eq!(kinds(&machine), []);
}

#[test]
fn a_tracked_source_tells_the_machine_with_the_callers_line() {
    let machine = builder().build().unwrap();
    let other = Machine::pc(8 << 20, 1);
    let source = Tracked::new(&machine, FramePool::new(&other, 0x200));
    let frame = source.alloc(&FrameRequest::ONE).unwrap();
    let number = frame.first().number();
    source.free(frame);
    let history = machine.frame_history(number);
    assert_eq!(history.len(), 2);
    assert!(
        history
            .iter()
            .all(|event| event.to_string().contains("devices.rs")),
        "{history:?}"
    );
}

/// A copy into a page that a handler maps at the first fault.
#[test]
fn user_copies_are_fixed_up_or_end_where_they_must() {
    let machine = builder().build().unwrap();
    let tables = RefCell::new(Tables::new(&machine, 0x20_0000));
    tables.borrow_mut().map(VA, 0x80_0000, 12, P | RW | US);
    tables.borrow().load(0);
    let faults = RefCell::new(Vec::new());
    let user = MachineUser::new(&machine, |fault| {
        faults.borrow_mut().push(fault);
        let page = fault.address.align_down(4096).as_u64();
        let mapped = page == VA + 0x1000;
        if mapped {
            tables.borrow_mut().map(page, 0x90_0000, 12, P | RW | US);
        }
        mapped
    });
    let text: Vec<u8> = (0..4200u32).map(|byte| byte as u8).collect();
    assert_eq!(user.copy_to_user(VirtAddr::new(VA + 100), &text), Ok(()));
    assert_eq!(faults.borrow().len(), 1);
    let mut back = vec![0; 4200];
    assert_eq!(
        user.copy_from_user(&mut back, VirtAddr::new(VA + 100)),
        Ok(())
    );
    assert_eq!(back, text);
    let fault = user
        .copy_to_user(VirtAddr::new(VA + 0x1ff0), &text)
        .unwrap_err();
    assert_eq!(
        (fault.address, fault.copied),
        (VirtAddr::new(VA + 0x2000), 16)
    );
    // A supervisor page is not the user's, whatever the handler says.
    tables.borrow_mut().map(VA + 0x3000, 0x90_0000, 12, P | RW);
    let eager = MachineUser::new(&machine, |_| true);
    assert_eq!(
        eager
            .copy_from_user(&mut [0; 8], VirtAddr::new(VA + 0x3000))
            .unwrap_err()
            .copied,
        0
    );
    assert!(
        eager
            .copy_from_user(&mut [0; 8], VirtAddr::new(1 << 47))
            .is_err()
    );
}

fn request(root: Root, first: u64, count: u64) -> FlushRequest {
    let range = PageRange::with_count(Page::from_number(first >> 12), count).unwrap();
    FlushRequest {
        root,
        scope: FlushScope::Pages { range, stride: 1 },
        global: false,
        tables_freed: false,
    }
}

#[test]
fn the_mmu_trait_flushes_what_it_promises() {
    for (registers, asid) in [(Registers::LONG, 0), (Registers::LONG_PCID, 3)] {
        let machine = builder().cpus(3).registers(registers).build().unwrap();
        let mut tables = Tables::new(&machine, 0x20_0000);
        for page in 0..64 {
            tables.map(VA + page * 0x1000, 0x80_0000 + page * 0x1000, 12, P | RW);
        }
        let root = Root {
            frame: Frame::from_number(0x200),
            asid: Asid::new(asid),
        };
        for cpu in 0..2 {
            // SAFETY: nothing runs on the mock machine but this test's accesses.
            machine.on_cpu(cpu, || unsafe { machine.load_root(root, false) });
            for page in 0..64 {
                machine.cpu(cpu).read_u8(VA + page * 0x1000).unwrap();
            }
        }
        let active = machine.active_cpus(root);
        assert_eq!(active.iter().map(CpuId::get).collect::<Vec<_>>(), [0, 1]);
        machine.flush_local(&request(root, VA, 2));
        assert!(
            !machine.cpu(0).holds(VA)
                && !machine.cpu(0).holds(VA + 0x1000)
                && machine.cpu(0).holds(VA + 0x2000)
        );
        assert!(machine.cpu(1).holds(VA));
        machine.complete(machine.shootdown(&active, &request(root, VA, 2)));
        assert!(!machine.cpu(1).holds(VA) && machine.cpu(1).holds(VA + 0x2000));
        machine.flush_local(&request(root, VA, 64));
        assert!(
            !machine.cpu(0).holds(VA + 63 * 0x1000),
            "many pages are one flush"
        );
        // A CPU that left the space under a PCID may still hold it, and is flushed there.
        let other = Root {
            frame: Frame::from_number(0x300),
            asid: Asid::new(if asid == 0 { 0 } else { 4 }),
        };
        // SAFETY: as above.
        machine.on_cpu(1, || unsafe { machine.load_root(other, false) });
        let still = machine.active_cpus(root).contains(CpuId::new(1));
        assert_eq!(still, asid != 0);
        machine.complete(machine.shootdown(&active, &request(root, VA + 0x2000, 1)));
        // SAFETY: as above.
        machine.on_cpu(1, || unsafe { machine.load_root(root, true) });
        assert!(!machine.cpu(1).holds(VA + 0x2000));
        assert_eq!(machine.cpu(1).holds(VA + 0x3000), asid != 0);
        let all = FlushRequest {
            root,
            scope: FlushScope::Everything,
            global: true,
            tables_freed: true,
        };
        machine.on_cpu(1, || machine.flush_local(&all));
        assert_eq!(machine.cpu(1).cached_entries(), 0);
        assert_eq!(machine.loaded_root(1), root);
        assert_eq!(kinds(&machine), []);
    }
}

#[test]
fn freed_tables_of_a_space_that_is_not_loaded_leave_the_walk_caches_too() {
    let machine = builder().registers(Registers::LONG_PCID).build().unwrap();
    let mut tables = Tables::new(&machine, 0x20_0000);
    tables.map(VA, 0x80_0000, 12, P);
    tables.map(VA + (1 << 30), 0x80_1000, 12, P);
    let cpu = machine.cpu(0);
    cpu.write_cr3(tables.root | 3).unwrap();
    cpu.read_u8(VA + (1 << 30)).unwrap();
    cpu.write_cr3(0x30_0000 | 4).unwrap();
    // The table of the far page is freed; the request names only the near one, as a gather may.
    let table = tables.entry(VA + (1 << 30), 12) >> 12;
    let root = Root {
        frame: Frame::from_number(0x200),
        asid: Asid::new(3),
    };
    let entry = tables.entry(VA + (1 << 30), 21);
    tables.set(entry, 0);
    machine.flush_local(&FlushRequest {
        tables_freed: true,
        ..request(root, VA, 1)
    });
    machine.note_freed(table, 1);
    cpu.write_cr3(tables.root | 3 | 1 << 63).unwrap();
    assert!(cpu.read_u8(VA + (1 << 30)).is_err());
    assert_eq!(kinds(&machine), []);
}

#[test]
fn the_trace_checks_a_library_against_its_own_words() {
    let machine = builder().cpus(2).build().unwrap();
    let mut tables = Tables::new(&machine, 0x20_0000);
    let leaf = tables.map(VA, 0x80_0000, 12, P | RW);
    for cpu in 0..2 {
        tables.load(cpu);
        machine.cpu(cpu).write_u8(VA, 1).unwrap();
    }
    let range = PageRange::single(Page::from_number(VA >> 12));
    let root = machine.loaded_root(0);
    machine.event(TraceEvent::FrameAllocated(FRAME, Order::ZERO));
    machine.event(TraceEvent::Mapped(range, FRAME));
    tables.set(leaf, 0x80_0000 | P);
    machine.event(TraceEvent::Restricted(range));
    machine.cpu(0).invlpg(VA).unwrap();
    machine.cpu(1).write_u8(VA, 1).unwrap();
    assert_eq!(kinds(&machine), [], "in flight");
    machine.event(TraceEvent::Flushed(request(root, VA, 1)));
    machine.cpu(1).write_u8(VA, 1).unwrap();
    assert_eq!(kinds(&machine), [ViolationKind::Unflushed]);
    let story: String = machine
        .frame_history(FRAME.number())
        .iter()
        .map(|event| format!("{event}\n"))
        .collect();
    assert!(story.contains("mapped at 0x400000"), "{story}");
    // A flush that nobody had to make declares nothing: CPU 1 has changed this page and not flushed it yet.
    machine.cpu(1).invlpg(VA).unwrap();
    tables.set(leaf, 0x80_0000 | P | RW);
    machine.cpu(0).write_u8(VA, 1).unwrap();
    tables.set(leaf, 0x80_0000 | P);
    machine.on_cpu(1, || machine.event(TraceEvent::Restricted(range)));
    machine.event(TraceEvent::Flushed(request(root, VA, 1)));
    machine.cpu(0).write_u8(VA, 1).unwrap();
    assert_eq!(kinds(&machine), []);
}

#[test]
fn clock_and_random_numbers_follow_the_seed() {
    let machines = [3, 3, 4].map(|seed| builder().seed(seed).build().unwrap());
    let numbers = machines
        .each_ref()
        .map(|machine| [machine.next_u64(), machine.next_u64()]);
    assert_eq!(numbers[0], numbers[1]);
    assert_ne!(numbers[0], numbers[2]);
    let before = machines[0].now();
    machines[0].note_allocated(1, 1);
    assert!(machines[0].now() > before);
}

#[test]
fn the_physical_map_is_one_offset_over_all_memory() {
    let machine = builder().build().unwrap();
    let reach = machine.reach();
    assert_eq!(reach.count(), (64 << 20) / 4096);
    let pointer = machine.to_ptr(PhysAddr::new(0x12_3450));
    assert_eq!(machine.to_phys(pointer), PhysAddr::new(0x12_3450));
    // SAFETY: the frame is RAM, and nobody else uses this machine.
    unsafe {
        machine.words(Frame::from_number(0x123))[3].store(42, kmem_hal::sync::Ordering::Relaxed)
    };
    assert_eq!(machine.memory().load(0x12_3018, 8), Some(42));
}
