//! A pin that is kept beside its space.

use kmem_cow_mm::{Pin, PinError};
use kmem_hal::{Access, VirtAddr};

use super::{Space, World};

/// A pinned page. Ends before its space, which it keeps.
pub struct HeldPin {
    pin: Option<Pin<'static, 'static, World>>,
    space: Box<Space>,
}

impl HeldPin {
    pub fn new(space: &Space, address: u64, write: bool) -> Result<Self, PinError> {
        let space = Box::new(space.share().unwrap());
        let access = match write {
            true => Access::Write,
            false => Access::Read,
        };
        let pin = space.pin(VirtAddr::new(address), access)?;
        // SAFETY: only the lifetime of the space is erased, which lives in its box until the pin is dropped.
        let pin = unsafe {
            std::mem::transmute::<Pin<'_, 'static, World>, Pin<'static, 'static, World>>(pin)
        };
        Ok(Self {
            pin: Some(pin),
            space,
        })
    }

    pub fn read(&self) -> u64 {
        let mut word = [0; 8];
        self.pin.as_ref().unwrap().read(0, &mut word);
        u64::from_le_bytes(word)
    }

    pub fn frame(&self) -> kmem_hal::Frame {
        self.pin.as_ref().unwrap().frame()
    }

    pub fn world(&self) -> &'static World {
        self.space.mm().env()
    }

    /// `false` where it may only be read.
    pub fn write(&self, word: u64) -> bool {
        self.pin.as_ref().unwrap().write(0, &word.to_le_bytes())
    }
}

impl Drop for HeldPin {
    fn drop(&mut self) {
        self.pin = None;
    }
}
