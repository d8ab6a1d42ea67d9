//! The book: it builds, its links lead somewhere, and it has every contract of hal.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::sh::{Shell, Stop, fail};
use crate::tools;

/// Builds the book into `target/book` and checks it.
///
/// # Errors
/// When a link of a Markdown file leads nowhere, a contract clause of hal is not in the book, or mdBook complains.
pub fn check(shell: &mut Shell) -> Result<String, Stop> {
    let root = shell.root().to_owned();
    let mut files = markdown(&root.join("docs"));
    files.extend(["README.md", "CONTRIBUTING.md", "CHANGELOG.md"].map(|name| root.join(name)));
    let mut broken = 0;
    for file in &files {
        let text = std::fs::read_to_string(file)?;
        for target in links(&text) {
            let path = target.split('#').next().unwrap_or_default();
            let outside = target.contains("://") || target.starts_with("mailto:");
            if !path.is_empty() && !outside && !file.with_file_name(path).exists() {
                shell.say(format_args!("{}: no such file: {target}", file.display()));
                broken += 1;
            }
        }
    }
    let promised = clauses(&root.join("crates/hal/src"))?;
    let mut described = String::new();
    for file in markdown(&root.join("docs/contracts")) {
        described += &std::fs::read_to_string(file)?;
    }
    let missing: Vec<&String> = promised
        .iter()
        .filter(|clause| !described.contains(&format!("| `{clause}` |")))
        .collect();
    for clause in &missing {
        shell.say(format_args!(
            "hal's contract clause {clause} is not in docs/contracts"
        ));
    }
    if broken > 0 || !missing.is_empty() {
        return fail(format!(
            "{broken} links lead nowhere, {} clauses are missing",
            missing.len()
        ));
    }
    let mdbook = tools::MDBOOK.path(shell)?;
    let mut command = shell.command(mdbook);
    command
        .args(["build", "docs", "--dest-dir"])
        .arg(root.join("target/book"));
    shell.run(&mut command)?;
    Ok(format!(
        "{} files, {} contract clauses",
        files.len(),
        promised.len()
    ))
}

/// The labels of hal's contract clauses: lines like ``/// - `C1`: ...``.
fn clauses(folder: &Path) -> Result<BTreeSet<String>, Stop> {
    let mut labels = BTreeSet::new();
    for file in files_with(folder, "rs") {
        for line in std::fs::read_to_string(file)?.lines() {
            if let Some((label, _)) = line
                .trim_start()
                .strip_prefix("/// - `")
                .and_then(|rest| rest.split_once("`:"))
            {
                labels.insert(label.to_owned());
            }
        }
    }
    if labels.is_empty() {
        fail("hal has no contract clause")
    } else {
        Ok(labels)
    }
}

/// The targets of `[text](target)`, code blocks left out.
fn links(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut code = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            code = !code;
        }
        if !code {
            let targets = line
                .split("](")
                .skip(1)
                .filter_map(|rest| rest.split_once(')'));
            found.extend(targets.map(|(target, _)| target));
        }
    }
    found
}

fn markdown(folder: &Path) -> Vec<PathBuf> {
    files_with(folder, "md")
}

/// Every file below `folder` with this extension, sorted.
pub fn files_with(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let (mut files, mut todo) = (Vec::new(), vec![folder.to_owned()]);
    while let Some(folder) = todo.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                todo.push(path);
            } else if path.extension().is_some_and(|found| found == extension) {
                files.push(path);
            }
        }
    }
    files.sort();
    files
}
