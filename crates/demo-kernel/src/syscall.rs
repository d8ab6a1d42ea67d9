//! System calls: Linux's numbers and conventions on x86-64.
//!
//! rax: number, then result or a negative error number; arguments in rdi, rsi, rdx, r10, r8, r9.

use kmem::cow_mm::{
    Advice, Errno, Limits, LockAll, LockFlags, MapRequest, Prot, RemapFlags, SyncFlags,
};
use kmem::hal::{UserAccess, VirtAddr};

use crate::error::Error;
use crate::file::{self, Descriptor};
use crate::platform::Machine;
use crate::traps::TrapFrame;
use crate::{console, cpu, process, sched, signal};

/// Longest path or argument that a call may pass.
const STRING: usize = 128;
/// Most arguments and environment strings of a program.
const STRINGS: usize = 8;

const CLONE_VM: u64 = 0x100;
const CLONE_VFORK: u64 = 0x4000;
const CLONE_SETTLS: u64 = 0x8_0000;
const CLONE_PARENT_SETTID: u64 = 0x10_0000;
const CLONE_CHILD_CLEARTID: u64 = 0x20_0000;
const CLONE_CHILD_SETTID: u64 = 0x100_0000;

/// Answers a system call in the frame.
pub fn call(frame: &mut TrapFrame) {
    let before = *frame;
    let result = dispatch(frame);
    if console::traces_calls() {
        let a = [before.rdi, before.rsi, before.rdx, before.r10];
        crate::println!(
            "[{}] call {} {a:#x?} = {result:?}",
            process::pid(),
            before.error
        );
    }
    // exec and sigreturn set every register themselves.
    match result {
        Ok(Answer::Value(value)) => frame.rax = value,
        Ok(Answer::Done) => {}
        Err(error) => frame.rax = i64::from(-error.0) as u64,
    }
}

#[derive(Debug)]
enum Answer {
    Value(u64),
    Done,
}

fn dispatch(frame: &mut TrapFrame) -> Result<Answer, Error> {
    let [a, b, c, d, e, f] = [
        frame.rdi, frame.rsi, frame.rdx, frame.r10, frame.r8, frame.r9,
    ];
    let (thread, process) = process::current();
    let space = process.space();
    let user = VirtAddr::new;
    let done = |result: Result<(), Errno>| result.map(|()| 0).map_err(Error::from);
    let value = match frame.error {
        0 => file::read(a, user(b), c),
        1 => file::write(a, user(b), c),
        2 => file::open(path(a, &mut [0; STRING])?, b),
        3 => process.files.lock().close(a).map(|()| 0),
        5 => stat(a, b),
        9 => mmap([a, b, c, d, e, f]),
        10 => done(space.mprotect(a, b, prot(c)?)),
        11 => done(space.munmap(a, b)),
        12 => Ok(space.brk(a)),
        13 => signal::sigaction(a, b, c).map(|()| 0),
        14 => Ok(0), // rt_sigprocmask: only SIGSEGV comes, which cannot be held back when the access is at fault
        15 => return signal::sigreturn(frame).map(|()| Answer::Done),
        16 => Err(Error::ENOTTY),
        20 => writev(a, b, c),
        24 => {
            sched::yield_now();
            Ok(0)
        }
        25 => {
            let flags = RemapFlags::from_bits(d as u32).ok_or(Error::EINVAL)?;
            space.mremap(a, b, c, flags, e).map_err(Error::from)
        }
        26 => done(space.msync_with(a, b, SyncFlags::from_bits_retain(c as u32))),
        27 => mincore(a, b, c),
        28 => {
            let advice = Advice::from_number(c as i32).ok_or(Error::EINVAL)?;
            done(space.madvise(a, b, advice))
        }
        39 => Ok(u64::from(process::pid())),
        56 => clone(frame),
        57 | 58 => process::fork(frame).map(u64::from),
        59 => return exec(frame),
        60 => process::exit_thread((a as i32 & 0xff) << 8),
        61 => wait4(a, b, c),
        63 => uname(a),
        97 => limit(0, a, b),
        110 => Ok(u64::from(process::parent_pid())),
        149 => done(space.mlock(a, b)),
        150 => done(space.munlock(a, b)),
        151 => done(space.mlockall(LockAll::from_bits_retain(a as u32))),
        152 => done(space.munlockall()),
        158 => arch_prctl(a, b),
        160 => limit(b, a, 0),
        186 => Ok(u64::from(
            thread.id.load(core::sync::atomic::Ordering::Relaxed),
        )),
        202 => {
            sched::yield_now(); // futex: a wake-up without cause is allowed, so that a wait may end at once
            Ok(0)
        }
        218 => {
            let id = thread.id.load(core::sync::atomic::Ordering::Relaxed);
            let word = &thread.clear_at_exit;
            word.store(a, core::sync::atomic::Ordering::Relaxed);
            Ok(u64::from(id))
        }
        228 => clock(b),
        231 => process::exit_process((a as i32 & 0xff) << 8),
        257 => file::open(path(b, &mut [0; STRING])?, c),
        262 => stat(a, c),
        273 | 334 => Err(Error::ENOSYS), // set_robust_list, rseq: C does without
        302 => limit(c, b, d),
        318 => random(a, b),
        325 => done(space.mlock2(a, b, LockFlags::from_bits_retain(c as u32))),
        _ => Err(Error::ENOSYS),
    };
    value.map(Answer::Value)
}

