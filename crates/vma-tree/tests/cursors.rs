//! Cursors against the list: they keep their place through their own edits. And what a reader that sleeps may cost.

mod common;

use common::{Heap, Model, count, page, pages};
use kmem_hal::{AllocError, Page, PageRange, SingleGrace};
use kmem_vma_tree::{Cursor, CursorMut, Entry, Exclusive, RangeTree, SharedTree};
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Step {
    Seek(u64),
    Next,
    Previous,
    Store(PageRange, u64),
    Erase(PageRange),
    Merged(PageRange, u64),
    Replace(u64),
}

fn any_step() -> impl Strategy<Value = Step> {
    let range = || (0_u64..300, 1_u64..9).prop_map(|(first, pages)| count(first, pages));
    prop_oneof![
        2 => prop_oneof![0_u64..310, Just(Page::MAX.number())].prop_map(Step::Seek),
        6 => Just(Step::Next),
        6 => Just(Step::Previous),
        6 => (range(), 0_u64..4).prop_map(|(range, value)| Step::Store(range, value)),
        3 => range().prop_map(Step::Erase),
        3 => (range(), 0_u64..4).prop_map(|(range, value)| Step::Merged(range, value)),
        2 => (0_u64..4).prop_map(Step::Replace),
    ]
}

/// Where the model's cursor stands: `None` below the space, the page after the last one above it.
type Place = Option<u64>;

fn here(model: &Model, place: Place) -> Option<Entry<u64>> {
    let at = place.filter(|&at| at < Page::LIMIT)?;
    model.get(page(at))
}

fn after(model: &Model, place: Place) -> Option<Entry<u64>> {
    let above = |entry: &&Entry<u64>| place.is_none_or(|at| entry.first().number() > at);
    model.entries.iter().find(above).copied()
}

fn before(model: &Model, place: Place) -> Option<Entry<u64>> {
    let below = |entry: &&Entry<u64>| place.is_some_and(|at| entry.last().number() < at);
    model.entries.iter().rev().find(below).copied()
}

fn same<const W: usize>(cursor: &CursorMut<'_, u64, &Heap, W>, model: &Model, place: Place) {
    assert_eq!(cursor.entry(), here(model, place));
    assert_eq!(cursor.peek_next(), after(model, place));
    assert_eq!(cursor.peek_previous(), before(model, place));
}

fn follow<const W: usize>(steps: &[Step]) {
    let heap = Heap::default();
    let mut tree = RangeTree::<u64, &Heap, Exclusive, W>::new_in(&heap);
    let mut model = Model::default();
    for i in 0..20 {
        tree.store(count(15 * i, 6), Some(i % 4), &mut |_| ())
            .unwrap();
        model.store(count(15 * i, 6), Some(i % 4));
    }
    let mut cursor = tree.cursor_mut(Page::ZERO);
    let mut place = Some(0);
    for step in steps {
        match *step {
            Step::Seek(at) => {
                cursor.seek(page(at));
                place = Some(at);
            }
            Step::Next => {
                let next = after(&model, place);
                assert_eq!(cursor.next(), next);
                place = Some(next.map_or(Page::LIMIT, |entry| entry.first().number()));
            }
            Step::Previous => {
                let previous = before(&model, place);
                assert_eq!(cursor.previous(), previous);
                place = previous.map(|entry| entry.first().number());
            }
            Step::Store(range, value) => {
                let mut removed = Vec::new();
                cursor
                    .store(range, value, &mut |piece| removed.push(piece))
                    .unwrap();
                assert_eq!(removed, model.store(range, Some(value)));
            }
            Step::Erase(range) => {
                let mut removed = Vec::new();
                cursor
                    .erase(range, &mut |piece| removed.push(piece))
                    .unwrap();
                assert_eq!(removed, model.store(range, None));
            }
            Step::Merged(range, value) => {
                let merged = cursor.store_merged(range, value, &mut |_| ()).unwrap();
                assert_eq!(merged, model.store_merged(range, value).0);
                place = Some(merged.first().number());
            }
            Step::Replace(value) => {
                let old = here(&model, place);
                assert_eq!(cursor.replace(value).unwrap(), old.map(|entry| entry.value));
                if let Some(old) = old {
                    model.store(old.range, Some(value));
                }
            }
        }
        same(&cursor, &model, place);
    }
    tree.check().unwrap();
    // A cursor that only looks goes over all, there and back.
    let mut cursor: Cursor<'_, _, _, _, W> = tree.cursor(Page::ZERO);
    let mut seen: Vec<_> = cursor.entry().into_iter().collect();
    seen.extend(std::iter::from_fn(|| cursor.next()));
    assert_eq!(seen, model.entries);
    let mut back: Vec<_> = std::iter::from_fn(|| cursor.previous()).collect();
    back.reverse();
    assert_eq!(back, model.entries);
    assert!(cursor.iter().eq(model.entries.iter().copied()));
    cursor.seek(page(150));
    let from = model
        .entries
        .iter()
        .filter(|entry| entry.last() >= page(150));
    assert!(cursor.iter().rev().eq(from.rev().copied()));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_cursor_keeps_its_place(steps in prop::collection::vec(any_step(), 1..120)) {
        follow::<32>(&steps);
        follow::<8>(&steps);
    }
}

/// While a reader sleeps an edit is refused before the garbage grows beyond its bound; what was reserved goes through.
#[test]
fn garbage_is_bounded_while_a_reader_sleeps() {
    let heap = Heap::default();
    // SAFETY: one thread runs the test.
    let grace = unsafe { SingleGrace::new() };
    let mut shared: SharedTree<u64, &Heap, &SingleGrace> = SharedTree::new_in(&heap, &grace);
    let (mut writer, readers) = shared.split();
    for i in 0..100 {
        writer.store(count(4 * i, 2), Some(0), &mut |_| ()).unwrap();
    }
    let section = readers.read();
    let mut edits = 0;
    let refused = loop {
        let range = count(4 * (edits % 100), 2);
        match writer.store(range, Some(edits), &mut |_| ()) {
            Ok(()) => edits += 1,
            Err(error) => break error,
        }
        assert!(edits < 10_000, "nothing bounds the garbage");
    };
    assert_eq!(refused, AllocError::Busy);
    assert!(
        (1000..=2100).contains(&writer.garbage()),
        "{} nodes wait",
        writer.garbage()
    );
    // The refused edit changed nothing.
    let last = edits - 1;
    assert_eq!(
        section.get(page(4 * (last % 100))).map(|entry| entry.value),
        Some(last)
    );
    let mut reserved = writer.reserve(2).unwrap();
    reserved.store(pages(1000, 1001), Some(7), &mut |_| ());
    reserved.store(pages(1003, 1004), Some(8), &mut |_| ());
    drop(reserved);
    assert_eq!(section.get(page(1004)).map(|entry| entry.value), Some(8));
    drop(section);
    writer.quiesce();
    assert_eq!(writer.garbage(), 0);
    writer.store(pages(1003, 1004), None, &mut |_| ()).unwrap();
    writer.check().unwrap();
}
