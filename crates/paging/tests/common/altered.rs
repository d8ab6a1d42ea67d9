// The format of x86-64 with other answers to what formats may choose: at which levels an entry can say that its table is shared, whether CPUs are
// told of rights that they get, and which frames small leaves can name.
#[macro_use]
#[path = "as_x86_64.rs"]
mod as_x86_64;

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
    as_x86_64!();
    const NAME: &'static str = "x86-64, altered";
    const CACHES_ABSENT: bool = false;
    const TELLS_GAINS: bool = TELLS;

    fn can_encode(level: usize, frame: Frame, attributes: &Attributes) -> bool {
        (level > 1 || frame.number() < SMALL) && X86_64::can_encode(level, frame, attributes)
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
}
