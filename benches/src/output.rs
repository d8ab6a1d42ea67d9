//! What is printed: one line a row, and the JSON array that other programs read.

use std::fmt::Write as _;

use serde_json::{Map, Value, json};

use crate::stats::Summary;

/// What a figure counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Nanoseconds an operation.
    Ns,
    /// Bytes.
    Bytes,
    /// Blocks of memory.
    Blocks,
    /// A plain number.
    Count,
}

impl Unit {
    /// The unit's name in JSON and in lines.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ns => "ns",
            Self::Bytes => "bytes",
            Self::Blocks => "blocks",
            Self::Count => "count",
        }
    }

    fn from_name(name: &str) -> Option<Self> {
        [Self::Ns, Self::Bytes, Self::Blocks, Self::Count]
            .into_iter()
            .find(|unit| unit.name() == name)
    }
}

/// One figure: a program in a workload.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// `buddy`, `slab`, `paging`, `fork` or `vma`.
    pub area: String,
    /// The workload's name.
    pub workload: String,
    /// Its size, where it has one.
    pub n: Option<u64>,
    /// `kmem`, a peer's crate, `btreemap`, `host-kernel` or `limit:NAME`.
    pub program: String,
    /// Threads that run it.
    pub threads: u32,
    /// What the figure counts.
    pub unit: Unit,
    /// The figure.
    pub summary: Summary,
}

impl Row {
    /// The row as JSON.
    #[must_use]
    pub fn to_json(&self) -> Value {
        json!({
            "area": self.area,
            "workload": self.workload,
            "n": self.n,
            "program": self.program,
            "threads": self.threads,
            "unit": self.unit.name(),
            "median": self.summary.median,
            "min": self.summary.min,
            "max": self.summary.max,
            "p999": self.summary.p999,
            "runs": self.summary.runs,
        })
    }

    /// The row that [`to_json`](Self::to_json) made; `None` where a field is missing or of another type.
    #[must_use]
    pub fn from_json(value: &Value) -> Option<Self> {
        let object: &Map<String, Value> = value.as_object()?;
        let text = |key| Some(object.get(key)?.as_str()?.to_owned());
        let number = |key| object.get(key)?.as_f64();
        Some(Self {
            area: text("area")?,
            workload: text("workload")?,
            n: match object.get("n")? {
                Value::Null => None,
                n => Some(n.as_u64()?),
            },
            program: text("program")?,
            threads: u32::try_from(object.get("threads")?.as_u64()?).ok()?,
            unit: Unit::from_name(&text("unit")?)?,
            summary: Summary {
                median: number("median")?,
                min: number("min")?,
                max: number("max")?,
                p999: number("p999")?,
                runs: usize::try_from(object.get("runs")?.as_u64()?).ok()?,
            },
        })
    }

    fn is_beside(&self, other: &Self) -> bool {
        (&self.area, &self.workload, self.n, self.threads)
            == (&other.area, &other.workload, other.n, other.threads)
    }
}

/// All rows as one JSON array, a row a line.
#[must_use]
pub fn json(rows: &[Row]) -> String {
    let mut text = String::from("[");
    for (index, row) in rows.iter().enumerate() {
        text.push_str(if index == 0 { "\n" } else { ",\n" });
        text.push_str(&row.to_json().to_string());
    }
    text.push_str("\n]\n");
    text
}

/// Reads what [`json()`] wrote.
///
/// # Errors
///
/// What is wrong, in words.
pub fn parse(text: &str) -> Result<Vec<Row>, String> {
    let value: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let rows = value.as_array().ok_or("the JSON is not an array")?;
    rows.iter()
        .map(|row| Row::from_json(row).ok_or_else(|| format!("not a row: {row}")))
        .collect()
}

/// The heading of [`line()`]s.
#[must_use]
pub fn heading() -> String {
    format!(
        "{:<8}{:<24}{:>9} {:<24}{:>2} {:>11} {:>11} {:>11} {:>11} {:<6} {:>8}",
        "area", "workload", "n", "program", "t", "median", "min", "max", "p99.9", "unit", "ratio"
    )
}

/// The row as a line; its ratio is its median by kmem's of the same workload, size and threads among `rows`.
#[must_use]
pub fn line(row: &Row, rows: &[Row]) -> String {
    let mut text = String::new();
    let n = row.n.map_or("-".into(), |n| n.to_string());
    let _ = write!(
        text,
        "{:<8}{:<24}{n:>9} {:<24}{:>2}",
        row.area, row.workload, row.program, row.threads
    );
    let summary = &row.summary;
    for value in [summary.median, summary.min, summary.max, summary.p999] {
        let _ = write!(text, " {:>11}", figure(value));
    }
    let _ = write!(text, " {:<6}", row.unit.name());
    match ratio(row, rows) {
        Some(ratio) => {
            let _ = write!(text, " {:>8}", figure(ratio));
        }
        None => {
            let _ = write!(text, " {:>8}", "-");
        }
    }
    text
}

/// All rows as a Markdown table: a line for each figure of kmem's, with what was measured beside it.
#[must_use]
pub fn markdown(rows: &[Row]) -> String {
    let mut text = String::from(
        "| area | workload | n | threads | unit | kmem, min to max | others, and their ratios to kmem |\n|---|---|---|---|---|---|---|\n",
    );
    for row in rows.iter().filter(|row| row.program == "kmem") {
        let n = row.n.map_or("-".into(), |n| n.to_string());
        let summary = &row.summary;
        let _ = write!(
            text,
            "| {} | `{}` | {n} | {} | {} | {}, {} to {} | ",
            row.area,
            row.workload,
            row.threads,
            row.unit.name(),
            figure(summary.median),
            figure(summary.min),
            figure(summary.max)
        );
        let others = rows
            .iter()
            .filter(|other| other.program != "kmem" && other.is_beside(row));
        let others: Vec<_> = others
            .map(|other| {
                let median = figure(other.summary.median);
                match ratio(other, rows) {
                    Some(ratio) => format!("`{}` {median} ({})", other.program, figure(ratio)),
                    None => format!("`{}` {median}", other.program),
                }
            })
            .collect();
        text.push_str(if others.is_empty() { "-" } else { "" });
        text.push_str(&others.join(", "));
        text.push_str(" |\n");
    }
    text
}

