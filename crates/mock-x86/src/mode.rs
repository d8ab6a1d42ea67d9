//! The paging modes as data: which bits of a linear address index which table, and what is reserved where.
//!
//! ```text
//!            57     48  47     39  38     30  29     21  20     12  11         0
//!  LA57      | PML5  |  PML4   |   PDPT   |    PD    |    PT    |   offset  |   8-byte entries
//!  4-level            |  PML4   |   PDPT   |    PD    |    PT    |   offset  |
//!  PAE                           [31:30]=4 registers |    PD    |    PT    |
//!  32-bit                               |  PD 31:22  |  PT 21:12 |  offset  |   4-byte entries
//! ```
//!
//! The walker knows levels only through [`Mode`], so another mode is another constant here.
//!
//! Invariants
//! - `I1` levels are listed from the root down, their shifts fall, and the last one has shift 12.
//! - `I2` reserved masks come from MAXPHYADDR and EFER.NXE alone (SDM 3A 4.4.2, 4.5.4); a bit that a table of
//!   the manual calls *ignored* is never in a mask.
//!
//! Not handled: EPT, shadow stacks, HLAT, AMD's must-be-zero G bit in upper entries (Intel ignores it).

use crate::manual::{cr0, cr4, efer, pte};

/// One level of a paging mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Level {
    /// The lowest bit of the linear address that indexes this level's table; also log2 of what one entry maps.
    pub shift: u32,
    /// How many bits index it.
    pub bits: u32,
    /// Whether an entry with PS = 1 is a leaf here (and a last-level entry always is one).
    pub leaf: bool,
    /// Whether the processor sets an accessed flag in entries of this level (PAE's four registers have none).
    pub accessed: bool,
    /// The manual's name of an entry of this level.
    pub name: &'static str,
}

/// A paging mode of the processor.
#[derive(Debug, PartialEq, Eq)]
pub struct Mode {
    /// The mode's name.
    pub name: &'static str,
    /// Bits of a linear address.
    pub linear_bits: u32,
    /// Bytes of an entry.
    pub entry_bytes: u64,
    /// Whether an address must be sign-extended from its top bit (`#GP` otherwise).
    pub canonical: bool,
    /// Whether entries have a bit 63, XD.
    pub has_xd: bool,
    /// Whether entries have a protection key (only in IA-32e mode).
    pub has_pkey: bool,
    /// Levels from the root to the page table.
    pub levels: &'static [Level],
}

const fn level(shift: u32, bits: u32, leaf: bool, name: &'static str) -> Level {
    Level {
        shift,
        bits,
        leaf,
        accessed: true,
        name,
    }
}

/// 32-bit paging with 4-byte entries (SDM 3A 4.3).
pub static LEGACY32: Mode = Mode {
    name: "32-bit",
    linear_bits: 32,
    entry_bytes: 4,
    canonical: false,
    has_xd: false,
    has_pkey: false,
    levels: &[level(22, 10, true, "PDE"), level(12, 10, true, "PTE")],
};

/// PAE paging; the first level is the four PDPTE registers (SDM 3A 4.4).
pub static PAE: Mode = Mode {
    name: "PAE",
    linear_bits: 32,
    entry_bytes: 8,
    canonical: false,
    has_xd: true,
    has_pkey: false,
    levels: &[
        Level {
            shift: 30,
            bits: 2,
            leaf: false,
            accessed: false,
            name: "PDPTE",
        },
        level(21, 9, true, "PDE"),
        level(12, 9, true, "PTE"),
    ],
};

/// Four-level paging of IA-32e mode (SDM 3A 4.5).
pub static LONG4: Mode = Mode {
    name: "4-level",
    linear_bits: 48,
    entry_bytes: 8,
    canonical: true,
    has_xd: true,
    has_pkey: true,
    levels: &[
        level(39, 9, false, "PML4E"),
        level(30, 9, true, "PDPTE"),
        level(21, 9, true, "PDE"),
        level(12, 9, true, "PTE"),
    ],
};

