//! Physical and linear addresses, and the canonical forms of linear ones.
//!
//! x86 knows three kinds of address, and a kernel that mixes them up is wrong in
//! a way that no test shows until the offset is not zero. So each has a type:
//!
//! ```text
//!  logical (selector:offset) --segmentation--> linear --paging--> physical
//!     mock-x86 only                           VirtAddr           PhysAddr
//! ```
//!
//! Invariants
//! - `I1`: arithmetic never wraps silently: every operation that may leave the
//!   64-bit space is `checked_*` and answers `None`.
//! - `I2`: both types hold 64 bits on every target. A 32-bit kernel with PAE has
//!   64-bit physical addresses and 32-bit pointers.
//! - `I3`: a `VirtAddr` is any 64-bit number; whether a format can translate it is
//!   asked of a [`Canonical`] form, because that depends on the paging mode.
//!
//! Source: Intel SDM volume 1, 3.3.7.1 (canonical addressing) and volume 3A, 4.

use core::fmt;

/// log2 of the size of a base page and of a frame: 4 KiB in every supported format.
pub const PAGE_SHIFT: u32 = 12;

/// Bytes in a base page and in a frame.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;

macro_rules! address {
    ($(#[$meta:meta])* $name:ident) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(u64);

        impl $name {
            /// The address 0.
            pub const ZERO: Self = Self(0);

            /// Wraps a raw 64-bit address (bytes).
            #[must_use]
            pub const fn new(raw: u64) -> Self {
                Self(raw)
            }

            /// The raw 64-bit address (bytes).
            #[must_use]
            pub const fn as_u64(self) -> u64 {
                self.0
            }

            /// Adds `bytes`; `None` if the sum leaves the 64-bit space (`I1`).
            #[must_use]
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(sum) => Some(Self(sum)),
                    None => None,
                }
            }

            /// Subtracts `bytes`; `None` below 0 (`I1`).
            #[must_use]
            pub const fn checked_sub(self, bytes: u64) -> Option<Self> {
                match self.0.checked_sub(bytes) {
                    Some(difference) => Some(Self(difference)),
                    None => None,
                }
            }

            /// The distance in bytes from `base` up to `self`; `None` if `base` is higher.
            #[must_use]
            pub const fn offset_from(self, base: Self) -> Option<u64> {
                self.0.checked_sub(base.0)
            }

            /// Rounds down to a multiple of `align` bytes.
            ///
            /// `align` is a power of two; any other number is treated as the next one up.
            #[must_use]
            pub const fn align_down(self, align: u64) -> Self {
                Self(self.0 & !(mask(align)))
            }

            /// Rounds up to a multiple of `align` bytes (a power of two); `None` past the top.
            #[must_use]
            pub const fn align_up(self, align: u64) -> Option<Self> {
                match self.0.checked_add(mask(align)) {
                    Some(sum) => Some(Self(sum & !mask(align))),
                    None => None,
                }
            }

            /// Whether the address is a multiple of `align` bytes (a power of two).
            #[must_use]
            pub const fn is_aligned(self, align: u64) -> bool {
                self.0 & mask(align) == 0
            }

            /// The byte offset inside the 4 KiB page, 0..4096.
            #[must_use]
            pub const fn page_offset(self) -> u64 {
                self.0 & (PAGE_SIZE - 1)
            }
        }

        impl From<u64> for $name {
            fn from(raw: u64) -> Self {
                Self(raw)
            }
        }

        impl From<$name> for u64 {
            fn from(address: $name) -> u64 {
                address.0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }
    };
}

const fn mask(align: u64) -> u64 {
    match align.checked_next_power_of_two() {
        Some(power) => power - 1,
        None => u64::MAX,
    }
}

address! {
    /// A physical address in bytes: what the memory bus sees.
    ///
    /// # Examples
    ///
    /// ```
    /// use kmem_hal::PhysAddr;
    ///
    /// let a = PhysAddr::new(0x1234);
    /// assert_eq!(a.align_down(4096), PhysAddr::new(0x1000));
    /// assert_eq!(a.align_up(4096), Some(PhysAddr::new(0x2000)));
    /// assert_eq!(PhysAddr::new(u64::MAX).checked_add(1), None);
    /// ```
    PhysAddr
}

