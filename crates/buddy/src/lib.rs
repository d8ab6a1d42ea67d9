#![doc = include_str!("../README.md")]
#![no_std]

/// Whether a fault was planted by a model; no build but loom's has any.
#[cfg(not(loom))]
macro_rules! planted {
    ($fault:ident) => {
        false
    };
}
#[cfg(loom)]
macro_rules! planted {
    ($fault:ident) => {
        crate::plant::is(crate::plant::Plant::$fault)
    };
}

mod alloc;
mod batch;
mod boot;
mod buddy;
mod build;
mod carve;
mod claim;
mod classic;
mod compact;
mod config;
mod cpu_cache;
mod cpus;
mod error;
mod free;
#[cfg(not(loom))]
mod pending;
#[cfg(loom)]
#[doc(hidden)]
pub mod pending;
mod plan;
#[cfg(loom)]
#[doc(hidden)]
pub mod plant;
mod range;
mod refusal;
mod reserved;
mod state;
mod view;
mod wanted;
mod watch;
mod watermark;
#[cfg(feature = "x86_64")]
mod x86_frames;
mod zone;

pub use boot::{
    BootList, BootMap, BootMapError, BootRegion, EarlyAllocator, EarlyError, RegionKind,
    Reservation,
};
pub use buddy::Buddy;
pub use claim::{ClaimError, CmaArea};
pub use compact::{Compacted, Emptying};
pub use config::Config;
pub use error::{FreeError, InitError, Misuse, PlaceError};
pub use range::OwnedRange;
pub use view::{
    BuddyInfo, FragmentationIndex, MemInfo, PageTypeInfo, Picture, PictureCell, Recount, ShowMem,
    Svg, UnusableIndex, ZoneFree, ZoneInfo,
};
pub use watch::{Audit, Owner, PageOwner, Watch, WatchedBuddy};
#[cfg(feature = "x86_64")]
pub use x86_frames::X86Frames;
pub use zone::kind::{MigrateType, ZoneKind, ZoneLimits};
