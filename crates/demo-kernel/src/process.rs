//! Processes: an address space, its threads, open files, and what parents and children know of each other.
//!
//! Invariants
//! - `P1`: `space` is written by `create` before a thread runs, by `exec` in a process with one thread, and by the last
//!   thread when it ends; all others only read it.
//! - `P2`: a process is reaped after its space is gone, so that who waits for it finds its frames free.

use core::cell::UnsafeCell;
use core::fmt;
use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use kmem::cow_mm::{ExecError, Image, MapFlags, OpenFile, Outcome, Signal};
use kmem::hal::{FaultCode, Lock, Mmu, PageFault, UserAccess, VirtAddr};
use kmem::{FrameSink, FrameSource, IrqSafe, OwnedFrame};

use crate::error::Error;
use crate::file::{self, Files};
use crate::memory::{self, Space, frames};
use crate::plant::{self, Plant};
use crate::platform::{Machine, SPACES};
use crate::sched::{self, THREADS, Thread};
use crate::signal::{self, Action, SIGBUS, SIGFPE, SIGILL, SIGKILL, SIGSEGV, SIGTRAP};
use crate::traps::{TrapFrame, USER_CODE, USER_DATA};
use crate::{cpu, println};

/// What a parent learns from `wait4`, and the kernel from a scenario's program: as Linux encodes it.
pub type Status = i32;

/// What relatives know of a process.
struct Family {
    /// 0 where the slot is free.
    pid: u32,
    /// 0 for the kernel.
    parent: u32,
    /// Set when the process has ended.
    status: Option<Status>,
    /// The thread that waits for a child.
    waiting: Option<&'static Thread>,
}

/// A process.
pub struct Process {
    space: UnsafeCell<Option<Space>>,
    threads: AtomicU32,
    /// The status with which it shall end, plus 1; 0 while it shall not.
    killed: AtomicU32,
    /// Open files.
    pub files: Lock<Files, IrqSafe>,
    /// What happens at SIGSEGV.
    pub action: Lock<Action, IrqSafe>,
}
// SAFETY: P1.
unsafe impl Sync for Process {}

static TABLE: [Process; THREADS] = [const {
    Process {
        space: UnsafeCell::new(None),
        threads: AtomicU32::new(0),
        killed: AtomicU32::new(0),
        files: Lock::new(Files::NONE),
        action: Lock::new(Action::DEFAULT),
    }
}; THREADS];
static FAMILIES: Lock<[Family; THREADS], IrqSafe> = Lock::new(
    [const {
        Family {
            pid: 0,
            parent: 0,
            status: None,
            waiting: None,
        }
    }; THREADS],
);
/// Processes that a page fault without memory ended.
pub static OUT_OF_MEMORY: AtomicUsize = AtomicUsize::new(0);

impl Process {
    /// Its memory.
    pub fn space(&self) -> &Space {
        // SAFETY: P1: the callers are its threads.
        unsafe { (*self.space.get()).as_ref() }.expect("a thread has memory")
    }
}

/// The running thread and its process.
pub fn current() -> (&'static Thread, &'static Process) {
    let thread = cpu::thread().expect("a thread asks");
    (thread, &TABLE[thread.process.load(Ordering::Relaxed)])
}

fn slot() -> usize {
    current().0.process.load(Ordering::Relaxed)
}

/// The running process's number.
pub fn pid() -> u32 {
    FAMILIES.lock()[slot()].pid
}

/// The number of its parent.
pub fn parent_pid() -> u32 {
    FAMILIES.lock()[slot()].parent
}

/// Takes a free slot for a child of `parent`.
fn claim(parent: u32) -> Option<usize> {
    let mut families = FAMILIES.lock();
    let index = families.iter().position(|family| family.pid == 0)?;
    families[index] = Family {
        pid: sched::next_id(),
        parent,
        status: None,
        waiting: None,
    };
    TABLE[index].killed.store(0, Ordering::Relaxed);
    TABLE[index].threads.store(1, Ordering::Relaxed);
    Some(index)
}

fn release(index: usize) {
    FAMILIES.lock()[index].pid = 0;
}

fn set_space(index: usize, space: Option<Space>) -> Option<Space> {
    // SAFETY: P1: the caller is one of the three.
    unsafe { core::mem::replace(&mut *TABLE[index].space.get(), space) }
}

