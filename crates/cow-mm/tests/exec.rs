//! exec: images static, position-independent and with an interpreter; the stack; and whatever is no image.

mod common;

use common::elf::{Builder, Part};
use common::{PAGE, Program, World};
use kmem_cow_mm::{Errno, ExecError, Image, Layout, OpenFile, Start};
use kmem_hal::VirtAddr;
use proptest::prelude::*;

const TEXT: Part = Part {
    offset: 0,
    address: 0x40_0000,
    file_size: 0x1800,
    memory_size: 0x1800,
    rights: 5,
};
const DATA: Part = Part {
    offset: 0x1800,
    address: 0x40_2800,
    file_size: 0x900,
    memory_size: 0x3000,
    rights: 6,
};

fn exec(program: &Program, image: &Image<'_>) -> Result<Start, Errno> {
    loop {
        match program.space.exec(image) {
            Err(ExecError::NeedIo(_)) => {}
            Err(ExecError::Errno(errno)) => return Err(errno),
            Err(other) => panic!("{other:?}"),
            Ok(start) => return Ok(start),
        }
    }
}

fn open(world: &'static World, bytes: &[u8]) -> OpenFile {
    world.file(shared(world), bytes).1
}

/// One `Mm` for all files and programs of a world.
fn shared(world: &'static World) -> &'static kmem_cow_mm::Mm<'static, World> {
    thread_local! {
        static MM: std::cell::OnceCell<&'static kmem_cow_mm::Mm<'static, World>> = const { std::cell::OnceCell::new() };
    }
    MM.with(|mm| *mm.get_or_init(|| world.mm()))
}

fn word(program: &Program, at: u64) -> u64 {
    program.load(at).unwrap()
}

fn string(program: &Program, at: u64) -> String {
    let mut text = Vec::new();
    loop {
        let mut byte = [0];
        let from = VirtAddr::new(at + text.len() as u64);
        program.space.read_memory(from, &mut byte).unwrap();
        if byte == [0] {
            return String::from_utf8(text).unwrap();
        }
        text.push(byte[0]);
    }
}

#[test]
fn a_static_image_with_data_and_bss() {
    let world = World::new();
    let bytes = Builder::new(true, &[TEXT, DATA]).build();
    let program = Program::new(shared(world));
    let image = Image {
        arguments: &[b"prog", b"-v", b""],
        environment: &[b"A=1", b"B=22"],
        auxiliary: &[(16, 0xabcd), (17, 100)],
        random: *b"0123456789abcdef",
        ..Image::new(open(world, &bytes), b"/bin/prog")
    };
    let start = exec(&program, &image).unwrap();
    assert_eq!((start.bias, start.interpreter), (0, 0));
    assert_eq!(start.entry.as_u64(), 0x40_0400);
    assert!(program.execute(0x40_0400).is_ok());
    // The file's bytes, zeros to the end of its last page, and zeros behind it.
    assert_eq!(
        word(&program, 0x40_30f8).to_le_bytes()[..],
        bytes[0x20f8..0x2100]
    );
    assert_eq!(word(&program, 0x40_3100), 0);
    assert_eq!(word(&program, 0x40_5000), 0);
    program.store(0x40_57f8, 1).unwrap();
    assert_eq!(program.space.heap().start, 0x40_6000);
    // The stack, as the ABI has it.
    let stack = start.stack.as_u64();
    assert!(stack.is_multiple_of(16));
    assert_eq!(word(&program, stack), 3, "argc");
    let pointer = |index: u64| word(&program, stack + 8 * index);
    let texts: Vec<_> = (1..=3)
        .map(|index| string(&program, pointer(index)))
        .collect();
    assert_eq!(texts, ["prog", "-v", ""]);
    assert_eq!(pointer(4), 0);
    assert_eq!(string(&program, pointer(5)), "A=1");
    assert_eq!(string(&program, pointer(6)), "B=22");
    assert_eq!(pointer(7), 0);
    let auxiliary: std::collections::BTreeMap<u64, u64> = (0..)
        .map(|index| (pointer(8 + 2 * index), pointer(9 + 2 * index)))
        .take_while(|(key, _)| *key != 0)
        .collect();
    assert_eq!(auxiliary[&3], 0x40_0040, "where the program headers are");
    assert_eq!((auxiliary[&4], auxiliary[&5], auxiliary[&6]), (56, 3, 4096));
    assert_eq!((auxiliary[&7], auxiliary[&9]), (0, 0x40_0400));
    assert_eq!(string(&program, auxiliary[&31]), "/bin/prog");
    assert_eq!(word(&program, auxiliary[&25]).to_le_bytes(), *b"01234567");
    assert_eq!((auxiliary[&16], auxiliary[&17]), (0xabcd, 100));
    let segments = program.space.segments();
    assert_eq!(
        (segments.code, segments.data),
        ((0x40_0000, 0x40_1800), (0x40_2800, 0x40_3100))
    );
    assert_eq!(segments.stack, stack);
    let maps = program.space.maps().to_string();
    let rights: Vec<_> = maps
        .lines()
        .map(|line| line.split(' ').nth(1).unwrap())
        .collect();
    assert_eq!(rights, ["r-xp", "rw-p", "rw-p", "rw-p"], "{maps}");
    assert_eq!(program.space.status().code, 2 * PAGE);
    program.exit();
}

