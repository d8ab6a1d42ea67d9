#![doc = include_str!("../README.md")]
#![no_std]

mod boot;

pub use boot::{
    BootList, BootMap, BootMapError, BootRegion, EarlyAllocator, EarlyError, RegionKind,
    Reservation,
};
