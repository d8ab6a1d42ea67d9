//! A file whose size a test changes.

use std::sync::atomic::{AtomicU64, Ordering};

use kmem_hal::{Frame, IoError, IoState, IoTicket, PageProvider};
use kmem_mock_x86::DiskImage;

/// An image on a disk, of which as many bytes are the file's as it says at the moment.
#[derive(Debug)]
pub struct ChangingFile {
    pub image: DiskImage<'static>,
    pub size: AtomicU64,
}

// SAFETY: W1 to W4: forwards to an image that keeps them.
unsafe impl PageProvider for ChangingFile {
    fn size(&self) -> u64 {
        self.size.load(Ordering::SeqCst)
    }
    fn read(&self, index: u64, frame: Frame) -> Result<IoState, IoError> {
        self.image.read(index, frame)
    }
    fn write(&self, index: u64, frame: Frame) -> Result<IoState, IoError> {
        self.image.write(index, frame)
    }
    fn poll(&self, ticket: IoTicket) -> Result<IoState, IoError> {
        self.image.poll(ticket)
    }
}
