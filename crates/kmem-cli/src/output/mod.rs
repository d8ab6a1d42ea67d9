//! What boot and replay print: numbered stages with progress, figures beside their recounts.

pub mod checks;
pub mod stages;
pub mod units;

pub use checks::Checks;
pub use stages::Stages;
