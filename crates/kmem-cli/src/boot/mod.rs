//! `kmem boot`: the main job, stage by stage.

pub mod exec;
pub mod forks;
pub mod machine;
pub mod recount;

use crate::args::Boot;
use crate::embedded;
use crate::input::{InputError, lines::Source, map};

/// The map that is booted from where none is given.
pub const DEFAULT_MAP: &str = "firecracker-24g";

/// Runs the command; `false` means that something did not hold.
///
/// # Errors
/// Unusable input.
pub fn run(args: &Boot) -> Result<bool, InputError> {
    let source = match &args.map {
        Some(path) => Source::open(path)?,
        None => embedded::find(embedded::MAPS, DEFAULT_MAP)
            .expect("the default map is embedded")
            .open()?,
    };
    let map = map::read(source)?;
    println!(
        "{}: {} ranges, {} bytes usable",
        map.name,
        map.entries.len(),
        map.usable_bytes()
    );
    Ok(true)
}
