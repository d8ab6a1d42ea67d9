//! What `/proc` shows of a process: maps, smaps, status, pagemap, in Linux's formats; and why an access faulted.

mod common;

use common::{PAGE, Program, RW, World};
use kmem_cow_mm::{Errno, LockFlags, MapFlags, MapRequest, PagemapEntry, Prot};
use kmem_hal::{FaultCode, Page, VirtAddr};

const AT: u64 = 0x7000_0000;

fn anonymous(program: &Program, at: u64, pages: u64, prot: Prot) {
    let request = MapRequest::anonymous(pages * PAGE, prot).at(at);
    program.space.mmap(&request).unwrap();
}

/// The name and the value of each line of the form `Name: 12 kB`.
fn amounts(text: &str) -> Vec<(String, String)> {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_string(), value.trim().to_string()))
        .collect()
}

fn amount(text: &str, name: &str) -> u64 {
    let amounts = amounts(text);
    let (_, value) = amounts.iter().find(|(found, _)| found == name).unwrap();
    value.trim_end_matches(" kB").parse().unwrap()
}

/// The layout of a line: everything but digits, each run of which is right-aligned and so turned into blanks.
#[cfg(target_os = "linux")]
fn shape(line: &str) -> String {
    let blank = |c: char| if c.is_ascii_digit() { ' ' } else { c };
    line.chars().map(blank).collect()
}

#[test]
fn smaps_says_what_is_in_memory_and_whose() {
    let world = World::new();
    let parent = Program::new(world.mm());
    anonymous(&parent, AT, 8, RW);
    parent.store(AT, 1).unwrap();
    parent.store(AT + PAGE, 2).unwrap();
    parent.load(AT + 2 * PAGE).unwrap();
    let alone = parent.space.smaps().to_string();
    for (name, kib) in [
        ("Size", 32),
        ("Rss", 8),
        ("Pss", 8),
        ("Private_Dirty", 8),
        ("Shared_Dirty", 0),
        ("Anonymous", 8),
        ("Referenced", 8),
        ("Locked", 0),
    ] {
        assert_eq!(amount(&alone, name), kib, "{name}:\n{alone}");
    }
    assert!(alone.ends_with("VmFlags: rd wr mr mw me ac \n"), "{alone}");
    let child = parent.fork().unwrap();
    child.store(AT, 3).unwrap();
    for program in [&parent, &child] {
        let shared = program.space.smaps().to_string();
        assert_eq!(amount(&shared, "Rss"), 8, "{shared}");
        assert_eq!(
            amount(&shared, "Pss"),
            6,
            "one page alone, half of another:\n{shared}"
        );
        assert_eq!(amount(&shared, "Private_Dirty"), 4, "{shared}");
        assert_eq!(amount(&shared, "Shared_Dirty"), 4, "{shared}");
    }
    parent.space.mlock2(AT, PAGE, LockFlags::empty()).unwrap();
    let rollup = parent.space.smaps_rollup().to_string();
    assert!(
        rollup.starts_with("70000000-70008000 ---p 00000000 00:00 0 "),
        "{rollup}"
    );
    assert!(rollup.lines().next().unwrap().ends_with("[rollup]"));
    assert_eq!(amount(&rollup, "Pss_Anon"), 6);
    assert_eq!(amount(&rollup, "Locked"), 4);
    child.exit();
    parent.exit();
}

