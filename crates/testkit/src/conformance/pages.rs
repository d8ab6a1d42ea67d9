//! Checks of [`PageProvider`] and [`BlockDevice`], clauses `W1` to `W3`, and `W4` of the former.

use kmem_hal::{BlockDevice, Frame, IoError, IoState, IoTicket, PAGE_SIZE, PageProvider, PhysMap};

use super::Report;

const PAGE: usize = PAGE_SIZE as usize;
/// Questions after which I/O that is still pending counts as lost.
const PATIENCE: u32 = 1_000_000;

/// Pages by number, whatever they belong to.
trait Pages {
    const NAME: &'static str;
    /// Bytes in all.
    fn bytes(&self) -> u64;
    /// Whether it says of itself that it cannot be written; `None` where it says nothing of that.
    fn is_read_only(&self) -> Option<bool>;
    fn read(&self, page: u64, frame: Frame) -> Result<IoState, IoError>;
    fn write(&self, page: u64, frame: Frame) -> Result<IoState, IoError>;
    fn poll(&self, ticket: IoTicket) -> Result<IoState, IoError>;
}

struct File<'a, P>(&'a P);
impl<P: PageProvider> Pages for File<'_, P> {
    const NAME: &'static str = "PageProvider";
    fn bytes(&self) -> u64 {
        self.0.size()
    }
    fn is_read_only(&self) -> Option<bool> {
        Some(self.0.is_read_only())
    }
    fn read(&self, page: u64, frame: Frame) -> Result<IoState, IoError> {
        self.0.read(page, frame)
    }
    fn write(&self, page: u64, frame: Frame) -> Result<IoState, IoError> {
        self.0.write(page, frame)
    }
    fn poll(&self, ticket: IoTicket) -> Result<IoState, IoError> {
        self.0.poll(ticket)
    }
}

struct Device<'a, B>(&'a B);
impl<B: BlockDevice> Pages for Device<'_, B> {
    const NAME: &'static str = "BlockDevice";
    fn bytes(&self) -> u64 {
        self.0.blocks() * PAGE_SIZE
    }
    fn is_read_only(&self) -> Option<bool> {
        None
    }
    fn read(&self, page: u64, frame: Frame) -> Result<IoState, IoError> {
        self.0.read(page, frame)
    }
    fn write(&self, page: u64, frame: Frame) -> Result<IoState, IoError> {
        self.0.write(page, frame)
    }
    fn poll(&self, ticket: IoTicket) -> Result<IoState, IoError> {
        self.0.poll(ticket)
    }
}

/// Checks a file of at least one page; what is in it is lost, if it can be written.
///
/// `relax` is called while I/O is on its way.
///
/// # Safety
///
/// The caller owns both frames, which differ and are mapped by `map`.
pub unsafe fn check_provider<P: PageProvider, M: PhysMap>(
    report: &Report,
    file: &P,
    map: &M,
    frames: [Frame; 2],
    relax: &dyn Fn(),
) {
    // SAFETY: the caller's promise is passed on.
    unsafe { check(report, &File(file), map, frames, relax) }
}

/// Checks a device of at least one block; what is on its first blocks is lost.
///
/// # Safety
///
/// As [`check_provider`].
pub unsafe fn check_device<B: BlockDevice, M: PhysMap>(
    report: &Report,
    device: &B,
    map: &M,
    frames: [Frame; 2],
    relax: &dyn Fn(),
) {
    // SAFETY: the caller's promise is passed on.
    unsafe { check(report, &Device(device), map, frames, relax) }
}

fn finish<P: Pages>(pages: &P, mut state: IoState, relax: &dyn Fn()) -> Result<(), IoError> {
    for _ in 0..PATIENCE {
        match state {
            IoState::Done => return Ok(()),
            IoState::Pending(ticket) => {
                relax();
                state = pages.poll(ticket)?;
            }
        }
    }
    Err(IoError::UnknownTicket)
}