#[test]
fn a_position_independent_image_and_its_interpreter() {
    let world = World::new();
    let at_zero = |part: Part| Part {
        address: part.address - 0x40_0000,
        ..part
    };
    let program_bytes = Builder {
        position_independent: true,
        interpreter: Some("/lib/ld.so"),
        ..Builder::new(true, &[at_zero(TEXT), at_zero(DATA)])
    };
    let loader_bytes = Builder {
        position_independent: true,
        ..Builder::new(true, &[at_zero(TEXT), at_zero(DATA)])
    };
    let file = open(world, &program_bytes.build());
    let loader = open(world, &loader_bytes.build());
    let program = Program::new(shared(world));
    let mut path = [0; 32];
    let length = loop {
        match program.space.interpreter(file, &mut path) {
            Err(ExecError::NeedIo(_)) => {}
            other => break other.unwrap().unwrap(),
        }
    };
    assert_eq!(&path[..length], b"/lib/ld.so");
    let image = Image {
        interpreter: Some(loader),
        ..Image::new(file, b"prog")
    };
    let start = exec(&program, &image).unwrap();
    assert_eq!(start.bias, 0x5555_5555_4000, "two thirds up");
    // The interpreter is the first mapping without an address: the highest place below the stack's room.
    let base = program.space.layout().mmap_base.unwrap();
    assert_eq!(start.interpreter, base - 0x6000);
    assert_eq!(
        start.entry.as_u64(),
        start.interpreter + 0x400 + TEXT.address - 0x40_0000
    );
    assert_eq!(
        string(&program, word(&program, start.stack.as_u64() + 8)),
        "",
        "no arguments: an empty one"
    );
    // Without the interpreter it starts at its own entry; an image that names none goes where mappings go.
    let alone = Program::new(shared(world));
    let start = exec(&alone, &Image::new(file, b"prog")).unwrap();
    assert_eq!(start.entry.as_u64(), start.bias + 0x400);
    let fixed = Program::new(shared(world));
    let start = exec(&fixed, &Image::new(loader, b"ld.so")).unwrap();
    assert_eq!(start.bias, base - 0x6000);
    assert_eq!(fixed.space.heap().start, 0x5555_5555_4000);
    for program in [program, alone, fixed] {
        program.exit();
    }
}

#[test]
fn malformed_images_are_refused_with_linux_errno() {
    let world = World::new();
    let good = Builder::new(true, &[TEXT, DATA]).build();
    let with = |at: usize, bytes: &[u8]| {
        let mut image = good.clone();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        image
    };
    // Offsets in the header, and in the entries of the table from 64 on.
    let second = 64 + 56;
    for (name, bytes, errno) in [
        ("empty", vec![], Errno::ENOEXEC),
        ("a script", b"#!/bin/sh\n".to_vec(), Errno::ENOEXEC),
        ("short", good[..60].to_vec(), Errno::ENOEXEC),
        ("magic", with(0, b"\x7fELG"), Errno::ENOEXEC),
        ("class", with(4, &[1]), Errno::ENOEXEC),
        ("core dump", with(16, &[4]), Errno::ENOEXEC),
        ("machine", with(18, &[183]), Errno::ENOEXEC),
        ("entry size", with(54, &[32]), Errno::ENOEXEC),
        ("no entries", with(56, &[0, 0]), Errno::ENOEXEC),
        ("too many entries", with(56, &[0xff, 0xff]), Errno::ENOEXEC),
        (
            "table beyond the file",
            with(32, &[0, 0, 0, 1]),
            Errno::ENOEXEC,
        ),
        ("table that wraps", with(32, &[0xff; 8]), Errno::ENOEXEC),
        (
            "more in the file than in memory",
            with(second + 40, &[1, 0]),
            Errno::EINVAL,
        ),
        (
            "memory that is too large",
            with(second + 40, &[0xff; 8]),
            Errno::EINVAL,
        ),
        (
            "address beyond the user's",
            with(second + 16, &[0, 0x28, 0, 0, 0, 0x80, 0, 0]),
            Errno::EINVAL,
        ),
        (
            "offset and address apart",
            with(second + 8, &[0, 0x11]),
            Errno::EINVAL,
        ),
    ] {
        let program = Program::new(shared(world));
        let got = exec(&program, &Image::new(open(world, &bytes), b"x"));
        assert_eq!(got.err(), Some(errno), "{name}");
        assert_eq!(program.space.map_count(), 0, "{name}: nothing was changed");
        program.exit();
    }
}

