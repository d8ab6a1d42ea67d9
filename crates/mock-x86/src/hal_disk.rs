//! hal's `BlockDevice` and `PageProvider` on the machine: disks in memory or on a file of the host, slow and failing at will.
//!
//! ```text
//!   submit --latency 0--> transfer, Done
//!      `----latency n---> Pending(ticket) --poll, n times--> transfer, Done       or Err(Device) if it was to fail
//! ```
//!
//! A device reaches memory by physical address, past every MMU. A transfer to or from a free frame is a violation.
//!
//! Invariants
//! - `I1` the transfer of a slow request happens at the poll that answers `Done`, as late as a device may be.
//! - `I2` a ticket is known from its submission until a poll answered `Done` or an error.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};

use kmem_hal::{BlockDevice, Frame, IoError, IoState, IoTicket, PageProvider};

use crate::frames::FrameState;
use crate::machine::Machine;
use crate::sched;
use crate::violation::ViolationKind;

const PAGE: u64 = 4096;

/// Where the bytes of a disk are.
enum Media {
    /// Pages of memory; those never written are zero.
    Memory(BTreeMap<u64, Box<[u8; 4096]>>),
    /// A file of the host.
    File(File),
}

#[derive(Debug, Clone, Copy)]
struct Request {
    index: u64,
    frame: Frame,
    write: bool,
    polls_left: u32,
    fails: bool,
}

struct State {
    media: Media,
    open: BTreeMap<u64, Request>,
    next_ticket: u64,
    submitted: u64,
    latency: u32,
    fail_at: Option<u64>,
    reads: u64,
    writes: u64,
}

/// The mechanism of both devices.
struct Engine<'m> {
    machine: &'m Machine,
    /// Bytes.
    size: u64,
    writable: bool,
    state: Mutex<State>,
}

impl fmt::Debug for Engine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Engine({} bytes)", self.size)
    }
}

impl<'m> Engine<'m> {
    fn new(machine: &'m Machine, size: u64, writable: bool, media: Media) -> Self {
        let state = State {
            media,
            open: BTreeMap::new(),
            next_ticket: 1,
            submitted: 0,
            latency: 0,
            fail_at: None,
            reads: 0,
            writes: 0,
        };
        Self {
            machine,
            size,
            writable,
            state: Mutex::new(state),
        }
    }

    fn state<R>(&self, run: impl FnOnce(&mut State) -> R) -> R {
        run(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn submit(&self, index: u64, frame: Frame, write: bool) -> Result<IoState, IoError> {
        sched::yield_point(self.machine);
        if index >= self.size.div_ceil(PAGE) {
            return Err(IoError::OutOfRange);
        }
        if write && !self.writable {
            return Err(IoError::ReadOnly);
        }
        let (request, ticket) = self.state(|state| {
            state.submitted += 1;
            let fails = state.fail_at == Some(state.submitted);
            let request = Request {
                index,
                frame,
                write,
                polls_left: state.latency,
                fails,
            };
            if state.latency == 0 {
                return (request, None);
            }
            let ticket = state.next_ticket;
            state.next_ticket += 1;
            state.open.insert(ticket, request);
            (request, Some(ticket))
        });
        match ticket {
            Some(ticket) => Ok(IoState::Pending(IoTicket(ticket))),
            None => self.transfer(request).map(|()| IoState::Done),
        }
    }

    fn poll(&self, ticket: IoTicket) -> Result<IoState, IoError> {
        sched::yield_point(self.machine);
        let due = self.state(|state| {
            let request = state
                .open
                .get_mut(&ticket.0)
                .ok_or(IoError::UnknownTicket)?;
            request.polls_left = request.polls_left.saturating_sub(1);
            let request = *request;
            if request.polls_left > 0 {
                return Ok(None);
            }
            state.open.remove(&ticket.0);
            Ok(Some(request))
        })?;
        match due {
            None => Ok(IoState::Pending(ticket)),
            Some(request) => self.transfer(request).map(|()| IoState::Done),
        }
    }

    fn transfer(&self, request: Request) -> Result<(), IoError> {
        if request.fails {
            return Err(IoError::Device);
        }
        let Request {
            index,
            frame,
            write,
            ..
        } = request;
        let cpu = self.machine.current_cpu();
        self.machine.with(|inner| {
            let core = &mut inner.core;
            core.step += 1;
            if core.frames.state(frame.number()) == FrameState::Free {
                let way = if write { "read from" } else { "wrote to" };
                let line = format!(
                    "a disk {way} frame {:#x} for page {index}, and the frame is free",
                    frame.number()
                );
                core.raise(
                    ViolationKind::DeviceFreedFrame,
                    cpu,
                    None,
                    Some(frame.number()),
                    vec![line],
                );
            }
        });
        let address = frame.start().as_u64();
        let mut page = [0; PAGE as usize];
        // The last page of an image may be partial: behind the end there are zeros.
        let inside = (self.size - index * PAGE).min(PAGE) as usize;
        let memory = self.machine.memory();
        if write {
            if !memory.read(address, &mut page) {
                return Err(IoError::Device);
            }
            return self.state(|state| {
                state.writes += 1;
                state
                    .media
                    .write(index, &page, inside)
                    .map_err(|_| IoError::Device)
            });
        }
        self.state(|state| {
            state.reads += 1;
            state
                .media
                .read(index, &mut page[..inside])
                .map_err(|_| IoError::Device)
        })?;
        if memory.write(address, &page) {
            Ok(())
        } else {
            Err(IoError::Device)
        }
    }
}

impl Media {
    fn read(&self, index: u64, into: &mut [u8]) -> io::Result<()> {
        match self {
            Self::Memory(pages) => match pages.get(&index) {
                Some(page) => into.copy_from_slice(&page[..into.len()]),
                None => into.fill(0),
            },
            Self::File(file) => {
                let mut done = 0;
                while done < into.len() {
                    match file.read_at(&mut into[done..], index * PAGE + done as u64)? {
                        // A sparse or short file reads as zeros.
                        0 => {
                            into[done..].fill(0);
                            break;
                        }
                        more => done += more,
                    }
                }
            }
        }
        Ok(())
    }

    fn write(&mut self, index: u64, page: &[u8; 4096], inside: usize) -> io::Result<()> {
        match self {
            Self::Memory(pages) => {
                pages.insert(index, Box::new(*page));
                Ok(())
            }
            Self::File(file) => file.write_all_at(&page[..inside], index * PAGE),
        }
    }
}

macro_rules! common {
    ($type:ident) => {
        impl<'m> $type<'m> {
            /// Answers every request only at its `polls`-th poll (0: at once).
            pub fn set_latency(&self, polls: u32) {
                self.engine.state(|state| state.latency = polls);
            }

            /// Lets the `number`-th request from now on fail (1 is the next one).
            pub fn fail_at(&self, number: u64) {
                self.engine
                    .state(|state| state.fail_at = Some(state.submitted + number));
            }

            /// Pages read and written so far.
            pub fn transfers(&self) -> (u64, u64) {
                self.engine.state(|state| (state.reads, state.writes))
            }

            /// Requests that are on their way.
            pub fn in_flight(&self) -> usize {
                self.engine.state(|state| state.open.len())
            }
        }
    };
}

/// A disk of 4 KiB blocks, for swap.
#[derive(Debug)]
pub struct Disk<'m> {
    engine: Engine<'m>,
}

impl<'m> Disk<'m> {
    /// A disk in memory: `blocks` blocks of zeros, which cost nothing until they are written.
    pub fn in_memory(machine: &'m Machine, blocks: u64) -> Self {
        Self {
            engine: Engine::new(machine, blocks * PAGE, true, Media::Memory(BTreeMap::new())),
        }
    }

