//! An image's table of program headers, read once and kept in a frame while exec works.
//!
//! ```text
//!   file  [ header | table: entry, entry, .. (at most a page) | .. ] ── read ──> frame ── parsed each time it is asked for
//! ```
//!
//! What the file says later does not matter: what was checked is what is mapped. A frame, and not the stack: 73 entries of 56 bytes are
//! more than a kernel's stack should give.
//!
//! Source: Linux `fs/binfmt_elf.c` (`load_elf_phdrs`).

use kmem_hal::{FrameRequest, FrameSink, FrameSource, OwnedFrame};
use kmem_paging::Env as _;

use crate::elf::{Class, ENTRY_SIZE, Entry};
use crate::env::Env;
use crate::exec::ExecError;
use crate::mm::Mm;

/// The table, in a frame that is given back when this is dropped.
pub(crate) struct ProgramHeaders<'m, E: Env> {
    env: &'m E,
    frame: Option<OwnedFrame>,
    class: Class,
    count: u64,
}

impl<'m, E: Env> ProgramHeaders<'m, E> {
    /// Reads `count` entries, which fit a page, by `read`: an index, and where its bytes go.
    ///
    /// # Errors
    ///
    /// `read`'s, [`Errno::ENOMEM`](crate::Errno::ENOMEM), and [`Errno::ENOEXEC`](crate::Errno::ENOEXEC) for an entry that is none.
    pub fn read(
        mm: &Mm<'m, E>,
        class: Class,
        count: u64,
        mut read: impl FnMut(u64, &mut [u8]) -> Result<(), ExecError>,
    ) -> Result<Self, ExecError> {
        let frame = mm.env().paging().frames().alloc(&FrameRequest::ONE);
        let frame = frame.map_err(crate::errno::Errno::from)?;
        let first = frame.first();
        let table = Self {
            env: mm.env(),
            frame: Some(frame),
            class,
            count,
        };
        let mut bytes = [0; ENTRY_SIZE];
        let bytes = &mut bytes[..class.entry_size()];
        for index in 0..count {
            read(index, bytes)?;
            Entry::parse(class, bytes)?;
            mm.write_frame(first, index as usize * class.entry_size(), bytes);
        }
        Ok(table)
    }

    /// The entries, in the table's order.
    pub fn entries(&self) -> impl Iterator<Item = Entry> {
        let size = self.class.entry_size();
        let first = self.frame.as_ref().map(OwnedFrame::first);
        (0..self.count).filter_map(move |index| {
            let mut bytes = [0; ENTRY_SIZE];
            let bytes = &mut bytes[..size];
            Mm::read_frame_of(self.env, first?, index as usize * size, bytes);
            // Each was looked at when it was read.
            Entry::parse(self.class, bytes).ok()
        })
    }
}

impl<E: Env> Drop for ProgramHeaders<'_, E> {
    fn drop(&mut self) {
        if let Some(frame) = self.frame.take() {
            self.env.paging().frames().free(frame);
        }
    }
}
