//! The live oracle: seeded random calls, made on the running Linux kernel and on kmem side by side.
//!
//! After every call both must have answered the same, and the lists of mappings must be equal: addresses, rights, offsets,
//! whose pages, what merged with what. Loads compare contents: after fork, copy-on-write, DONTNEED, beyond the end of a file.
//!
//! The rules are those of Linux 6.18; an older kernel merges less, so there the test says that it skips. A run with more:
//! `KMEM_LIVE_SEEDS=1000 KMEM_LIVE_CALLS=2000 cargo test --release -p kmem-cow-mm --test live -- --nocapture`.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

#[path = "live/calls.rs"]
mod calls;
mod common;
#[path = "live/kernel.rs"]
mod kernel;

use calls::{Call, Calls, heap_of};
use common::host::{release, skipped};
use common::{Program, World};
use kernel::{Ask, FILE_PAGES, FILES, Kernel, Line, WINDOW};
use kmem_cow_mm::{
    Advice, Errno, Limits, LockAll, LockFlags, MapFlags, MapRequest, OpenFile, Outcome, Prot,
    RemapFlags, Signal, SyncFlags, VmFlags, permissions,
};
use kmem_hal::VirtAddr;
use kmem_mock_x86::DiskImage;

/// The word at the start of a page of a file.
pub fn file_word(file: usize, page: u64) -> u64 {
    0xf11e << 48 | (file as u64) << 32 | page
}

/// A bit for each page that mincore's vector says is in memory.
pub fn bits(vector: &[u8]) -> u64 {
    let bits = vector.iter().enumerate();
    bits.fold(0, |bits, (page, in_core)| {
        bits | u64::from(in_core & 1) << page
    })
}

/// kmem's side: the processes of a fork tree, the last of which runs.
struct Ours {
    programs: Vec<Program>,
    files: Vec<OpenFile>,
    inodes: Vec<u64>,
}

impl Ours {
    fn new() -> Self {
        let world = World::new();
        let mm = world.mm();
        let mut files = Vec::new();
        for file in 0..FILES {
            let mut bytes = vec![0; (FILE_PAGES * common::PAGE) as usize];
            for page in 0..FILE_PAGES {
                let at = (page * common::PAGE) as usize;
                bytes[at..at + 8].copy_from_slice(&file_word(file, page).to_le_bytes());
            }
            let image: &'static DiskImage<'static> =
                common::kept::keep(Box::new(DiskImage::from_bytes(world.machine, &bytes)));
            let name = ["f0", "f1"][file];
            let file = mm.open_file(image, name, 1 + file as u64).unwrap();
            let (readable, writable) = (true, true);
            files.push(OpenFile {
                file,
                readable,
                writable,
            });
        }
        for file in 0..FILES {
            let file = common::reopen(mm, files[file].file);
            let (readable, writable) = (true, false);
            files.push(OpenFile {
                file,
                readable,
                writable,
            });
        }
        let program = Program::new(mm);
        // As on the other side, everything outside the window is taken.
        let fill: &'static DiskImage<'static> =
            common::kept::keep(Box::new(DiskImage::from_bytes(world.machine, &[])));
        let fill = mm.open_file(fill, "fill", 99).unwrap();
        for (start, end) in [(0x1_0000, WINDOW.start), (WINDOW.end, 0x7fff_ffff_f000)] {
            let request = MapRequest {
                address: start,
                length: end - start,
                prot: Prot::empty(),
                flags: MapFlags::SHARED | MapFlags::FIXED,
                file: Some(OpenFile {
                    file: fill,
                    readable: true,
                    writable: true,
                }),
                offset: 0,
            };
            program.space.mmap(&request).unwrap();
        }
        Self {
            programs: vec![program],
            files,
            inodes: Vec::new(),
        }
    }

    fn program(&self) -> &Program {
        self.programs.last().unwrap()
    }

