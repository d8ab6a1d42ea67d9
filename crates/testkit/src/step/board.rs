//! The page that parent and children share: how far the child is, and what went wrong.

use std::ops::Deref;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};

/// Not yet, or not any more: a signal enters nothing.
pub const IDLE: u32 = 0;
/// The operation runs.
pub const RUNNING: u32 = 1;

/// The words that are shared.
pub struct Board {
    /// [`IDLE`] or [`RUNNING`].
    pub phase: AtomicU32,
    /// Instructions that were stepped.
    pub steps: AtomicU64,
    /// Every so manieth of them is interrupted.
    pub stride: AtomicU64,
    /// How many were.
    pub interrupts: AtomicU64,
    /// The address of the last one.
    pub address: AtomicU64,
    /// The step at which a copy failed; 0 where none did.
    pub failed_at: AtomicU64,
    length: AtomicUsize,
    text: [AtomicU8; 2048],
}

impl Board {
    /// Keeps the first message.
    pub fn note(&self, message: &str) {
        if self.length.load(Relaxed) == 0 {
            let bytes = &message.as_bytes()[..message.len().min(self.text.len())];
            for (to, from) in self.text.iter().zip(bytes) {
                to.store(*from, Relaxed);
            }
            self.length.store(bytes.len(), Relaxed);
        }
    }

    /// The message.
    pub fn message(&self) -> String {
        let bytes: Vec<u8> = self.text[..self.length.load(Relaxed)]
            .iter()
            .map(|byte| byte.load(Relaxed))
            .collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// A board that children of this process share with it.
pub struct Shared(*mut Board);

impl Shared {
    /// A board of zeroes.
    ///
    /// # Panics
    ///
    /// Where the host has no page.
    pub fn new() -> Self {
        // SAFETY: a new mapping at a place of the host's choice.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<Board>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert!(page != libc::MAP_FAILED, "no page to share");
        Self(page.cast())
    }
}

impl Deref for Shared {
    type Target = Board;

    fn deref(&self) -> &Board {
        // SAFETY: mapped until the value is dropped, aligned to a page; atomics of zeroes are valid.
        unsafe { &*self.0 }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this size; the borrow of `deref` has ended.
        unsafe { libc::munmap(self.0.cast(), size_of::<Board>()) };
    }
}

/// Writes to the standard error past the test harness, which shows nothing of tests that pass.
pub fn say(text: &str) {
    // SAFETY: a valid buffer; that it may be written in part only is of no consequence.
    unsafe { libc::write(2, text.as_ptr().cast(), text.len()) };
}
