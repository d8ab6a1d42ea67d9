//! `trace_mix_*`: what real programs did to their address spaces, one workload for each recorded program.
//!
//! A step is a range that is mapped over whatever is there (and becomes one with neighbours of the same kind), a range that is
//! unmapped, or a look at a page. Each pass begins with the areas that exec made.

use std::collections::BTreeMap;
use std::io::Read;

use kmem_hal::Page;
use rangemap::RangeMap;

use super::{AREA, Areas, Intervals, Kmem, Nodit, Ranges, Red, Vma, nodes, page_range};
use crate::clock::Watch;
use crate::harness::{Competitor, Runner, Slice, Workload};
use crate::output::Unit;

#[derive(Clone, Copy)]
enum Step {
    Map(Vma),
    Unmap(u64, u64),
    Look(u64),
}

/// A map of ranges that can be written over.
pub(super) trait Mapped: Ranges {
    fn empty() -> Self;
    /// Maps the range over what is there; touching ranges of the same value become one.
    fn map(&mut self, vma: Vma);
    fn unmap(&mut self, first: u64, last: u64);
}

impl Mapped for Kmem {
    fn empty() -> Self {
        Self::new_in(nodes())
    }
    fn map(&mut self, (first, last, value): Vma) {
        self.store_merged(page_range(first, last), value, &mut |_| ())
            .expect("memory for nodes");
    }
    fn unmap(&mut self, first: u64, last: u64) {
        self.store(page_range(first, last), None, &mut |_| ())
            .expect("memory for nodes");
    }
}

impl Mapped for BTreeMap<u64, (u64, u64)> {
    fn empty() -> Self {
        Self::new()
    }
    fn map(&mut self, (mut first, mut last, value): Vma) {
        self.unmap(first, last);
        if let Some((&below, &(end, other))) = self.range(..first).next_back()
            && (end + 1, other) == (first, value)
        {
            first = below;
        }
        if let Some(&(end, other)) = self.get(&(last + 1))
            && other == value
        {
            self.remove(&(last + 1));
            last = end;
        }
        self.insert(first, (last, value));
    }
    fn unmap(&mut self, first: u64, last: u64) {
        if let Some((_, area)) = self.range_mut(..first).next_back()
            && area.0 >= first
        {
            let (end, value) = *area;
            area.0 = first - 1;
            if end > last {
                self.insert(last + 1, (end, value));
                return;
            }
        }
        while let Some((&begin, &(end, value))) = self.range(first..=last).next() {
            self.remove(&begin);
            if end > last {
                self.insert(last + 1, (end, value));
            }
        }
    }
}

impl Mapped for RangeMap<u64, u64> {
    fn empty() -> Self {
        Self::new()
    }
    fn map(&mut self, (first, last, value): Vma) {
        self.insert(first..last + 1, value);
    }
    fn unmap(&mut self, first: u64, last: u64) {
        self.remove(first..last + 1);
    }
}

impl Mapped for Nodit {
    fn empty() -> Self {
        Self::new()
    }
    fn map(&mut self, (first, last, value): Vma) {
        let range = nodit::interval::ii(first, last);
        let _ = self.cut(&range).count();
        let merged = self.insert_merge_touching_if_values_equal(range, value);
        merged.expect("the place is free");
    }
    fn unmap(&mut self, first: u64, last: u64) {
        let _ = self.cut(&nodit::interval::ii(first, last)).count();
    }
}

macro_rules! traces {
    ($($workload:literal $file:literal)*) => {
        [$(($workload, include_bytes!(concat!(
            "../../../../crates/kmem-cli/data/oracle/traces/", $file, ".txt.gz"
        )).as_slice())),*]
    };
}

/// Adds the workloads.
pub(super) fn run(runner: &mut Runner) {
    let traces = traces!(
        "trace_mix_git" "git-log"
        "trace_mix_java" "java-threads"
        "trace_mix_ls" "ls"
        "trace_mix_perl" "perl"
        "trace_mix_python" "python-threads"
        "trace_mix_rustc" "rustc"
        "trace_mix_sort" "sort-parallel"
        "trace_mix_sqlite" "sqlite3"
    );
    for (name, packed) in traces {
        if !runner.wants(name) {
            continue;
        }
        let mut text = String::new();
        flate2::read::MultiGzDecoder::new(packed)
            .read_to_string(&mut text)
            .expect("the trace is packed with gzip");
        let steps = steps(&text);
        let workload = Workload::new(AREA, name, Unit::Ns).n(steps.len() as u64);
        runner.run(
            workload
                .with("kmem", replay::<Kmem>(&steps))
                .with("btreemap", replay::<BTreeMap<u64, (u64, u64)>>(&steps))
                .with("rangemap", replay::<RangeMap<u64, u64>>(&steps))
                .with("nodit", replay::<Nodit>(&steps))
                .with("memory_set", replay::<Areas>(&steps))
                .with("iset", replay::<Intervals>(&steps))
                .with("rbtree", replay::<Red>(&steps)),
        );
    }
}

