//! **What kmem asks of a kernel, on x86-64.** Copy this file and change what is marked.
//!
//! | hal's trait | here | contract |
//! |---|---|---|
//! | `PhysMap` | [`phys`], hal's own `OffsetMap` | physical memory is mapped at [`DIRECT`] |
//! | `Cpu` | [`Machine`] | the number stands in a per-CPU word behind `gs` |
//! | `CpuCall` | [`Machine`] | a mailbox and an interrupt to each CPU |
//! | `Mmu` | [`Machine`], by [`SPACES`] | kmem's `AsidMmu` over the instructions (`tlb.rs`) and `CpuCall` |
//! | `UserAccess` | [`Machine`] | a copy that the page-fault handler may cut short |
//! | `PageProvider` | [`MemoryFile`] | a file whose bytes lie in memory |
//! | `RawLock`, `RawSleepLock` | hal's own `IrqSafe`, `SpinWait` | `cli` and spin; spin |
//!
//! A kernel with one CPU needs `load_root` and `flush_local`: hal has `SingleCpu`. User access and files are for user mode.

use core::arch::{asm, global_asm};
use core::ptr;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use core::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64};

use kmem::hal::{
    CachePadded, Completion, Cpu, CpuCall, CpuCallError, CpuId, CpuSet, FlushRequest, Frame,
    IoError, IoState, IoTicket, Mmu, OffsetMap, PageProvider, PhysMap, Root, UserAccess, UserFault,
    VirtAddr,
};

use kmem::paging::{AsidArea, AsidMmu};

use crate::layout::{DIRECT, DIRECT_BYTES}; // *Yours may come from the boot loader.*
use crate::plant::{self, Plant};
use crate::tlb::BootTlb;
use crate::{apic, smp};

/// CPUs that this kernel can run. *Change it to what your tables have room for.*
pub const MAX_CPUS: usize = 4;

/// Physical memory, as kmem reaches it.
pub const fn phys() -> OffsetMap {
    // SAFETY: P1, P2: boot.s maps it all there, write-back; kmem touches only what the memory map calls usable.
    unsafe { OffsetMap::new(DIRECT as usize, DIRECT_BYTES >> 12) }
}

/// The processors of this machine. No state of its own.
#[derive(Clone, Copy, Debug)]
pub struct Machine;

/// The CPU that runs this code.
pub fn this_cpu() -> CpuId {
    let id: u32;
    // SAFETY: `cpu::install` made gs point to this CPU's area, whose first word is the number.
    unsafe { asm!("mov {:e}, gs:[0]", out(reg) id, options(nostack, preserves_flags, readonly)) };
    CpuId::new(id)
}

// SAFETY: C1, C2, C4: this kernel never moves or preempts kernel code, so that a pin needs nothing. *If yours does, count
// preemption here.* C3: ids are below MAX_CPUS. C5: a CPU sees its own stores.
unsafe impl Cpu for Machine {
    type Guard<'a> = ();

    fn raw_pin(&self) {}
    fn id(&self, _guard: &()) -> CpuId {
        this_cpu()
    }
    fn count(&self) -> u32 {
        MAX_CPUS as u32
    }
}

