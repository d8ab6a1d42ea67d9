//! Hardening as types: what a system, or one cache, checks beyond what costs nothing.
//!
//! A policy is a type, so a build without it has no trace of it: no branch, no byte. Several are put together in a tuple.
//!
//! | policy | finds | costs |
//! |---|---|---|
//! | [`Plain`] | double, invalid and foreign frees when the object reaches its slab | nothing |
//! | [`Check`] | the same, and frees to the wrong cache or with the wrong size or alignment, **at the call**, which then changes nothing | 8 bytes an object, or its alignment where that is more; a word written each way |
//! | [`Redzone`] | writes behind the object | 40 bytes an object, of which 8 are its alignment where that is more; a scan at the free |
//! | [`Poison`] | writes to freed objects, at their next allocation | both ways touch the whole object |
//! | [`Quarantine<N>`](Quarantine) | more of what `Check` and `Poison` find: the last `N` freed objects of each cache wait before they are given again | a lock a free |
//! | [`Shuffle`] | nothing; makes the order of addresses hard to guess | a swap an object at each refill |
//! | [`Owner`] | who allocated what is still there: cache, size and source line | 24 bytes an object, of which 8 are its alignment where that is more |
//! | [`Guard<EVERY>`](Guard) | out-of-bounds accesses of one in `EVERY` allocations, by a page fault | an allocation from the large source for each of them; where that is for tasks, only of those whose flags allow waiting, which are then freed in tasks |
//!
//! `Redzone`, `Poison`, `Quarantine` and `Owner` check as well.
//!
//! Sources: Linux `SLAB_CONSISTENCY_CHECKS`, `SLAB_RED_ZONE`, `SLAB_POISON`, `SLAB_STORE_USER`, `CONFIG_SLAB_FREELIST_RANDOM`, KFENCE; Bonwick 1994,
//! section 6.

/// What a policy switches on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    pub(crate) check: bool,
    pub(crate) redzone: bool,
    pub(crate) poison: bool,
    pub(crate) shuffle: bool,
    pub(crate) owner: bool,
    pub(crate) quarantine: u8,
    pub(crate) sample: u32,
}

/// Bytes of the record behind each object that [`Owner`] and [`Redzone`] keep.
pub(crate) const RECORD: usize = 16;

/// Bytes of the tag in front of each object of a cache that checks.
pub(crate) const TAG: usize = 8;

/// The least bytes between an object and its record that [`Redzone`] watches.
const ZONE: usize = 16;

impl Features {
    /// None at all.
    pub const PLAIN: Self = Self {
        check: false,
        redzone: false,
        poison: false,
        shuffle: false,
        owner: false,
        quarantine: 0,
        sample: 0,
    };

    /// Both together.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self {
            check: self.check | other.check,
            redzone: self.redzone | other.redzone,
            poison: self.poison | other.poison,
            shuffle: self.shuffle | other.shuffle,
            owner: self.owner | other.owner,
            quarantine: if self.quarantine > other.quarantine {
                self.quarantine
            } else {
                other.quarantine
            },
            sample: if self.sample > other.sample {
                self.sample
            } else {
                other.sample
            },
        }
    }

    /// Bytes that an object aligned to `align` bytes (a power of two) needs beyond those asked for.
    #[must_use]
    pub const fn extra(self, align: usize) -> usize {
        let zone = if self.redzone { ZONE } else { 0 };
        self.front(align) + crate::harden::bytes_behind(self) + zone
    }

    /// Those of them that are in front of the object.
    #[inline(always)]
    pub(crate) const fn front(self, align: usize) -> usize {
        match self.check {
            false => 0,
            true if align < TAG => TAG,
            true => align,
        }
    }

    /// Whether the size asked for is kept behind each object.
    pub(crate) const fn keeps_size(self) -> bool {
        self.redzone | self.owner
    }

    /// Whether more is to be done for each object than a look at its tag.
    pub(crate) const fn more(self) -> bool {
        self.redzone | self.poison | self.owner | (self.quarantine > 0)
    }

    /// Without what writes into freed objects: for memory whose content outlives a free.
    pub(crate) const fn keeping_content(self) -> Self {
        Self {
            poison: false,
            ..self
        }
    }
}

/// How much a system or a cache checks. A type, so that what is absent costs nothing.
///
/// # Examples
///
/// ```
/// use kmem_slab::{Check, Features, Owner, Plain, Policy, Poison};
///
/// assert_eq!(<Plain as Policy>::FEATURES, Features::PLAIN);
/// assert_eq!(<Check as Policy>::FEATURES.extra(8), 8);
/// assert_eq!(<(Poison, Owner) as Policy>::FEATURES.extra(8), 24);
/// ```
#[doc(alias = "slab_debug")]
pub trait Policy: 'static {
    /// What it switches on.
    const FEATURES: Features;
}

macro_rules! policy {
    ($(#[$meta:meta])* $name:ident $(<const $n:ident: $t:ty>)?, $features:expr) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug)]
        pub struct $name $(<const $n: $t>)?;

        impl $(<const $n: $t>)? Policy for $name $(<$n>)? {
            const FEATURES: Features = $features;
        }
    };
}

const CHECKED: Features = Features {
    check: true,
    ..Features::PLAIN
};

policy!(
    /// Only what costs nothing: misuse is found when the object reaches its slab.
    Plain,
    Features::PLAIN
);
policy!(
    /// Finds a double free, an invalid one, and one to the wrong cache or with the wrong size or alignment at the call.
    #[doc(alias = "SLAB_CONSISTENCY_CHECKS")]
    Check,
    CHECKED
);
policy!(
    /// Watches the bytes behind each object.
    #[doc(alias = "SLAB_RED_ZONE")]
    Redzone,
    Features {
        redzone: true,
        ..CHECKED
    }
);
policy!(
    /// Fills freed objects and looks whether they stayed so. Not for type-stable and reused objects, whose content outlives a free.
    #[doc(alias = "SLAB_POISON")]
    Poison,
    Features {
        poison: true,
        ..CHECKED
    }
);
policy!(
    /// Keeps the last `N` freed objects of each cache from being given again (1 to 128).
    Quarantine<const N: usize>,
    {
        assert!(N > 0 && N <= crate::array::SMALL_SLOTS, "a quarantine holds 1 to 128 objects");
        Features { quarantine: N as u8, ..CHECKED }
    }
);
policy!(
    /// Gives the objects of a refill in an order that is hard to guess.
    #[doc(alias = "CONFIG_SLAB_FREELIST_RANDOM")]
    Shuffle,
    Features {
        shuffle: true,
        ..Features::PLAIN
    }
);
policy!(
    /// Remembers who allocated each object.
    #[doc(alias = "SLAB_STORE_USER")]
    Owner,
    Features {
        owner: true,
        ..CHECKED
    }
);
policy!(
    /// Serves one in `EVERY` kmalloc requests at the end of pages of its own from the large source, whose guard page catches an overrun.
    #[doc(alias = "kfence")]
    Guard<const EVERY: u32>,
    {
        assert!(EVERY > 0, "one in how many?");
        Features { sample: EVERY, ..Features::PLAIN }
    }
);

macro_rules! together {
    ($($name:ident),+) => {
        impl<$($name: Policy),+> Policy for ($($name,)+) {
            const FEATURES: Features = Features::PLAIN$(.with($name::FEATURES))+;
        }
    };
}

together!(A, B);
together!(A, B, C);
together!(A, B, C, D);
together!(A, B, C, D, E);
together!(A, B, C, D, E, F);