/// Five-level paging, CR4.LA57 (SDM 3A 4.5).
pub static LONG5: Mode = Mode {
    name: "5-level",
    linear_bits: 57,
    entry_bytes: 8,
    canonical: true,
    has_xd: true,
    has_pkey: true,
    levels: &[
        level(48, 9, false, "PML5E"),
        level(39, 9, false, "PML4E"),
        level(30, 9, true, "PDPTE"),
        level(21, 9, true, "PDE"),
        level(12, 9, true, "PTE"),
    ],
};

impl Mode {
    /// Returns the mode that the control registers select, `None` while CR0.PG = 0 (SDM 3A 4.1.1).
    pub fn of(cr0_value: u64, cr4_value: u64, efer_value: u64) -> Option<&'static Mode> {
        if cr0_value & cr0::PG == 0 {
            None
        } else if cr4_value & cr4::PAE == 0 {
            Some(&LEGACY32)
        } else if efer_value & efer::LME == 0 {
            Some(&PAE)
        } else if cr4_value & cr4::LA57 == 0 {
            Some(&LONG4)
        } else {
            Some(&LONG5)
        }
    }

    /// Returns whether `address` may be used at all in this mode (otherwise `#GP`, or `#SS` on the stack).
    pub fn is_canonical(&self, address: u64) -> bool {
        if !self.canonical {
            return true;
        }
        let unused = 64 - self.linear_bits;
        ((address << unused) as i64 >> unused) as u64 == address
    }

    /// Brings an address into the mode: modes without canonical forms drop what is above their bits.
    pub fn wrap(&self, address: u64) -> u64 {
        if self.canonical {
            address
        } else {
            address & bits(0, self.linear_bits - 1)
        }
    }

    /// Returns the reserved bits of `entry` at `levels[index]`: any of them set faults with RSVD.
    ///
    /// `max_phys_bits` is MAXPHYADDR, `nxe` is EFER.NXE, `pse` is CR4.PSE, `gigabyte` is CPUID's Page1GB.
    pub fn reserved(&self, index: usize, entry: u64, features: &ReservedInputs) -> u64 {
        let level = &self.levels[index];
        let last = index + 1 == self.levels.len();
        if self.entry_bytes == 4 {
            // SDM 3A table 4-4: with PSE-36 bits 20:13 of a 4 MiB leaf carry address bits 39:32, of which those
            // at MAXPHYADDR and above are reserved, and bit 21 is reserved always. Nothing else is.
            if !last && features.pse && entry & pte::PS != 0 {
                let carried = features.max_phys_bits.clamp(32, 40) - 32;
                return bits(13 + carried, 21);
            }
            return 0;
        }
        if !level.accessed {
            // PAE's PDPTE (table 4-8): 2:1, 8:5 and everything from MAXPHYADDR up, bit 63 included.
            return bits(1, 2) | bits(5, 8) | bits(features.max_phys_bits, 63);
        }
        // In PAE mode bits 62:MAXPHYADDR are reserved; in IA-32e mode 62:52 are ignored or a key.
        let top = if self.has_pkey { 51 } else { 62 };
        let mut mask = bits(features.max_phys_bits, top);
        if !features.nxe {
            mask |= pte::XD;
        }
        if !last && entry & pte::PS != 0 {
            if !level.leaf || (level.shift == 30 && !features.gigabyte) {
                mask |= pte::PS;
            } else {
                // Bit 12 is PAT; the rest up to the page's own alignment must be zero.
                mask |= bits(13, level.shift - 1);
            }
        }
        mask
    }

    /// Returns whether `entry` at `levels[index]` maps a page.
    pub fn is_leaf(&self, index: usize, entry: u64, pse: bool) -> bool {
        index + 1 == self.levels.len()
            || (self.levels[index].leaf && entry & pte::PS != 0 && (self.entry_bytes == 8 || pse))
    }

    /// Returns which entry of the PAT a leaf at `levels[index]` picks (SDM 3A 4.9.2): PAT, PCD and PWT as bits 2 to 0.
    pub fn pat(&self, index: usize, entry: u64) -> u8 {
        let pat = if index + 1 == self.levels.len() {
            pte::PAT_4K
        } else {
            pte::PAT_LARGE
        };
        u8::from(entry & pat != 0) << 2
            | u8::from(entry & pte::PCD != 0) << 1
            | u8::from(entry & pte::PWT != 0)
    }

    /// Returns the physical address in `entry`: of the page if it is a leaf, else of the next table.
    pub fn address(&self, index: usize, entry: u64, leaf: bool) -> u64 {
        let last = index + 1 == self.levels.len();
        if self.entry_bytes == 4 {
            if leaf && !last {
                return (entry & 0xffc0_0000) | ((entry >> 13 & 0xff) << 32);
            }
            return entry & 0xffff_f000;
        }
        let low = if leaf { self.levels[index].shift } else { 12 };
        entry & bits(low, 51)
    }
}

