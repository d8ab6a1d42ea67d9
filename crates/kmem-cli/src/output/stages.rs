//! Numbered stages: a bar on a terminal while one runs, a plain line when it is done.
//!
//! The bar goes to stderr and only if that is a terminal, so that the output proper is the same in a pipe. Plain lines go
//! to stdout. Times are printed for readers and never decide anything.

use super::units::time;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::time::Instant;

/// The stages of a run.
pub struct Stages {
    total: usize,
    done: usize,
    bars: bool,
    lines: Vec<String>,
}

/// A stage that runs.
pub struct Stage<'a> {
    stages: &'a mut Stages,
    name: String,
    started: Instant,
    bar: ProgressBar,
}

impl Stages {
    /// Starts a run of `total` stages.
    pub fn new(total: usize) -> Self {
        Self {
            total,
            done: 0,
            bars: std::io::stderr().is_terminal(),
            lines: Vec::new(),
        }
    }

    /// Starts a stage of `steps` steps; 0 if their number is not known.
    pub fn start(&mut self, name: &str, steps: u64) -> Stage<'_> {
        let target = if self.bars {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        let bar = ProgressBar::with_draw_target(Some(steps).filter(|s| *s > 0), target);
        let form = if steps > 0 {
            "  {msg} [{bar:40}] {pos}/{len}"
        } else {
            "  {msg} {spinner} {pos}"
        };
        if let Ok(style) = ProgressStyle::with_template(form) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_message(name.to_string());
        Stage {
            name: name.into(),
            started: Instant::now(),
            bar,
            stages: self,
        }
    }

    /// Returns the lines of all finished stages, without times.
    pub fn lines(&self) -> &[String] {
        &self.lines
    }
}

impl Stage<'_> {
    /// Says how far the stage is.
    pub fn progress(&self, step: u64) {
        self.bar.set_position(step);
    }

    /// Ends the stage with what it did.
    pub fn done(self, summary: &str) {
        self.bar.finish_and_clear();
        self.stages.done += 1;
        let line = format!(
            "[{:>2}/{}] {:<22} {summary}",
            self.stages.done, self.stages.total, self.name
        );
        say!("{line}  ({})", time(self.started.elapsed()));
        self.stages.lines.push(line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_are_counted() {
        let mut s = Stages::new(2);
        let stage = s.start("zones", 10);
        stage.progress(5);
        stage.done("3 zones");
        s.start("slab", 0).done("online");
        assert_eq!(
            s.lines(),
            [
                "[ 1/2] zones                  3 zones",
                "[ 2/2] slab                   online"
            ]
        );
    }
}
