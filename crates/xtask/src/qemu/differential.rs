//! Scenario `differential`: what the kernel printed, held against mock-x86 by the demo kernel's own `oracle` program.

use std::path::Path;
use std::process::Command;

use crate::sh::{Stop, fail};

/// Runs the oracle on the kernel's output.
///
/// # Errors
/// Where the two machines differ: the oracle's words.
pub fn compare(oracle: &Path, text: &str) -> Result<(), Stop> {
    let name = format!("kmem-differential-{}-{:p}.txt", std::process::id(), text);
    let file = std::env::temp_dir().join(name);
    std::fs::write(&file, text)?;
    let output = Command::new(oracle).arg(&file).output()?;
    std::fs::remove_file(&file)?;
    let words = String::from_utf8_lossy(&output.stdout);
    if output.status.success() {
        Ok(())
    } else {
        fail(words.trim())
    }
}