/// Starts a program from the kernel; gives its pid.
pub fn spawn(name: &str, arguments: &[&[u8]]) -> Result<u32, Error> {
    let index = claim(0).ok_or(Error::EAGAIN)?;
    let start = || {
        let space = memory::new_space().ok_or(Error::ENOMEM)?;
        let frame = load(&space, name, arguments, &[])?;
        let thread = sched::prepare(index).ok_or(Error::EAGAIN)?;
        set_space(index, Some(space));
        *TABLE[index].files.lock() = Files::CONSOLE;
        *TABLE[index].action.lock() = Action::DEFAULT;
        Ok((thread, frame))
    };
    match start() {
        Ok((thread, frame)) => {
            let pid = FAMILIES.lock()[index].pid;
            thread.id.store(pid, Ordering::Relaxed);
            thread.fs_base.store(0, Ordering::Relaxed);
            sched::start(thread, &frame, None);
            Ok(pid)
        }
        Err(error) => {
            release(index);
            Err(error)
        }
    }
}

/// Maps a program into an empty space; gives the registers with which it begins.
fn load(
    space: &Space,
    name: &str,
    arguments: &[&[u8]],
    environment: &[&[u8]],
) -> Result<TrapFrame, Error> {
    let inode = file::find(name).ok_or(Error::ENOENT)?;
    let file = inode.open()?;
    let open = OpenFile {
        file,
        readable: true,
        writable: false,
    };
    let image = Image {
        arguments,
        environment,
        random: *b"sixteen randoms!",
        ..Image::new(open, name.as_bytes())
    };
    let start = space.exec(&image);
    memory::mm().close(file);
    let start = start.map_err(|error| match error {
        ExecError::Errno(errno) => Error::from(errno),
        _ => Error::EAGAIN, // a page on its way: our files have none
    })?;
    Ok(TrapFrame {
        rip: start.entry.as_u64(),
        cs: USER_CODE,
        rflags: 1 << 9 | 2,
        rsp: start.stack.as_u64(),
        ss: USER_DATA,
        ..TrapFrame::default()
    })
}

/// execve: another program in the running process.
pub fn exec(
    frame: &mut TrapFrame,
    name: &str,
    arguments: &[&[u8]],
    environment: &[&[u8]],
) -> Result<(), Error> {
    let (thread, process) = current();
    if process.threads.load(Ordering::Acquire) != 1 {
        return Err(Error::EAGAIN);
    }
    let space = memory::new_space().ok_or(Error::ENOMEM)?;
    let start = load(&space, name, arguments, environment)?;
    let old = set_space(slot(), Some(space));
    enter_space(slot());
    if let Some(old) = old {
        leave_space(old);
    }
    *process.action.lock() = Action::DEFAULT;
    thread.fs_base.store(0, Ordering::Relaxed);
    thread.clear_at_exit.store(0, Ordering::Relaxed);
    cpu::set_fs_base(0);
    *frame = start;
    Ok(())
}

/// fork: a child with a copy of everything; it sees 0 where the parent sees the child's pid.
pub fn fork(frame: &TrapFrame) -> Result<u32, Error> {
    let (thread, process) = current();
    let index = claim(pid()).ok_or(Error::EAGAIN)?;
    let Some(child) = sched::prepare(index) else {
        release(index);
        return Err(Error::EAGAIN);
    };
    let space = match process.space().fork() {
        Ok(space) => space,
        Err(error) => {
            child.abandon();
            release(index);
            return Err(error.into());
        }
    };
    set_space(index, Some(space));
    *TABLE[index].files.lock() = process.files.lock().duplicate();
    *TABLE[index].action.lock() = *process.action.lock();
    let pid = FAMILIES.lock()[index].pid;
    begin(
        child,
        thread,
        pid,
        frame,
        thread.fs_base.load(Ordering::Relaxed),
    );
    Ok(pid)
}

/// clone with CLONE_VM: another thread of the running process; its number goes to `words` before it runs.
pub fn clone_thread(
    frame: &TrapFrame,
    stack: u64,
    fs_base: Option<u64>,
    clear_at_exit: u64,
    words: [Option<u64>; 2],
) -> Result<u32, Error> {
    let (thread, process) = current();
    let child = sched::prepare(slot()).ok_or(Error::EAGAIN)?;
    let id = sched::next_id();
    for word in words.into_iter().flatten() {
        let written = Machine.copy_to_user(VirtAddr::new(word), &id.to_le_bytes());
        if written.is_err() {
            child.abandon();
            return Err(Error::EFAULT);
        }
    }
    process.threads.fetch_add(1, Ordering::AcqRel);
    child.clear_at_exit.store(clear_at_exit, Ordering::Relaxed);
    let rsp = if stack == 0 { frame.rsp } else { stack };
    let own = thread.fs_base.load(Ordering::Relaxed);
    begin(
        child,
        thread,
        id,
        &TrapFrame { rsp, ..*frame },
        fs_base.unwrap_or(own),
    );
    Ok(id)
}

