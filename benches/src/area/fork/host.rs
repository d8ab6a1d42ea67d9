//! The host's side: memory of this process, children that get it, and the time that they take.

use super::PAGE;
use crate::clock::Watch;

/// Memory of this process, in pages of 4 KiB, which its children get.
pub(super) struct HostMemory {
    pub(super) base: *mut u8,
    pub(super) pages: u64,
}

impl HostMemory {
    pub fn new(pages: u64) -> Self {
        let length = (pages * PAGE) as usize;
        // SAFETY: a new mapping that nothing else uses.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        assert_ne!(base, libc::MAP_FAILED, "the host has no room");
        // SAFETY: the mapping just made.
        unsafe { libc::madvise(base, length, libc::MADV_NOHUGEPAGE) };
        Self {
            base: base.cast(),
            pages,
        }
    }

    pub fn touched(pages: u64) -> Self {
        let memory = Self::new(pages);
        memory.write(0..pages);
        memory
    }

    #[inline]
    pub fn write(&self, pages: impl Iterator<Item = u64>) {
        for page in pages {
            // SAFETY: inside the mapping, which this value owns.
            unsafe { self.base.add((page * PAGE) as usize).write_volatile(1) };
        }
    }

    #[inline]
    pub fn read(&self, pages: impl Iterator<Item = u64>) {
        for page in pages {
            // SAFETY: inside the mapping, which this value owns.
            std::hint::black_box(unsafe { self.base.add((page * PAGE) as usize).read_volatile() });
        }
    }

    /// Gives the pages back to the kernel.
    pub fn forget(&self) {
        let length = (self.pages * PAGE) as usize;
        // SAFETY: the value's mapping.
        unsafe { libc::madvise(self.base.cast(), length, libc::MADV_DONTNEED) };
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`.
        unsafe { libc::munmap(self.base.cast(), (self.pages * PAGE) as usize) };
    }
}

/// CPU time of all children that ended and were waited for.
pub(super) fn children_time() -> std::time::Duration {
    // SAFETY: zero is a value of this plain struct.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a local of the right type.
    assert_eq!(0, unsafe {
        libc::getrusage(libc::RUSAGE_CHILDREN, &raw mut usage)
    });
    [usage.ru_utime, usage.ru_stime]
        .iter()
        .map(|time| std::time::Duration::new(time.tv_sec as u64, time.tv_usec as u32 * 1000))
        .sum()
}

/// A child of this process; it is ended and waited for when this is dropped.
pub(super) struct Child(libc::pid_t);

impl Child {
    /// Forks; the child sleeps until it is killed. Times the parent's part.
    pub fn asleep(watch: Option<&mut Watch>) -> Self {
        // SAFETY: no other thread runs, and the child calls only what is allowed after fork.
        let fork = || unsafe { libc::fork() };
        let child = match watch {
            Some(watch) => watch.time(fork),
            None => fork(),
        };
        if child == 0 {
            loop {
                // SAFETY: no arguments.
                unsafe { libc::pause() };
            }
        }
        assert!(child > 0, "the host cannot fork");
        Self(child)
    }

    /// Forks; the child does `work` and ends.
    pub fn working(work: impl FnOnce()) -> Self {
        // SAFETY: as above; `work` only writes to memory.
        let child = unsafe { libc::fork() };
        if child == 0 {
            work();
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(0) };
        }
        assert!(child > 0, "the host cannot fork");
        Self(child)
    }

    /// Waits for the child's own end; it must have done its work.
    pub fn wait(self) {
        let mut status = 0;
        // SAFETY: a child of this process that nobody else waits for.
        let child = unsafe { libc::waitpid(self.0, &raw mut status, 0) };
        assert_eq!((child, status), (self.0, 0), "the child failed");
        std::mem::forget(self);
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let mut status = 0;
        // SAFETY: a child of this process that nobody else waits for.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            libc::waitpid(self.0, &raw mut status, 0);
        }
    }
}

/// One page of the host's; unmapped when it is dropped.
pub(super) struct HostPage(*mut libc::c_void);

impl HostPage {
    pub fn new() -> Self {
        // SAFETY: a new mapping that nothing else uses.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE as usize,
                libc::PROT_READ,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(page, libc::MAP_FAILED);
        Self(page)
    }
}

impl Drop for HostPage {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`.
        let result = unsafe { libc::munmap(self.0, PAGE as usize) };
        assert_eq!(result, 0);
    }
}
