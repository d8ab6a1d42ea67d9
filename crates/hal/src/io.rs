//! Pages of files and blocks of devices: what the page cache and swap read and write.
//!
//! Both interfaces are split into submit and complete, so that a fault that needs I/O holds no lock while it waits:
//! the fault path submits, keeps a ticket, and comes back. A device that answers at once says so at submission.

use core::fmt;

use crate::frame::Frame;

/// I/O that was submitted and is not done.
#[must_use = "a ticket says when the I/O is done"]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IoTicket(pub u64);

/// How I/O stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoState {
    /// Finished well.
    Done,
    /// On its way: ask again with the ticket.
    Pending(IoTicket),
}

/// Why I/O failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum IoError {
    /// Beyond the end of the file or device.
    OutOfRange,
    /// The device failed.
    Device,
    /// The object cannot be written.
    ReadOnly,
    /// No such ticket.
    UnknownTicket,
}

impl fmt::Display for IoError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OutOfRange => "beyond the end of the file or device",
            Self::Device => "the device failed",
            Self::ReadOnly => "the object cannot be written",
            Self::UnknownTicket => "no such I/O is on its way",
        })
    }
}

impl core::error::Error for IoError {}

/// The pages of a file, by index.
///
/// What of a page lies past the file's end is zero when its write is submitted; programs that map the page may store there until the write is
/// done. So a file that grows shows zeros where its old end was, whether a provider keeps whole pages or the bytes of the file alone, if its
/// cache is told (`Mm::extend_file` of `kmem-cow-mm`).
///
/// Whoever gives a file up, by its last handle or its last mapping, waits for calls of its provider that are under way: such a call does neither
/// itself, nor does it wait for who does.
///
/// # Safety
///
/// - `W1`: from submission of a read until it is done, only the provider writes to the frame.
/// - `W2`: a read that is done has written all 4096 bytes; those past the end of the file are zero.
/// - `W3`: a write that is done has taken the bytes as they were at some instant since its submission.
/// - `W4`: it [is read-only](PageProvider::is_read_only), for as long as it is there, exactly where it answers [`IoError::ReadOnly`] to whoever would
///   write one of its pages, whichever that is.
pub unsafe trait PageProvider {
    /// The size of the file in bytes.
    ///
    /// Asked for with a page's lock held as well, for which those wait who tell the cache of a new size: waits for no lock that is held across
    /// `Mm::truncate_file` or `Mm::extend_file` of `kmem-cow-mm`.
    #[doc(alias = "i_size_read")]
    fn size(&self) -> u64;

    /// Whether no page can ever be written (`W4`): of a file system that is mounted to be read, or on a medium that is.
    ///
    /// Of such a file the cache keeps no page for [`write`](Self::write): no shared mapping of it can be written, whatever it was opened for, and
    /// where it moved its end, the zeros beyond that are the provider's to keep.
    fn is_read_only(&self) -> bool {
        false
    }

    /// Starts reading page `index` into `frame`.
    ///
    /// # Errors
    ///
    /// [`IoError`]; nothing was started.
    #[doc(alias = "readpage")]
    #[doc(alias = "read_folio")]
    fn read(&self, index: u64, frame: Frame) -> Result<IoState, IoError>;

    /// Starts writing `frame` to page `index`.
    ///
    /// # Errors
    ///
    /// [`IoError`]; nothing was started. Who [is read-only](Self::is_read_only) answers [`IoError::ReadOnly`], and nobody else does always.
    #[doc(alias = "writepage")]
    fn write(&self, index: u64, frame: Frame) -> Result<IoState, IoError>;

    /// How the I/O of a ticket stands; a ticket is forgotten once it is `Done` or failed.
    ///
    /// # Errors
    ///
    /// [`IoError`] where the I/O failed.
    fn poll(&self, ticket: IoTicket) -> Result<IoState, IoError>;
}

/// A device of 4 KiB blocks: swap.
///
/// # Safety
///
/// As [`PageProvider`]'s `W1` to `W3`, for blocks.
pub unsafe trait BlockDevice {
    /// Blocks of 4096 bytes.
    fn blocks(&self) -> u64;

    /// Starts reading block `block` into `frame`.
    ///
    /// # Errors
    ///
    /// [`IoError`]; nothing was started.
    fn read(&self, block: u64, frame: Frame) -> Result<IoState, IoError>;

    /// Starts writing `frame` to block `block`.
    ///
    /// # Errors
    ///
    /// [`IoError`]; nothing was started.
    fn write(&self, block: u64, frame: Frame) -> Result<IoState, IoError>;

    /// How the I/O of a ticket stands.
    ///
    /// # Errors
    ///
    /// [`IoError`] where the I/O failed.
    fn poll(&self, ticket: IoTicket) -> Result<IoState, IoError>;
}