#[test]
#[cfg(target_os = "linux")]
fn the_formats_are_the_running_kernels() {
    let world = World::new();
    let program = Program::new(world.mm());
    anonymous(&program, AT, 8, RW);
    program.store(AT, 1).unwrap();
    for (ours, theirs) in [
        (program.space.smaps().to_string(), "/proc/self/smaps"),
        (
            program.space.smaps_rollup().to_string(),
            "/proc/self/smaps_rollup",
        ),
        (program.space.status().to_string(), "/proc/self/status"),
    ] {
        let theirs = std::fs::read_to_string(theirs).unwrap();
        let is_ours = |line: &str| {
            let name = line.split(':').next().unwrap_or("");
            ours.lines()
                .any(|ours| ours.starts_with(&format!("{name}:")))
        };
        // The first mapping's lines, which of a status are its lines about memory.
        let theirs: Vec<&str> = theirs.lines().filter(|line| is_ours(line)).collect();
        for (number, line) in ours.lines().enumerate() {
            if line.contains('-')
                || line.starts_with("VmFlags")
                || line.starts_with("ProtectionKey")
            {
                continue;
            }
            let number = number - usize::from(ours.starts_with('7'));
            if theirs[number].bytes().filter(u8::is_ascii_digit).count() > 8 {
                // Wider than its column, as the terabytes that AddressSanitizer reserves.
                continue;
            }
            assert_eq!(shape(line), shape(theirs[number]), "line {number}");
        }
    }
    program.exit();
}

#[test]
fn status_and_statm_count_what_is_mapped() {
    let world = World::new();
    let program = Program::new(world.mm());
    anonymous(&program, AT, 8, RW);
    anonymous(&program, AT + 16 * PAGE, 2, Prot::READ | Prot::EXEC);
    program.store(AT, 1).unwrap();
    let status = program.space.status();
    assert_eq!(
        (status.size, status.data, status.rss()),
        (10 * PAGE, 8 * PAGE, PAGE)
    );
    assert_eq!(status.libraries, 2 * PAGE);
    assert_eq!(status.statm().to_string(), "10 1 0 0 0 8 0\n");
    program.space.munmap(AT, 8 * PAGE).unwrap();
    let after = program.space.status();
    assert_eq!(
        (after.size, after.peak, after.rss_peak),
        (2 * PAGE, 10 * PAGE, PAGE)
    );
    assert!(
        after
            .to_string()
            .starts_with("VmPeak:\t      40 kB\nVmSize:\t       8 kB\n")
    );
    program.exit();
}

#[test]
fn pagemap_says_where_each_page_is() {
    let world = World::new();
    let parent = Program::new(world.mm());
    anonymous(&parent, AT, 4, RW);
    parent.store(AT, 1).unwrap();
    parent.load(AT + PAGE).unwrap();
    let page = Page::containing(VirtAddr::new(AT));
    let mut entries = [PagemapEntry::default(); 4];
    assert_eq!(parent.space.pagemap(page, &mut entries), 4);
    assert!(entries[0].is_present() && entries[0].is_exclusive() && !entries[0].is_file());
    assert_eq!(entries[0].frame(), parent.space.frame_at(page));
    assert_eq!(entries[1].frame(), Some(parent.space.mm().zero_page()));
    assert!(!entries[1].is_exclusive());
    assert_eq!(entries[2].to_word(), 0);
    assert_eq!(entries[0].without_frame().to_word(), 1 << 63 | 1 << 56);
    let child = parent.fork().unwrap();
    assert!(
        !parent.space.pagemap_entry(page).is_exclusive(),
        "seen by both"
    );
    child.exit();
    parent.exit();
}