#[test]
fn interpreters_that_are_none_and_paths_that_do_not_end() {
    let world = World::new();
    let dynamic = Builder {
        interpreter: Some("/lib/ld.so"),
        ..Builder::new(true, &[TEXT, DATA])
    };
    let bytes = dynamic.build();
    let program = Program::new(shared(world));
    let image = Image {
        interpreter: Some(open(world, b"no image at all")),
        ..Image::new(open(world, &bytes), b"x")
    };
    assert_eq!(exec(&program, &image).err(), Some(Errno::ELIBBAD));
    assert_eq!(program.space.map_count(), 0);
    let mut endless = bytes.clone();
    endless[0x300 + 10] = b'x';
    let image = Image::new(open(world, &endless), b"x");
    assert_eq!(exec(&program, &image).err(), Some(Errno::ENOEXEC));
    for length in [0u8, 1] {
        let mut short = bytes.clone();
        short[64 + 32] = length;
        let image = Image::new(open(world, &short), b"x");
        assert_eq!(exec(&program, &image).err(), Some(Errno::ENOEXEC));
    }
    program.exit();
}

#[test]
fn segments_over_the_stack_and_too_many_arguments() {
    let world = World::new();
    // The first segment may not lie where the stack is.
    let top = 0x7fff_ffff_f000;
    let over = Part {
        address: top - 0x2000,
        ..TEXT
    };
    let program = Program::new(shared(world));
    let file = open(world, &Builder::new(true, &[over]).build());
    assert_eq!(
        exec(&program, &Image::new(file, b"x")).err(),
        Some(Errno::EEXIST)
    );
    program.exit();
    // A later one replaces it, and then there is nowhere to write to.
    let program = Program::new(shared(world));
    let file = open(
        world,
        &Builder::new(true, &[TEXT, Part { rights: 5, ..over }]).build(),
    );
    assert_eq!(
        exec(&program, &Image::new(file, b"x")).err(),
        Some(Errno::EFAULT)
    );
    program.exit();
    let file = open(world, &Builder::new(true, &[TEXT]).build());
    let long = vec![b'x'; 128 << 10];
    let many: Vec<&[u8]> = vec![b"0123456789"; 200_000];
    for arguments in [&[&long[..]][..], &many] {
        let program = Program::new(shared(world));
        let image = Image {
            arguments,
            ..Image::new(file, b"x")
        };
        assert_eq!(exec(&program, &image).err(), Some(Errno::E2BIG));
        program.exit();
    }
    // Many that fit: the stack grows for them.
    let program = Program::new(shared(world));
    let image = Image {
        arguments: &many[..40_000],
        ..Image::new(file, b"x")
    };
    let start = exec(&program, &image).unwrap();
    assert_eq!(word(&program, start.stack.as_u64()), 40_000);
    program.exit();
    // A quarter of the stack's 8 MiB, to the byte: strings with their zeros, the path's too, and a pointer for each argument.
    let part = vec![b'x'; 65_535];
    let rest = (2 << 20) - 31 * 65_536 - 32 * 8 - 2 - 1;
    for (length, refused) in [(rest, None), (rest + 1, Some(Errno::E2BIG))] {
        let mut arguments = vec![&part[..]; 31];
        arguments.push(&long[..length]);
        let program = Program::new(shared(world));
        let image = Image {
            arguments: &arguments,
            ..Image::new(file, b"x")
        };
        assert_eq!(exec(&program, &image).err(), refused);
        program.exit();
    }
}

