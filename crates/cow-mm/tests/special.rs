//! What the kernel itself maps into a program: `[vvar]` and `[vdso]` go, move and change whole, or not at all.
//!
//! The answers are those of Linux 6.18 on x86-64, recorded, and compared to the running kernel where that is no older: a newer one is held to
//! them too, and where it answers otherwise kmem is to follow. A kernel that seals these mappings itself (`CONFIG_MSEAL_SYSTEM_MAPPINGS`) is not
//! asked, nor is any for a call that it refuses for ordinary memory too: `mlock` without a limit for it, `mseal` behind a filter.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod common;

use common::host::{release, skipped};
use common::{PAGE, Program, RW, World, check_counters};
use kmem_cow_mm::{
    Advice, Errno, Label, MapFlags, MapRequest, Prot, RemapFlags, VmFlags, permissions,
};

const AT: u64 = 0x1000_0000;
/// Where calls move to.
const TO: u64 = 0x2000_0000;
const PAGES: u64 = 2;

/// A call with a range of a special mapping.
#[derive(Clone, Copy, Debug)]
enum Call {
    Unmap,
    MapOver,
    Protect(i32),
    Lock,
    Unlock,
    Move,
    Stay,
    Shrink,
    Grow,
    Keep,
    MoveAndKeep,
    Twice,
    Advise(Advice),
    Sync,
    Seal,
}

/// Which range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    First,
    Last,
    Whole,
}

use Call::*;
use Part::*;

const EACCES: i32 = 13;
const EFAULT: i32 = 14;
const EINVAL: i32 = 22;

/// Calls, and what they answer of `[vvar]` and of `[vdso]`.
const ANSWERS: &[(Call, Part, i32, i32)] = &[
    (Unmap, First, EINVAL, EINVAL),
    (Unmap, Last, EINVAL, EINVAL),
    (Unmap, Whole, 0, 0),
    (MapOver, First, EINVAL, EINVAL),
    (MapOver, Last, EINVAL, EINVAL),
    (MapOver, Whole, 0, 0),
    (Protect(0), First, EINVAL, EINVAL),
    (Protect(0), Last, EINVAL, EINVAL),
    (Protect(0), Whole, 0, 0),
    (Protect(1), First, 0, EINVAL),
    (Protect(1), Whole, 0, 0),
    (Protect(5), First, EACCES, 0),
    (Protect(3), First, EACCES, EINVAL),
    (Protect(3), Whole, EACCES, 0),
    (Lock, First, 0, 0),
    (Lock, Whole, 0, 0),
    (Unlock, First, 0, 0),
    (Move, First, EINVAL, EINVAL),
    (Move, Last, EINVAL, EINVAL),
    (Move, Whole, 0, 0),
    (Stay, First, 0, 0),
    (Shrink, Whole, EINVAL, EINVAL),
    (Grow, First, EFAULT, EFAULT),
    (Grow, Whole, EFAULT, EFAULT),
    (Keep, First, EINVAL, EINVAL),
    (Keep, Whole, EINVAL, EINVAL),
    (MoveAndKeep, First, EINVAL, EINVAL),
    (MoveAndKeep, Whole, EINVAL, EINVAL),
    (Twice, First, EINVAL, EINVAL),
    (Advise(Advice::Normal), First, 0, 0),
    (Advise(Advice::Random), First, EINVAL, EINVAL),
    (Advise(Advice::Random), Last, EINVAL, EINVAL),
    (Advise(Advice::Random), Whole, 0, 0),
    (Advise(Advice::Sequential), First, EINVAL, EINVAL),
    (Advise(Advice::WillNeed), First, 0, 0),
    (Advise(Advice::DontNeed), First, EINVAL, 0),
    (Advise(Advice::DontNeed), Whole, EINVAL, 0),
    (Advise(Advice::DontNeedLocked), First, EINVAL, 0),
    (Advise(Advice::Free), Whole, EINVAL, EINVAL),
    (Advise(Advice::Remove), Whole, EINVAL, EINVAL),
    (Advise(Advice::DontFork), First, EINVAL, EINVAL),
    (Advise(Advice::DontFork), Whole, 0, 0),
    (Advise(Advice::DoFork), First, EINVAL, 0),
    (Advise(Advice::DontDump), First, 0, EINVAL),
    (Advise(Advice::DontDump), Whole, 0, 0),
    (Advise(Advice::DoDump), Whole, EINVAL, EINVAL),
    (Advise(Advice::WipeOnFork), First, EINVAL, EINVAL),
    (Advise(Advice::WipeOnFork), Whole, 0, 0),
    (Advise(Advice::KeepOnFork), First, 0, 0),
    (Advise(Advice::Cold), First, EINVAL, 0),
    (Advise(Advice::PageOut), First, EINVAL, 0),
    (Advise(Advice::PopulateRead), First, EINVAL, 0),
    (Advise(Advice::PopulateWrite), First, EINVAL, EINVAL),
    (Advise(Advice::GuardInstall), Whole, EINVAL, EINVAL),
    (Advise(Advice::GuardRemove), Whole, EINVAL, EINVAL),
    (Sync, First, 0, 0),
    (Seal, First, EINVAL, EINVAL),
    (Seal, Whole, 0, 0),
];

