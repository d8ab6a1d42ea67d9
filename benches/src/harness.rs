//! Runs workloads: programs take turns inside each repetition, answers are compared, samples are summed up.
//!
//! ```text
//!   repetition 1    A A A  B B B  C C C        each: slices until its budget of time is used, at least one
//!   repetition 2    B B B  C C C  A A A        who begins changes, so that nobody always follows the same neighbour
//!   ...
//! ```
//!
//! - `I1`: a neighbour that comes and goes on the machine meets all programs alike, since they take turns at every repetition.
//! - `I2`: slice number `i` is the same work for every program; where both ran it, both must answer the same check.
//! - `I3`: a slice that did no operation or took no time is a problem, never a figure.
//! - `I4`: a program that panics or fails a check loses its row, and the run ends with an exit code that says so.
//!
//! A repetition's figure is its time by its operations. The published median, smallest and largest are those of repetitions; p99.9
//! is taken over slices, of which there are more. The first repetition warms up and is not counted.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use crate::clock::Watch;
use crate::output::{Row, Unit, heading, line};
use crate::stats::summarise;

/// Slices that one program may run in one repetition.
const MOST_SLICES: u64 = 1000;

/// What a slice did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Slice {
    /// So many operations were timed by the watch.
    Timed {
        /// Operations between start and stop of the watch.
        ops: u64,
        /// What they computed; `None` where no other program computes the same.
        check: Option<u64>,
    },
    /// A figure that is not a time.
    Value {
        /// The figure.
        value: f64,
        /// As above.
        check: Option<u64>,
    },
}

impl Slice {
    /// Operations whose answers add up to `check`.
    #[must_use]
    pub const fn ops(ops: u64, check: u64) -> Self {
        Self::Timed {
            ops,
            check: Some(check),
        }
    }

    /// Operations of a physical limit: nobody computes the same.
    #[must_use]
    pub const fn limit(ops: u64) -> Self {
        Self::Timed { ops, check: None }
    }

    /// A figure that is not a time.
    #[must_use]
    pub const fn value(value: f64) -> Self {
        Self::Value { value, check: None }
    }

    const fn check(&self) -> Option<u64> {
        match self {
            Self::Timed { check, .. } | Self::Value { check, .. } => *check,
        }
    }
}

/// A program in a workload.
pub trait Competitor {
    /// Does work number `index`: prepares it, and times what counts with `watch`.
    fn slice(&mut self, index: u64, watch: &mut Watch) -> Slice;
}

impl<F: FnMut(u64, &mut Watch) -> Slice> Competitor for F {
    fn slice(&mut self, index: u64, watch: &mut Watch) -> Slice {
        self(index, watch)
    }
}

/// A name, a size, and the programs that run it.
pub struct Workload<'a> {
    area: &'static str,
    name: &'static str,
    n: Option<u64>,
    threads: u32,
    unit: Unit,
    entries: Vec<(String, Box<dyn Competitor + 'a>)>,
}

impl<'a> Workload<'a> {
    /// A workload of one thread without a size.
    #[must_use]
    pub fn new(area: &'static str, name: &'static str, unit: Unit) -> Self {
        Self {
            area,
            name,
            n: None,
            threads: 1,
            unit,
            entries: Vec::new(),
        }
    }

    /// Gives it a size.
    #[must_use]
    pub fn n(mut self, n: u64) -> Self {
        self.n = Some(n);
        self
    }

    /// Says how many threads run it.
    #[must_use]
    pub fn threads(mut self, threads: u32) -> Self {
        self.threads = threads;
        self
    }

    /// Adds a program.
    #[must_use]
    pub fn with(mut self, program: &str, competitor: impl Competitor + 'a) -> Self {
        self.entries
            .push((program.to_owned(), Box::new(competitor)));
        self
    }
}

/// How much is run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Small sizes and budgets.
    pub quick: bool,
    /// Counted repetitions.
    pub repetitions: usize,
    /// Time for one program in one repetition.
    pub budget: Duration,
    /// Only workloads whose name begins so.
    pub only: Option<String>,
    /// Prints rows as they come.
    pub print: bool,
}

