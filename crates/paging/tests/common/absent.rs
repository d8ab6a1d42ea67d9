// The format of x86-64 on a processor that remembers absent entries and missing rights until it is told to forget, as RISC-V's may: the mock
// machine has such a mode, and what is filled without a flush is refused for ever there.
use kmem_hal::{Canonical, Frame};
use kmem_paging::format::{Format, Kind, Level, X86_64};
use kmem_paging::{Attributes, Payload, Rights};

#[derive(Clone, Copy, Debug)]
pub struct X86Absent;

// SAFETY: F1 to F5: those of `X86_64`, which says every word; of what it leaves to be chosen, that absent entries are cached asks for flushes
// more.
unsafe impl Format for X86Absent {
    type Word = u64;
    const NAME: &'static str = "x86-64, absent entries cached";
    const LEVELS: &'static [Level] = X86_64::LEVELS;
    const MIN_LEVELS: usize = X86_64::MIN_LEVELS;
    const SOFT_BITS: u32 = X86_64::SOFT_BITS;
    const PAYLOAD_BITS: u32 = X86_64::PAYLOAD_BITS;
    const PROTECTION_KEYS: u8 = X86_64::PROTECTION_KEYS;
    const FRAME_LIMIT: u64 = X86_64::FRAME_LIMIT;
    const TABLE_FRAME_LIMIT: u64 = X86_64::TABLE_FRAME_LIMIT;
    const ROOT_FRAME_LIMIT: u64 = X86_64::ROOT_FRAME_LIMIT;
    const CACHES_ABSENT: bool = true;
    const FIXED_TOP: bool = false;

    fn canonical(levels: usize) -> Canonical {
        X86_64::canonical(levels)
    }
    fn can_encode(level: usize, frame: Frame, attributes: &Attributes) -> bool {
        X86_64::can_encode(level, frame, attributes)
    }
    fn leaf(level: usize, frame: Frame, attributes: &Attributes) -> u64 {
        X86_64::leaf(level, frame, attributes)
    }
    fn table(level: usize, frame: Frame) -> u64 {
        X86_64::table(level, frame)
    }
    fn payload(payload: Payload) -> u64 {
        X86_64::payload(payload)
    }
    fn kind(level: usize, word: u64) -> Kind {
        X86_64::kind(level, word)
    }
    fn table_frame(word: u64) -> Frame {
        X86_64::table_frame(word)
    }
    fn leaf_frame(level: usize, word: u64) -> Frame {
        X86_64::leaf_frame(level, word)
    }
    fn attributes(level: usize, word: u64) -> Attributes {
        X86_64::attributes(level, word)
    }
    fn payload_of(word: u64) -> Payload {
        X86_64::payload_of(word)
    }
    fn is_settled(word: u64) -> bool {
        X86_64::is_settled(word)
    }
    fn with_rights(level: usize, word: u64, rights: Rights) -> u64 {
        X86_64::with_rights(level, word, rights)
    }
}
