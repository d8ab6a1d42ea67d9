//! Order statistics: median, smallest, largest, and the value that 99.9 % of the samples do not exceed.

/// What is published of a row's samples.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// The middle repetition; the mean of the two in the middle where their number is even.
    pub median: f64,
    /// The smallest repetition.
    pub min: f64,
    /// The largest repetition.
    pub max: f64,
    /// The smallest sample that at least 99.9 % of all samples do not exceed.
    pub p999: f64,
    /// How many repetitions.
    pub runs: usize,
}

/// Sums up: `runs` has one figure for each repetition, `samples` one for each slice of any repetition.
///
/// `None` where there is nothing to sum up.
#[must_use]
pub fn summarise(runs: &[f64], samples: &[f64]) -> Option<Summary> {
    let runs = sorted(runs);
    let samples = sorted(samples);
    Some(Summary {
        median: median(&runs)?,
        min: *runs.first()?,
        max: *runs.last()?,
        p999: percentile(&samples, 999, 1000)?,
        runs: runs.len(),
    })
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut values = values.to_vec();
    values.sort_unstable_by(f64::total_cmp);
    values
}

/// The median of sorted values.
fn median(sorted: &[f64]) -> Option<f64> {
    let middle = sorted.len() / 2;
    let upper = *sorted.get(middle)?;
    if sorted.len() % 2 == 1 {
        Some(upper)
    } else {
        Some((sorted[middle - 1] + upper) / 2.0)
    }
}

/// Nearest rank: the smallest of the sorted values that at least `numerator / denominator` of them do not exceed.
fn percentile(sorted: &[f64], numerator: usize, denominator: usize) -> Option<f64> {
    let rank = (sorted.len() * numerator).div_ceil(denominator);
    sorted.get(rank.saturating_sub(1)).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_has_no_summary() {
        assert_eq!(summarise(&[], &[]), None);
        assert_eq!(summarise(&[1.0], &[]), None);
    }

    #[test]
    fn one_value_is_everything() {
        let summary = summarise(&[4.0], &[4.0]).unwrap();
        assert_eq!(
            (summary.median, summary.min, summary.max, summary.p999),
            (4.0, 4.0, 4.0, 4.0)
        );
        assert_eq!(summary.runs, 1);
    }

    #[test]
    fn the_median_needs_no_order_and_takes_the_middle() {
        let odd = summarise(&[9.0, 1.0, 5.0], &[1.0]).unwrap();
        assert_eq!((odd.median, odd.min, odd.max), (5.0, 1.0, 9.0));
        let even = summarise(&[9.0, 1.0, 5.0, 6.0], &[1.0]).unwrap();
        assert_eq!(even.median, 5.5);
    }

    #[test]
    fn the_percentile_is_the_nearest_rank() {
        let samples: Vec<f64> = (1..=1000).rev().map(f64::from).collect();
        assert_eq!(summarise(&[1.0], &samples).unwrap().p999, 999.0);
        let samples: Vec<f64> = (1..=1001).map(f64::from).collect();
        assert_eq!(summarise(&[1.0], &samples).unwrap().p999, 1000.0);
        let few: Vec<f64> = (1..=9).map(f64::from).collect();
        assert_eq!(summarise(&few, &few).unwrap().p999, 9.0);
        assert_eq!(percentile(&[1.0, 2.0, 3.0, 4.0], 1, 2), Some(2.0));
    }

    #[test]
    fn one_wild_repetition_moves_the_largest_only() {
        let mut runs = vec![10.0; 9];
        runs[4] = 1e9;
        let summary = summarise(&runs, &runs).unwrap();
        assert_eq!((summary.median, summary.min), (10.0, 10.0));
        assert_eq!(summary.max, 1e9);
    }
}