impl Options {
    /// What `--quick` means, or the full run.
    #[must_use]
    pub fn new(quick: bool) -> Self {
        Self {
            quick,
            repetitions: if quick { 9 } else { 15 },
            budget: Duration::from_millis(if quick { 3 } else { 40 }),
            only: None,
            print: true,
        }
    }
}

/// Runs workloads one after the other and keeps their rows.
#[derive(Debug)]
pub struct Runner {
    options: Options,
    rows: Vec<Row>,
    problems: Vec<String>,
    losses: Vec<String>,
}

#[derive(Default)]
struct Samples {
    runs: Vec<f64>,
    slices: Vec<f64>,
    failed: bool,
}

impl Runner {
    /// A runner without rows.
    #[must_use]
    pub fn new(options: Options) -> Self {
        if options.print {
            println!("{}", heading());
        }
        Self {
            options,
            rows: Vec::new(),
            problems: Vec::new(),
            losses: Vec::new(),
        }
    }

    /// Whether small sizes are wanted.
    #[must_use]
    pub fn is_quick(&self) -> bool {
        self.options.quick
    }

    /// `small` in a quick run, `full` otherwise.
    #[must_use]
    pub fn size<T>(&self, small: T, full: T) -> T {
        if self.options.quick { small } else { full }
    }

    /// Whether this workload was asked for: ask before building it.
    #[must_use]
    pub fn wants(&self, name: &str) -> bool {
        self.options
            .only
            .as_ref()
            .is_none_or(|only| name.starts_with(only.as_str()))
    }

    /// What was measured.
    #[must_use]
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// What went wrong.
    #[must_use]
    pub fn problems(&self) -> &[String] {
        &self.problems
    }

    /// Rows that a peer lost by itself: it ran out of memory, or panicked.
    #[must_use]
    pub fn losses(&self) -> &[String] {
        &self.losses
    }

    fn loss(&mut self, loss: String) {
        eprintln!("compare: {loss}");
        self.losses.push(loss);
    }

    /// Notes something that went wrong.
    pub fn problem(&mut self, problem: String) {
        eprintln!("compare: {problem}");
        self.problems.push(problem);
    }

    /// Adds rows that were measured elsewhere.
    pub fn add_rows(&mut self, rows: Vec<Row>) {
        let first = self.rows.len();
        self.rows.extend(rows);
        self.print_from(first);
    }

    /// Runs a workload and keeps its rows.
    pub fn run(&mut self, mut workload: Workload<'_>) {
        if !self.wants(workload.name) {
            return;
        }
        let mut samples: Vec<Samples> = workload
            .entries
            .iter()
            .map(|_| Samples::default())
            .collect();
        let mut answers: HashMap<u64, (String, u64)> = HashMap::new();
        for repetition in 0..=self.options.repetitions {
            for turn in 0..workload.entries.len() {
                let at = (turn + repetition) % workload.entries.len();
                if samples[at].failed {
                    continue;
                }
                let (program, competitor) = &mut workload.entries[at];
                let result = catch_unwind(AssertUnwindSafe(|| {
                    turn_of(
                        &self.options,
                        repetition,
                        program,
                        competitor.as_mut(),
                        &mut answers,
                    )
                }));
                match result {
                    Ok(Ok((run, slices))) if repetition > 0 => {
                        samples[at].runs.push(run);
                        samples[at].slices.extend(slices);
                    }
                    Ok(Ok(_)) => {}
                    Ok(Err(problem)) => {
                        samples[at].failed = true;
                        self.problem(format!("{} {}: {problem}", workload.area, workload.name));
                    }
                    Err(_) => {
                        samples[at].failed = true;
                        let what =
                            format!("{} {}: {program} panicked", workload.area, workload.name);
                        if is_ours(program) {
                            self.problem(what);
                        } else {
                            self.loss(what);
                        }
                    }
                }
            }
        }
        let first = self.rows.len();
        for ((program, _), samples) in workload.entries.iter().zip(samples) {
            if samples.failed {
                continue;
            }
            let Some(summary) = summarise(&samples.runs, &samples.slices) else {
                continue;
            };
            self.rows.push(Row {
                area: workload.area.to_owned(),
                workload: workload.name.to_owned(),
                n: workload.n,
                program: program.clone(),
                threads: workload.threads,
                unit: workload.unit,
                summary,
            });
        }
        self.print_from(first);
    }