    fn make(&mut self, call: Call) -> kernel::Answer {
        let space = &self.program().space;
        let mut value = 0;
        let unit = |result: Result<(), Errno>| result.map(|()| 0);
        let result = match call {
            Call::Map {
                address,
                length,
                prot,
                flags,
                file,
                offset,
            } => space
                .mmap(&MapRequest {
                    address,
                    length,
                    prot: Prot::from_bits_retain(prot),
                    flags: MapFlags::from_bits_retain(flags),
                    file: usize::try_from(file)
                        .ok()
                        .and_then(|file| self.files.get(file).copied()),
                    offset,
                })
                .map(|address| address.as_u64()),
            Call::Unmap(address, length) => unit(space.munmap(address, length)),
            Call::Protect(address, length, prot) => {
                unit(space.mprotect(address, length, Prot::from_bits_retain(prot)))
            }
            Call::Remap {
                address,
                old,
                new,
                flags,
                to,
            } => space.mremap(address, old, new, RemapFlags::from_bits_retain(flags), to),
            Call::Advise(address, length, advice) => match Advice::from_number(advice) {
                Some(advice) => unit(space.madvise(address, length, advice)),
                None => Err(Errno::EINVAL),
            },
            Call::Lock(address, length) => unit(space.mlock(address, length)),
            Call::Lock2(address, length, flags) => {
                unit(space.mlock2(address, length, LockFlags::from_bits_retain(flags)))
            }
            Call::LockAll(flags) => unit(space.mlockall(LockAll::from_bits_retain(flags))),
            Call::UnlockAll => unit(space.munlockall()),
            Call::Unlock(address, length) => unit(space.munlock(address, length)),
            Call::Sync(address, length, flags) => {
                unit(space.msync_with(address, length, SyncFlags::from_bits_retain(flags)))
            }
            Call::InCore(address, length) => {
                let mut vector = vec![0; 4096];
                let result = unit(space.mincore(address, length, &mut vector));
                let pages = length.div_ceil(common::PAGE).min(64) as usize;
                value = result.map_or(0, |_| bits(&vector[..pages]));
                result
            }
            Call::Break(end) => Ok(space.brk(end)),
            Call::Store(address, value) => return access(self.program().store(address, value)),
            Call::Load(address) => {
                let loaded = self.program().load(address);
                value = *loaded.as_ref().unwrap_or(&0);
                let answer = access(loaded.map(|_| ()));
                return kernel::Answer { value, ..answer };
            }
            Call::Fork => {
                let child = self.program().fork().unwrap();
                self.programs.push(child);
                Ok(0)
            }
            Call::Exit => {
                self.programs.pop().unwrap().exit();
                Ok(0)
            }
        };
        let result = match result {
            Ok(result) => result as i64,
            Err(error) => -i64::from(error.number()),
        };
        kernel::Answer { result, value }
    }

    fn lines(&mut self) -> Vec<Line> {
        let mut lines = Vec::new();
        let space = &self.programs.last().unwrap().space;
        let inodes = &mut self.inodes;
        space.for_each_vma(|vma| {
            let start = vma.range.start().as_u64();
            let end = start + vma.range.count() * common::PAGE;
            if start < WINDOW.start || end > WINDOW.end {
                return true;
            }
            let name = match vma.file.map(|file| space.mm().object_info(file).unwrap()) {
                None => "-".to_string(),
                Some(info) if info.is_shared_memory => {
                    let known = inodes.iter().position(|known| *known == info.inode);
                    let number = known.unwrap_or_else(|| {
                        inodes.push(info.inode);
                        inodes.len() - 1
                    });
                    format!("s{number}")
                }
                Some(info) => info.name.to_string(),
            };
            let offset = vma.file.map_or(0, |_| vma.offset * common::PAGE);
            let rights = String::from_utf8(permissions(vma.flags).to_vec()).unwrap();
            lines.push(Line {
                start,
                end,
                rights,
                offset,
                name,
            });
            true
        });
        lines
    }
}

fn access(outcome: Result<(), Outcome>) -> kernel::Answer {
    let result = match outcome {
        Ok(()) => 0,
        Err(Outcome::Signal { signal, .. }) => match signal {
            Signal::MapError => kernel::MAP_ERROR,
            Signal::AccessError | Signal::KeyError(_) => kernel::ACCESS_ERROR,
            Signal::BusError => kernel::BUS_ERROR,
        },
        Err(other) => panic!("{other:?}"),
    };
    kernel::Answer { result, value: 0 }
}

