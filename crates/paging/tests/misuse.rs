//! Misuse that must not compile, with what the compiler must say.
//!
//! Each file in `misuse/` names in its `//~` lines what must be in the compiler's answer. The files are compiled against
//! the library that this test was built with; `control.rs` must compile, or nothing is proven.

#![cfg(not(any(loom, miri)))]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Compiled libraries of a crate, newest first.
fn libraries(directory: &Path, name: &str) -> Vec<PathBuf> {
    let prefix = format!("lib{name}-");
    let mut found: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            let file = path.file_name().unwrap().to_str().unwrap();
            file.starts_with(&prefix) && file.ends_with(".rlib")
        })
        .collect();
    found.sort_by_key(|path| std::cmp::Reverse(fs::metadata(path).unwrap().modified().unwrap()));
    found
}

/// Where else the compiler finds crates: with `--target`, procedural macros are built for the host, in a folder of their own.
fn of_host(deps: &Path) -> PathBuf {
    // TARGET_DIR/TRIPLE/PROFILE/deps, and TARGET_DIR/PROFILE/deps.
    let profile = deps.parent().unwrap();
    let target = profile.ancestors().nth(2).unwrap_or(profile);
    target.join(profile.file_name().unwrap()).join("deps")
}

struct Compiler {
    directory: PathBuf,
    hal: PathBuf,
    paging: PathBuf,
}

impl Compiler {
    /// What the compiler says about a file; `Ok` if it compiles.
    fn compile(&self, file: &Path) -> Result<(), String> {
        let out = tempdir().join(file.file_stem().unwrap());
        let output = Command::new(std::env::var_os("RUSTC").unwrap_or("rustc".into()))
            .args([
                "--edition",
                "2024",
                "--crate-type",
                "bin",
                "--emit",
                "metadata",
            ])
            .args(["--color", "never", "--cap-lints", "allow"])
            .arg("-o")
            .arg(out.with_extension("rmeta"))
            .arg("-L")
            .arg(format!("dependency={}", self.directory.display()))
            .arg("-L")
            .arg(format!("dependency={}", of_host(&self.directory).display()))
            .arg("--extern")
            .arg(format!("kmem_hal={}", self.hal.display()))
            .arg("--extern")
            .arg(format!("kmem_paging={}", self.paging.display()))
            .arg(file)
            .output()
            .unwrap();
        if output.status.success() {
            Ok(())
        } else {
            Err(String::from_utf8(output.stderr).unwrap())
        }
    }
}

fn tempdir() -> PathBuf {
    let directory = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("misuse");
    fs::create_dir_all(&directory).unwrap();
    directory
}

#[test]
fn misuse_does_not_compile() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/misuse");
    let directory = std::env::current_exe()
        .unwrap()
        .parent()
        .unwrap()
        .to_path_buf();
    // The folder may hold libraries of other builds (loom, other features): the control finds ours.
    let control = folder.join("control.rs");
    let mut said = String::from("no compiled library next to this test");
    let mut compiler = None;
    'search: for paging in libraries(&directory, "kmem_paging") {
        for hal in libraries(&directory, "kmem_hal") {
            let candidate = Compiler {
                directory: directory.clone(),
                hal,
                paging: paging.clone(),
            };
            match candidate.compile(&control) {
                Ok(()) => {
                    compiler = Some(candidate);
                    break 'search;
                }
                Err(error) => said = error,
            }
        }
    }
    let compiler = compiler.unwrap_or_else(|| panic!("the control does not compile: {said}"));
    let mut count = 0;
    for entry in fs::read_dir(&folder).unwrap() {
        let file = entry.unwrap().path();
        if file == control || file.extension().is_none_or(|extension| extension != "rs") {
            continue;
        }
        let source = fs::read_to_string(&file).unwrap();
        let said = match compiler.compile(&file) {
            Ok(()) => panic!("{} compiles", file.display()),
            Err(said) => said,
        };
        let mut expected = source
            .lines()
            .filter_map(|line| line.strip_prefix("//~ "))
            .peekable();
        assert!(
            expected.peek().is_some(),
            "{} expects nothing",
            file.display()
        );
        for expected in expected {
            assert!(
                said.contains(expected),
                "{}: {expected:?} is not in\n{said}",
                file.display()
            );
        }
        assert_eq!(
            said.matches("\nerror[").count() + usize::from(said.starts_with("error[")),
            1,
            "{said}"
        );
        count += 1;
    }
    assert!(count >= 8, "{count} misuses");
}
