//! Draws physical memory as it is now: a row a node, cells by the books, the boot map's reservations and the map.

use crate::report::picture::{Cell, Picture, Row, Span};
use crate::world::World;
use kmem_hal::PAGE_SIZE;

/// Cells in a row.
const CELLS: u64 = 250;

/// Counts what is in each cell of each node's row.
pub fn of(world: &World) -> Picture {
    let boot_map = world.boot_map();
    let mut nodes: Vec<(u16, u64, u64)> = Vec::new();
    for (node, range) in boot_map.present_by_node() {
        let (first, end) = (
            range.first().number(),
            range.first().number() + range.count(),
        );
        match nodes.iter_mut().find(|n| n.0 == node.get()) {
            Some(n) => (n.1, n.2) = (n.1.min(first), n.2.max(end)),
            None => nodes.push((node.get(), first, end)),
        }
    }
    nodes.sort_unstable();
    let mut used: Vec<(u64, u64)> = world
        .source()
        .ledger(|l| l.blocks.iter().map(|(f, o)| (*f, *f + (1 << o))).collect());
    boot_map
        .for_each_reserved(|r, _| used.push((r.first().number(), r.first().number() + r.count())));
    let used = merged(used);
    let mut rows = Vec::new();
    for (node, first, end) in nodes {
        let step = (end - first).div_ceil(CELLS).max(1);
        let mut cells = vec![
            Cell {
                absent: step,
                ..Cell::default()
            };
            usize::try_from((end - first).div_ceil(step)).unwrap_or(0)
        ];
        let present = boot_map.present_by_node().filter(|(n, _)| n.get() == node);
        for (_, range) in present {
            let (a, b) = (
                range.first().number(),
                range.first().number() + range.count(),
            );
            each_part(a, b, first, step, |cell, pages| {
                cells[cell].absent -= pages;
                cells[cell].free += pages;
            });
            for (from, to) in &used {
                each_part(*from.max(&a), *to.min(&b), first, step, |cell, pages| {
                    cells[cell].free -= pages;
                    cells[cell].used += pages;
                });
            }
        }
        let spans = world
            .frames()
            .zones()
            .filter(|z| z.node.get() == node && z.present > 0)
            .map(|z| Span {
                name: z.kind.name().into(),
                start: z.start * PAGE_SIZE,
                end: (z.start + z.spanned) * PAGE_SIZE,
            })
            .collect();
        rows.push(Row {
            label: format!("node {node}"),
            start: first * PAGE_SIZE,
            end: (first + step * cells.len() as u64) * PAGE_SIZE,
            spans,
            cells,
        });
    }
    Picture { rows }
}

/// Sorts runs and joins those that overlap or touch.
fn merged(mut runs: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    runs.sort_unstable();
    let mut out: Vec<(u64, u64)> = Vec::new();
    for (first, end) in runs {
        match out.last_mut() {
            Some(last) if first <= last.1 => last.1 = last.1.max(end),
            _ => out.push((first, end)),
        }
    }
    out
}

/// Cuts a run at the borders of cells.
fn each_part(first: u64, end: u64, base: u64, step: u64, mut each: impl FnMut(usize, u64)) {
    let mut at = first;
    while at < end {
        let cell = (at - base) / step;
        let stop = end.min(base + (cell + 1) * step);
        each(cell as usize, stop - at);
        at = stop;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_cut_at_cells() {
        let mut parts = Vec::new();
        each_part(5, 25, 0, 10, |cell, pages| parts.push((cell, pages)));
        assert_eq!(parts, [(0, 5), (1, 10), (2, 5)]);
        each_part(7, 7, 0, 10, |_, _| panic!("nothing to cut"));
    }

    #[test]
    fn overlapping_runs_count_once() {
        assert_eq!(
            merged(vec![(5, 9), (0, 2), (2, 3), (6, 12)]),
            [(0, 3), (5, 12)]
        );
    }
}