fn ask(kernel: &mut Kernel, call: Call) -> Option<(kernel::Answer, Vec<Line>)> {
    use libc::*;
    let system = |number: c_long, a: u64, b: u64, c: u64, d: u64, e: i64, f: u64| {
        let words = [number, a as i64, b as i64, c as i64, d as i64, e, f as i64];
        (Ask::Call, words)
    };
    let (what, words) = match call {
        Call::Map {
            address,
            length,
            prot,
            flags,
            file,
            offset,
        } => system(
            SYS_mmap,
            address,
            length,
            prot.into(),
            flags.into(),
            file,
            offset,
        ),
        Call::Unmap(address, length) => system(SYS_munmap, address, length, 0, 0, 0, 0),
        Call::Protect(address, length, prot) => {
            system(SYS_mprotect, address, length, prot.into(), 0, 0, 0)
        }
        Call::Remap {
            address,
            old,
            new,
            flags,
            to,
        } => system(SYS_mremap, address, old, new, flags.into(), to as i64, 0),
        Call::Advise(address, length, advice) => {
            system(SYS_madvise, address, length, advice as u64, 0, 0, 0)
        }
        Call::Lock(address, length) => system(SYS_mlock, address, length, 0, 0, 0, 0),
        Call::Unlock(address, length) => system(SYS_munlock, address, length, 0, 0, 0, 0),
        Call::Lock2(address, length, flags) => {
            system(SYS_mlock2, address, length, flags.into(), 0, 0, 0)
        }
        Call::LockAll(flags) => system(SYS_mlockall, flags.into(), 0, 0, 0, 0, 0),
        Call::UnlockAll => system(SYS_munlockall, 0, 0, 0, 0, 0, 0),
        Call::Sync(address, length, flags) => {
            system(SYS_msync, address, length, flags.into(), 0, 0, 0)
        }
        Call::InCore(address, length) => {
            let words = [address as i64, length as i64, 0, 0, 0, 0, 0];
            (Ask::InCore, words)
        }
        Call::Break(end) => system(SYS_brk, end, 0, 0, 0, 0, 0),
        Call::Store(address, value) => (Ask::Store, [address as i64, value as i64, 0, 0, 0, 0, 0]),
        Call::Load(address) => (Ask::Load, [address as i64, 0, 0, 0, 0, 0, 0]),
        Call::Fork => (Ask::Fork, [0; 7]),
        Call::Exit => (Ask::Exit, [0; 7]),
    };
    kernel.ask(what, words)
}

/// The `VmFlags` of each mapping in the window, by its address, as `smaps` prints them.
fn vm_flags(smaps: &str) -> Vec<(u64, String)> {
    let mut flags = Vec::new();
    let mut start = 0;
    for line in smaps.lines() {
        if let Some(letters) = line.strip_prefix("VmFlags:") {
            if WINDOW.contains(&start) {
                flags.push((start, letters.trim().to_string()));
            }
        } else if let Some((address, _)) = line.split_once('-') {
            start = u64::from_str_radix(address, 16).unwrap_or(start);
        }
    }
    flags
}

/// Advice that the running kernel is built with: what it takes for private memory, or for shared.
fn known_advice(kernel: &mut Kernel) -> Vec<i32> {
    let at = WINDOW.start;
    let mut known = vec![77];
    for kind in [libc::MAP_PRIVATE, libc::MAP_SHARED] {
        let map = Call::Map {
            address: at,
            length: 4096,
            prot: 3,
            flags: (kind | libc::MAP_ANONYMOUS | libc::MAP_FIXED) as u32,
            file: -1,
            offset: 0,
        };
        ask(kernel, map).unwrap();
        // Given to a real kernel by root, these take real memory away.
        let harmful = [Advice::HwPoison, Advice::SoftOffline];
        for advice in Advice::ALL {
            let number = advice as i32;
            if !harmful.contains(&advice) && !known.contains(&number) {
                let (answer, _) = ask(kernel, Call::Advise(at, 4096, number)).unwrap();
                if answer.result == 0 {
                    known.push(number);
                }
            }
        }
    }
    let emptied = [Advice::DontNeed as i32; 4];
    known.extend(emptied);
    ask(kernel, Call::Unmap(at, 4096)).unwrap();
    kernel.forget_shared_memory();
    known
}