fn replay<'s, R: Mapped + 's>(steps: &'s [Step]) -> impl Competitor + 's {
    move |_: u64, watch: &mut Watch| {
        let rounds = (5000 / steps.len() as u64).max(1);
        let mut maps = Vec::with_capacity(rounds as usize);
        let mut check = watch.time(|| {
            let mut seen = 0u64;
            for _ in 0..rounds {
                let mut map = R::empty();
                for &step in steps {
                    match step {
                        Step::Map(vma) => map.map(vma),
                        Step::Unmap(first, last) => map.unmap(first, last),
                        Step::Look(page) => {
                            seen = seen.wrapping_add(map.lookup(page).unwrap_or(0));
                        }
                    }
                }
                maps.push(map);
            }
            seen
        });
        for map in &maps {
            check = check.wrapping_add(map.sum() ^ map.count() as u64);
        }
        Slice::ops(rounds * steps.len() as u64, check)
    }
}

/// What a mapping is: two that touch and are the same kind are one.
#[derive(Clone, Copy)]
struct Kind {
    rights: u64,
    shared: bool,
    /// 0 is anonymous memory.
    file: u64,
    /// The page of the file at page 0 of the space.
    bias: u64,
}

impl Kind {
    fn word(self) -> u64 {
        let bias = if self.file == 0 { 0 } else { self.bias };
        let kind = self.rights | u64::from(self.shared) << 3 | self.file << 4;
        kind | bias.wrapping_mul(0x9e37_79b9_7f4a_7c15) << 16
    }
}

/// The areas while a trace is read, so that a call on a part of an area knows what that was.
#[derive(Default)]
struct Space {
    areas: BTreeMap<u64, (u64, Kind)>,
    steps: Vec<Step>,
}

impl Space {
    fn drop_range(&mut self, first: u64, last: u64) {
        let mut from = first;
        if let Some((&begin, _)) = self.areas.range(..first).next_back() {
            from = begin;
        }
        let touched: Vec<_> = self
            .areas
            .range(from..=last)
            .filter(|(_, (end, _))| *end >= first)
            .map(|(&begin, &(end, kind))| (begin, end, kind))
            .collect();
        for (begin, end, kind) in touched {
            self.areas.remove(&begin);
            if begin < first {
                self.areas.insert(begin, (first - 1, kind));
            }
            if end > last {
                self.areas.insert(last + 1, (end, kind));
            }
        }
    }

    fn map(&mut self, first: u64, last: u64, kind: Kind) {
        self.drop_range(first, last);
        self.areas.insert(first, (last, kind));
        self.steps.push(Step::Map((first, last, kind.word())));
    }

    fn unmap(&mut self, first: u64, last: u64) {
        self.drop_range(first, last);
        self.steps.push(Step::Unmap(first, last));
    }

    /// The parts of areas in a range.
    fn parts(&self, first: u64, last: u64) -> Vec<(u64, u64, Kind)> {
        self.areas
            .range(..=last)
            .filter(|(_, (end, _))| *end >= first)
            .map(|(&begin, &(end, kind))| (begin.max(first), end.min(last), kind))
            .collect()
    }
}

/// The steps of a recorded run (the format is that of `kmem replay`). Calls that failed are left out.
fn steps(text: &str) -> Vec<Step> {
    let mut space = Space::default();
    let mut brk = 0;
    let file = |name: &str| name.strip_prefix('f').map_or(0, |id| 1 + hex(id));
    for line in text.lines() {
        let word: Vec<&str> = line.split_whitespace().collect();
        let [call, rest @ ..] = word.as_slice() else {
            continue;
        };
        let number = |index: usize| rest.get(index).map_or(0, |word| hex(word));
        let result = rest
            .iter()
            .position(|&word| word == "=")
            .map(|at| rest[at + 1]);
        let done = result.is_none_or(|result| u64::from_str_radix(result, 16).is_ok());
        if !done && *call != "b" {
            continue;
        }
        let result = result.map_or(0, hex);
        let pages = |address: u64, bytes: u64| {
            let first = address / 4096 % Page::LIMIT;
            (first, first + bytes.div_ceil(4096).max(1) - 1)
        };
        match *call {
            "I" => {
                let (start, end, perms) = (number(0), number(1), rest[2]);
                let (first, last) = pages(start, end - start);
                let bit = |at: usize, letter| u64::from(perms.as_bytes()[at] == letter);
                let kind = Kind {
                    rights: bit(0, b'r') | bit(1, b'w') << 1 | bit(2, b'x') << 2,
                    shared: bit(3, b's') == 1,
                    file: file(rest[4]),
                    bias: (number(3) / 4096).wrapping_sub(first),
                };
                space.map(first, last, kind);
            }
            "m" => {
                let (first, last) = pages(result, number(1));
                let kind = Kind {
                    rights: number(2),
                    shared: number(3) & 1 == 1,
                    file: file(rest[4]),
                    bias: (number(5) / 4096).wrapping_sub(first),
                };
                space.map(first, last, kind);
            }
            "u" => {
                let (first, last) = pages(number(0), number(1));
                space.unmap(first, last);
            }
            "p" => {
                let (first, last) = pages(number(0), number(1));
                for (first, last, kind) in space.parts(first, last) {
                    let rights = number(2);
                    space.map(first, last, Kind { rights, ..kind });
                }
            }
            "r" => {
                let (first, last) = pages(number(0), number(1));
                let Some(&(_, _, kind)) = space.parts(first, first).first() else {
                    continue;
                };
                let (to, end) = pages(result, number(2));
                if to != first {
                    space.unmap(first, last);
                } else if end < last {
                    space.unmap(end + 1, last);
                    continue;
                }
                let bias = kind.bias.wrapping_add(first).wrapping_sub(to);
                space.map(to, end, Kind { bias, ..kind });
            }
            "b" => {
                let (old, new) = (brk, result / 4096);
                brk = new;
                let kind = Kind {
                    rights: 3,
                    shared: false,
                    file: 0,
                    bias: 0,
                };
                if old != 0 && new > old {
                    space.map(old, new - 1, kind);
                } else if new < old {
                    space.unmap(new, old - 1);
                }
            }
            "d" | "t" => space.steps.push(Step::Look(pages(number(0), 1).0)),
            _ => {}
        }
    }
    space.steps
}

fn hex(word: &str) -> u64 {
    u64::from_str_radix(word, 16).unwrap_or(0)
}