/// The address and the length that a part of `[start, end)` has.
fn range(part: Part, start: u64, end: u64) -> (u64, u64) {
    match part {
        First => (start, PAGE),
        Last => (end - PAGE, PAGE),
        Whole => (start, end - start),
    }
}

/// kmem's answer.
fn ours(program: &Program, call: Call, (at, length): (u64, u64)) -> i32 {
    let space = &program.space;
    let fixed = RemapFlags::MAYMOVE | RemapFlags::FIXED;
    let may = RemapFlags::MAYMOVE;
    let keep = may | RemapFlags::DONTUNMAP;
    let remap = |old, new, flags, to| space.mremap(at, old, new, flags, to).map(|_| ());
    let over = MapRequest::anonymous(length, RW).at(at);
    let answer = match call {
        Unmap => space.munmap(at, length),
        MapOver => space.mmap(&over).map(|_| ()),
        Protect(prot) => space.mprotect(at, length, Prot::from_bits_retain(prot as u32)),
        Lock => space.mlock(at, length),
        Unlock => space.munlock(at, length),
        Move => remap(length, length, fixed, TO),
        Stay => remap(length, length, RemapFlags::empty(), 0),
        Shrink => remap(length, length - PAGE, RemapFlags::empty(), 0),
        Grow => remap(length, length + PAGE, may, 0),
        Keep => remap(length, length, keep, 0),
        MoveAndKeep => remap(length, length, keep | RemapFlags::FIXED, TO),
        Twice => remap(0, length, may, 0),
        Advise(advice) => space.madvise(at, length, advice),
        Sync => space.msync(at, length),
        Seal => space.mseal(at, length, 0),
    };
    answer.map_or_else(Errno::number, |()| 0)
}

/// The running kernel's answer, in a child that ends with it.
fn theirs(call: Call, (at, length): (u64, u64)) -> i32 {
    let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    let (at, length, page) = (at as i64, length as i64, PAGE as i64);
    let (number, words) = match call {
        Unmap => (libc::SYS_munmap, [at, length, 0, 0, 0, 0]),
        MapOver => (libc::SYS_mmap, [at, length, 3, i64::from(anonymous), -1, 0]),
        Protect(prot) => (libc::SYS_mprotect, [at, length, i64::from(prot), 0, 0, 0]),
        Lock => (libc::SYS_mlock, [at, length, 0, 0, 0, 0]),
        Unlock => (libc::SYS_munlock, [at, length, 0, 0, 0, 0]),
        Move => (libc::SYS_mremap, [at, length, length, 3, TO as i64, 0]),
        Stay => (libc::SYS_mremap, [at, length, length, 0, 0, 0]),
        Shrink => (libc::SYS_mremap, [at, length, length - page, 0, 0, 0]),
        Grow => (libc::SYS_mremap, [at, length, length + page, 1, 0, 0]),
        Keep => (libc::SYS_mremap, [at, length, length, 5, 0, 0]),
        MoveAndKeep => (libc::SYS_mremap, [at, length, length, 7, TO as i64, 0]),
        Twice => (libc::SYS_mremap, [at, 0, length, 1, 0, 0]),
        Advise(advice) => (libc::SYS_madvise, [at, length, advice as i64, 0, 0, 0]),
        Sync => (libc::SYS_msync, [at, length, 4, 0, 0, 0]),
        // mseal, which the C library has no name for yet.
        Seal => (462, [at, length, 0, 0, 0, 0]),
    };
    let [a, b, c, d, e, f] = words;
    // SAFETY: the child makes one system call, with pages that nothing of its own is in, and ends.
    unsafe {
        let child = libc::fork();
        if child == 0 {
            let failed = libc::syscall(number, a, b, c, d, e, f) == -1;
            libc::_exit(if failed { *libc::__errno_location() } else { 0 });
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &mut status, 0), child);
        assert!(libc::WIFEXITED(status), "{call:?}: {status:#x}");
        libc::WEXITSTATUS(status)
    }
}

