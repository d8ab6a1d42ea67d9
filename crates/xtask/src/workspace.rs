//! What `cargo metadata` says about the workspace.

use std::path::PathBuf;

use serde_json::Value;

use crate::sh::{Shell, Stop, fail};

/// A package of the workspace.
pub struct Package {
    /// Its name.
    pub name: String,
    /// The folder of its manifest.
    pub folder: PathBuf,
    /// Whether it is published.
    pub published: bool,
    /// Its features, without `default`.
    pub features: Vec<String>,
}

/// The packages that are published, sorted by name.
///
/// # Errors
/// When cargo cannot read the workspace.
pub fn published(shell: &mut Shell) -> Result<Vec<Package>, Stop> {
    Ok(members(shell)?
        .into_iter()
        .filter(|package| package.published)
        .collect())
}

/// Every package of the workspace, sorted by name.
///
/// # Errors
/// When cargo cannot read the workspace.
pub fn members(shell: &mut Shell) -> Result<Vec<Package>, Stop> {
    let mut command = shell.cargo(["metadata", "--format-version", "1", "--no-deps"]);
    let output = command.output()?;
    if !output.status.success() {
        return fail(String::from_utf8_lossy(&output.stderr));
    }
    let Ok(metadata) = serde_json::from_slice::<Value>(&output.stdout) else {
        return fail("cargo metadata is not JSON");
    };
    let mut packages = Vec::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let mut folder = PathBuf::from(text(&package["manifest_path"]));
        folder.pop();
        let features = package["features"].as_object().into_iter().flatten();
        packages.push(Package {
            name: text(&package["name"]),
            folder,
            // `publish = false` is an empty list of registries.
            published: package["publish"]
                .as_array()
                .is_none_or(|registries| !registries.is_empty()),
            features: features
                .map(|(name, _)| name.clone())
                .filter(|name| name != "default")
                .collect(),
        });
    }
    packages.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(packages)
}
