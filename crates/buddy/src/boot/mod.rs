//! Memory before the allocator: the boot map and the early allocator.
//!
//! ```text
//!  E820, PVH, multiboot, device tree      SRAT             kernel image, initrd
//!            | push                         | assign_node        | reserve
//!            v                              v                    v
//!       regions (usable, reserved, ..)    node ranges       reservations  <- EarlyAllocator
//!            '------------- present ---------'--- minus reservations ---> free frames -> zones
//! ```

mod early;
mod error;
mod kind;
mod map;
mod pieces;

pub use early::EarlyAllocator;
pub use error::{BootList, BootMapError, EarlyError};
pub use kind::{RegionKind, Reservation};
pub use map::{BootMap, BootRegion};
