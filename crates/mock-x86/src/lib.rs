#![doc = include_str!("../README.md")]

mod adversary;
mod arena;
mod bus;
mod cpu;
mod engine;
mod frames;
mod hal_cpu;
mod hal_disk;
mod hal_frames;
mod hal_grace;
mod hal_mmu;
mod hal_trace;
mod hal_user;
mod interrupt;
mod lock;
mod machine;
pub mod manual;
mod memory;
mod memory_map;
mod mode;
mod rng;
mod sched;
mod segment;
mod sleep_lock;
mod slots;
mod story;
mod tlb;
mod vcpu;
mod violation;
pub mod walker;

pub use adversary::{Adversary, Stats};
pub use bus::{Device, Dma, DmaError};
pub use cpu::{Fault, Features, Flush, Invpcid, Registers};
pub use frames::{FrameEvent, FrameEventKind, FrameState};
pub use hal_cpu::MachinePin;
pub use hal_disk::{Disk, DiskImage};
pub use hal_frames::{FramePool, Tracked};
pub use hal_grace::{MachineGrace, MachineGraceGuard};
pub use hal_user::MachineUser;
pub use interrupt::{FlushWhat, FlushWork};
pub use lock::{MachineLock, MachineLockState};
pub use machine::{Machine, MachineBuilder};
pub use memory::PhysMemory;
pub use memory_map::{FRAME_BYTES, MemoryKind, MemoryMap, MemoryMapError, MemoryRange};
pub use mode::{LEGACY32, LONG4, LONG5, Level, Mode, PAE, ReservedInputs};
pub use rng::SeededRng;
pub use sched::{Run, Scheduler};
pub use segment::{
    Descriptor, LINUX_GDT_32, LINUX_GDT_32_FIRST, LINUX_GDT_64, Segment, SegmentRegister,
    SegmentedCpu, Selector,
};
pub use sleep_lock::MachineSleepLock;
pub use vcpu::VirtualCpu;
pub use violation::{OnViolation, Violation, ViolationKind};
pub use walker::{Access, AccessKind};