fn begin(child: &'static Thread, parent: &Thread, id: u32, frame: &TrapFrame, fs_base: u64) {
    child.id.store(id, Ordering::Relaxed);
    child.fs_base.store(fs_base, Ordering::Relaxed);
    // SAFETY: the parent stands in its system call, above its saved vector registers.
    let vectors = unsafe { &*parent.vectors() };
    sched::start(child, &TrapFrame { rax: 0, ..*frame }, Some(vectors));
}

/// Makes this CPU translate through a process's tables, unless it does already.
pub fn enter_space(index: usize) {
    // SAFETY: P1: a thread of the process is about to run here.
    let space = unsafe { (*TABLE[index].space.get()).as_ref() }.expect("a thread has memory");
    let root = space.root();
    // SAFETY: the space shares the kernel's half.
    unsafe { Machine.load_root(root, true) };
}

/// Ends a space that no thread runs in any more. CPUs that keep it lazily leave it when its tables go.
fn leave_space(space: Space) {
    space.exit();
}

/// Ends the running thread; the last one ends the process with `status`.
pub fn exit_thread(status: Status) -> ! {
    let (thread, process) = current();
    let index = slot();
    let word = thread.clear_at_exit.load(Ordering::Relaxed);
    if word != 0 {
        let _ = Machine.copy_to_user(VirtAddr::new(word), &[0; 4]);
    }
    if process.threads.fetch_sub(1, Ordering::AcqRel) == 1 {
        let killed = process.killed.load(Ordering::Relaxed);
        let status = if killed != 0 {
            killed as i32 - 1
        } else {
            status
        };
        process.files.lock().close_all();
        if let Some(space) = set_space(index, None) {
            // From here on this is a kernel thread.
            let _ = SPACES.enter_lazy();
            leave_space(space);
        }
        spoil();
        bury(index, status);
    }
    sched::end()
}

/// The faults of `plant.rs` that are planted where a process ends.
fn spoil() {
    if plant::is(Plant::Leak) || plant::is(Plant::DoubleFree) {
        let frame = frames().alloc(&kmem::FrameRequest::ONE).expect("a frame");
        let (first, order) = kmem::hal::OwnedFrame::into_raw(frame);
        if plant::is(Plant::DoubleFree) {
            for _ in 0..2 {
                // SAFETY: the second time it is a lie, which is the purpose.
                frames().free(unsafe { OwnedFrame::from_raw(first, order) });
            }
        }
    }
}

/// Tells the family that a process has ended.
fn bury(index: usize, status: Status) {
    let mut families = FAMILIES.lock();
    let (pid, parent) = (families[index].pid, families[index].parent);
    families[index].status = Some(status);
    for family in families.iter_mut().filter(|family| family.pid != 0) {
        if family.parent == pid {
            // Orphans: nobody waits for them.
            family.parent = u32::MAX;
            if family.status.is_some() {
                family.pid = 0;
            }
        }
    }
    if parent == u32::MAX {
        families[index].pid = 0;
    }
    let parent = families.iter_mut().find(|family| family.pid == parent);
    if let Some(waiting) = parent.and_then(|parent| parent.waiting.take()) {
        waiting.wake();
    }
}

/// exit_group: ends every thread of the running process.
pub fn exit_process(status: Status) -> ! {
    let (_, process) = current();
    let _ =
        process
            .killed
            .compare_exchange(0, status as u32 + 1, Ordering::AcqRel, Ordering::Relaxed);
    exit_thread(status)
}

/// Ends the running thread if its process shall end.
pub fn end_if_killed() {
    let (_, process) = current();
    if process.killed.load(Ordering::Acquire) != 0 {
        exit_thread(0);
    }
}

