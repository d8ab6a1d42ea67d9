//! The course's own examples: what its pictures and programs show comes out here.

mod common;

use std::collections::BTreeMap;

use common::elf::{Builder, Part};
use common::{PAGE, Program, RW, World, check_counters, signal};
use kmem_cow_mm::{
    ExecError, Image, Layout, MapFlags, MapRequest, Mm, OpenFile, Outcome, Prot, Signal,
};
use kmem_hal::{Frame, Page, VirtAddr};
use kmem_mock_x86::{DiskImage, Machine, MemoryMap, Registers};
use kmem_paging::format::{Format, X86Pae, X86TwoLevel};

const RX: Prot = Prot::READ.union(Prot::EXEC);
const AT: u64 = 0x1000_0000;

fn frame<F: Format>(program: &Program<F>, address: u64) -> Frame {
    let page = Page::containing(VirtAddr::new(address));
    program.space.frame_at(page).expect("a page that is there")
}

/// Before: both processes map the frames of pages A, B and C. After the child wrote to C: A and B are shared still, and the
/// child has a copy of C.
#[test]
fn the_child_writes_page_c_of_the_picture() {
    let world = World::new();
    let parent = Program::new(world.mm());
    parent
        .space
        .mmap(&MapRequest::anonymous(3 * PAGE, RW).at(AT))
        .unwrap();
    let (a, b, c) = (AT, AT + PAGE, AT + 2 * PAGE);
    for (page, value) in [(a, 0xa), (b, 0xb), (c, 0xc)] {
        parent.store(page, value).unwrap();
    }
    let frames = [a, b, c].map(|page| frame(&parent, page));
    let child = parent.fork().unwrap();
    assert_eq!(
        [a, b, c].map(|page| child.load(page).unwrap()),
        [0xa, 0xb, 0xc]
    );
    assert_eq!(
        [a, b, c].map(|page| frame(&child, page)),
        frames,
        "the same frames, before the write"
    );
    child.store(c, 0xcc).unwrap();
    assert_eq!(
        [a, b].map(|page| frame(&child, page)),
        [frames[0], frames[1]]
    );
    assert_ne!(frame(&child, c), frames[2], "a copy of page C");
    assert_eq!([a, b, c].map(|page| frame(&parent, page)), frames);
    assert_eq!((parent.load(c), child.load(c)), (Ok(0xc), Ok(0xcc)));
    // The parent is the only one left with C: it writes to it where it is.
    parent.store(c, 0xccc).unwrap();
    assert_eq!(frame(&parent, c), frames[2]);
    child.exit();
    parent.exit();
}

fn run<F: Format>(program: &Program<F>, image: &Image<'_>) -> u64 {
    loop {
        match program.space.exec(image) {
            Err(ExecError::NeedIo(_)) => {}
            other => return other.unwrap().entry.as_u64(),
        }
    }
}

#[test]
fn two_processes_share_text_and_have_data_of_their_own() {
    let world = World::new();
    let mm = world.mm();
    let text = Part {
        offset: 0,
        address: 0x40_0000,
        file_size: 0x2000,
        memory_size: 0x2000,
        rights: 5,
    };
    let data = Part {
        offset: 0x2000,
        address: 0x40_2000,
        file_size: 0x1000,
        memory_size: 0x1000,
        rights: 6,
    };
    let (_, file) = world.file(mm, &Builder::new(true, &[text, data]).build());
    let programs = [Program::new(mm), Program::new(mm)];
    for (number, program) in programs.iter().enumerate() {
        let entry = run(program, &Image::new(file, b"prog"));
        program.execute(entry).unwrap();
        program.load(0x40_2000).unwrap();
        program.store(0x40_2000, number as u64).unwrap();
    }
    let [one, two] = &programs;
    assert_eq!(
        frame(one, 0x40_0400),
        frame(two, 0x40_0400),
        "one frame of text for both"
    );
    assert_ne!(
        frame(one, 0x40_2000),
        frame(two, 0x40_2000),
        "a frame of data for each"
    );
    assert_eq!((one.load(0x40_2000), two.load(0x40_2000)), (Ok(0), Ok(1)));
    // Who runs it writes nothing to it.
    assert_eq!(
        one.store(0x40_0400, 1),
        Err(signal(Signal::AccessError, 0x40_0400))
    );
    programs.into_iter().for_each(Program::exit);
}

/// What malloc of the C library does, as far as the kernel sees it: below its threshold it moves the break, from there on it maps.
struct Malloc<'p> {
    program: &'p Program,
    top: u64,
}

