//! Models of frame slots: counts, the lock bit, claims, and the first use of a section.
#![cfg(loom)]

use std::sync::Arc;

use kmem_hal::sync::{Ordering, UnsafeCell};
use kmem_hal::{
    CountError, Frame, FrameRange, FrameSlot, FrameTag, Order, Page, SlotFlags, TableSlot, UserSlot,
};
use kmem_testkit::SlotArena;
use kmem_testkit::model::explore;

#[test]
fn loom_a_section_is_zeroed_before_anybody_sees_a_slot() {
    explore(3, || {
        let frames = FrameRange::new(Frame::from_number(4), 1).unwrap();
        let table = Arc::new(SlotArena::new(frames));
        let look = |table: &SlotArena| {
            let slot = table.slot(Frame::from_number(4)).unwrap();
            // Before the section was made ready the slot said "reserved".
            assert_eq!(slot.tag(), FrameTag::Free);
            let flags = slot.set_flags(SlotFlags::REFERENCED);
            assert!(flags.difference(SlotFlags::REFERENCED).is_empty());
        };
        let other = {
            let table = table.clone();
            loom::thread::spawn(move || look(&table))
        };
        look(&table);
        other.join().unwrap();
        // Zeroed once: nobody's flag was lost.
        let slot = table.slot(Frame::from_number(4)).unwrap();
        assert!(slot.flags().contains(SlotFlags::REFERENCED));
    });
}

#[test]
fn loom_the_last_of_a_pages_references_is_seen_once() {
    explore(3, || {
        let slot = Arc::new(FrameSlot::new());
        let page = UserSlot::claim(&slot, FrameTag::Anon, Order::ZERO, 1, 0).unwrap();
        // Two leaf tables map the page, and nobody else holds it.
        page.add_mapping().unwrap();
        page.add_mapping().unwrap();
        page.sub_reference().unwrap();
        let unmap = |slot: &FrameSlot| {
            let page = slot.as_user().expect("still a user page");
            page.sub_mapping() == Ok((0, 0))
        };
        let other = {
            let slot = slot.clone();
            loom::thread::spawn(move || unmap(&slot))
        };
        let mine = unmap(&slot);
        assert!(
            mine != other.join().unwrap(),
            "exactly one sees the last reference"
        );
        assert_eq!(slot.count(), 0);
    });
}

#[test]
fn loom_a_lookup_never_revives_a_freed_page() {
    explore(3, || {
        let slot = Arc::new(FrameSlot::new());
        let _ = UserSlot::claim(&slot, FrameTag::File, Order::ZERO, 1, 0).unwrap();
        let lookup = {
            let slot = slot.clone();
            loom::thread::spawn(move || match slot.try_add_count(1) {
                Ok(_) => slot.sub_count(1) == Ok(0),
                Err(error) => {
                    assert_eq!(error, CountError::Underflow);
                    false
                }
            })
        };
        let mine = slot.sub_count(1) == Ok(0);
        assert!(mine != lookup.join().unwrap(), "exactly one frees the page");
    });
}

#[test]
fn loom_first_mapping_races_with_last_unmapping() {
    explore(3, || {
        let slot = Arc::new(FrameSlot::new());
        let page = UserSlot::claim(&slot, FrameTag::File, Order::ZERO, 1, 0).unwrap();
        page.add_mapping().unwrap();
        // The page cache's reference is the one of `claim`.
        let other = {
            let slot = slot.clone();
            loom::thread::spawn(move || {
                slot.as_user().unwrap().sub_mapping().unwrap();
            })
        };
        page.add_mapping().unwrap();
        other.join().unwrap();
        assert_eq!((page.mappings(), page.references()), (1, 2));
    });
}

#[test]
fn loom_two_first_mappings_take_one_reference() {
    explore(3, || {
        let slot = Arc::new(FrameSlot::new());
        let page = UserSlot::claim(&slot, FrameTag::File, Order::ZERO, 1, 0).unwrap();
        let other = {
            let slot = slot.clone();
            loom::thread::spawn(move || {
                slot.as_user().unwrap().add_mapping().unwrap();
            })
        };
        page.add_mapping().unwrap();
        other.join().unwrap();
        assert_eq!((page.mappings(), page.references()), (2, 2));
    });
}

#[test]
fn loom_the_lock_bit_orders_plain_changes_of_words() {
    explore(3, || {
        struct Table {
            slot: FrameSlot,
            entries: UnsafeCell<u32>,
        }
        // SAFETY: that the lock bit keeps users apart is what the model checks.
        unsafe impl Sync for Table {}
        let table = Table {
            slot: FrameSlot::new(),
            entries: UnsafeCell::new(0),
        };
        let _ = TableSlot::claim(&table.slot, 1, Page::ZERO);
        let table = Arc::new(table);
        let add = |table: &Table| {
            let guard = table.slot.lock();
            let view = table.slot.as_table().unwrap();
            view.set_live(view.live() + 1);
            // SAFETY: the lock bit is held.
            table.entries.with_mut(|entries| unsafe { *entries += 1 });
            drop(guard);
        };
        let other = {
            let table = table.clone();
            loom::thread::spawn(move || add(&table))
        };
        add(&table);
        other.join().unwrap();
        assert_eq!(table.slot.as_table().unwrap().live(), 2);
    });
}

#[test]
fn loom_a_claimed_slot_shows_its_words() {
    explore(3, || {
        let slot = Arc::new(FrameSlot::new());
        let other = {
            let slot = slot.clone();
            loom::thread::spawn(move || {
                if let Some(page) = slot.as_user() {
                    assert_eq!((page.object(), page.page()), (5, 9));
                    assert_eq!(slot.links().load(Ordering::Relaxed), 0);
                }
            })
        };
        let _ = UserSlot::claim(&slot, FrameTag::Anon, Order::ZERO, 5, 9);
        other.join().unwrap();
    });
}