/// A real, tiny program: exits with 42.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn runnable() -> Vec<u8> {
    let text = Part {
        file_size: 0x1000,
        memory_size: 0x1000,
        ..TEXT
    };
    let mut bytes = Builder::new(true, &[text]).build();
    // mov edi, 42; mov eax, 60; syscall
    let code = b"\xbf\x2a\x00\x00\x00\xb8\x3c\x00\x00\x00\x0f\x05";
    bytes[0x400..0x400 + code.len()].copy_from_slice(code);
    bytes
}

/// What the running kernel answers to an exec of these bytes: its errno, or `None` if the program was started.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn host_exec(bytes: &[u8]) -> Option<i32> {
    let mut status = 0;
    // SAFETY: plain system calls; between fork and exec the child makes nothing else.
    unsafe {
        let fd = libc::memfd_create(c"image".as_ptr(), libc::MFD_CLOEXEC);
        assert_eq!(
            libc::write(fd, bytes.as_ptr().cast(), bytes.len()),
            bytes.len() as isize
        );
        let argv = [c"x".as_ptr(), std::ptr::null()];
        let child = libc::fork();
        if child == 0 {
            let limit = libc::rlimit {
                rlim_cur: 0,
                rlim_max: 0,
            };
            libc::setrlimit(libc::RLIMIT_CORE, &limit);
            libc::syscall(
                libc::SYS_execveat,
                fd,
                c"".as_ptr(),
                argv.as_ptr(),
                argv[1..].as_ptr(),
                libc::AT_EMPTY_PATH,
            );
            libc::_exit(100 + *libc::__errno_location());
        }
        libc::close(fd);
        libc::waitpid(child, &mut status, 0);
    }
    let exited = libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status));
    exited.filter(|code| *code > 100).map(|code| code - 100)
}

/// The table of the program's headers lies behind the end of the file, in its last page.
#[test]
fn headers_behind_the_end_keep_no_page() {
    let world = World::new();
    let mm = world.mm();
    let mut bytes = Builder::new(false, &[TEXT, DATA]).build();
    let beyond = bytes.len() as u32 + 4;
    assert!(beyond % 4096 > 4, "in the file's last page");
    bytes[28..32].copy_from_slice(&beyond.to_le_bytes());
    let before = world.used_frames();
    let (_, file) = world.file(mm, &bytes);
    let program = Program::with_layout(mm, kmem_cow_mm::Layout::x86_32_legacy());
    assert_eq!(exec(&program, &Image::new(file, b"x")), Err(Errno::ENOEXEC));
    program.exit();
    assert!(mm.close(file.file));
    assert_eq!(world.used_frames(), before);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever bytes of the headers change: an answer, no panic, nothing lost; and what the running kernel refuses is refused alike.
    #[test]
    fn mutated_headers_get_an_answer(changes in prop::collection::vec((0usize..240, any::<u8>()), 1..4)) {
        let world = World::new();
        let mm = world.mm();
        let mut bytes = Builder::new(true, &[TEXT, DATA]).build();
        #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
        let mut real = runnable();
        for (at, value) in &changes {
            bytes[*at] = *value;
            #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
            { real[*at] = *value; }
        }
        let before = world.used_frames();
        for bytes in [&bytes, #[cfg(all(target_os = "linux", target_arch = "x86_64"))] &real] {
            let (_, file) = world.file(mm, bytes);
            let program = Program::new(mm);
            let got = exec(&program, &Image::new(file, b"x"));
            #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
            if std::ptr::eq(bytes, &real)
                && let Some(errno) = host_exec(bytes)
                // Of an interpreter that is not there kmem does not know.
                && ![libc::ENOENT, libc::EACCES, libc::EIO, libc::ENOTDIR, libc::EISDIR, libc::ELOOP, libc::ENAMETOOLONG].contains(&errno)
            {
                prop_assert_eq!(got.map_err(|error| error.number()).err(), Some(errno), "{:?}", &changes);
            }
            common::check_counters([&program]);
            program.exit();
            mm.close(file.file);
        }
        prop_assert_eq!(world.used_frames(), before);
    }

    #[test]
    fn mutated_headers_of_32_bits_get_an_answer(changes in prop::collection::vec((0usize..160, any::<u8>()), 1..5)) {
        let world = World::new();
        let mm = world.mm();
        let mut bytes = Builder::new(false, &[TEXT, DATA]).build();
        for (at, value) in changes {
            bytes[at] = value;
        }
        let before = world.used_frames();
        let (_, file) = world.file(mm, &bytes);
        let program = Program::with_layout(mm, kmem_cow_mm::Layout::x86_32_legacy());
        let _ = exec(&program, &Image::new(file, b"x"));
        common::check_counters([&program]);
        program.exit();
        mm.close(file.file);
        prop_assert_eq!(world.used_frames(), before);
    }
}