/// What decides which bits are reserved, beside the entry itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReservedInputs {
    /// MAXPHYADDR, 32 to 52.
    pub max_phys_bits: u32,
    /// EFER.NXE.
    pub nxe: bool,
    /// CR4.PSE (only 32-bit paging looks at it).
    pub pse: bool,
    /// CPUID.80000001H:EDX.Page1GB.
    pub gigabyte: bool,
}

/// A mask of the bits `low` to `high`, both included; empty when `low > high`.
pub(crate) const fn bits(low: u32, high: u32) -> u64 {
    if low > high {
        return 0;
    }
    let upper = if high >= 63 {
        u64::MAX
    } else {
        (1 << (high + 1)) - 1
    };
    upper & !((1u64 << low) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: ReservedInputs = ReservedInputs {
        max_phys_bits: 46,
        nxe: true,
        pse: true,
        gigabyte: true,
    };

    #[test]
    fn masks_agree_with_the_tables_of_the_manual() {
        // PML4E: PS and 51:46.
        assert_eq!(LONG4.reserved(0, pte::PS, &PLAIN), 0x000f_c000_0000_0080);
        // 1 GiB leaf: 29:13 and 51:46.
        assert_eq!(LONG4.reserved(1, pte::PS, &PLAIN), 0x000f_c000_3fff_e000);
        // 2 MiB leaf: 20:13 and 51:46.
        assert_eq!(LONG4.reserved(2, pte::PS, &PLAIN), 0x000f_c000_001f_e000);
        // PTE: bit 7 is PAT.
        assert_eq!(
            LONG4.reserved(3, pte::PAT_4K, &PLAIN),
            0x000f_c000_0000_0000
        );
        // Without NX bit 63 is reserved, without 1 GiB pages PS in a PDPTE is.
        let old = ReservedInputs {
            nxe: false,
            gigabyte: false,
            max_phys_bits: 52,
            ..PLAIN
        };
        assert_eq!(LONG4.reserved(1, pte::PS, &old), pte::XD | pte::PS);
        // PAE: 62:46 in a PTE; 63:46, 8:5 and 2:1 in a PDPTE.
        assert_eq!(PAE.reserved(2, 0, &PLAIN), 0x7fff_c000_0000_0000);
        assert_eq!(PAE.reserved(0, 0, &PLAIN), 0xffff_c000_0000_01e6);
        // 32-bit: 4 MiB leaf with 36 physical bits: 21:17; with 40 and more: 21 alone.
        let pse36 = ReservedInputs {
            max_phys_bits: 36,
            ..PLAIN
        };
        assert_eq!(LEGACY32.reserved(0, pte::PS, &pse36), 0x003e_0000);
        assert_eq!(LEGACY32.reserved(0, pte::PS, &PLAIN), 0x0020_0000);
        assert_eq!(
            LEGACY32.reserved(
                0,
                pte::PS,
                &ReservedInputs {
                    pse: false,
                    ..PLAIN
                }
            ),
            0
        );
        assert_eq!(LEGACY32.reserved(1, pte::PAT_4K, &PLAIN), 0);
    }

    #[test]
    fn canonical_forms() {
        assert!(LONG4.is_canonical(0x0000_7fff_ffff_ffff));
        assert!(!LONG4.is_canonical(0x0000_8000_0000_0000));
        assert!(LONG4.is_canonical(0xffff_8000_0000_0000));
        assert!(!LONG4.is_canonical(0xffff_7fff_ffff_ffff));
        assert!(LONG5.is_canonical(0x00ff_ffff_ffff_ffff));
        assert!(!LONG5.is_canonical(0x0100_0000_0000_0000));
        assert!(LONG5.is_canonical(0xff00_0000_0000_0000));
    }
}