/// The row's median by kmem's: above 1 kmem has the smaller figure.
#[must_use]
pub fn ratio(row: &Row, rows: &[Row]) -> Option<f64> {
    let kmem = rows
        .iter()
        .find(|other| other.program == "kmem" && other.is_beside(row))?;
    (kmem.summary.median > 0.0).then(|| row.summary.median / kmem.summary.median)
}

/// Three significant digits, without an exponent.
#[must_use]
pub fn figure(value: f64) -> String {
    let size = value.abs();
    if size >= 100.0 || value == 0.0 {
        format!("{value:.0}")
    } else if size >= 10.0 {
        format!("{value:.1}")
    } else if size >= 1.0 {
        format!("{value:.2}")
    } else if size >= 0.1 {
        format!("{value:.3}")
    } else {
        format!("{value:.4}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(program: &str, n: Option<u64>, threads: u32, median: f64) -> Row {
        Row {
            area: "buddy".into(),
            workload: "pair_o0".into(),
            n,
            program: program.into(),
            threads,
            unit: Unit::Ns,
            summary: Summary {
                median,
                min: median / 2.0,
                max: median * 2.0,
                p999: median * 3.0,
                runs: 9,
            },
        }
    }

    #[test]
    fn json_comes_back_as_it_was() {
        let rows = [
            row("kmem", None, 1, 2.4),
            row("limit:stack", Some(1 << 40), 2, 1.0 / 3.0),
        ];
        assert_eq!(parse(&json(&rows)).unwrap(), rows);
        assert_eq!(parse(&json(&[])).unwrap(), []);
    }

    #[test]
    fn a_line_of_the_table_has_the_peers_of_its_workload_alone() {
        let mut elsewhere = row("talc", None, 1, 9.0);
        elsewhere.workload = "other".into();
        let rows = [
            row("kmem", None, 1, 2.0),
            row("talc", None, 1, 6.0),
            row("talc", None, 2, 7.0),
            elsewhere,
        ];
        let text = markdown(&rows);
        let lines: Vec<_> = text.lines().skip(2).collect();
        assert_eq!(
            lines,
            ["| buddy | `pair_o0` | - | 1 | ns | 2.00, 1.00 to 4.00 | `talc` 6.00 (3.00) |"]
        );
        assert_eq!(
            markdown(&[row("kmem", Some(8), 2, 1.0)]).lines().last(),
            Some("| buddy | `pair_o0` | 8 | 2 | ns | 1.00, 0.500 to 2.00 | - |")
        );
    }

    #[test]
    fn json_has_the_published_keys_and_no_others() {
        let value = row("kmem", None, 1, 2.0).to_json();
        let mut keys: Vec<_> = value.as_object().unwrap().keys().cloned().collect();
        keys.sort();
        let mut want = [
            "area", "workload", "n", "program", "threads", "unit", "median", "min", "max", "p999",
            "runs",
        ];
        want.sort_unstable();
        assert_eq!(keys, want);
        assert!(value["n"].is_null());
        assert_eq!(value["unit"], "ns");
    }

    #[test]
    fn a_row_with_a_missing_or_wrong_field_is_refused() {
        let good = row("kmem", Some(3), 1, 2.0).to_json();
        assert!(Row::from_json(&good).is_some());
        for key in good.as_object().unwrap().keys() {
            let mut bad = good.clone();
            bad.as_object_mut().unwrap().remove(key);
            assert!(Row::from_json(&bad).is_none(), "without {key}");
        }
        let mut bad = good.clone();
        bad["unit"] = "parsecs".into();
        assert!(parse(&format!("[{bad}]")).is_err());
        assert!(parse("{}").is_err());
        assert!(parse("[").is_err());
    }

    #[test]
    fn a_ratio_is_by_kmem_in_the_same_workload_size_and_threads() {
        let rows = [
            row("kmem", Some(1), 1, 2.0),
            row("kmem", Some(1), 2, 4.0),
            row("kmem", Some(2), 1, 100.0),
            row("peer", Some(1), 1, 5.0),
            row("peer", Some(1), 2, 5.0),
            row("peer", Some(3), 1, 5.0),
        ];
        assert_eq!(ratio(&rows[3], &rows), Some(2.5));
        assert_eq!(ratio(&rows[4], &rows), Some(1.25));
        assert_eq!(ratio(&rows[5], &rows), None);
        assert!(line(&rows[3], &rows).ends_with("2.50"));
        assert!(line(&rows[5], &rows).ends_with('-'));
        let nothing = [row("kmem", None, 1, 0.0), row("peer", None, 1, 3.0)];
        assert_eq!(ratio(&nothing[1], &nothing), None, "no division by zero");
    }

    #[test]
    fn figures_have_three_digits() {
        let texts: Vec<_> = [0.0, 0.0123, 0.123, 1.234, 12.34, 123.4, 123_456.0]
            .map(figure)
            .into();
        assert_eq!(
            texts,
            ["0", "0.0123", "0.123", "1.23", "12.3", "123", "123456"]
        );
    }
}