    /// A disk on a file of the host, opened for reading and writing; the file grows as blocks are written.
    pub fn on_file(machine: &'m Machine, file: File, blocks: u64) -> Self {
        Self {
            engine: Engine::new(machine, blocks * PAGE, true, Media::File(file)),
        }
    }
}

common!(Disk);

// SAFETY: W1 to W3: the engine moves whole pages at one instant between submission and `Done` (I1).
unsafe impl BlockDevice for Disk<'_> {
    fn blocks(&self) -> u64 {
        self.engine.size / PAGE
    }
    fn read(&self, block: u64, frame: Frame) -> Result<IoState, IoError> {
        self.engine.submit(block, frame, false)
    }
    fn write(&self, block: u64, frame: Frame) -> Result<IoState, IoError> {
        self.engine.submit(block, frame, true)
    }
    fn poll(&self, ticket: IoTicket) -> Result<IoState, IoError> {
        self.engine.poll(ticket)
    }
}

/// A file whose pages can be mapped: an image in memory or a file of the host.
#[derive(Debug)]
pub struct DiskImage<'m> {
    engine: Engine<'m>,
}

impl<'m> DiskImage<'m> {
    /// An image with these bytes, which can be written.
    pub fn from_bytes(machine: &'m Machine, bytes: &[u8]) -> Self {
        let mut pages = BTreeMap::new();
        for (index, chunk) in bytes.chunks(PAGE as usize).enumerate() {
            let mut page = Box::new([0; PAGE as usize]);
            page[..chunk.len()].copy_from_slice(chunk);
            pages.insert(index as u64, page);
        }
        Self {
            engine: Engine::new(machine, bytes.len() as u64, true, Media::Memory(pages)),
        }
    }

    /// A file of the host, of its present length; writes need a file opened for writing and `writable`.
    ///
    /// # Errors
    ///
    /// The host's, if the length cannot be asked.
    pub fn on_file(machine: &'m Machine, file: File, writable: bool) -> io::Result<Self> {
        let size = file.metadata()?.len();
        Ok(Self {
            engine: Engine::new(machine, size, writable, Media::File(file)),
        })
    }
}

common!(DiskImage);

// SAFETY: W1 to W3: as for `Disk`; bytes behind the end are zero (W2), since `transfer` fills a zeroed page up to `inside`. W4: `writable` never
// changes.
unsafe impl PageProvider for DiskImage<'_> {
    fn size(&self) -> u64 {
        self.engine.size
    }
    fn is_read_only(&self) -> bool {
        !self.engine.writable
    }
    fn read(&self, index: u64, frame: Frame) -> Result<IoState, IoError> {
        self.engine.submit(index, frame, false)
    }
    fn write(&self, index: u64, frame: Frame) -> Result<IoState, IoError> {
        self.engine.submit(index, frame, true)
    }
    fn poll(&self, ticket: IoTicket) -> Result<IoState, IoError> {
        self.engine.poll(ticket)
    }
}
