//! The demo kernel's programs on Linux itself: each must succeed there too, and the C program's maps must be the same.

use std::path::Path;
use std::process::Command;

use crate::sh::{Shell, Stop, fail};

/// Linux's output for one image, with the image's hash in the first line.
const RECORDED: &str = include_str!("../../../demo-kernel/user/hosted/maps.linux.txt");

/// Runs every program that needs no library on this machine, where it is one that can.
///
/// # Errors
/// When one of them fails: then it does not say what a kernel should do.
pub fn run_programs(shell: &mut Shell, folder: &Path) -> Result<(), Stop> {
    if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
        return Ok(());
    }
    let scratch = folder.join("scratch.bin");
    std::fs::write(&scratch, vec![0; 65536])?;
    let mut names: Vec<_> = std::fs::read_dir(folder)?.flatten().collect();
    names.sort_by_key(|entry| entry.file_name());
    for entry in names {
        let path = entry.path();
        // `forkbomb` is bounded by the kernel under test, not by this one.
        if path.extension().is_some() || path.ends_with("forkbomb") || path.ends_with("maps") {
            continue;
        }
        let mut command = Command::new(&path);
        if path.ends_with("shared") {
            command.arg(&scratch);
        }
        let status = command.status()?;
        if !status.success() {
            return fail(format!("{} on Linux: {status}", path.display()));
        }
        shell.say(format_args!(
            "passed            {} on Linux",
            path.file_name().unwrap_or_default().display()
        ));
    }
    Ok(())
}

/// Holds the kernel's output for the C program against Linux's: recorded for this image, or run now.
///
/// # Errors
/// When they differ; [`Stop::Missing`] where there is nothing to compare with.
pub fn compare_maps(image: &Path, text: &str) -> Result<(), Stop> {
    let own = parse(text);
    if own.len() < 5 {
        return fail(format!("the program printed {} mappings", own.len()));
    }
    let mut compared = false;
    let recorded_for = RECORDED.lines().next().unwrap_or("");
    if recorded_for == format!("# image {:016x}", hash(&std::fs::read(image)?)) {
        same("recorded", &own, &parse(RECORDED))?;
        compared = true;
    }
    if let Some(live) = run(image) {
        same("run now", &own, &parse(&live))?;
        compared = true;
    }
    if compared {
        return Ok(());
    }
    Err(Stop::Missing(format!(
        "{} is not the image whose maps were recorded, and this machine cannot run it without address-space randomisation",
        image.display()
    )))
}

/// The program's output on this machine.
fn run(image: &Path) -> Option<String> {
    if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
        return None;
    }
    let mut command = Command::new("setarch");
    let output = command
        .arg("-R")
        .arg(image)
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .output()
        .ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A mapping: its address where that is the image's own, its size, permissions, offset and name.
#[derive(Debug, PartialEq, Eq)]
struct Mapping {
    start: Option<u64>,
    bytes: u64,
    permissions: String,
    offset: String,
    name: String,
}

/// The mappings in a text, without those that Linux adds of its own.
fn parse(text: &str) -> Vec<Mapping> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            let (start, end) = words.next()?.split_once('-')?;
            let start = u64::from_str_radix(start, 16).ok()?;
            let end = u64::from_str_radix(end, 16).ok()?;
            let (permissions, offset) = (words.next()?, words.next()?);
            let name = words.nth(2).unwrap_or("");
            // A file's path differs from machine to machine, its name does not.
            let name = name.rsplit('/').next().unwrap_or("");
            Some(Mapping {
                // Nameless memory lies below Linux's own pages, where there are any.
                start: (!name.is_empty()).then_some(start),
                bytes: end - start,
                permissions: permissions.to_owned(),
                offset: offset.to_owned(),
                name: name.to_owned(),
            })
        })
        .filter(|mapping| !["[vdso]", "[vsyscall]"].contains(&mapping.name.as_str()))
        .filter(|mapping| !mapping.name.starts_with("[vvar"))
        .collect()
}

fn same(which: &str, own: &[Mapping], linux: &[Mapping]) -> Result<(), Stop> {
    for index in 0..own.len().max(linux.len()) {
        if own.get(index) != linux.get(index) {
            return fail(format!(
                "mapping {index}: {:?} here, {:?} on Linux ({which})",
                own.get(index),
                linux.get(index)
            ));
        }
    }
    Ok(())
}

/// FNV-1a, 64 bits: names an image, no more.
fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    })
}
