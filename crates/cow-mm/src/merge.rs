//! When two neighbouring VMAs are one: Linux's rules, and nothing else.
//!
//! A new or changed range joins its neighbours when all that a VMA says of itself is equal and the object offsets
//! continue. The one rule that is not an equality is the reverse map's: a side that owns no anonymous pages may join
//! one that does, unless that one's chain was inherited through fork, because then its pages are found through more
//! than one reverse map.
//!
//! ```text
//!      P            range            N
//!  |--------|====================|--------|
//!   left? ──────────┘     └────────── right?     both, and P fits N  -> one VMA
//! ```
//!
//! Source: Linux `mm/vma.c` (`is_mergeable_vma`, `is_mergeable_anon_vma`); the eight classic cases are listed in its
//! comments. The recorded runs of Linux 6.18 in the oracle hold this module to it, call by call.

use kmem_hal::PageRange;

use crate::flags::VmFlags;
use crate::object::FileRef;
use crate::vma::{AnonLink, Label, Vma};

/// What a range would be, were it a VMA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Protection and kind.
    pub flags: VmFlags,
    /// Page offset at the first page.
    pub offset: u64,
    /// The object.
    pub file: Option<FileRef>,
    /// The reverse map that its pages hang on.
    pub anon: Option<AnonLink>,
    /// The label.
    pub label: Label,
}

impl From<&Vma> for Candidate {
    fn from(vma: &Vma) -> Self {
        Self {
            flags: vma.flags,
            offset: vma.offset,
            file: vma.file,
            anon: vma.anon,
            label: vma.label,
        }
    }
}

impl Candidate {
    /// The VMA that a range becomes where it joins no neighbour.
    pub(crate) const fn over(self, range: PageRange) -> Vma {
        Vma {
            range,
            flags: self.flags,
            offset: self.offset,
            file: self.file,
            anon: self.anon,
            label: self.label,
        }
    }
}

/// Which neighbours a range joins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Joins {
    /// The one before.
    pub left: bool,
    /// The one after.
    pub right: bool,
}

/// Decides which of its direct neighbours a range of `pages` pages joins.
///
/// `previous` ends where the range begins and `next` begins where it ends; pass `None` where something else does.
#[doc(alias = "vma_merge")]
#[must_use]
pub fn joins(
    candidate: &Candidate,
    pages: u64,
    previous: Option<&Vma>,
    next: Option<&Vma>,
) -> Joins {
    let left = previous.filter(|p| {
        same_kind(candidate, p)
            && p.offset.wrapping_add(p.range.count()) == candidate.offset
            && anon_compatible(candidate.anon, p.anon)
    });
    let right = next.filter(|n| {
        same_kind(candidate, n)
            && n.offset == candidate.offset.wrapping_add(pages)
            && anon_compatible(candidate.anon, n.anon)
    });
    // If both would join, they must fit each other too; else only the one before is taken.
    let right = match (left, right) {
        (Some(p), Some(n)) => match (p.anon, n.anon) {
            (Some(a), Some(b)) => a.id == b.id,
            _ => true,
        },
        (_, right) => right.is_some(),
    };
    Joins {
        left: left.is_some(),
        right,
    }
}

/// Equality of everything but offsets and reverse maps (`is_mergeable_vma`).
fn same_kind(candidate: &Candidate, vma: &Vma) -> bool {
    !candidate.flags.intersects(VmFlags::SPECIAL)
        && (candidate.flags ^ vma.flags)
            .difference(VmFlags::IGNORED_BY_MERGE)
            .is_empty()
        && candidate.file == vma.file
        && candidate.label == vma.label
}

/// Whether pages of `source`'s reverse map may live in a VMA of `target`'s (`is_mergeable_anon_vma`).
///
/// Linux 6.16 and later; 6.12 refuses where the target has none.
fn anon_compatible(source: Option<AnonLink>, target: Option<AnonLink>) -> bool {
    match (source, target) {
        (Some(source), None) => source.singular,
        (None, Some(target)) => target.singular,
        (Some(source), Some(target)) => source.id == target.id,
        (None, None) => true,
    }
}

/// Whether a first write fault in one of two neighbours may use the other's reverse map.
///
/// `first` ends where `second` begins. Rights may differ; everything else must match (`anon_vma_compatible`).
#[doc(alias = "find_mergeable_anon_vma")]
#[must_use]
pub fn may_share_anon(first: &Vma, second: &Vma) -> bool {
    let ignored = VmFlags::ACCESS.union(VmFlags::IGNORED_BY_MERGE);
    first.file == second.file
        && first.label == second.label
        && (first.flags ^ second.flags).difference(ignored).is_empty()
        && second.offset == first.offset.wrapping_add(first.range.count())
}

#[cfg(test)]
mod tests {
    use core::num::NonZeroU64;

    use kmem_hal::Page;

    use super::*;

    fn vma(first: u64, pages: u64, flags: VmFlags) -> Vma {
        let range = PageRange::with_count(Page::new(first).unwrap(), pages).unwrap();
        Vma {
            range,
            flags,
            offset: first,
            file: None,
            anon: None,
            label: Label::None,
        }
    }

    fn link(id: u64, singular: bool) -> Option<AnonLink> {
        Some(AnonLink {
            id: NonZeroU64::new(id).unwrap(),
            singular,
        })
    }

    #[test]
    fn a_hole_between_equals_joins_both() {
        let (p, n) = (vma(10, 2, VmFlags::READ), vma(14, 2, VmFlags::READ));
        let c = Candidate::from(&vma(12, 2, VmFlags::READ));
        assert_eq!(
            joins(&c, 2, Some(&p), Some(&n)),
            Joins {
                left: true,
                right: true
            }
        );
    }

    #[test]
    fn other_rights_or_offsets_join_nothing() {
        let p = vma(10, 2, VmFlags::READ);
        let written = Candidate::from(&vma(12, 2, VmFlags::READ | VmFlags::WRITE));
        assert_eq!(
            joins(&written, 2, Some(&p), None),
            Joins {
                left: false,
                right: false
            }
        );
        let moved = Candidate {
            offset: 99,
            ..Candidate::from(&vma(12, 2, VmFlags::READ))
        };
        assert_eq!(
            joins(&moved, 2, Some(&p), None),
            Joins {
                left: false,
                right: false
            }
        );
    }

    #[test]
    fn a_reverse_map_inherited_through_fork_joins_no_stranger() {
        let mut p = vma(10, 2, VmFlags::READ);
        let c = Candidate::from(&vma(12, 2, VmFlags::READ));
        p.anon = link(1, false);
        assert!(!joins(&c, 2, Some(&p), None).left);
        p.anon = link(1, true);
        assert!(joins(&c, 2, Some(&p), None).left);
    }

    #[test]
    fn two_reverse_maps_on_the_sides_take_only_the_left() {
        let (mut p, mut n) = (vma(10, 2, VmFlags::READ), vma(14, 2, VmFlags::READ));
        p.anon = link(1, true);
        n.anon = link(2, true);
        let c = Candidate::from(&vma(12, 2, VmFlags::READ));
        assert_eq!(
            joins(&c, 2, Some(&p), Some(&n)),
            Joins {
                left: true,
                right: false
            }
        );
    }

    #[test]
    fn special_mappings_never_join() {
        let flags = VmFlags::READ | VmFlags::PFNMAP;
        let p = vma(10, 2, flags);
        let c = Candidate::from(&vma(12, 2, flags));
        assert!(!joins(&c, 2, Some(&p), None).left);
    }
}
