//! The command line that other programs drive: output lines and exit codes.

use std::path::PathBuf;
use std::process::{Command, Output};

fn kmem(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kmem"))
        .args(args)
        .output()
        .expect("the binary runs")
}

fn stdout(out: &Output) -> String {
    String::from_utf8_lossy(&out.stdout).into_owned()
}

fn good(name: &str) -> String {
    let path: PathBuf = [env!("CARGO_MANIFEST_DIR"), "tests", "good", name]
        .iter()
        .collect();
    path.display().to_string()
}

/// A folder for one test's files.
fn folder(name: &str) -> PathBuf {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = std::fs::remove_dir_all(&path);
    std::fs::create_dir_all(&path).unwrap();
    path
}

#[test]
fn replay_says_pass_and_fail() {
    let trace = good("trace-heading.txt");
    let fuzz = good("fuzz-cut-off.txt");
    let out = kmem(&["replay", &trace, &fuzz]);
    assert_eq!(out.status.code(), Some(0));
    assert_eq!(
        stdout(&out),
        "PASS trace-heading.txt calls=3\nPASS fuzz-cut-off.txt calls=6\n2 passed, 0 failed\n"
    );
    // The same run, with one word of the recording changed.
    let dir = folder("replay");
    let changed = dir.join("changed.txt");
    let text = std::fs::read_to_string(&fuzz).unwrap();
    std::fs::write(
        &changed,
        text.replace("f11e00000000000a", "f11e00000000000b"),
    )
    .unwrap();
    let out = kmem(&["replay", &changed.display().to_string(), &trace]);
    assert_eq!(out.status.code(), Some(1));
    assert_eq!(
        stdout(&out),
        "FAIL changed.txt line=4 expected=f11e00000000000b got=f11e00000000000a\n\
         PASS trace-heading.txt calls=3\n1 passed, 1 failed\n"
    );
}

#[test]
fn replay_lists_what_has_no_full_effect() {
    let out = kmem(&["replay", "--unsupported"]);
    assert_eq!(out.status.code(), Some(0));
    assert!(
        stdout(&out).lines().all(|l| l.contains(": ")),
        "{}",
        stdout(&out)
    );
}

#[test]
fn boot_prints_linux_files_and_writes_a_report() {
    let dir = folder("report");
    let map = good("map-wraps.txt");
    let trace = good("trace-heading.txt");
    let out = kmem(&[
        "boot",
        "--map",
        &map,
        "--trace",
        &trace,
        "--report",
        &dir.display().to_string(),
    ]);
    let text = stdout(&out);
    assert_eq!(out.status.code(), Some(0), "{text}");
    for part in [
        "/proc/buddyinfo",
        "/proc/meminfo",
        "/proc/slabinfo",
        "/proc/vmallocinfo",
        "/proc/zoneinfo",
        "/proc/1/maps",
    ] {
        assert!(text.contains(&format!("--- {part}\n")), "{part} is missing");
    }
    assert!(
        text.contains("Node 0, zone      DMA "),
        "buddyinfo in Linux's format"
    );
    assert!(text.lines().last().unwrap().starts_with("all "), "{text}");
    let html = std::fs::read_to_string(dir.join("report.html")).unwrap();
    assert!(html.contains("<svg") && html.contains("Node 0, zone"));
    // Nothing is loaded from anywhere; the one address is the name of a format.
    assert_eq!(
        html.matches("http").count(),
        html.matches("http://www.w3.org/2000/svg").count()
    );
    assert!(
        std::fs::read_to_string(dir.join("report.txt"))
            .unwrap()
            .contains("Figures and their recounts")
    );
}

#[test]
fn top_prints_one_picture_without_a_terminal() {
    let out = kmem(&["top", "--trace", &good("trace-heading.txt")]);
    assert_eq!(out.status.code(), Some(0));
    assert!(
        stdout(&out).contains("programs ended 1"),
        "{}",
        stdout(&out)
    );
}

#[test]
fn a_wrong_command_line_is_status_2() {
    assert_eq!(kmem(&["fly"]).status.code(), Some(2));
    assert_eq!(kmem(&["boot", "--map"]).status.code(), Some(2));
}
