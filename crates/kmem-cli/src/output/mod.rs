//! What boot and replay print: numbered stages with progress, figures beside their recounts.

/// Prints a line to stdout. A reader that has gone away, as `head` does, ends the output and not the run.
#[macro_export]
macro_rules! say {
    ($($what:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stdout().lock(), $($what)*);
    }};
}

pub mod checks;
pub mod stages;
pub mod units;

pub use checks::Checks;
pub use stages::Stages;