#[test]
fn an_image_above_its_place_is_moved_down() {
    let world = World::new();
    let high = |part: Part| Part {
        address: part.address + 0x7000_0000_0000,
        ..part
    };
    let bytes = Builder {
        position_independent: true,
        interpreter: Some("/lib/ld.so"),
        ..Builder::new(true, &[high(TEXT), high(DATA)])
    };
    let program = Program::new(shared(world));
    let image = Image::new(open(world, &bytes.build()), b"/bin/high");
    let start = exec(&program, &image).unwrap();
    let moved = 0x7000_0040_0000 - start.entry.as_u64().wrapping_sub(0x400);
    assert_eq!(start.bias, moved.wrapping_neg());
    assert_eq!(
        program.space.heap().start,
        start.bias.wrapping_add(0x7000_0040_6000)
    );
    program.exit();
}

/// An image with as many segments as a page of program headers has room for, one after the other.
fn image_of(wide: bool, segments: u64) -> Vec<u8> {
    let mut parts = vec![TEXT];
    parts.extend((1..segments).map(|number| Part {
        offset: 0x1800 + number * 8,
        address: 0x50_0800 + number * PAGE + number * 8,
        file_size: 8,
        memory_size: 8,
        rights: 6,
    }));
    parts[1..].iter_mut().for_each(|part| part.offset += PAGE);
    Builder::new(wide, &parts).build()
}

#[test]
fn an_image_may_have_a_page_of_program_headers() {
    // One more is about the stack.
    for (layout, wide, most) in [
        (Layout::x86_64(), true, 72),
        (Layout::x86_32_legacy(), false, 127),
    ] {
        let world = World::new();
        let mm = world.mm();
        let before = world.used_frames();
        for (segments, outcome) in [
            (17, Ok(())),
            (most, Ok(())),
            (most + 1, Err(Errno::ENOEXEC)),
        ] {
            let program = Program::with_layout(mm, layout);
            let bytes = image_of(wide, segments);
            let (_, file) = world.file(mm, &bytes);
            let image = Image::new(file, b"/bin/many");
            assert_eq!(exec(&program, &image).map(|_| ()), outcome, "{segments}");
            if outcome.is_ok() {
                let last = 0x50_0800 + (segments - 1) * (PAGE + 8);
                let at = 0x2800 + (segments - 1) * 8;
                let want = &bytes[at as usize..][..8];
                assert_eq!(word(&program, last).to_le_bytes(), want);
            }
            program.exit();
            assert!(mm.close(file.file));
        }
        assert_eq!(world.used_frames(), before);
    }
}

/// A segment without bytes in the file may say that they lie anywhere.
#[test]
fn a_segment_without_a_part_of_the_file_is_memory() {
    let world = World::new();
    let bss = Part {
        offset: 0x123,
        address: 0x41_0010,
        file_size: 0,
        memory_size: 0x2000,
        rights: 6,
    };
    let bytes = Builder::new(true, &[TEXT, bss]).build();
    let program = Program::new(shared(world));
    let image = Image::new(open(world, &bytes), b"/bin/bss");
    exec(&program, &image).unwrap();
    assert_eq!(word(&program, 0x41_0010), 0);
    program.store(0x41_2008, 1).unwrap();
    assert!(program.store(0x41_3000, 1).is_err());
    program.exit();
    // With one they have to lie alike.
    let bss = Part {
        file_size: 8,
        ..bss
    };
    let bytes = Builder::new(true, &[TEXT, bss]).build();
    let program = Program::new(shared(world));
    let image = Image::new(open(world, &bytes), b"/bin/bss");
    assert_eq!(exec(&program, &image), Err(Errno::EINVAL));
    program.exit();
}