    fn print_from(&self, first: usize) {
        if self.options.print {
            for row in &self.rows[first..] {
                println!("{}", line(row, &self.rows));
            }
        }
    }
}

/// Whether a failure of this program is a failure of the comparison: a peer may fail by itself.
fn is_ours(program: &str) -> bool {
    program.starts_with("kmem") || program.starts_with("limit:")
}

/// One program's turn in one repetition: its figure and those of its slices.
fn turn_of(
    options: &Options,
    repetition: usize,
    program: &str,
    competitor: &mut dyn Competitor,
    answers: &mut HashMap<u64, (String, u64)>,
) -> Result<(f64, Vec<f64>), String> {
    let begin = Instant::now();
    let mut total = (0.0, 0.0);
    let mut spent = Duration::ZERO;
    let mut slices = Vec::new();
    for slice in 0..MOST_SLICES {
        let index = repetition as u64 * MOST_SLICES + slice;
        let mut watch = Watch::new();
        let done = competitor.slice(index, &mut watch);
        if let Some(check) = done.check() {
            let (first, want) = answers
                .entry(index)
                .or_insert_with(|| (program.to_owned(), check));
            if check != *want {
                return Err(format!(
                    "{program} answers {check:#x} where {first} answers {want:#x}"
                ));
            }
        }
        let (amount, ops) = match done {
            Slice::Timed { ops, .. } => (watch.elapsed().as_nanos() as f64, ops as f64),
            Slice::Value { value, .. } => (value, 1.0),
        };
        if ops == 0.0 {
            return Err(format!("{program} did nothing in slice {index}"));
        }
        // A hypervisor's clock of a thread stands still now and then; such a slice says nothing.
        if amount > 0.0 || matches!(done, Slice::Value { .. }) {
            slices.push(amount / ops);
            total = (total.0 + amount, total.1 + ops);
        }
        spent += watch.elapsed();
        // Preparation is not timed, but a busy machine must not make a run endless.
        if matches!(done, Slice::Value { .. })
            || spent >= options.budget
            || begin.elapsed() >= options.budget * 8
        {
            break;
        }
    }
    if slices.is_empty() {
        return Err(format!("{program} measured nothing"));
    }
    Ok((total.0 / total.1, slices))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quiet() -> Runner {
        Runner::new(Options {
            print: false,
            repetitions: 9,
            budget: Duration::from_micros(100),
            ..Options::new(true)
        })
    }

    fn spin(rounds: u64) -> u64 {
        (0..rounds).fold(1, |sum, i| std::hint::black_box(sum ^ i.wrapping_mul(sum)))
    }

    fn honest(rounds: u64) -> impl Competitor {
        move |index: u64, watch: &mut Watch| {
            watch.time(|| spin(rounds));
            Slice::ops(rounds, index)
        }
    }

    #[test]
    fn a_slice_in_which_the_clock_stood_still_does_not_count_and_a_turn_without_a_measured_one_fails()
     {
        let stood_still = |slices: u64| {
            move |index: u64, watch: &mut Watch| {
                if index % MOST_SLICES >= slices {
                    watch.time(|| spin(10_000));
                }
                Slice::ops(10_000, index)
            }
        };
        let mut runner = quiet();
        runner.run(Workload::new("area", "work", Unit::Ns).with("kmem", stood_still(1)));
        assert!(runner.problems().is_empty());
        assert!(runner.rows()[0].summary.min > 0.0);
        let mut runner = quiet();
        runner.run(Workload::new("area", "work", Unit::Ns).with("kmem", stood_still(u64::MAX)));
        assert_eq!(runner.problems().len(), 1, "{:?}", runner.problems());
    }

    #[test]
    fn every_program_gets_a_row_of_all_repetitions() {
        let mut runner = quiet();
        runner.run(
            Workload::new("area", "work", Unit::Ns)
                .n(3)
                .with("kmem", honest(10_000))
                .with("peer", honest(20_000)),
        );
        assert!(runner.problems().is_empty());
        let rows = runner.rows();
        assert_eq!((rows.len(), rows[0].program.as_str()), (2, "kmem"));
        assert!(rows.iter().all(|row| row.summary.runs == 9));
        assert!(rows.iter().all(|row| row.summary.min <= row.summary.median));
        assert!(rows.iter().all(|row| row.summary.min > 0.0));
    }

    #[test]
    fn programs_take_turns_and_none_always_begins() {
        let log = std::cell::RefCell::new(String::new());
        let named = |name| {
            let log = &log;
            move |index: u64, watch: &mut Watch| {
                if index.is_multiple_of(MOST_SLICES) {
                    log.borrow_mut().push(name);
                }
                watch.time(|| spin(100_000));
                Slice::ops(1, 0)
            }
        };
        let mut runner = quiet();
        runner.run(
            Workload::new("area", "work", Unit::Ns)
                .with("a", named('a'))
                .with("b", named('b'))
                .with("c", named('c')),
        );
        assert!(log.borrow().starts_with("abcbcacababc"), "{}", log.borrow());
        assert_eq!(log.borrow().len(), 30);
    }

    #[test]
    fn a_different_answer_costs_the_row_and_is_a_problem() {
        let liar = |_: u64, watch: &mut Watch| {
            watch.time(|| spin(10_000));
            Slice::ops(1, u64::MAX)
        };
        let mut runner = quiet();
        runner.run(
            Workload::new("area", "work", Unit::Ns)
                .with("kmem", honest(10_000))
                .with("liar", liar),
        );
        assert_eq!(runner.rows().len(), 1);
        assert_eq!(runner.problems().len(), 1);
        assert!(runner.problems()[0].contains("liar answers"));
    }

    #[test]
    fn measuring_nothing_and_panicking_are_problems() {
        let idle = |index: u64, watch: &mut Watch| {
            watch.time(|| ());
            Slice::ops(0, index)
        };
        let unmeasured = |index: u64, _: &mut Watch| Slice::ops(1, index);
        let broken = |_: u64, _: &mut Watch| -> Slice { panic!("as planned") };
        let mut runner = quiet();
        runner.run(
            Workload::new("area", "work", Unit::Ns)
                .with("idle", idle)
                .with("unmeasured", unmeasured)
                .with("kmem broken", broken)
                .with("kmem", honest(10_000)),
        );
        assert_eq!(runner.problems().len(), 3);
        assert_eq!(runner.rows().len(), 1);
        assert_eq!(runner.rows()[0].program, "kmem");
    }

    #[test]
    fn a_peer_that_panics_loses_its_row_and_nothing_else() {
        let broken = |_: u64, _: &mut Watch| -> Slice { panic!("as planned") };
        let mut runner = quiet();
        runner.run(
            Workload::new("area", "work", Unit::Ns)
                .with("peer", broken)
                .with("kmem", honest(10_000)),
        );
        assert!(runner.problems().is_empty());
        assert_eq!(runner.losses(), ["area work: peer panicked"]);
        assert_eq!(runner.rows().len(), 1);
    }

    #[test]
    fn values_are_taken_once_a_repetition() {
        let mut calls = 0;
        let mut runner = quiet();
        runner.run(Workload::new("area", "work", Unit::Bytes).with(
            "kmem",
            |_: u64, _: &mut Watch| {
                calls += 1;
                Slice::value(f64::from(calls))
            },
        ));
        assert_eq!(calls, 10);
        assert_eq!(
            runner.rows()[0].summary.median,
            6.0,
            "2 to 10: one warms up"
        );
    }

    #[test]
    fn only_picks_by_the_beginning_of_the_name() {
        let mut runner = quiet();
        runner.options.only = Some("map".into());
        assert!(runner.wants("map_4k"));
        assert!(!runner.wants("unmap"));
        runner.run(Workload::new("area", "unmap", Unit::Ns).with("kmem", honest(1000)));
        assert!(runner.rows().is_empty());
    }
}
