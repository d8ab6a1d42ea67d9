//! `cargo package` for every published crate, each built from its package.
//!
//! One command for all: cargo lays a registry of the packages themselves under the build of each, so that crates which
//! depend on each other need not be published for it. What comes from a registry cargo takes for unchangeable: it unpacks
//! and compiles it once for a path and version. So what an earlier run left of these crates is taken away first, both
//! in the build folder and in cargo's cache; other dependencies stay compiled.

use std::path::{Path, PathBuf};

use crate::sh::{Shell, Stop};
use crate::workspace;

/// Packages and builds every published crate.
///
/// # Errors
/// When one does not package or does not build from its package.
pub fn check(shell: &mut Shell) -> Result<String, Stop> {
    let packages = workspace::published(shell)?;
    let folder = shell.root().join("target/package-check");
    for part in [".fingerprint", "deps", "build"] {
        remove(&folder.join("debug").join(part), |name| {
            let crate_name = name.strip_prefix("lib").unwrap_or(name).replace('_', "-");
            packages
                .iter()
                .any(|package| crate_name.starts_with(&package.name))
        });
    }
    let _ = std::fs::remove_dir_all(folder.join("package"));
    forget();
    let mut command = shell.cargo(["package", "--allow-dirty", "--target-dir"]);
    command.arg(&folder);
    for package in &packages {
        command.args(["-p", &package.name]);
    }
    let result = shell.run(&mut command);
    forget();
    result?;
    Ok(format!("{} packages", packages.len()))
}

/// Removes kmem's packages from the caches of registries that are folders: cargo names them `-HASH`, without a host.
fn forget() {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")));
    let cache = home.unwrap_or_default().join("registry/src");
    for entry in std::fs::read_dir(cache).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with('-') {
            remove(&entry.path(), |name| name.starts_with("kmem"));
        }
    }
}

/// Removes the entries of a folder whose names fit.
fn remove(folder: &Path, fits: impl Fn(&str) -> bool) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if fits(&entry.file_name().to_string_lossy()) {
            let path = entry.path();
            let _ = if path.is_dir() {
                std::fs::remove_dir_all(path)
            } else {
                std::fs::remove_file(path)
            };
        }
    }
}