#[test]
fn a_program_names_its_memory() {
    let world = World::new();
    let before = world.used_frames();
    let mm = world.mm();
    let program = Program::new(mm);
    let space = &program.space;
    anonymous(&program, AT, 8, RW);
    space
        .set_anon_name(AT + 2 * PAGE, 2 * PAGE, Some(b"arena 7"))
        .unwrap();
    assert_eq!(space.map_count(), 3);
    let maps = space.maps().to_string();
    let named = maps.lines().nth(1).unwrap();
    assert!(named.starts_with("70002000-70004000 rw-p 00000000 00:00 0 "));
    assert_eq!(named.find("[anon:arena 7]"), Some(73), "{maps}");
    space
        .set_anon_name(AT + 4 * PAGE, 2 * PAGE, Some(b"arena 7"))
        .unwrap();
    assert_eq!(space.map_count(), 3, "equal names merge");
    space
        .set_anon_name(AT + 4 * PAGE, PAGE, Some(b"other"))
        .unwrap();
    assert_eq!(space.map_count(), 5, "other names do not");
    let child = program.fork().unwrap();
    assert_eq!(child.space.maps().to_string(), space.maps().to_string());
    space.set_anon_name(AT, 8 * PAGE, None).unwrap();
    assert_eq!(space.map_count(), 1);
    assert!(child.space.maps().to_string().contains("[anon:other]"));
    for bad in [&[b'x'; 80][..], b"a[b", b"a\\b", b"a$b", b"a`b", b"\n"] {
        assert_eq!(space.set_anon_name(AT, PAGE, Some(bad)), Err(Errno::EINVAL));
    }
    assert_eq!(
        space.set_anon_name(AT + 1, PAGE, Some(b"x")),
        Err(Errno::EINVAL)
    );
    assert_eq!(
        space.set_anon_name(AT - PAGE, 2 * PAGE, Some(b"x")),
        Err(Errno::ENOMEM)
    );
    let shared = MapRequest {
        address: AT + 32 * PAGE,
        flags: MapFlags::SHARED | MapFlags::ANONYMOUS | MapFlags::FIXED,
        ..MapRequest::anonymous(PAGE, RW)
    };
    space.mmap(&shared).unwrap();
    space
        .set_anon_name(AT + 32 * PAGE, PAGE, Some(b"mine"))
        .unwrap();
    assert!(space.maps().to_string().contains("[anon_shmem:mine]"));
    let (_, open) = world.file(mm, &[1; 4096]);
    let request = MapRequest {
        file: Some(open),
        flags: MapFlags::PRIVATE,
        ..MapRequest::anonymous(PAGE, RW)
    };
    let at = space.mmap(&request).unwrap().as_u64();
    assert_eq!(space.set_anon_name(at, PAGE, Some(b"x")), Err(Errno::EBADF));
    child.exit();
    program.exit();
    mm.close(open.file);
    assert_eq!(world.used_frames(), before + 1, "but for the page of zeros");
}

#[test]
fn a_fault_is_explained() {
    let world = World::new();
    let program = Program::new(world.mm());
    anonymous(&program, AT, 4, RW);
    let user = FaultCode::USER;
    let explain = |address, code| {
        program
            .space
            .explain_fault(VirtAddr::new(address), code)
            .to_string()
    };
    let text = explain(AT + 8, user | FaultCode::WRITE);
    assert!(text.starts_with(
        "A write at 0x70000008 from user mode found no page (error code 0x6). It lies in page 0 of 4 of 70000000-70004000 rw-p, anonymous memory. Level 4 (table "
    ), "{text}");
    assert!(text.contains("first touch of the page, a write"), "{text}");
    program.load(AT).unwrap();
    let text = explain(AT, user | FaultCode::WRITE | FaultCode::PRESENT);
    assert!(
        text.contains("only read so far") && text.contains("level 1 (table"),
        "{text}"
    );
    program.store(AT, 1).unwrap();
    let child = program.fork().unwrap();
    let text = explain(AT, user | FaultCode::WRITE | FaultCode::PRESENT);
    assert!(text.contains("copy on write"), "{text}");
    child.exit();
    for (address, code, says) in [
        (8, user, "null pointer"),
        (
            AT + 4 * PAGE,
            user,
            "the next one below is 70000000-70004000 rw-p; there is none above",
        ),
        (
            AT,
            user | FaultCode::FETCH | FaultCode::PRESENT,
            "SIGSEGV (ACCERR)",
        ),
        (0xffff_8000_0000_0000, user, "above the user addresses"),
        (
            0xffff_8000_0000_0000,
            FaultCode::empty(),
            "the kernel's own",
        ),
        (
            AT,
            user | FaultCode::PROTECTION_KEY | FaultCode::PRESENT,
            "PKRU",
        ),
    ] {
        let text = explain(address, code);
        assert!(text.contains(says), "{says}:\n{text}");
    }
    program.exit();
}
