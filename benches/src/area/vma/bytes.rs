//! `bytes_per_range`: what a map of the ranges takes, from malloc or from the slab cache.

use std::collections::BTreeMap;

use kmem_vma_tree::Node;
use rangemap::RangeMap;

use super::maps::{Nodit, Ranges};
use super::ours::{Kmem, nodes};
use super::{Areas, Input, Intervals, Red, Vma};
use crate::clock::Watch;
use crate::harness::{Slice, Workload};

/// Bytes that the host's heap has handed out.
fn heap_bytes() -> usize {
    // SAFETY: no arguments; it reads malloc's counters.
    unsafe { libc::mallinfo2() }.uordblks
}

/// Adds all programs.
pub(super) fn workload<'i>(input: &'i Input, workload: Workload<'i>) -> Workload<'i> {
    // Several maps, so that what malloc keeps aside does not matter.
    let copies = (20_000 / input.vmas.len()).max(1);
    let by_range = move |bytes: f64| Slice::value(bytes / (copies * input.vmas.len()) as f64);
    fn of_heap<R: Ranges>(vmas: &[Vma], copies: usize) -> f64 {
        let mut maps = Vec::with_capacity(copies);
        let before = heap_bytes();
        maps.extend((0..copies).map(|_| R::build(vmas)));
        let bytes = heap_bytes() - before;
        assert_eq!(maps[0].count(), vmas.len());
        bytes as f64
    }
    let of_kmem = move |_: u64, _: &mut Watch| {
        let active = || nodes().info().map_or(0, |info| info.active_objects);
        let before = active();
        let maps: Vec<Kmem> = (0..copies).map(|_| Kmem::build(&input.vmas)).collect();
        assert_eq!(maps[0].count(), input.vmas.len());
        by_range((active() - before) as f64 * size_of::<Node>() as f64)
    };
    let of_trees = move |_: u64, _: &mut Watch| {
        by_range(of_heap::<BTreeMap<u64, (u64, u64)>>(&input.vmas, copies))
    };
    let of_rangemap =
        move |_: u64, _: &mut Watch| by_range(of_heap::<RangeMap<u64, u64>>(&input.vmas, copies));
    let of_nodit = move |_: u64, _: &mut Watch| by_range(of_heap::<Nodit>(&input.vmas, copies));
    let of_areas = move |_: u64, _: &mut Watch| by_range(of_heap::<Areas>(&input.vmas, copies));
    let of_iset = move |_: u64, _: &mut Watch| by_range(of_heap::<Intervals>(&input.vmas, copies));
    let of_red = move |_: u64, _: &mut Watch| by_range(of_heap::<Red>(&input.vmas, copies));
    workload
        .with("kmem", of_kmem)
        .with("btreemap", of_trees)
        .with("rangemap", of_rangemap)
        .with("nodit", of_nodit)
        .with("memory_set", of_areas)
        .with("iset", of_iset)
        .with("rbtree", of_red)
}
