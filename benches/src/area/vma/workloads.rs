//! What is measured of one map: lookups, edits, searches, passes and copies.

use std::time::Instant;

use super::maps::Ranges;
use super::ours::{Kmem, nodes};
use super::{Input, LARGE, Vma};
use crate::clock::Watch;
use crate::harness::{Competitor, Slice};
use crate::rng::Rng;

/// Builds a map in the first slice, so that a failure costs a row and not the run.
struct Built<'i, R> {
    input: &'i Input,
    map: Option<R>,
}

impl<'i, R: Ranges> Built<'i, R> {
    fn new(input: &'i Input) -> Self {
        Self { input, map: None }
    }

    fn map(&mut self) -> &mut R {
        self.map.get_or_insert_with(|| {
            let map = R::build(&self.input.vmas);
            assert_eq!(map.count(), self.input.vmas.len(), "ranges were lost");
            for &(first, last, value) in self.input.vmas.iter().take(100) {
                assert_eq!(map.lookup(first), Some(value));
                assert_eq!(map.lookup(last), Some(value));
            }
            assert_eq!(map.lookup(self.input.large), None);
            map
        })
    }
}

pub(super) fn lookup<'i, R: Ranges + 'i>(input: &'i Input, is_local: bool) -> impl Competitor + 'i {
    const PAGES: usize = 1 << 12;
    let mut built = Built::<R>::new(input);
    move |index: u64, watch: &mut Watch| {
        let mut rng = Rng::new(index);
        let count = input.vmas.len() as u64;
        let hot: [u64; 4] = std::array::from_fn(|_| 1 + rng.below(count - 1));
        let pages: Vec<u64> = (0..PAGES)
            .map(|_| {
                let at = if is_local && rng.below(10) > 0 {
                    hot[rng.below(4) as usize]
                } else {
                    1 + rng.below(count - 1)
                };
                let (first, last, _) = input.vmas[at as usize];
                first + rng.below(last - first + 1)
            })
            .collect();
        let map = built.map();
        let mut finger = R::Finger::default();
        let ops = input.ops;
        let sum = watch.time(|| {
            let (mut sum, mut at) = (0u64, 0usize);
            for _ in 0..ops {
                let page = pages[at % PAGES];
                let value = if is_local {
                    map.lookup_near(&mut finger, page)
                } else {
                    map.lookup(page)
                };
                let value = value.expect("a page in a range");
                sum = sum.wrapping_add(value);
                // The next page is known only when this value is.
                at += 1 + (value & 1) as usize;
            }
            sum
        });
        Slice::ops(ops, sum)
    }
}

pub(super) fn insert_remove<'i, R: Ranges + 'i>(input: &'i Input) -> impl Competitor + 'i {
    edits(input, 2, |map: &mut R, vma| {
        map.remove(vma);
        map.insert(vma);
    })
}

/// So many operations, by `edit`, on each of many ranges that are all there again afterwards.
fn edits<'i, R: Ranges + 'i>(
    input: &'i Input,
    ops: u64,
    edit: impl Fn(&mut R, Vma) + 'i,
) -> impl Competitor + 'i {
    let mut built = Built::<R>::new(input);
    move |index: u64, watch: &mut Watch| {
        let mut rng = Rng::new(index);
        let picked: Vec<Vma> = (0..input.ops / 2).map(|_| input.any(&mut rng)).collect();
        let map = built.map();
        watch.time(|| {
            for &vma in &picked {
                edit(map, vma);
            }
        });
        assert_eq!(map.count(), input.vmas.len(), "pieces that did not merge");
        Slice::ops(ops * picked.len() as u64, map.sum())
    }
}

pub(super) fn gap<'i, R: Ranges + 'i>(input: &'i Input, up: bool) -> impl Competitor + 'i {
    fn search<R: Ranges>(map: &R, up: bool) -> Option<u64> {
        let pages = std::hint::black_box(LARGE);
        if up {
            map.gap_up(pages)
        } else {
            map.gap_down(pages)
        }
    }
    let mut built = Built::<R>::new(input);
    // Most programs pass all ranges below the gap, some none: so many searches as take 100 microseconds.
    let mut searches = None;
    move |_: u64, watch: &mut Watch| {
        let map = built.map();
        let searches = *searches.get_or_insert_with(|| {
            let begin = Instant::now();
            std::hint::black_box(search(map, up));
            (100_000 / begin.elapsed().as_nanos().max(1) as u64).clamp(4, 1000)
        });
        let found = watch.time(|| {
            let mut found = None;
            for _ in 0..searches {
                found = search(map, up);
            }
            found
        });
        assert_eq!(found, Some(input.large), "another gap was found");
        Slice::ops(searches, input.large)
    }
}

pub(super) fn iterate<'i, R: Ranges + 'i>(input: &'i Input) -> impl Competitor + 'i {
    let mut built = Built::<R>::new(input);
    move |_: u64, watch: &mut Watch| {
        let count = input.vmas.len() as u64;
        let rounds = (10_000 / count).max(1);
        let map = built.map();
        let sum = watch.time(|| {
            let mut sum = 0u64;
            for _ in 0..rounds {
                sum = sum.wrapping_add(std::hint::black_box(&*map).sum());
            }
            sum
        });
        Slice::ops(rounds * count, sum)
    }
}

pub(super) fn punch_merge<'i, R: Ranges + 'i>(input: &'i Input) -> impl Competitor + 'i {
    punch_merge_by(input, R::punch)
}

/// [`punch_merge`] in a way of one's own.
pub(super) fn punch_merge_by<'i, R: Ranges + 'i>(
    input: &'i Input,
    punch: impl Fn(&mut R, Vma, u64) + 'i,
) -> impl Competitor + 'i {
    edits(input, 1, move |map, vma| punch(map, vma, vma.0 + 1))
}

pub(super) fn duplicate<'i, R: Ranges + 'i>(input: &'i Input) -> impl Competitor + 'i {
    copies(input, R::copy)
}

/// What a copy costs whoever has no more than `store`: all ranges again, as an iterator gives them.
pub(super) fn inserting(input: &Input) -> impl Competitor + '_ {
    copies(input, |map: &Kmem| {
        let mut copy = Kmem::new_in(nodes());
        for entry in map.iter() {
            copy.store(entry.range, Some(entry.value), &mut |_| ())
                .expect("memory for nodes");
        }
        copy
    })
}

fn copies<'i, R: Ranges + 'i>(
    input: &'i Input,
    copy: impl Fn(&R) -> R + 'i,
) -> impl Competitor + 'i {
    let mut built = Built::<R>::new(input);
    move |_: u64, watch: &mut Watch| {
        let count = input.vmas.len() as u64;
        let rounds = (1000 / count).max(1);
        let map = built.map();
        let mut copies = Vec::new();
        watch.time(|| {
            for _ in 0..rounds {
                copies.push(copy(map));
            }
        });
        let sum = copies
            .iter()
            .fold(0u64, |sum, copy| sum.wrapping_add(copy.sum()));
        Slice::ops(rounds * count, sum)
    }
}