/// Waits for a child to end: any for -1.
pub fn wait(child: i32, block: bool) -> Result<(u32, Status), Error> {
    let (thread, _) = current();
    let (own, index) = (pid(), slot());
    loop {
        let mut families = FAMILIES.lock();
        let mut children = families.iter_mut().filter(|family| {
            family.pid != 0 && family.parent == own && (child == -1 || child == family.pid as i32)
        });
        let mut any = false;
        let ended = children.find_map(|family| {
            any = true;
            let status = family.status?;
            Some((core::mem::take(&mut family.pid), status))
        });
        match ended {
            Some(ended) => return Ok(ended),
            None if !any => return Err(Error::ECHILD),
            None if !block => return Ok((0, 0)),
            None => {}
        }
        families[index].waiting = Some(thread);
        sched::prepare_to_sleep(thread);
        drop(families);
        sched::sleep(thread);
        end_if_killed();
    }
}

/// How a program that the kernel started ended, once it has.
pub fn reap(pid: u32) -> Option<Status> {
    let mut families = FAMILIES.lock();
    let family = families.iter_mut().find(|family| family.pid == pid)?;
    let status = family.status?;
    family.pid = 0;
    Some(status)
}

/// Faults in a row of one instruction at one address that end a process: whatever is answered does not help.
const REPEATS: u64 = 1000;

/// Whether the running thread makes no progress.
fn is_stuck(thread: &Thread, rip: u64, address: u64) -> bool {
    let [last_rip, last_address, count] = &thread.last_fault;
    let same = last_rip.swap(rip, Ordering::Relaxed) == rip
        && last_address.swap(address, Ordering::Relaxed) == address;
    let before = if same {
        count.load(Ordering::Relaxed)
    } else {
        0
    };
    count.store(before + 1, Ordering::Relaxed);
    before >= REPEATS
}

/// Handles a page fault in user space; false where the kernel itself must give up its access.
pub fn page_fault(frame: &mut TrapFrame, address: u64) -> bool {
    if cpu::thread().is_none() {
        return false;
    }
    let (thread, process) = current();
    if is_stuck(thread, frame.rip, address) {
        kill(
            frame,
            SIGBUS,
            format_args!("the fault at {address:#x} never ends"),
        );
        return frame.is_user();
    }
    let fault = PageFault {
        address: VirtAddr::new(address),
        code: FaultCode::from_bits_truncate(frame.error as u32),
    };
    let signal = loop {
        match process.space().fault(&fault) {
            Outcome::Handled => return true,
            Outcome::NeedIo(_) => sched::yield_now(),
            Outcome::OutOfMemory => {
                OUT_OF_MEMORY.fetch_add(1, Ordering::Relaxed);
                println!("[{}] out of memory at {address:#x}: killed", pid());
                process.killed.store(SIGKILL + 1, Ordering::Release);
                return frame.is_user();
            }
            Outcome::Signal { signal, .. } => break signal,
            Outcome::KernelFault => break Signal::MapError,
        }
    };
    if !frame.is_user() {
        return false;
    }
    let (number, code) = match signal {
        Signal::MapError => (SIGSEGV, 1),
        Signal::AccessError => (SIGSEGV, 2),
        Signal::BusError => (SIGBUS, 2),
        Signal::KeyError(_) => (SIGSEGV, 4),
    };
    if signal::deliver(frame, number, code, address) {
        // The program's handler decides how often it tries; only answers of the kernel's own can be in vain.
        thread.last_fault[2].store(0, Ordering::Relaxed);
    } else {
        kill(frame, number, format_args!("{signal:?} at {address:#x}"));
    }
    true
}

/// Answers another exception in user mode.
pub fn exception(frame: &mut TrapFrame) {
    const KERNEL: u64 = 0x80; // SI_KERNEL: the kernel does not know the address
    let number = match frame.vector {
        0 | 16 | 19 => SIGFPE,
        1 | 3 => SIGTRAP,
        6 => SIGILL,
        _ => SIGSEGV,
    };
    if number != SIGSEGV || !signal::deliver(frame, number, KERNEL, 0) {
        kill(frame, number, format_args!("exception {}", frame.vector));
    }
}

/// Ends the running process for what it did.
fn kill(frame: &TrapFrame, signal: u32, what: fmt::Arguments<'_>) {
    let (rip, error) = (frame.rip, frame.error);
    println!("[{}] killed: {what}, error {error:#x}, rip {rip:#x}", pid());
    let (_, process) = current();
    let _ = process
        .killed
        .compare_exchange(0, signal + 1, Ordering::AcqRel, Ordering::Relaxed);
}

/// The flags of a mapping that a process asks for; what is unknown is refused.
pub fn map_flags(bits: u64) -> MapFlags {
    MapFlags::from_bits_retain(bits as u32)
}