/// Limits both sides alike, in another way for each seed: not at all, the size, or what may be locked.
fn limit(kernel: &mut Kernel, space: &common::Space, seed: u64) -> Option<()> {
    // SAFETY: a system call without arguments.
    let root = unsafe { libc::geteuid() } == 0;
    let mut limits = Limits {
        may_lock_all: root,
        ..Limits::default()
    };
    let mut set = true;
    match seed % 4 {
        0 | 1 if root => {}
        2 => {
            let (own, ours) = (kernel.own()?, space.counters());
            let (total, data) = (500 + seed * 37 % 3000, 100 + seed * 13 % 900);
            limits.address_space = (ours.total + total) * common::PAGE;
            limits.data = (ours.data + data) * common::PAGE;
            limits.data_hard = limits.data;
            set &= kernel.limit(libc::RLIMIT_AS, (own.total + total) * common::PAGE);
            set &= kernel.limit(libc::RLIMIT_DATA, (own.data + data) * common::PAGE);
            if !root {
                limits.locked = 0;
                set &= kernel.limit(libc::RLIMIT_MEMLOCK, 0);
            }
        }
        _ => {
            let pages = if seed % 32 == 3 { 0 } else { seed * 7 % 90 };
            limits.locked = pages * common::PAGE;
            limits.may_lock_all = false;
            set &= kernel.limit(libc::RLIMIT_MEMLOCK, limits.locked);
            set &= !root || kernel.drop_capabilities();
        }
    }
    space.set_limits(limits);
    set.then_some(())
}

/// Linux goes on counting locked memory that `DONTUNMAP` left behind, unlocked, even when it is unmapped: under a limit on
/// locked memory nothing that locks could be compared from then on (docs/oracle.md). There it is moved whole instead.
fn without_miscount(mut call: Call, space: &common::Space) -> Call {
    let limits = space.limits();
    let dontunmap = RemapFlags::DONTUNMAP.bits();
    if let Call::Remap {
        address,
        old,
        ref mut flags,
        ..
    } = call
        && !limits.may_lock_all
        && limits.locked != u64::MAX
    {
        space.for_each_vma(|vma| {
            let start = vma.range.start().as_u64();
            let end = start + vma.range.count() * common::PAGE;
            let meets = start < address.saturating_add(old) && address < end;
            if meets && vma.flags.contains(VmFlags::LOCKED) {
                *flags &= !dontunmap;
            }
            true
        });
    }
    call
}

/// Pages that were given up by `MADV_FREE` or `MADV_PAGEOUT`: when they go depends on the machine and on who else runs there.
#[derive(Default)]
struct GivenUp {
    /// Where private ones are, or were moved to.
    pages: std::collections::HashSet<u64>,
    /// Whether there is shared memory among them, which may be mapped anywhere.
    shared: bool,
}

impl GivenUp {
    /// After a call, from which mappings `lines` tells.
    fn note(&mut self, call: Call, result: i64, lines: &[Line]) {
        let pages = |start: u64, length: u64| {
            let first = start / common::PAGE;
            first..first.saturating_add(length.div_ceil(common::PAGE).min(4096))
        };
        match call {
            Call::Advise(start, length, advice)
                if advice == Advice::Free as i32 || advice == Advice::PageOut as i32 =>
            {
                self.pages.extend(pages(start, length));
                let end = start.saturating_add(length);
                let mut met = lines
                    .iter()
                    .filter(|line| line.start < end && start < line.end);
                self.shared |= met.any(|line| line.name.starts_with('s'));
            }
            Call::Remap {
                address, old, new, ..
            } if result > 0 => {
                let moved = pages(address, old).any(|page| self.pages.contains(&page));
                if moved {
                    self.pages.extend(pages(result as u64, new));
                }
            }
            _ => {}
        }
    }