impl Malloc<'_> {
    const THRESHOLD: u64 = 128 << 10;
    /// What the top may have free before it is given back (`M_TRIM_THRESHOLD`).
    const TRIM: u64 = 128 << 10;

    fn malloc(&mut self, size: u64) -> u64 {
        let space = &self.program.space;
        if size >= Self::THRESHOLD {
            let length = (size + 16).next_multiple_of(PAGE);
            return space
                .mmap(&MapRequest::anonymous(length, RW))
                .unwrap()
                .as_u64()
                + 16;
        }
        let block = self.top;
        self.top += size + 16;
        if self.top > space.heap().end {
            let end = (self.top + Self::THRESHOLD).next_multiple_of(PAGE);
            assert_eq!(space.brk(end), end);
        }
        block + 16
    }

    fn free(&mut self, block: u64, size: u64) {
        let space = &self.program.space;
        if size >= Self::THRESHOLD {
            space
                .munmap(block - 16, (size + 16).next_multiple_of(PAGE))
                .unwrap();
        } else if block + size == self.top {
            self.top = block - 16;
            if space.heap().end - self.top > Self::TRIM {
                let end = self.top.next_multiple_of(PAGE);
                assert_eq!(space.brk(end), end);
            }
        }
    }
}

#[test]
fn malloc_below_and_above_its_threshold_and_trim() {
    let world = World::new();
    let program = Program::new(world.mm());
    let start = 0x60_0000;
    program.space.set_heap(start);
    let mut malloc = Malloc {
        program: &program,
        top: start,
    };
    let small = malloc.malloc(1000);
    let heap = program.space.heap();
    assert!((heap.start..heap.end).contains(&small), "from the heap");
    program.store(small & !7, 1).unwrap();
    assert!(program.space.maps().to_string().contains("[heap]"));
    let large = malloc.malloc(1 << 20);
    assert_eq!(program.space.heap(), heap, "the break stays");
    assert!(
        large > heap.end && program.space.map_count() == 2,
        "a mapping of its own"
    );
    for page in 0..256 {
        program.store((large & !7) + page * PAGE, page).unwrap();
    }
    assert_eq!(program.space.recount().rss_anon, 257);
    malloc.free(large, 1 << 20);
    assert_eq!(
        (program.space.map_count(), program.space.recount().rss_anon),
        (1, 1)
    );
    assert_eq!(
        program.load(large & !7),
        Err(signal(Signal::MapError, large & !7))
    );
    // Many small ones, and all freed again: the top goes back.
    let blocks: Vec<u64> = (0..40).map(|_| malloc.malloc(100_000)).collect();
    for block in &blocks {
        program.store(block & !7, 7).unwrap();
    }
    let before = program.space.recount().rss_anon;
    let end = program.space.heap().end;
    for block in blocks.iter().rev() {
        malloc.free(*block, 100_000);
    }
    assert!(program.space.heap().end < end - (3 << 20), "trimmed");
    assert!(
        program.space.recount().rss_anon < before,
        "and the frames with it"
    );
    check_counters([&program]);
    program.exit();
}

/// The lecture's module: it is given a process's number and lists that process's VMAs.
fn list_vmas(processes: &BTreeMap<u32, Program>, pid: u32) -> Option<Vec<String>> {
    let program = processes.get(&pid)?;
    let mut lines = Vec::new();
    program.space.for_each_vma(|vma| {
        let (start, end) = vma.bounds();
        let letters = kmem_cow_mm::permissions(vma.flags);
        lines.push(format!(
            "{start:#x}-{end:#x} {}",
            String::from_utf8_lossy(&letters)
        ));
        true
    });
    Some(lines)
}

#[test]
fn another_processs_vmas_are_listed_by_its_number() {
    let world = World::new();
    let mm = world.mm();
    let processes = BTreeMap::from([(1, Program::new(mm)), (42, Program::new(mm))]);
    for (address, prot) in [(AT, RX), (AT + PAGE, RW), (AT + 4 * PAGE, RW)] {
        processes[&42]
            .space
            .mmap(&MapRequest::anonymous(PAGE, prot).at(address))
            .unwrap();
    }
    assert_eq!(
        list_vmas(&processes, 42).unwrap(),
        [
            "0x10000000-0x10001000 r-xp",
            "0x10001000-0x10002000 rw-p",
            "0x10004000-0x10005000 rw-p"
        ]
    );
    assert_eq!(list_vmas(&processes, 1).unwrap().len(), 0);
    assert_eq!(list_vmas(&processes, 7), None, "no such process");
    processes.into_values().for_each(Program::exit);
}

