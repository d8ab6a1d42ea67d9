//! `cargo package` for every published crate, each built from its package.
//!
//! One command for all: cargo lays a registry of the packages themselves under the build of each, so that crates which
//! depend on each other need not be published for it. cargo unpacks from that registry into its own cache by path and
//! version, and would find the sources of an earlier run there: so each run has a folder of its own, and takes away
//! what it left in the cache.

use std::path::Path;
use std::time::SystemTime;

use crate::sh::{Shell, Stop};
use crate::workspace;

/// Packages and builds every published crate.
///
/// # Errors
/// When one does not package or does not build from its package.
pub fn check(shell: &mut Shell) -> Result<String, Stop> {
    let begin = SystemTime::now();
    let packages = workspace::published(shell)?;
    let stamp = begin
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let folder = shell
        .root()
        .join("target/package-check")
        .join(stamp.to_string());
    let mut command = shell.cargo(["package", "--allow-dirty", "--target-dir"]);
    command.arg(&folder);
    for package in &packages {
        command.args(["-p", &package.name]);
    }
    // What is compiled may stay: only the sources must be fresh.
    command.env(
        "CARGO_BUILD_BUILD_DIR",
        shell.root().join("target/package-check/build"),
    );
    let result = shell.run(&mut command);
    let _ = std::fs::remove_dir_all(&folder);
    if let Some(home) = std::env::var_os("CARGO_HOME")
        .or_else(|| Some(Path::new(&std::env::var_os("HOME")?).join(".cargo").into()))
    {
        forget(&Path::new(&home).join("registry/src"), begin);
    }
    result?;
    Ok(format!("{} packages", packages.len()))
}

/// Removes what was unpacked since `begin` from registries that are folders: cargo names their caches `-HASH`, without
/// a host.
fn forget(cache: &Path, begin: SystemTime) {
    for entry in std::fs::read_dir(cache).into_iter().flatten().flatten() {
        let local = entry.file_name().to_string_lossy().starts_with('-');
        let fresh = entry
            .metadata()
            .and_then(|data| data.modified())
            .is_ok_and(|modified| modified >= begin);
        if local && fresh {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}
