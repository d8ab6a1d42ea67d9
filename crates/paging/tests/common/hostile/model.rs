// What the tables of the hostile run should say: a flat map from pages to what they have, cut and joined as the operations do it.
//
// It knows the rules of the manual and the shape of a format's levels, and nothing of the tables that are tested.

use std::collections::BTreeMap;

use kmem_hal::Order;
use kmem_paging::format::Format;
use kmem_paging::{Attributes, Leaf, Rights};

use super::super::modes::names_high_frames_huge;

/// What a page has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Item {
    Leaf {
        frame: u64,
        order: Order,
        /// As the format expresses them; accessed and dirty are clear here.
        attributes: Attributes,
        /// Whether it was written; `None` where a write may have been missed legally.
        dirty: Option<bool>,
    },
    Payload(u64),
}

impl Item {
    pub(super) fn pages(&self) -> u64 {
        match self {
            Self::Leaf { order, .. } => order.frames(),
            Self::Payload(_) => 1,
        }
    }
}

pub(super) type Model = BTreeMap<u64, Item>;

pub(super) fn find(model: &Model, page: u64) -> Option<(u64, Item)> {
    let (&first, &item) = model.range(..=page).next_back()?;
    (first + (item.pages() - 1) >= page).then_some((first, item))
}

fn orders<F: Format>(levels: usize) -> Vec<Order> {
    F::LEVELS[..levels]
        .iter()
        .filter(|level| level.leaf)
        .map(|level| level.order())
        .collect()
}

pub(super) fn split_item<F: Format>(model: &mut Model, first: u64) {
    let Some(Item::Leaf {
        frame,
        order,
        attributes,
        dirty,
    }) = model.remove(&first)
    else {
        panic!("no leaf to split")
    };
    assert!(
        !is_indivisible::<F>(frame, order),
        "leaf of page {first:#x}"
    );
    let orders = orders::<F>(F::LEVELS.len());
    let position = orders.iter().position(|&other| other == order).unwrap();
    let part = orders[position - 1];
    for index in 0..order.frames() / part.frames() {
        let offset = index * part.frames();
        let item = Item::Leaf {
            frame: frame + offset,
            order: part,
            attributes,
            dirty,
        };
        model.insert(first + offset, item);
    }
}

/// Whether no smaller leaf can name the frames of a huge one.
fn is_indivisible<F: Format>(frame: u64, order: Order) -> bool {
    order > Order::ZERO && names_high_frames_huge::<F>() && frame >= 1 << 20
}

/// Whether one of the cuts between pages falls into a leaf that cannot be split: the one at `found`.
pub(super) fn refuses_cuts<F: Format>(model: &Model, cuts: [u64; 2], found: u64) -> bool {
    let Some(&Item::Leaf { frame, order, .. }) = model.get(&found) else {
        return false;
    };
    let inside = |cut: u64| cut > found && cut - found < order.frames();
    is_indivisible::<F>(frame, order) && cuts.into_iter().any(inside)
}

/// Whether a leaf is huge and cannot be split.
pub(super) fn refuses_splits<F: Format>(item: &Item) -> bool {
    matches!(*item, Item::Leaf { frame, order, .. } if is_indivisible::<F>(frame, order))
}

/// Cuts leaves at `page`, as operations do at the ends of their ranges.
fn cut<F: Format>(model: &mut Model, page: u64) {
    while let Some((first, Item::Leaf { .. })) = find(model, page) {
        if first == page {
            return;
        }
        split_item::<F>(model, first);
    }
}

pub(super) fn inside<F: Format>(model: &mut Model, first: u64, count: u64) -> Vec<(u64, Item)> {
    cut::<F>(model, first);
    cut::<F>(model, first + count);
    let found = model.range(first..first + count);
    found.map(|(&page, &item)| (page, item)).collect()
}

pub(super) fn is_free(model: &Model, first: u64, count: u64) -> bool {
    find(model, first).is_none() && model.range(first..first + count).next().is_none()
}

pub(super) fn level_of<F: Format>(order: Order) -> usize {
    F::LEVELS
        .iter()
        .position(|level| level.order() == order)
        .unwrap()
        + 1
}

/// What becomes of attributes in a leaf, by the manual alone: any access includes reading, and where there is no XD,
/// executing; a leaf without access keeps nothing but G. Accessed and dirty are clear in the model.
pub(super) fn expressed<F: Format>(attributes: &Attributes) -> Attributes {
    let has_xd = F::LEVELS[0].bits == 9;
    let mut rights = attributes.rights & Rights::GLOBAL;
    if attributes.rights.grants_access() {
        rights = attributes.rights | Rights::READ;
        if !has_xd {
            rights |= Rights::EXECUTE;
        }
    }
    Attributes {
        rights,
        accessed: false,
        dirty: false,
        ..*attributes
    }
}

pub(super) fn same(first: u64, item: &Item, leaf: &Leaf) {
    let Item::Leaf {
        frame,
        order,
        attributes,
        dirty,
    } = *item
    else {
        panic!("{item:?} is no leaf: {leaf:?}")
    };
    let mut found = leaf.attributes;
    if let Some(dirty) = dirty {
        assert_eq!(found.dirty, dirty, "dirty bit of {leaf:?}");
    }
    (found.accessed, found.dirty) = (false, false);
    assert_eq!(
        (leaf.page.number(), leaf.frame.number(), leaf.order, found),
        (first, frame, order, attributes)
    );
}

/// The leaf that merging the small ones from `first` on gives.
pub(super) fn mergeable(model: &Model, first: u64, order: Order) -> Option<Item> {
    let mut joined: Option<(u64, Attributes)> = None;
    let (mut any_dirty, mut unknown) = (false, false);
    for offset in 0..order.frames() {
        let Some(&Item::Leaf {
            frame,
            order: found,
            attributes,
            dirty,
        }) = model.get(&(first + offset))
        else {
            return None;
        };
        let (base, all) = *joined.get_or_insert((frame, attributes));
        any_dirty |= dirty == Some(true);
        unknown |= dirty.is_none();
        if found != Order::ZERO || frame != base + offset || attributes != all {
            return None;
        }
    }
    let (frame, attributes) = joined?;
    frame.is_multiple_of(order.frames()).then_some(Item::Leaf {
        frame,
        order,
        attributes,
        dirty: if any_dirty {
            Some(true)
        } else if unknown {
            None
        } else {
            Some(false)
        },
    })
}