/// What the kernel does between a fault that cannot be handled and the program's next instruction: the handler runs, and returns to
/// the access.
fn with_handler(
    access: impl Fn() -> Result<u64, Outcome>,
    mut handler: impl FnMut(Signal, u64),
) -> u64 {
    loop {
        match access() {
            Ok(value) => return value,
            Err(Outcome::Signal { signal, address }) => handler(signal, address.as_u64()),
            Err(other) => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_signal_handler_repairs_a_fault_and_the_access_resumes() {
    let world = World::new();
    let program = Program::new(world.mm());
    let space = &program.space;
    space
        .mmap(&MapRequest::anonymous(PAGE, Prot::READ).at(AT))
        .unwrap();
    let mut signals = Vec::new();
    let mut handler = |signal, address: u64| {
        signals.push(signal);
        let page = address & !(PAGE - 1);
        match signal {
            Signal::AccessError => space.mprotect(page, PAGE, RW).unwrap(),
            _ => {
                space
                    .mmap(&MapRequest::anonymous(PAGE, RW).at(page))
                    .unwrap();
            }
        }
    };
    with_handler(|| program.store(AT + 8, 5).map(|()| 0), &mut handler);
    assert_eq!(program.load(AT + 8), Ok(5), "the write went through");
    let other = AT + 16 * PAGE;
    assert_eq!(with_handler(|| program.load(other), &mut handler), 0);
    assert_eq!(signals, [Signal::AccessError, Signal::MapError]);
    program.exit();
}

/// 32-bit paging, with PAE or with 4 MiB pages (PSE).
fn registers(pae: bool) -> Registers {
    let (paging, efer) = if pae { (1 << 5, 1 << 11) } else { (1 << 4, 0) };
    Registers {
        cr0: Registers::LONG.cr0,
        cr4: paging | 1 << 7,
        efer,
        ..Registers::PROTECTED
    }
}

fn file<F: Format>(
    world: &'static World<F>,
    mm: &'static Mm<'static, World<F>>,
    bytes: &[u8],
    name: &'static str,
    inode: u64,
) -> OpenFile {
    let image: &'static DiskImage<'static> =
        Box::leak(Box::new(DiskImage::from_bytes(world.machine, bytes)));
    OpenFile {
        file: mm.open_file(image, name, inode).unwrap(),
        readable: true,
        writable: false,
    }
}

/// The course's program `exam`, linked with the C library, on a machine with 3 GiB of user space: its nine mappings.
fn exam<F: Format>(pae: bool) {
    let machine = Machine::builder()
        .memory(MemoryMap::pc(64 << 20))
        .registers(registers(pae))
        .build();
    let world = World::<F>::with(Box::leak(Box::new(machine.unwrap())));
    let mm = world.mm();
    let part = |offset, address, file_size, memory_size, rights| Part {
        offset,
        address,
        file_size,
        memory_size,
        rights,
    };
    let exam = Builder {
        interpreter: Some("/lib/ld-linux.so.2"),
        stack: None,
        ..Builder::new(
            false,
            &[
                part(0, 0x0804_8000, 0x4b4, 0x4b4, 5),
                part(0x4b4, 0x0804_94b4, 0x104, 0x108, 6),
            ],
        )
    };
    let loader = Builder {
        position_independent: true,
        stack: None,
        ..Builder::new(
            false,
            &[
                part(0, 0, 0x14d00, 0x14d00, 5),
                part(0x14d00, 0x15d00, 0x200, 0x300, 6),
            ],
        )
    };
    let exam = file(world, mm, &exam.build(), "/home/test/exam", 439_029);
    let loader = file(world, mm, &loader.build(), "/lib/ld-2.3.2.so", 1364);
    let library = file(
        world,
        mm,
        &vec![0x90; 0x13_1000],
        "/lib/tls/libc-2.3.2.so",
        1365,
    );
    let program = Program::with_layout(mm, Layout::x86_32_legacy());
    let image = Image {
        interpreter: Some(loader),
        arguments: &[b"./exam"],
        ..Image::new(exam, b"./exam")
    };
    let entry = run(&program, &image);
    assert_eq!(entry, 0x4000_0400, "it starts in the loader, a third up");
    program.execute(entry).unwrap();
    // The loader maps a page for itself, and the C library where it was prelinked to.
    let space = &program.space;
    let page = space
        .mmap(&MapRequest::anonymous(PAGE, RW))
        .unwrap()
        .as_u64();
    assert_eq!(page, 0x4001_6000);
    let private = MapFlags::PRIVATE;
    let map = |address, length, prot, flags, offset| {
        let request = MapRequest {
            address,
            length,
            prot,
            flags,
            file: Some(library),
            offset,
        };
        assert_eq!(space.mmap(&request).unwrap().as_u64(), address);
    };
    map(0x4200_0000, 0x13_3000, RX, private, 0);
    map(
        0x4212_e000,
        0x3000,
        RW,
        private | MapFlags::FIXED,
        0x12_e000,
    );
    space
        .mmap(&MapRequest::anonymous(0x2000, RW).at(0x4213_1000))
        .unwrap();
    // It runs: text of the library, its own data, and a stack that grows by a page.
    program.execute(0x4200_1000).unwrap();
    program.store(0x0804_9500, 1).unwrap();
    program.store(0xbfff_e800, 2).unwrap();
    assert_eq!(
        (program.load(0x0804_9500), program.load(0xbfff_e800)),
        (Ok(1), Ok(2))
    );
    let lines: Vec<String> = space
        .maps()
        .to_string()
        .lines()
        .map(str::to_string)
        .collect();
    let expected = [
        ("08048000-08049000 r-xp 00000000", "/home/test/exam"),
        ("08049000-0804a000 rw-p 00000000", "/home/test/exam"),
        ("40000000-40015000 r-xp 00000000", "/lib/ld-2.3.2.so"),
        ("40015000-40016000 rw-p 00014000", "/lib/ld-2.3.2.so"),
        ("40016000-40017000 rw-p 00000000", ""),
        ("42000000-4212e000 r-xp 00000000", "/lib/tls/libc-2.3.2.so"),
        ("4212e000-42131000 rw-p 0012e000", "/lib/tls/libc-2.3.2.so"),
        ("42131000-42133000 rw-p 00000000", ""),
        ("bfffe000-c0000000 rwxp 00000000", "[stack]"),
    ];
    assert_eq!(lines.len(), expected.len(), "{lines:#?}");
    for (line, (start, name)) in lines.iter().zip(expected) {
        assert!(
            line.starts_with(start) && line.ends_with(name),
            "{start} {name}: {line}"
        );
    }
    // A child, and both write.
    let child = program.fork().unwrap();
    child.store(0x0804_9500, 3).unwrap();
    program.store(0xbfff_e800, 4).unwrap();
    assert_eq!(
        (program.load(0x0804_9500), child.load(0x0804_9500)),
        (Ok(1), Ok(3))
    );
    assert_eq!(
        (program.load(0xbfff_e800), child.load(0xbfff_e800)),
        (Ok(4), Ok(2))
    );
    check_counters([&program, &child]);
    assert_eq!(
        child.load(0xc000_0000),
        Err(signal(Signal::MapError, 0xc000_0000))
    );
    child.exit();
    program.exit();
    for open in [exam, loader, library] {
        mm.close(open.file);
    }
    assert_eq!(mm.committed(), 0);
}

#[test]
fn the_nine_mappings_of_exam_with_pae() {
    exam::<X86Pae>(true);
}

#[test]
fn the_nine_mappings_of_exam_with_4_mib_pages() {
    exam::<X86TwoLevel>(false);
}

/// Threads, and a child of vfork: one space, and the last of them ends it.
#[test]
fn threads_and_a_vforked_child_use_one_space() {
    let world = World::new();
    let mm = world.mm();
    let before = world.used_frames();
    let parent = Program::new(mm);
    parent
        .space
        .mmap(&MapRequest::anonymous(PAGE, RW).at(AT))
        .unwrap();
    let child = parent.share();
    assert_eq!(
        (parent.space.users(), child.space.root()),
        (2, parent.space.root())
    );
    child.store(AT, 5).unwrap();
    child
        .space
        .mmap(&MapRequest::anonymous(PAGE, RW).at(AT + PAGE))
        .unwrap();
    child.exit();
    assert_eq!(parent.space.users(), 1);
    assert_eq!(
        parent.load(AT),
        Ok(5),
        "what the child wrote before it called exec"
    );
    assert_eq!(parent.space.counters().total, 2);
    parent.exit();
    assert_eq!(world.used_frames(), before);
}
