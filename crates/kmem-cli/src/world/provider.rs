//! Files of the mock machine's world, as page providers: their pages come from the host, their writes stay in memory.
//!
//! ```text
//!   page cache ── read(index, frame) ──> Content (zeros, a pattern, bytes)  ──> the frame, through the physical map
//!              └─ write(index, frame) ─> pages written back, which later reads see
//! ```
//! Invariants: I1: a read fills all 4096 bytes; those behind the end are zero. I2: what was written back is what is read
//! next. I3: every call is done when it returns.

use crate::replay::mm::Content;
use kmem_hal::{Frame, IoError, IoState, IoTicket, PAGE_SIZE, PageProvider};
use kmem_mock_x86::Machine;
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// A file.
#[derive(Debug)]
pub struct HostFile {
    machine: &'static Machine,
    content: Content,
    bytes: u64,
    written: Mutex<HashMap<u64, Vec<u8>>>,
}

impl HostFile {
    /// Makes a file of whole pages.
    pub fn new(machine: &'static Machine, content: Content, pages: u64) -> Self {
        let bytes = match &content {
            Content::Bytes(b) => b.len() as u64,
            _ => pages * PAGE_SIZE,
        };
        Self {
            machine,
            content,
            bytes,
            written: Mutex::default(),
        }
    }

    fn check(&self, index: u64) -> Result<(), IoError> {
        if index < self.bytes.div_ceil(PAGE_SIZE) {
            Ok(())
        } else {
            Err(IoError::OutOfRange)
        }
    }
}

// SAFETY: W1, W2: `read` writes the whole frame before it returns and not afterwards (I1, I3); W3: `write` copies the frame
// before it returns; W4: any page of the file.
unsafe impl PageProvider for HostFile {
    fn size(&self) -> u64 {
        self.bytes
    }

    fn read(&self, index: u64, frame: Frame) -> Result<IoState, IoError> {
        self.check(index)?;
        let mut page = [0; PAGE_SIZE as usize];
        let written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        match written.get(&index) {
            Some(bytes) => page.copy_from_slice(bytes),
            None => self.content.fill(index, &mut page),
        }
        if self.machine.memory().write(frame.start().as_u64(), &page) {
            Ok(IoState::Done)
        } else {
            Err(IoError::Device)
        }
    }

    fn write(&self, index: u64, frame: Frame) -> Result<IoState, IoError> {
        self.check(index)?;
        let mut page = vec![0; PAGE_SIZE as usize];
        if !self
            .machine
            .memory()
            .read(frame.start().as_u64(), &mut page)
        {
            return Err(IoError::Device);
        }
        self.written
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(index, page);
        Ok(IoState::Done)
    }

    fn poll(&self, _: IoTicket) -> Result<IoState, IoError> {
        Err(IoError::UnknownTicket)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> &'static Machine {
        Box::leak(Box::new(Machine::pc(8 << 20, 1)))
    }

    #[test]
    fn pages_are_filled_and_written_pages_come_back() {
        let m = machine();
        let file = HostFile::new(m, Content::Pattern(3), 4);
        let frame = Frame::from_number(0x200);
        assert!(m.memory().write(0x20_0000, &[0xaa; 4096]));
        assert_eq!(file.read(2, frame), Ok(IoState::Done));
        assert_eq!(m.memory().load(0x20_0000, 8), Some(0xf11e_0003_0000_0002));
        assert_eq!(
            m.memory().load(0x20_0ff8, 8),
            Some(0),
            "the rest of the page is cleared"
        );
        assert!(m.memory().store(0x20_0000, 8, 7));
        assert_eq!(file.write(2, frame), Ok(IoState::Done));
        assert!(m.memory().store(0x20_0000, 8, 0));
        assert_eq!(file.read(2, frame), Ok(IoState::Done));
        assert_eq!(m.memory().load(0x20_0000, 8), Some(7));
    }

    #[test]
    fn nothing_is_behind_the_end() {
        let m = machine();
        let file = HostFile::new(m, Content::Bytes(vec![9; 4097].into()), 0);
        assert_eq!(file.size(), 4097);
        assert_eq!(file.read(1, Frame::from_number(0x200)), Ok(IoState::Done));
        assert_eq!(m.memory().load(0x20_0000, 8), Some(9));
        assert!(file.read(2, Frame::from_number(0x200)).is_err());
        assert!(file.write(2, Frame::from_number(0x200)).is_err());
        // A hole of the machine is no frame.
        assert!(file.read(0, Frame::from_number(0xb0)).is_err());
    }
}
