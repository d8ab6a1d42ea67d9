//! What an entry of a page table says when its page is not there: a word that only this crate reads.
//!
//! ```text
//!   kind (2 bits)   0 swapped    [ offset of the slot | area (3) ]
//!                   1 moving     [ frame number | dirty | accessed | writable ]
//!                   2 guard      nothing: the page is part of a guard region
//! ```
//!
//! The page table inverts the bits where an address would be, so that the entry names no memory that exists (L1TF, CVE-2018-3620).
//!
//! Source: Linux `include/linux/swapops.h`.

use kmem_hal::Frame;
use kmem_paging::Payload;
use kmem_paging::format::Format;

const KIND_BITS: u32 = 2;
const SWAPPED: u64 = 0;
const MOVING: u64 = 1;
const GUARD: u64 = 2;
const AREA_BITS: u32 = 3;

/// Areas of swap at most: what their number has bits for.
pub const SWAP_AREAS: usize = 1 << AREA_BITS;

/// A page's place in swap.
#[doc(alias = "swp_entry_t")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SwapEntry {
    /// Which area.
    pub area: u8,
    /// Which slot, and block of the device.
    pub offset: u64,
}

impl SwapEntry {
    /// In one word, never 0, for a slot of the frame table.
    pub(crate) const fn to_word(self) -> u64 {
        (self.offset << AREA_BITS | self.area as u64) + 1
    }

    /// From that word.
    pub(crate) const fn from_word(word: u64) -> Option<Self> {
        match word.checked_sub(1) {
            Some(word) => Some(Self {
                area: (word & (SWAP_AREAS as u64 - 1)) as u8,
                offset: word >> AREA_BITS,
            }),
            None => None,
        }
    }
}

/// A page on its way to another frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Moving {
    /// The frame that it leaves.
    pub from: Frame,
    /// Bits of the entry that the mapping does not say.
    pub writable: bool,
    pub accessed: bool,
    pub dirty: bool,
}

/// An entry without a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Absent {
    Swapped(SwapEntry),
    Moving(Moving),
    Guard,
}

impl Absent {
    /// The entry's payload; `None` where the format has too few bits for the number.
    pub fn payload<F: Format>(self) -> Option<Payload> {
        let number = match self {
            Self::Swapped(SwapEntry { area, offset }) => {
                let room = F::PAYLOAD_BITS.saturating_sub(KIND_BITS + AREA_BITS);
                if room < 64 && offset >> room != 0 {
                    return None;
                }
                (offset << AREA_BITS | u64::from(area)) << KIND_BITS | SWAPPED
            }
            Self::Moving(moving) => {
                let bits = u64::from(moving.writable)
                    | u64::from(moving.accessed) << 1
                    | u64::from(moving.dirty) << 2;
                (moving.from.number() << 3 | bits) << KIND_BITS | MOVING
            }
            Self::Guard => GUARD,
        };
        Payload::new::<F>(number)
    }

    /// What a payload says; `None` for one that this crate did not make.
    pub fn of(payload: Payload) -> Option<Self> {
        let number = payload.number() >> KIND_BITS;
        match payload.number() & ((1 << KIND_BITS) - 1) {
            SWAPPED => Some(Self::Swapped(SwapEntry {
                area: (number & (SWAP_AREAS as u64 - 1)) as u8,
                offset: number >> AREA_BITS,
            })),
            MOVING => Some(Self::Moving(Moving {
                from: Frame::from_number(number >> 3),
                writable: number & 1 != 0,
                accessed: number & 2 != 0,
                dirty: number & 4 != 0,
            })),
            GUARD => Some(Self::Guard),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kmem_paging::format::{X86_64, X86TwoLevel};

    #[test]
    fn entries_come_back_as_they_were() {
        let swapped = Absent::Swapped(SwapEntry {
            area: 7,
            offset: 0x12_3456,
        });
        let moving = Absent::Moving(Moving {
            from: Frame::from_number(0xf_ffff),
            writable: true,
            accessed: false,
            dirty: true,
        });
        for absent in [swapped, moving, Absent::Guard] {
            assert_eq!(
                Absent::of(absent.payload::<X86_64>().unwrap()),
                Some(absent)
            );
            assert_eq!(
                Absent::of(absent.payload::<X86TwoLevel>().unwrap()),
                Some(absent)
            );
        }
        let entry = SwapEntry { area: 3, offset: 0 };
        assert_eq!(SwapEntry::from_word(entry.to_word()), Some(entry));
        assert_eq!(SwapEntry::from_word(0), None);
    }

    #[test]
    fn a_slot_beyond_the_formats_bits_is_refused() {
        let far = Absent::Swapped(SwapEntry {
            area: 0,
            offset: 1 << 40,
        });
        assert_eq!(far.payload::<X86TwoLevel>(), None);
    }
}
