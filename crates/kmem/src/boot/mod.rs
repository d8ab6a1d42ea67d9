//! Boot maps from the tables that boot protocols hand over.
//!
//! Each adapter reads the entries of one protocol, in whatever order and overlap they come, and pushes them into a
//! [`BootMap`](kmem_buddy::BootMap). Errors name the entry, its field and the value. Nothing is allocated, and the byte
//! readers trust no length.
//!
//! | protocol | from bytes or plain numbers | from a crate's types, with the feature |
//! |---|---|---|
//! | BIOS, Linux's zero page | [`e820`], [`raw`] | |
//! | PVH | [`pvh`], [`raw`] | |
//! | UEFI | [`uefi`] | `uefi`: `uefi_descriptors` of `uefi-raw` 0.11 |
//! | Multiboot2 | [`multiboot2`] | `multiboot2`: `multiboot2_info` of `multiboot2` 0.24 |
//! | Limine | [`limine`] | `limine`: `limine_entries` of `limine` 0.5 |
//! | `bootloader` 0.11 (`blog_os`) | | `bootloader_api`: `bootloader` of `bootloader_api` 0.11 |
//!
//! **No protocol excludes everything that is in use.** What each leaves for the kernel to reserve stands at the top of its
//! adapter: the kernel's image, modules, the protocol's own structures, and the tables and the stack that the kernel runs on.
//! Memory that is free once they have been read goes in as boot-reclaimable, and
//! [`Buddy::release`](kmem_buddy::Buddy::release) frees it later; the book's chapter on booting shows the order.

mod bytes;
mod e820;
mod error;
mod limine;
mod multiboot2;
mod uefi;

#[cfg(feature = "bootloader_api")]
mod bootloader;

#[cfg(feature = "bootloader_api")]
pub use bootloader::bootloader;
pub use e820::{E820Entry, PvhEntry, e820, pvh, raw};
pub use error::TableError;
pub use limine::limine;
#[cfg(feature = "limine")]
pub use limine::limine_entries;
pub use multiboot2::multiboot2;
#[cfg(feature = "multiboot2")]
pub use multiboot2::multiboot2_info;
pub use uefi::uefi;
#[cfg(feature = "uefi")]
pub use uefi::uefi_descriptors;