/// A string of the program's, up to its zero.
fn path(at: u64, buffer: &mut [u8; STRING]) -> Result<&str, Error> {
    for index in 0..buffer.len() {
        let byte = &mut buffer[index..=index];
        Machine.copy_from_user(byte, VirtAddr::new(at + index as u64))?;
        if byte[0] == 0 {
            return core::str::from_utf8(&buffer[..index]).map_err(|_| Error::ENOENT);
        }
    }
    Err(Error::E2BIG)
}

fn word(at: u64) -> Result<u64, Error> {
    let mut bytes = [0; 8];
    Machine.copy_from_user(&mut bytes, VirtAddr::new(at))?;
    Ok(u64::from_le_bytes(bytes))
}

fn put(at: u64, bytes: &[u8]) -> Result<u64, Error> {
    Machine.copy_to_user(VirtAddr::new(at), bytes)?;
    Ok(0)
}

fn prot(bits: u64) -> Result<Prot, Error> {
    Prot::from_bits(bits as u32).ok_or(Error::EINVAL)
}

fn mmap([address, length, bits, flags, number, offset]: [u64; 6]) -> Result<u64, Error> {
    let (_, process) = process::current();
    let flags = process::map_flags(flags);
    let anonymous = flags.contains(kmem::cow_mm::MapFlags::ANONYMOUS);
    let file = if anonymous {
        None
    } else {
        match *process.files.lock().get(number)? {
            Descriptor::File(_, open, _) => Some(open),
            _ => return Err(Error::EACCES),
        }
    };
    let request = MapRequest {
        address,
        length,
        prot: prot(bits)?,
        flags,
        file,
        offset,
    };
    Ok(process.space().mmap(&request)?.as_u64())
}

fn mincore(start: u64, length: u64, vector: u64) -> Result<u64, Error> {
    let mut pages = [0; 64];
    let count = length.div_ceil(4096) as usize;
    let pages = pages.get_mut(..count).ok_or(Error::ENOMEM)?;
    let (_, process) = process::current();
    process.space().mincore(start, length, pages)?;
    put(vector, pages)
}

fn clone(frame: &TrapFrame) -> Result<u64, Error> {
    let [flags, stack, parent_word, child_word, fs_base] =
        [frame.rdi, frame.rsi, frame.rdx, frame.r10, frame.r8];
    if flags & CLONE_VM == 0 || flags & CLONE_VFORK != 0 {
        return process::fork(frame).map(u64::from); // vfork may copy
    }
    let fs_base = (flags & CLONE_SETTLS != 0).then_some(fs_base);
    let clear = if flags & CLONE_CHILD_CLEARTID != 0 {
        child_word
    } else {
        0
    };
    let words = [
        (flags & CLONE_PARENT_SETTID != 0).then_some(parent_word),
        (flags & CLONE_CHILD_SETTID != 0).then_some(child_word),
    ];
    process::clone_thread(frame, stack, fs_base, clear, words).map(u64::from)
}

fn exec(frame: &mut TrapFrame) -> Result<Answer, Error> {
    let mut name = [0; STRING];
    let name = path(frame.rdi, &mut name)?;
    let mut buffers = [[[0; STRING]; STRINGS]; 2];
    let mut lists = [[&[][..]; STRINGS]; 2];
    let mut counts = [0; 2];
    let vectors = [frame.rsi, frame.rdx];
    for (list, buffers) in buffers.iter_mut().enumerate() {
        for (index, buffer) in buffers.iter_mut().enumerate() {
            let at = match vectors[list] {
                0 => 0,
                vector => word(vector + 8 * index as u64)?,
            };
            if at == 0 {
                break;
            }
            lists[list][index] = path(at, buffer)?.as_bytes();
            counts[list] += 1;
        }
    }
    let [arguments, environment] = [0, 1].map(|list: usize| &lists[list][..counts[list]]);
    process::exec(frame, name, arguments, environment).map(|()| Answer::Done)
}