address! {
    /// A linear (virtual) address in bytes: what paging translates.
    ///
    /// # Examples
    ///
    /// ```
    /// use kmem_hal::{Canonical, VirtAddr};
    ///
    /// let hole = VirtAddr::new(0x0000_8000_0000_0000);
    /// assert!(!Canonical::X86_48.contains(hole));
    /// assert_eq!(Canonical::X86_48.sign_extend(hole), VirtAddr::new(0xffff_8000_0000_0000));
    /// ```
    VirtAddr
}

impl VirtAddr {
    /// The address of a pointer.
    pub fn from_ptr<T: ?Sized>(pointer: *const T) -> Self {
        Self(pointer.cast::<u8>().addr() as u64)
    }
}

/// Which linear addresses a paging mode can translate.
///
/// Long mode demands that the bits above the translated ones equal the highest
/// translated bit; 32-bit modes have no bits above.
///
/// Source: Intel SDM volume 1, 3.3.7.1; RISC-V privileged manual, 10.4; Arm ARM D8.2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Canonical {
    bits: u32,
    sign_extended: bool,
}

impl Canonical {
    /// 32-bit linear addresses: two-level and PAE.
    pub const X86_32: Self = Self::zero_extended(32);
    /// 48 bits, sign-extended: x86-64 with four levels.
    pub const X86_48: Self = Self::sign_extended(48);
    /// 57 bits, sign-extended: x86-64 with LA57.
    pub const X86_57: Self = Self::sign_extended(57);
    /// RISC-V Sv39.
    pub const SV39: Self = Self::sign_extended(39);
    /// RISC-V Sv48.
    pub const SV48: Self = Self::sign_extended(48);
    /// RISC-V Sv57.
    pub const SV57: Self = Self::sign_extended(57);
    /// AArch64 stage 1 with 48 bits: TTBR0 below, TTBR1 above.
    pub const AARCH64_48: Self = Self::sign_extended(48);

    /// A form of `bits` (1..=64) whose upper bits repeat the highest translated one.
    #[must_use]
    pub const fn sign_extended(bits: u32) -> Self {
        Self {
            bits: clamp(bits),
            sign_extended: true,
        }
    }

    /// A form of `bits` (1..=64) whose upper bits are zero.
    #[must_use]
    pub const fn zero_extended(bits: u32) -> Self {
        Self {
            bits: clamp(bits),
            sign_extended: false,
        }
    }

    /// How many address bits are translated.
    #[must_use]
    pub const fn bits(self) -> u32 {
        self.bits
    }

    /// Whether `address` can be translated.
    #[must_use]
    pub const fn contains(self, address: VirtAddr) -> bool {
        self.sign_extend(address).as_u64() == address.as_u64()
    }

    /// The canonical address with the same translated bits.
    #[must_use]
    pub const fn sign_extend(self, address: VirtAddr) -> VirtAddr {
        let unused = 64 - self.bits;
        VirtAddr::new(if self.sign_extended {
            (((address.as_u64() << unused) as i64) >> unused) as u64
        } else {
            (address.as_u64() << unused) >> unused
        })
    }

    /// The last address of the lower half: `[0, lower_end]` is canonical.
    #[must_use]
    pub const fn lower_end(self) -> VirtAddr {
        let bits = if self.sign_extended {
            self.bits - 1
        } else {
            self.bits
        };
        VirtAddr::new(if bits == 0 {
            0
        } else {
            u64::MAX >> (64 - bits)
        })
    }

    /// The first address of the upper half; `None` where the form has only one.
    #[must_use]
    pub const fn upper_start(self) -> Option<VirtAddr> {
        if self.sign_extended && self.bits < 64 {
            Some(VirtAddr::new(!self.lower_end().as_u64()))
        } else {
            None
        }
    }

    /// Adds `bytes` and stays canonical: `None` past the top or into the hole.
    #[must_use]
    pub const fn checked_add(self, address: VirtAddr, bytes: u64) -> Option<VirtAddr> {
        match address.checked_add(bytes) {
            Some(sum) if self.contains(sum) && self.contains(address) => {
                // Both halves are convex, so leaving one half always crosses the hole.
                let lower = self.lower_end().as_u64();
                if (address.as_u64() <= lower) == (sum.as_u64() <= lower) {
                    Some(sum)
                } else {
                    None
                }
            }
            _ => None,
        }
    }
}

const fn clamp(bits: u32) -> u32 {
    match bits {
        0 => 1,
        65.. => 64,
        n => n,
    }
}
