//! Rows of whole programs: see [`crate::hosted`].

use super::AREA;
use crate::harness::Runner;
use crate::hosted::{HEAPS, HostPages, run};
use crate::output::{Row, Unit};
use crate::stats::summarise;

/// `sort` and `json` over every heap, in turns.
///
/// Each runs twice and the second time counts: what the host must do for a process's memory depends on what the process before it left behind
/// (large pages that are there and warm, or memory in pieces), which was worth a fifth of the time and always hit the same program.
pub(super) fn programs(runner: &mut Runner) {
    let (sort, json) = (
        runner.size(200_000, 10_000_000),
        runner.size(20_000, 500_000),
    );
    for (workload, program, n, pages) in [
        ("hosted_sort", "sort", sort, HostPages::Large),
        ("hosted_sort_4k", "sort", sort, HostPages::Small),
        ("hosted_json", "json", json, HostPages::Large),
        ("hosted_json_4k", "json", json, HostPages::Small),
    ] {
        if runner.wants(workload) {
            one(runner, workload, program, n, pages);
        }
    }
}

fn one(runner: &mut Runner, workload: &str, program: &str, n: u64, pages: HostPages) {
    let runs = runner.size(5, 3);
    let mut times = vec![Vec::new(); HEAPS.len()];
    let mut computed = None;
    for round in 0..runs {
        for turn in 0..HEAPS.len() {
            let heap = (turn + round) % HEAPS.len();
            let once = || run(HEAPS[heap], program, n, pages);
            let twice = once().and_then(|_| once());
            let (time, check) = match twice {
                Ok(answer) => answer,
                Err(problem) => return runner.problem(problem),
            };
            if *computed.get_or_insert(check) != check {
                return runner.problem(format!("{workload} over {}: a wrong answer", HEAPS[heap]));
            }
            times[heap].push(time);
        }
    }
    let row = |(heap, times): (&&str, &Vec<f64>)| {
        Some(Row {
            area: AREA.into(),
            workload: workload.into(),
            n: Some(n),
            program: (*heap).into(),
            threads: 1,
            unit: Unit::Ns,
            summary: summarise(times, times)?,
        })
    };
    let mut rows: Vec<Row> = HEAPS.iter().zip(&times).filter_map(row).collect();
    // kmem first, as in every workload.
    rows.sort_by_key(|row| row.program != "kmem");
    runner.add_rows(rows);
}