/// A function that other CPUs shall run.
struct Call<'a> {
    f: &'a (dyn Fn(CpuId) + Sync),
    remaining: AtomicU32,
}
/// Invariant: a mailbox that is not null points to a call on the stack of a CPU that waits for it.
static MAILBOXES: [AtomicPtr<Call<'static>>; MAX_CPUS] =
    [const { AtomicPtr::new(ptr::null_mut()) }; MAX_CPUS];

// SAFETY: R1 to R3: `run_on` returns when every CPU has run `f` and said so with a release store.
unsafe impl CpuCall for Machine {
    fn run_on(&self, cpus: &CpuSet, f: &(dyn Fn(CpuId) + Sync)) -> Result<(), CpuCallError> {
        let (this, mut others) = (this_cpu(), smp::online());
        others.remove(this);
        let others: CpuSet = others.iter().filter(|cpu| cpus.contains(*cpu)).collect();
        let remaining = AtomicU32::new(others.len());
        let call = Call { f, remaining };
        let pointer = (&raw const call).cast_mut().cast::<Call<'static>>();
        for cpu in others.iter() {
            let (mailbox, empty) = (&MAILBOXES[cpu.index()], ptr::null_mut());
            let post = || mailbox.compare_exchange(empty, pointer, Release, Relaxed);
            // Whoever waits answers its own mailbox, so that two CPUs that call each other do not wait for ever.
            while post().is_err() {
                answer_calls();
            }
            apic::send(cpu, apic::CALL);
        }
        if cpus.contains(this) {
            f(this);
        }
        while call.remaining.load(Acquire) != 0 {
            answer_calls();
        }
        Ok(())
    }
}

/// Runs what stands in this CPU's mailbox: the handler of the interrupt that `run_on` sends.
pub fn answer_calls() {
    let call = MAILBOXES[this_cpu().index()].swap(ptr::null_mut(), Acquire);
    if call.is_null() {
        return core::hint::spin_loop();
    }
    // SAFETY: the mailbox's invariant: the caller waits until `remaining` is 0, and the subtraction is the last use.
    unsafe {
        ((*call).f)(this_cpu());
        (*call).remaining.fetch_sub(1, Release);
    }
}

static ASID_AREAS: [CachePadded<AsidArea>; MAX_CPUS] =
    [const { CachePadded::new(AsidArea::new()) }; MAX_CPUS];
static GENERATIONS: [AtomicU64; 64] = [const { AtomicU64::new(0) }; 64];
/// Who has which root loaded, lazily or not, and who must be told of a flush.
// SAFETY: an area for each CPU; roots are loaded by `Machine` alone.
pub static SPACES: AsidMmu<'static, BootTlb, Machine> =
    unsafe { AsidMmu::new(BootTlb, Machine, &ASID_AREAS, &GENERATIONS) };

// SAFETY: `AsidMmu` keeps the contract; the faults of `plant.rs` are there to break it.
unsafe impl Mmu for Machine {
    unsafe fn load_root(&self, root: Root, keep: bool) {
        // SAFETY: the caller's promise is passed on.
        unsafe { SPACES.load_root(root, keep) };
    }

    fn flush_local(&self, request: &FlushRequest) {
        if !plant::is(Plant::LostFlush) {
            SPACES.flush_local(request);
        }
    }

    fn active_cpus(&self, root: Root) -> CpuSet {
        SPACES.active_cpus(root)
    }

    fn flush_targets(&self, request: &FlushRequest) -> CpuSet {
        SPACES.flush_targets(request)
    }

    fn isolates(&self) -> bool {
        SPACES.isolates()
    }

    fn is_loaded(&self, root: Root) -> bool {
        SPACES.is_loaded(root)
    }

    fn this_cpu(&self) -> CpuId {
        this_cpu()
    }

    fn shootdown(&self, cpus: &CpuSet, request: &FlushRequest) -> Completion {
        if plant::spoils_shootdown(cpus, request) {
            return Completion::DONE;
        }
        SPACES.shootdown(cpus, request)
    }
}

// user_copy(to, from, bytes) -> bytes left: with user memory open (flag AC, as STAC and CLAC write it where SMAP is) while it
// runs, and cut short by the page-fault handler (`traps.rs`), which goes on at user_copy_end.
global_asm!(
    ".globl user_copy, user_copy_end",
    "user_copy: pushfq; or dword ptr [rsp], 1 << 18; popfq; mov rcx, rdx; rep movsb",
    "user_copy_end: pushfq; and dword ptr [rsp], ~(1 << 18); popfq; mov rax, rcx; ret"
);

fn copy(to: *mut u8, from: *const u8, length: usize, user: VirtAddr) -> Result<(), UserFault> {
    unsafe extern "C" {
        fn user_copy(to: *mut u8, from: *const u8, length: usize) -> usize;
    }
    let inside = |end| end <= 0x7fff_ffff_f000;
    let left = match user.as_u64().checked_add(length as u64).is_some_and(inside) {
        // SAFETY: one side is the caller's slice; the other lies in user space, and a bad address ends the copy.
        true => unsafe { user_copy(to, from, length) },
        false => length,
    };
    let copied = length - left;
    let address = VirtAddr::new(user.as_u64() + copied as u64);
    (left == 0)
        .then_some(())
        .ok_or(UserFault { address, copied })
}

// SAFETY: U1: CR0.WP makes the kernel obey read-only pages. U2: an unresolved fault ends `user_copy`.
unsafe impl UserAccess for Machine {
    fn copy_from_user(&self, to: &mut [u8], from: VirtAddr) -> Result<(), UserFault> {
        copy(to.as_mut_ptr(), from.as_u64() as *const u8, to.len(), from)
    }
    fn copy_to_user(&self, to: VirtAddr, from: &[u8]) -> Result<(), UserFault> {
        copy(to.as_u64() as *mut u8, from.as_ptr(), from.len(), to)
    }
}

/// A file whose `'static` bytes nobody else writes.
pub struct MemoryFile(pub *mut [u8]);
// SAFETY: pages are read and written whole, by the page cache, which keeps two transfers of one page apart.
unsafe impl Sync for MemoryFile {}

impl MemoryFile {
    fn transfer(&self, index: u64, frame: Frame, write: bool) -> Result<IoState, IoError> {
        let (start, end) = ((index << 12) as usize, self.0.len());
        let length = end.checked_sub(start).ok_or(IoError::OutOfRange)?.min(4096);
        let file = self.0.cast::<u8>().wrapping_add(start);
        let frame = phys().to_ptr(frame.start());
        // SAFETY: `length` bytes from `start` on are the file's; the caller owns the frame.
        unsafe {
            if write {
                file.copy_from_nonoverlapping(frame, length);
            } else {
                frame.copy_from_nonoverlapping(file, length);
                frame.add(length).write_bytes(0, 4096 - length);
            }
        }
        Ok(IoState::Done)
    }
}

// SAFETY: W1 to W3: all is done before a call returns, for 4096 bytes. W4: none is refused because it is a write.
unsafe impl PageProvider for MemoryFile {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }
    fn read(&self, index: u64, frame: Frame) -> Result<IoState, IoError> {
        self.transfer(index, frame, false)
    }
    fn write(&self, index: u64, frame: Frame) -> Result<IoState, IoError> {
        self.transfer(index, frame, true)
    }
    fn poll(&self, _: IoTicket) -> Result<IoState, IoError> {
        Err(IoError::UnknownTicket) // nothing is ever pending
    }
}