    /// Whether a page of a mapping may be one.
    fn may_be(&self, address: u64, line: &Line) -> bool {
        self.pages.contains(&(address / common::PAGE)) || self.shared && line.name.starts_with('s')
    }
}

/// What mincore says of files depends on who read them before, and here that is another kernel's cache: their pages do not count, nor do
/// those that were given up.
fn without_chance(
    call: Call,
    lines: &[Line],
    given_up: &GivenUp,
    mut got: kernel::Answer,
    mut expected: kernel::Answer,
) -> (kernel::Answer, kernel::Answer) {
    if let Call::InCore(address, _) = call {
        for page in 0..64 {
            let at = address.saturating_add(page * common::PAGE);
            let line = lines.iter().find(|line| line.start <= at && at < line.end);
            if line.is_some_and(|line| given_up.may_be(at, line) || line.name.starts_with('f')) {
                got.value &= !(1 << page);
                expected.value &= !(1 << page);
            }
        }
    }
    (got, expected)
}

/// Words in memory that was given up by `MADV_FREE`: they may be gone on either side.
#[derive(Default)]
struct Freed {
    stored: std::collections::HashSet<u64>,
    uncertain: std::collections::HashSet<u64>,
}

impl Freed {
    /// Before a call: which words it makes uncertain. Those at the start of the range's private pages, as far as it can come to them.
    fn note(&mut self, call: Call, lines: &[Line], space: &common::Space) {
        let Call::Advise(address, length, advice) = call else {
            return;
        };
        let aligned = address.is_multiple_of(common::PAGE);
        if advice != Advice::Free as i32 || !aligned {
            return;
        }
        let end = address.saturating_add(length.next_multiple_of(common::PAGE));
        for line in lines.iter().filter(|line| line.name == "-") {
            let (mut at, end) = (line.start.max(address), line.end.min(end));
            let locked = space
                .vma_at(VirtAddr::new(at))
                .is_some_and(|vma| vma.flags.contains(VmFlags::LOCKED));
            while at < end && !locked {
                let mut word = [0; 8];
                if space.peek(VirtAddr::new(at), &mut word).is_some() {
                    let word = u64::from_ne_bytes(word);
                    self.uncertain.extend(self.stored.get(&word));
                }
                at += common::PAGE;
            }
        }
    }

    /// The answer to a call of kmem's, or the expected one where both may be right.
    fn accept(
        &mut self,
        call: Call,
        got: kernel::Answer,
        expected: kernel::Answer,
    ) -> kernel::Answer {
        match call {
            Call::Store(_, value) => {
                self.stored.insert(value);
            }
            Call::Load(_) if got.result == expected.result => {
                let gone = |value: u64, other: u64| other == 0 && self.uncertain.contains(&value);
                if gone(got.value, expected.value) || gone(expected.value, got.value) {
                    return expected;
                }
            }
            _ => {}
        }
        got
    }
}

/// kmem's providers have no call that punches a hole into a file (docs/spec/advice.md): advice to do so is given to shared memory alone.
fn without_holes_in_files(mut call: Call, lines: &[Line]) -> Call {
    if let Call::Advise(address, length, ref mut advice) = call
        && *advice == Advice::Remove as i32
    {
        let meets =
            |line: &&Line| line.start < address.saturating_add(length) && address < line.end;
        if lines
            .iter()
            .filter(meets)
            .any(|line| line.name.starts_with('f'))
        {
            *advice = Advice::DontNeed as i32;
        }
    }
    call
}

/// Says once that there is no heap, not for every seed.
static NO_HEAP: std::sync::Once = std::sync::Once::new();

