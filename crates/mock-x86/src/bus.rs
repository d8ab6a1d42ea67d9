//! Everything on the bus that is no memory: I/O ports, registers of devices in physical memory, and a DMA engine.
//!
//! ```text
//!  CPU --in, out--> ports ---------+
//!   | --load, store--> MMU --> physical --RAM?--> memory <---+
//!   |                              | Device range            | physical addresses, 24 bits
//!   +------------------------------+--> registers       DMA engine <-- programmed by the driver
//! ```
//!
//! The engine is the old PC's (8237A and its page register): it has 24 address bits and 16 bits of counter, so a transfer lies
//! below 16 MiB and inside one block of 64 KiB. It knows no paging: what is contiguous for a program need not be for it.
//!
//! Invariants
//! - `I1` a device's code runs under the machine's lock and gets nothing but the access: it cannot call back.
//! - `I2` a transfer reads or writes memory at one moment, in [`Dma::run`]; a frame that was freed between programming and
//!   that moment is a violation.
//!
//! Source: Intel 8237A data sheet; SDM volume 1, chapter 19 (input/output).

use std::fmt;

use crate::cpu::Fault;
use crate::frames::FrameState;
use crate::machine::Machine;
use crate::vcpu::VirtualCpu;
use crate::violation::ViolationKind;

/// Registers that answer to reads and writes of 1, 2, 4 or 8 bytes.
pub trait Device: Send {
    /// Reads `bytes` bytes at `offset` from the device's first register.
    fn read(&mut self, offset: u64, bytes: u32) -> u64;

    /// Writes `bytes` bytes at `offset`.
    fn write(&mut self, offset: u64, bytes: u32, value: u64);
}

struct Attached {
    first: u64,
    last: u64,
    device: Box<dyn Device>,
}

/// What is attached to the bus.
#[derive(Default)]
pub(crate) struct Bus {
    ports: Vec<Attached>,
    memory: Vec<Attached>,
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Bus({} at ports, {} in memory)",
            self.ports.len(),
            self.memory.len()
        )
    }
}

fn find(devices: &mut [Attached], at: u64) -> Option<&mut Attached> {
    devices
        .iter_mut()
        .find(|device| device.first <= at && at <= device.last)
}

impl Bus {
    /// Whether a device answered the read.
    pub(crate) fn read(&mut self, physical: u64, into: &mut [u8]) -> bool {
        let Some(found) = find(&mut self.memory, physical) else {
            return false;
        };
        let value = found.device.read(physical - found.first, into.len() as u32);
        let bytes = value.to_le_bytes();
        let length = into.len().min(8);
        into[..length].copy_from_slice(&bytes[..length]);
        true
    }

    /// Whether a device took the write.
    pub(crate) fn write(&mut self, physical: u64, from: &[u8]) -> bool {
        let Some(found) = find(&mut self.memory, physical) else {
            return false;
        };
        let mut word = [0; 8];
        let length = from.len().min(8);
        word[..length].copy_from_slice(&from[..length]);
        let value = u64::from_le_bytes(word);
        found
            .device
            .write(physical - found.first, from.len() as u32, value);
        true
    }
}

impl Machine {
    /// Attaches a device to I/O ports `first..=last`.
    ///
    /// # Panics
    ///
    /// If another device has one of them.
    pub fn attach_ports(&self, first: u16, last: u16, device: impl Device + 'static) {
        self.with(|inner| {
            attach(
                &mut inner.core.bus.ports,
                first.into(),
                last.into(),
                Box::new(device),
            );
        });
    }

    /// Attaches a device's registers to physical addresses `first..=last`: a range of the memory map of kind `Device`, or a hole.
    ///
    /// # Panics
    ///
    /// If memory or another device answers there.
    pub fn attach_memory(&self, first: u64, last: u64, device: impl Device + 'static) {
        assert!(
            (first..=last)
                .step_by(4096)
                .chain([last])
                .all(|at| !self.memory().is_backed(at, 1)),
            "memory answers in {first:#x}..={last:#x}"
        );
        self.with(|inner| attach(&mut inner.core.bus.memory, first, last, Box::new(device)));
    }

    /// The DMA engine of the old PC.
    pub fn dma(&self) -> Dma<'_> {
        Dma {
            machine: self,
            programmed: None,
        }
    }
}

fn attach(devices: &mut Vec<Attached>, first: u64, last: u64, device: Box<dyn Device>) {
    assert!(first <= last, "no registers");
    assert!(
        devices
            .iter()
            .all(|other| last < other.first || other.last < first),
        "another device is at {first:#x}..={last:#x}"
    );
    devices.push(Attached {
        first,
        last,
        device,
    });
}

