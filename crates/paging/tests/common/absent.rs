// The format of x86-64 on a processor that remembers absent entries and missing rights until it is told to forget, as RISC-V's may: the mock
// machine has such a mode, and what is filled without a flush is refused for ever there.
#[macro_use]
#[path = "as_x86_64.rs"]
mod as_x86_64;

use kmem_hal::{Canonical, Frame};
use kmem_paging::format::{Format, Kind, Level, X86_64};
use kmem_paging::{Attributes, Payload, Rights};

#[derive(Clone, Copy, Debug)]
pub struct X86Absent;

// SAFETY: F1 to F5: those of `X86_64`, which says every word; of what it leaves to be chosen, that absent entries are cached asks for flushes
// more.
unsafe impl Format for X86Absent {
    as_x86_64!();
    const NAME: &'static str = "x86-64, absent entries cached";
    const PROTECTION_KEYS: u8 = X86_64::PROTECTION_KEYS;
    const CACHES_ABSENT: bool = true;

    fn can_encode(level: usize, frame: Frame, attributes: &Attributes) -> bool {
        X86_64::can_encode(level, frame, attributes)
    }
    fn with_rights(level: usize, word: u64, rights: Rights) -> u64 {
        X86_64::with_rights(level, word, rights)
    }
}