/// Runs a seed; says what differed, after which calls.
fn run(seed: u64, count: usize) -> Result<(), String> {
    let mut kernel = Kernel::start().ok_or("no child")?;
    let advice = known_advice(&mut kernel);
    let mut ours = Ours::new();
    let heap = Some(heap_of(seed)).filter(|start| kernel.set_heap(*start));
    match heap {
        Some(start) => ours.program().space.set_heap(start),
        None => NO_HEAP
            .call_once(|| skipped("the live oracle cannot move the heap here, and draws no brk")),
    }
    limit(&mut kernel, &ours.program().space, seed).ok_or("the child cannot be limited")?;
    let mut calls = Calls::new(seed, advice, heap);
    let mut lines = Vec::new();
    let mut history = String::new();
    let mut freed = Freed::default();
    let mut given_up = GivenUp::default();
    for number in 0..count {
        let call = calls.next(&lines, ours.programs.len() - 1);
        if matches!(call, Call::Exit) && ours.programs.len() == 1 {
            continue;
        }
        let call = without_miscount(call, &ours.program().space);
        let call = without_holes_in_files(call, &lines);
        freed.note(call, &lines, &ours.program().space);
        let (expected, now) = ask(&mut kernel, call)
            .ok_or_else(|| format!("seed {seed}, call {number}: {call:x?}: the child is gone"))?;
        let got = ours.make(call);
        let listed = ours.lines();
        if number % 16 == 0 {
            common::check_counters(&ours.programs);
            if let [program] = &ours.programs[..] {
                let theirs = vm_flags(&kernel.smaps().ok_or("no smaps")?);
                let ours = vm_flags(&program.space.smaps().to_string());
                if theirs != ours {
                    return Err(format!(
                        "seed {seed}, call {number}: {call:x?}\n  after:{history}\n  flags: Linux {theirs:x?}\n  kmem  {ours:x?}"
                    ));
                }
            }
        }
        given_up.note(call, expected.result, &lines);
        let (mut got, expected) = without_chance(call, &lines, &given_up, got, expected);
        if matches!(call, Call::InCore(..)) && ours.programs.len() > 1 {
            // A child of kmem's has the zero pages of its parent's tables too (docs/oracle.md).
            got.value &= expected.value;
        }
        let got = freed.accept(call, got, expected);
        if got != expected || listed != now {
            let only = |a: &[Line], b: &[Line]| {
                let lines = a.iter().filter(|line| !b.contains(line));
                lines
                    .map(|line| format!("\n    {line:x?}"))
                    .collect::<String>()
            };
            return Err(format!(
                "seed {seed}, call {number}: {call:x?}\n  after:{history}\n  Linux {expected:x?}\n  kmem  {got:x?}\n  before:{}\n  only Linux:{}\n  only kmem:{}",
                only(&lines, &[]),
                only(&now, &listed),
                only(&listed, &now)
            ));
        }
        lines = now;
        history += &format!("\n    {call:x?} = {:x}", got.result);
    }
    while let Some(program) = ours.programs.pop() {
        program.exit();
    }
    drop(ours);
    // SAFETY: all that this seed made is dropped, and its world is used no more.
    unsafe { common::kept::free_all() };
    Ok(())
}

fn variable(name: &str, default: usize) -> usize {
    let text = std::env::var(name).ok();
    text.and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[test]
fn every_call_answers_as_the_running_kernel() {
    let release = release();
    if release < (6, 18) {
        skipped(&format!(
            "the live oracle wants Linux 6.18, this is {release:?}"
        ));
        return;
    }
    if std::env::var_os("ASAN_OPTIONS").is_some() {
        skipped("the live oracle's window is AddressSanitizer's");
        return;
    }
    if !kernel::is_alike() {
        // Searches in the low window start at random otherwise, and stacks grow as far as the shell's limit; a layout is made at exec.
        let name = "every_call_answers_as_the_running_kernel";
        assert!(kernel::again_alike(name), "see above");
        return;
    }
    if Kernel::start().is_none() {
        skipped("the live oracle cannot start its child here");
        return;
    }
    let seeds = variable("KMEM_LIVE_SEEDS", 12);
    let calls = variable("KMEM_LIVE_CALLS", 300);
    let first = variable("KMEM_LIVE_FIRST", 1);
    for seed in first..first + seeds {
        if let Err(difference) = run(seed as u64, calls) {
            panic!("{difference}");
        }
    }
}