/// Where the running kernel mapped something in this process, and whether it is sealed.
fn mapped(name: &str) -> Option<((u64, u64), bool)> {
    let smaps = std::fs::read_to_string("/proc/self/smaps").ok()?;
    let mut lines = smaps.lines();
    let line = lines.find(|line| line.ends_with(name))?;
    let (start, end) = line.split(' ').next()?.split_once('-')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    let flags = lines.find(|line| line.starts_with("VmFlags:"))?;
    let sealed = flags.split(' ').any(|flag| flag == "sl");
    Some(((number(start)?, number(end)?), sealed))
}

/// Whether the running kernel does for ordinary memory what a call asks for; `memory` is such, of as many bytes as are asked for or more.
fn is_allowed(call: Call, memory: &[u8], length: u64) -> bool {
    assert!(memory.len() as u64 >= length + PAGE);
    let first = (memory.as_ptr() as u64).next_multiple_of(PAGE);
    theirs(call, (first, length)) == 0
}

const RX: Prot = Prot::READ.union(Prot::EXEC);

#[test]
fn every_call_answers_as_linux() {
    for &(call, part, vvar, vdso) in ANSWERS {
        for (label, prot, expected) in [
            (Label::Vvar, Prot::READ, vvar),
            (Label::VvarClock, Prot::READ, vvar),
            (Label::Vdso, RX, vdso),
        ] {
            let program = Program::new(World::new().mm());
            let space = &program.space;
            space.map_special(AT, PAGES * PAGE, prot, label).unwrap();
            let before = space.maps().to_string();
            let got = ours(&program, call, range(part, AT, AT + PAGES * PAGE));
            assert_eq!(got, expected, "{call:?} of {part:?} of {label:?}");
            if got != 0 {
                assert_eq!(space.maps().to_string(), before, "{call:?} was refused");
            }
            check_counters([&program]);
            program.exit();
        }
    }
}

#[test]
fn the_running_kernel_answers_as_recorded() {
    let release = release();
    let (Some((vvar, vvar_sealed)), Some((vdso, vdso_sealed))) =
        (mapped("[vvar]"), mapped("[vdso]"))
    else {
        return skipped("there is no [vvar] and [vdso] here to ask the kernel of");
    };
    if vvar_sealed || vdso_sealed {
        return skipped("[vvar] and [vdso] are sealed here, so that other calls are refused");
    }
    if release < (6, 18) {
        return skipped(&format!(
            "the answers for [vvar] and [vdso] are those of Linux 6.18, this is {release:?}"
        ));
    }
    let longest = (vvar.1 - vvar.0).max(vdso.1 - vdso.0);
    let ordinary = vec![0; (longest + PAGE) as usize];
    for &(call, part, of_vvar, of_vdso) in ANSWERS {
        for ((start, end), expected) in [(vvar, of_vvar), (vdso, of_vdso)] {
            if end - start == PAGE && part != Whole {
                continue;
            }
            let (start, length) = range(part, start, end);
            if matches!(call, Lock | Seal) && !is_allowed(call, &ordinary, length) {
                skipped(&format!("{call:?} of {part:?} is refused to this process"));
                continue;
            }
            let got = theirs(call, (start, length));
            assert_eq!(got, expected, "{call:?} of {part:?} of {start:#x}");
        }
    }
}