fn wait4(child: u64, status: u64, options: u64) -> Result<u64, Error> {
    let (pid, ended) = process::wait(child as i32, options & 1 == 0)?;
    if status != 0 && pid != 0 {
        put(status, &ended.to_le_bytes())?;
    }
    Ok(u64::from(pid))
}

fn writev(number: u64, vectors: u64, count: u64) -> Result<u64, Error> {
    let mut done = 0;
    for index in 0..count.min(1024) {
        let (from, length) = (word(vectors + 16 * index)?, word(vectors + 16 * index + 8)?);
        done += file::write(number, VirtAddr::new(from), length)?;
    }
    Ok(done)
}

/// fstat: a character device for the console, else a file of some size.
fn stat(number: u64, to: u64) -> Result<u64, Error> {
    let (_, process) = process::current();
    let (mode, size) = match *process.files.lock().get(number)? {
        Descriptor::Console => (0o020_620_u32, 0),
        Descriptor::File(inode, ..) => (0o100_644, inode.size()),
        _ => (0o100_444, 0),
    };
    let mut stat = [0; 144];
    stat[24..28].copy_from_slice(&mode.to_le_bytes());
    stat[48..56].copy_from_slice(&size.to_le_bytes());
    stat[56..64].copy_from_slice(&1024_u64.to_le_bytes()); // st_blksize: what stdio's buffer is made of
    put(to, &stat)
}

fn uname(to: u64) -> Result<u64, Error> {
    let mut names = [0; 6 * 65];
    let fields = ["Linux", "kmem", "6.18.0", "kmem demo", "x86_64", "(none)"];
    for (index, field) in fields.iter().enumerate() {
        names[index * 65..index * 65 + field.len()].copy_from_slice(field.as_bytes());
    }
    put(to, &names)
}

/// getrlimit, setrlimit, prlimit: data, stack, locked memory, address space.
fn limit(new: u64, resource: u64, old: u64) -> Result<u64, Error> {
    let (_, process) = process::current();
    let mut limits: Limits = process.space().limits();
    let field = match resource {
        2 => Some(&mut limits.data),
        3 => Some(&mut limits.stack),
        8 => Some(&mut limits.locked),
        9 => Some(&mut limits.address_space),
        0..16 => None,
        _ => return Err(Error::EINVAL),
    };
    if old != 0 {
        let value = field.as_ref().map_or(u64::MAX, |field| **field);
        let mut pair = [0; 16];
        pair[..8].copy_from_slice(&value.to_le_bytes());
        pair[8..].copy_from_slice(&u64::MAX.to_le_bytes());
        put(old, &pair)?;
    }
    if new != 0
        && let Some(field) = field
    {
        *field = word(new)?;
        process.space().set_limits(limits);
    }
    Ok(0)
}

fn arch_prctl(code: u64, address: u64) -> Result<u64, Error> {
    const SET_FS: u64 = 0x1002;
    if code != SET_FS {
        return Err(Error::EINVAL);
    }
    if address >> 47 != 0 {
        return Err(Error(1));
    }
    let (thread, _) = process::current();
    thread
        .fs_base
        .store(address, core::sync::atomic::Ordering::Relaxed);
    cpu::set_fs_base(address);
    Ok(0)
}

/// clock_gettime: the time-stamp counter, as if it ran at 1 GHz.
fn clock(to: u64) -> Result<u64, Error> {
    // SAFETY: reading the counter has no effect.
    let now = unsafe { core::arch::x86_64::_rdtsc() };
    let mut time = [0; 16];
    time[..8].copy_from_slice(&(now / 1_000_000_000).to_le_bytes());
    time[8..].copy_from_slice(&(now % 1_000_000_000).to_le_bytes());
    put(to, &time)
}

/// getrandom: the same numbers at every start, so that runs can be compared.
fn random(to: u64, length: u64) -> Result<u64, Error> {
    for at in 0..length {
        put(to + at, &[(at * 37 + 11) as u8])?;
    }
    Ok(length)
}
