//! Tools at pinned versions: looked for in the tool folder, then installed there, once.
//!
//! The folder is `$KMEM_TOOLS`, or `~/.cache/kmem/tools`. They are built at opt-level 1 without LTO: half the
//! time of a release build, and none of them is run for long.

use std::path::PathBuf;

use crate::sh::{Shell, Stop};

/// A cargo tool at one version.
pub struct Tool {
    /// The package's name on the registry.
    pub package: &'static str,
    /// The pinned version.
    pub version: &'static str,
    /// The program it installs.
    pub program: &'static str,
}

/// Runs the fuzz targets.
pub const FUZZ: Tool = Tool {
    package: "cargo-fuzz",
    version: "0.13.2",
    program: "cargo-fuzz",
};
/// Lists a crate's public API from nightly rustdoc's JSON.
pub const PUBLIC_API: Tool = Tool {
    package: "cargo-public-api",
    version: "0.52.0",
    program: "cargo-public-api",
};
/// Builds the book.
pub const MDBOOK: Tool = Tool {
    package: "mdbook",
    version: "0.5.4",
    program: "mdbook",
};

/// The tool folder.
pub fn folder() -> PathBuf {
    match std::env::var_os("KMEM_TOOLS") {
        Some(path) => PathBuf::from(path),
        None => {
            PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache/kmem/tools")
        }
    }
}

impl Tool {
    /// The program's path; installs it first when the folder has none of the pinned version.
    ///
    /// # Errors
    /// When it cannot be installed.
    pub fn path(&self, shell: &mut Shell) -> Result<PathBuf, Stop> {
        let path = folder().join("bin").join(self.program);
        let stamp = folder().join(format!("{}-{}", self.package, self.version));
        if path.exists() && stamp.exists() {
            return Ok(path);
        }
        let mut install = shell.cargo(["install", "--locked", "--force", "--root"]);
        install
            .arg(folder())
            .arg(format!("{}@{}", self.package, self.version));
        install
            .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1")
            .env("CARGO_PROFILE_RELEASE_LTO", "false");
        install.env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16");
        shell.run(&mut install).map_err(|why| {
            Stop::Missing(format!(
                "{} {} cannot be installed ({why})",
                self.package, self.version
            ))
        })?;
        std::fs::write(stamp, "")?;
        Ok(path)
    }
}

/// Checks that a nightly toolchain is there: sanitizers, fuzzing and rustdoc's JSON need one.
///
/// # Errors
/// When there is none.
pub fn nightly(shell: &mut Shell) -> Result<(), Stop> {
    let mut version = shell.cargo(["+nightly", "--version"]);
    shell.run(&mut version).map_err(|_| {
        Stop::Missing("there is no nightly toolchain (rustup toolchain install nightly)".into())
    })
}