/// A range that ends in the middle of one cuts what it begins in, as far as Linux comes before it finds out; so does a target of mremap.
#[test]
fn what_is_before_a_special_mapping_is_cut_before_the_call_is_refused() {
    let program = Program::new(World::new().mm());
    let space = &program.space;
    let special = AT + 2 * PAGE;
    space
        .mmap(&MapRequest::anonymous(2 * PAGE, RW).at(AT))
        .unwrap();
    space
        .map_special(special, 2 * PAGE, RX, Label::Vdso)
        .unwrap();
    program.store(AT + PAGE, 7).unwrap();
    assert_eq!(space.munmap(AT + PAGE, 2 * PAGE), Err(Errno::EINVAL));
    assert_eq!((space.map_count(), program.load(AT + PAGE)), (3, Ok(7)));
    space.mmap(&MapRequest::anonymous(PAGE, RW).at(TO)).unwrap();
    let fixed = RemapFlags::MAYMOVE | RemapFlags::FIXED;
    let onto = space.mremap(TO, PAGE, PAGE, fixed, special + PAGE);
    assert_eq!((onto, space.map_count()), (Err(Errno::EINVAL), 4));
    // Nothing of it has a name of its own either.
    let named = space.set_anon_name(special, PAGE, Some(b"x"));
    assert_eq!(named, Err(Errno::EINVAL));
    // It is all there, and goes as a whole.
    let flags = MapFlags::PRIVATE | MapFlags::ANONYMOUS | MapFlags::FIXED_NOREPLACE;
    let again = MapRequest {
        flags,
        ..MapRequest::anonymous(PAGE, RW).at(special + PAGE)
    };
    assert_eq!(space.mmap(&again), Err(Errno::EEXIST));
    space.munmap(AT, 4 * PAGE).unwrap();
    assert_eq!(space.map_count(), 1);
    check_counters([&program]);
    program.exit();
}

/// A call over several mappings, the last of which is a part of `[vdso]`: what stays done of it before it is refused, as Linux 6.18 leaves it.
#[test]
fn what_lies_before_a_part_of_a_special_mapping_stays_changed() {
    // Two pages, two that may be read only, and then `[vdso]`; the call begins in the second page and ends with the first of `[vdso]`.
    let (second, length) = (AT + PAGE, 4 * PAGE);
    let (data, constants) = ("rw-p", "r--p");
    let with = |flag| {
        [
            (AT, 1, data, ""),
            (second, 1, data, flag),
            (AT + 2 * PAGE, 2, constants, flag),
        ]
    };
    let cut = with("");
    for (call, left) in [
        (Unmap, &cut[..]),
        (MapOver, &cut),
        (Protect(0), &[(AT, 1, data, ""), (second, 3, "---p", "")]),
        (
            Move,
            &[
                (AT, 1, data, ""),
                (TO, 1, data, ""),
                (TO + PAGE, 2, constants, ""),
            ],
        ),
        (Advise(Advice::DontFork), &with("dc")),
        (Seal, &with("sl")),
        (
            MoveAndKeep,
            &[
                (AT, 2, data, ""),
                (AT + 2 * PAGE, 2, constants, ""),
                (TO, 1, data, ""),
                (TO + PAGE, 2, constants, ""),
            ],
        ),
    ] {
        let program = Program::new(World::new().mm());
        let space = &program.space;
        for (at, prot) in [(AT, RW), (AT + 2 * PAGE, Prot::READ)] {
            let request = MapRequest::anonymous(2 * PAGE, prot);
            space.mmap(&request.at(at)).unwrap();
        }
        let special = AT + 4 * PAGE;
        space
            .map_special(special, 2 * PAGE, RX, Label::Vdso)
            .unwrap();
        let got = ours(&program, call, (second, length));
        assert_eq!(got, EINVAL, "{call:?}");
        let mut found = Vec::new();
        space.for_each_vma(|vma| {
            let flag = match (
                vma.flags.contains(VmFlags::DONTCOPY),
                vma.flags.contains(VmFlags::SEALED),
            ) {
                (true, _) => "dc",
                (_, true) => "sl",
                _ => "",
            };
            let rights = String::from_utf8(permissions(vma.flags).to_vec()).unwrap();
            if vma.label == Label::None {
                found.push((vma.range.start().as_u64(), vma.range.count(), rights, flag));
            } else {
                assert_eq!(
                    (vma.range.start().as_u64(), vma.range.count(), flag),
                    (special, 2, ""),
                    "{call:?}"
                );
            }
            true
        });
        let left: Vec<_> = left
            .iter()
            .map(|&(at, pages, rights, flag)| (at, pages, rights.to_string(), flag))
            .collect();
        assert_eq!(found, left, "{call:?}");
        check_counters([&program]);
        program.exit();
    }
}

/// Whose pages they are is nobody's to know, so all of them are in memory.
#[test]
fn all_pages_of_a_special_mapping_are_in_memory() {
    let program = Program::new(World::new().mm());
    let space = &program.space;
    space
        .map_special(AT, PAGES * PAGE, RX, Label::Vdso)
        .unwrap();
    let mut vector = [0; PAGES as usize];
    space.mincore(AT, PAGES * PAGE, &mut vector).unwrap();
    assert_eq!(vector, [1; PAGES as usize]);
    program.exit();
}
