// The format of x86-64 with other answers to what formats may choose: at which levels an entry can say that its table is shared, whether CPUs are
// told of rights that they get, and which frames small leaves can name.
use kmem_hal::{Canonical, Frame};
use kmem_paging::format::{Format, Kind, Level, X86_64};
use kmem_paging::{Attributes, Payload};

/// Level `n` shares where bit `n` of `SHARES` is set; leaves of level 1 name frames below `SMALL`.
#[derive(Clone, Copy, Debug)]
pub struct Altered<const SHARES: u32, const TELLS: bool, const SMALL: u64>;

// SAFETY: F1 to F5: those of `X86_64`, which says every word; an entry that is never made says nothing, and no hardware walks these tables.
unsafe impl<const SHARES: u32, const TELLS: bool, const SMALL: u64> Format
    for Altered<SHARES, TELLS, SMALL>
{
    type Word = u64;
    const NAME: &'static str = "x86-64, altered";
    const LEVELS: &'static [Level] = X86_64::LEVELS;
    const MIN_LEVELS: usize = X86_64::MIN_LEVELS;
    const SOFT_BITS: u32 = X86_64::SOFT_BITS;
    const PAYLOAD_BITS: u32 = X86_64::PAYLOAD_BITS;
    const FRAME_LIMIT: u64 = X86_64::FRAME_LIMIT;
    const TABLE_FRAME_LIMIT: u64 = X86_64::TABLE_FRAME_LIMIT;
    const ROOT_FRAME_LIMIT: u64 = X86_64::ROOT_FRAME_LIMIT;
    const CACHES_ABSENT: bool = false;
    const TELLS_GAINS: bool = TELLS;
    const FIXED_TOP: bool = false;

    fn canonical(levels: usize) -> Canonical {
        X86_64::canonical(levels)
    }
    fn can_encode(level: usize, frame: Frame, attributes: &Attributes) -> bool {
        (level > 1 || frame.number() < SMALL) && X86_64::can_encode(level, frame, attributes)
    }
    fn leaf(level: usize, frame: Frame, attributes: &Attributes) -> u64 {
        X86_64::leaf(level, frame, attributes)
    }
    fn table(level: usize, frame: Frame) -> u64 {
        X86_64::table(level, frame)
    }
    fn shared_table(level: usize, word: u64) -> Option<u64> {
        (SHARES >> level & 1 != 0).then(|| X86_64::shared_table(level, word))?
    }
    fn is_shared_table(level: usize, word: u64) -> bool {
        SHARES >> level & 1 != 0 && X86_64::is_shared_table(level, word)
    }
    fn own_table(level: usize, word: u64) -> u64 {
        X86_64::own_table(level, word)
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
}