/// # Safety
///
/// As [`check_provider`].
unsafe fn check<P: Pages, M: PhysMap>(
    report: &Report,
    pages: &P,
    map: &M,
    [a, b]: [Frame; 2],
    relax: &dyn Fn(),
) {
    let name = P::NAME;
    // SAFETY: the caller owns both frames.
    let fill = |frame: Frame, byte: u8| unsafe {
        map.to_ptr(frame.start()).write_bytes(byte, PAGE);
    };
    let bytes = |frame: Frame| -> Vec<u8> {
        let start = map.to_ptr(frame.start());
        (0..PAGE)
            // SAFETY: as above.
            .map(|at| unsafe { start.add(at).read_volatile() })
            .collect()
    };
    let read = |page: u64, frame: Frame| {
        pages
            .read(page, frame)
            .and_then(|state| finish(pages, state, relax))
    };
    let size = pages.bytes();
    if size == 0 {
        report.skip(name, "W2", "there is no page to read");
        return;
    }
    let last = (size - 1) / PAGE_SIZE;
    for page in [0, last] {
        // Two kinds of junk: a byte that is not written shows in one of them.
        fill(a, 0xa5);
        fill(b, 0x5a);
        let read = [read(page, a), read(page, b)];
        if !report.check(name, "W2", read == [Ok(()), Ok(())], || {
            format!("page {page} of {size} bytes cannot be read: {read:?}")
        }) {
            return;
        }
        let (first, second) = (bytes(a), bytes(b));
        report.check(name, "W2", first == second, || {
            let at = first.iter().zip(&second).position(|(x, y)| x != y);
            format!(
                "a read that is done has not written byte {} of page {page}",
                at.unwrap_or(0)
            )
        });
        let end = (size - page * PAGE_SIZE).min(PAGE_SIZE) as usize;
        report.check(
            name,
            "W2",
            first[end..].iter().all(|&byte| byte == 0),
            || format!("bytes of page {page} past the end of the file are not zero"),
        );
    }
    // Beyond the end nothing starts.
    fill(a, 0xa5);
    let beyond = read(last + 1, a);
    report.check(
        name,
        "W2",
        beyond.is_err() && bytes(a).iter().all(|&byte| byte == 0xa5),
        || {
            format!(
                "page {} is past the end, and reading it gave {beyond:?}",
                last + 1
            )
        },
    );

    let pattern: Vec<u8> = (0..PAGE).map(|at| (at * 7 + at / 256) as u8).collect();
    // SAFETY: the caller owns the frame.
    unsafe {
        map.to_ptr(a.start())
            .copy_from_nonoverlapping(pattern.as_ptr(), PAGE);
    }
    let write = |page: u64| {
        pages
            .write(page, a)
            .and_then(|state| finish(pages, state, relax))
    };
    let written = write(0);
    if let Some(read_only) = pages.is_read_only() {
        let refused = Err(IoError::ReadOnly);
        let never_written = written == refused && write(last) == refused;
        report.check(name, "W4", never_written == read_only, || {
            format!(
                "it says that it is read-only: {read_only}, and writing page 0 gave {written:?}"
            )
        });
    }
    match written {
        Err(IoError::ReadOnly) => report.skip(name, "W3", "it cannot be written"),
        Err(error) => {
            report.check(name, "W3", false, || {
                format!("page 0 cannot be written: {error}")
            });
        }
        Ok(()) => {
            // What happens to the frame after the write is done is not the page's business.
            fill(a, 0x11);
            fill(b, 0x22);
            let again = read(0, b);
            let end = size.min(PAGE_SIZE) as usize;
            report.check(
                name,
                "W3",
                again.is_ok() && bytes(b)[..end] == pattern[..end],
                || "what was written is not what is read back".into(),
            );
        }
    }
    // The frame of a read that is done is the caller's again.
    if read(0, a).is_ok() {
        fill(a, 0x33);
        for _ in 0..8 {
            relax();
            let _ = read(0, b);
        }
        report.check(
            name,
            "W1",
            bytes(a).iter().all(|&byte| byte == 0x33),
            || "the frame of a read that was done was written to".into(),
        );
    }
}