impl VirtualCpu<'_> {
    /// `IN` of 1, 2 or 4 bytes; ones where no device answers.
    ///
    /// # Errors
    ///
    /// `#GP(0)` at CPL 3 (IOPL is 0, and no TSS allows a port).
    pub fn port_in(&self, port: u16, bytes: u32) -> Result<u32, Fault> {
        let mask = u32::MAX >> (32 - 8 * bytes.clamp(1, 4));
        self.at_port(|bus| {
            find(&mut bus.ports, port.into()).map_or(mask, |found| {
                found.device.read(u64::from(port) - found.first, bytes) as u32 & mask
            })
        })
    }

    /// `OUT` of 1, 2 or 4 bytes.
    ///
    /// # Errors
    ///
    /// As [`port_in`](Self::port_in).
    pub fn port_out(&self, port: u16, bytes: u32, value: u32) -> Result<(), Fault> {
        self.at_port(|bus| {
            if let Some(found) = find(&mut bus.ports, port.into()) {
                found
                    .device
                    .write(u64::from(port) - found.first, bytes, value.into());
            }
        })
    }
}

/// Why the engine refused a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DmaError {
    /// A byte of it lies above the engine's 24 address bits.
    BeyondReach,
    /// It crosses a multiple of 64 KiB: the counter would wrap.
    CrossesBoundary,
    /// No bytes, or nothing was programmed.
    Nothing,
    /// There is no memory.
    NoMemory,
}

impl fmt::Display for DmaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BeyondReach => "the engine has 24 address bits",
            Self::CrossesBoundary => "the transfer crosses a multiple of 64 KiB",
            Self::Nothing => "nothing to transfer",
            Self::NoMemory => "no memory there",
        })
    }
}

impl std::error::Error for DmaError {}

/// A DMA engine with one channel; see [`Machine::dma`].
#[derive(Debug)]
pub struct Dma<'m> {
    machine: &'m Machine,
    programmed: Option<(u64, usize)>,
}

impl Dma<'_> {
    /// The first address that it cannot reach: 16 MiB.
    pub const LIMIT: u64 = 1 << 24;

    /// Programs the channel: physical address and bytes. The hardware would cut the address off; here that is an error.
    ///
    /// # Errors
    ///
    /// [`DmaError`].
    pub fn program(&mut self, physical: u64, bytes: usize) -> Result<(), DmaError> {
        let last = match bytes.checked_sub(1) {
            Some(rest) => physical.saturating_add(rest as u64),
            None => return Err(DmaError::Nothing),
        };
        if last >= Self::LIMIT {
            return Err(DmaError::BeyondReach);
        }
        if physical >> 16 != last >> 16 {
            return Err(DmaError::CrossesBoundary);
        }
        if !self.machine.memory().is_backed(physical, bytes as u64) {
            return Err(DmaError::NoMemory);
        }
        self.programmed = Some((physical, bytes));
        Ok(())
    }

    /// The device writes what it has to memory: the transfer that was programmed takes place. Gives the bytes it moved.
    ///
    /// # Errors
    ///
    /// [`DmaError::Nothing`] where nothing is programmed.
    pub fn device_to_memory(&mut self, from: &[u8]) -> Result<usize, DmaError> {
        let (physical, bytes) = self.run("wrote to")?;
        let length = bytes.min(from.len());
        for (at, byte) in (physical..).zip(&from[..length]) {
            self.machine.memory().store(at, 1, u64::from(*byte));
        }
        Ok(length)
    }

    /// The device reads memory. Gives the bytes it moved.
    ///
    /// # Errors
    ///
    /// As [`device_to_memory`](Self::device_to_memory).
    pub fn memory_to_device(&mut self, into: &mut [u8]) -> Result<usize, DmaError> {
        let (physical, bytes) = self.run("read from")?;
        let length = bytes.min(into.len());
        for (at, byte) in (physical..).zip(&mut into[..length]) {
            *byte = self.machine.memory().load(at, 1).unwrap_or(0xff) as u8;
        }
        Ok(length)
    }

    /// `I2`.
    fn run(&mut self, way: &str) -> Result<(u64, usize), DmaError> {
        let (physical, bytes) = self.programmed.take().ok_or(DmaError::Nothing)?;
        let cpu = self.machine.current_cpu();
        self.machine.with(|inner| {
            let core = &mut inner.core;
            core.step += 1;
            for frame in physical >> 12..=(physical + bytes as u64 - 1) >> 12 {
                if core.frames.state(frame) == FrameState::Free {
                    let line =
                        format!("the DMA engine {way} frame {frame:#x}, and the frame is free");
                    core.raise(
                        ViolationKind::DeviceFreedFrame,
                        cpu,
                        None,
                        Some(frame),
                        vec![line],
                    );
                }
            }
        });
        Ok((physical, bytes))
    }
}
