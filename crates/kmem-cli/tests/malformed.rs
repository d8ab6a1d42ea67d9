//! Malformed inputs end in one line that names file, line, field and value, and in status 2; each has a twin that differs
//! in one field and succeeds.

use std::path::PathBuf;
use std::process::{Command, Output};

fn file(folder: &str, name: &str) -> String {
    let path: PathBuf = [env!("CARGO_MANIFEST_DIR"), "tests", folder, name]
        .iter()
        .collect();
    path.display().to_string()
}

fn kmem(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kmem"))
        .args(args)
        .output()
        .expect("the binary runs")
}

fn run(path: &str) -> Output {
    let name = path.rsplit('/').next().unwrap();
    if name.starts_with("trace-") || name.starts_with("fuzz-") {
        kmem(&["replay", path])
    } else {
        // One short program: it is the map that is in question.
        kmem(&[
            "boot",
            "--map",
            path,
            "--trace",
            &file("good", "trace-heading.txt"),
        ])
    }
}

/// File, line, field, value.
const BAD: &[(&str, usize, &str, &str)] = &[
    (
        "map-cut-in-range.txt",
        3,
        "range",
        "[mem 0x0000000000100000-0x",
    ),
    ("map-cut-in-mark.txt", 3, "line", "BIOS-e8"),
    ("map-zero-length.txt", 2, "end", "0x000000000009fbff"),
    ("map-wraps.txt", 3, "end", "0x00000000000fff00"),
    ("map-beyond-52-bits.txt", 3, "end", "0x10000003ffffff"),
    ("map-beyond-64-bits.txt", 3, "end", "0x10000000003ffffff"),
    ("map-all-64-bits.txt", 1, "end", "0xffffffffffffffff"),
    ("map-nothing-usable.txt", 1, "usable", "0 bytes"),
    ("map-one-mib.txt", 1, "usable", "1 MiB"),
    (
        "map-garbage.txt",
        1,
        "format",
        "BEANS-e820: [mem 0x0000000000000000-0x0000000003ffffff] usab..",
    ),
    ("map-empty.txt", 0, "file", "(nothing)"),
    ("map-blank.txt", 1, "file", "(nothing)"),
    ("map-unknown-kind.txt", 2, "kind", "reversed"),
    ("map-no-kind.txt", 2, "kind", "(nothing)"),
    ("map-bad-digit.txt", 2, "start", "0x00000000000gfc00"),
    (
        "map-no-bracket.txt",
        2,
        "range",
        "[mem 0x000000000009fc00-0x00000000000fffff reserved",
    ),
    (
        "map-no-dash.txt",
        2,
        "range",
        "0x000000000009fc000x00000000000fffff",
    ),
    ("map-contradiction.txt", 3, "kind", "reserved"),
    ("map-nodes-overlap.txt", 3, "node", "1"),
    ("map-node-number.txt", 3, "node", "1024"),
    ("map-node-no-pxm.txt", 3, "PXM", "1"),
    ("old-no-brackets.txt", 2, "kind", "usable"),
    ("old-zero-length.txt", 1, "end", "0000000000000000"),
    ("iomem-hidden.txt", 1, "range", "00000000-00000000"),
    ("iomem-wraps.txt", 4, "end", "000fff00"),
    ("iomem-child-outside.txt", 5, "range", "00200000-043fffff"),
    ("iomem-indent.txt", 5, "indent", "3"),
    (
        "iomem-no-name.txt",
        4,
        "range",
        "00100000-03ffffff System RAM",
    ),
    ("map-257-ranges.txt", 257, "entries", "257"),
    ("trace-no-end.txt", 16, "end", "(nothing)"),
    ("trace-bad-errno.txt", 10, "result", "ENOPE"),
    ("trace-overlap.txt", 13, "start", "555555555000"),
    ("trace-unknown-call.txt", 10, "call", "q"),
    ("trace-unknown-file.txt", 4, "file", "f1"),
    ("trace-cut-in-line.txt", 16, "line", "(nothing)"),
    ("trace-bad-perms.txt", 3, "perms", "rxp"),
    ("trace-empty-range.txt", 4, "end", "555555556000"),
    ("trace-heading.txt", 1, "version", "2"),
    (
        "trace-no-heading.txt",
        1,
        "heading",
        "vmatrace 1 prog tiny linux 6.18 aslr off",
    ),
    ("trace-empty.txt", 0, "file", "(nothing)"),
    (
        "trace-not-text.txt",
        10,
        "line",
        "� 7ffff7fc0000 1000 1 = 0",
    ),
    ("fuzz-cut-off.txt", 9, "calls", "4"),
    ("fuzz-no-such-vma.txt", 9, "start", "500c5000"),
    ("fuzz-bad-prot.txt", 2, "prot", "9"),
    ("fuzz-open-fork.txt", 9, "fork", "f"),
    ("fuzz-missing-result.txt", 8, "result", "(nothing)"),
    ("fuzz-outside-window.txt", 3, "start", "300c6000"),
    ("fuzz-unaligned.txt", 6, "addr", "500c6004"),
];

#[test]
fn malformed_inputs_are_refused_in_one_line() {
    assert!(BAD.len() >= 20);
    for (name, line, field, value) in BAD {
        let path = file("bad", name);
        let out = run(&path);
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{name}: {stderr}");
        assert_eq!(stderr.lines().count(), 1, "{name}: {stderr}");
        let start = format!("{path}:{line}: {field}: {value}: ");
        assert!(
            stderr.starts_with(&start),
            "{name}:\n  wanted {start}..\n  got    {stderr}"
        );
        assert!(
            stderr.trim_end().len() > start.len() + 8,
            "{name} says what is wrong: {stderr}"
        );
    }
}

#[test]
fn their_twins_succeed() {
    let mut seen = Vec::new();
    for (name, ..) in BAD {
        let path = file("good", name);
        let content = std::fs::read(&path).unwrap();
        // Many inputs are spoilt in many ways; each good one runs once.
        if seen.contains(&content) {
            continue;
        }
        seen.push(content);
        let out = run(&path);
        let (stdout, stderr) = (
            String::from_utf8_lossy(&out.stdout),
            String::from_utf8_lossy(&out.stderr),
        );
        assert!(out.status.success(), "{name}: {stderr}{stdout}");
        assert!(out.stderr.is_empty(), "{name}: {stderr}");
    }
    assert!(seen.len() >= 8);
}

#[test]
fn twins_differ_in_one_field() {
    for (name, ..) in BAD {
        let bad = std::fs::read(file("bad", name)).unwrap();
        let good = std::fs::read(file("good", name)).unwrap();
        assert_ne!(bad, good, "{name}");
        let same = bad.iter().zip(&good).take_while(|(a, b)| a == b).count();
        let rest = bad.len().min(good.len()) - same;
        let behind = bad
            .iter()
            .rev()
            .zip(good.iter().rev())
            .take(rest)
            .take_while(|(a, b)| a == b)
            .count();
        let changed = &good[same..good.len() - behind];
        let lines = changed.iter().filter(|c| **c == b'\n').count();
        // An empty file has no field to differ in.
        assert!(
            lines <= 1 || bad.is_empty(),
            "{name}: {:?}",
            String::from_utf8_lossy(changed)
        );
    }
}

#[test]
fn odd_but_legal_maps_boot() {
    let mut seen = 0;
    for entry in std::fs::read_dir(file("legal", "")).unwrap() {
        let path = entry.unwrap().path().display().to_string();
        let out = run(&path);
        let (stdout, stderr) = (
            String::from_utf8_lossy(&out.stdout),
            String::from_utf8_lossy(&out.stderr),
        );
        assert!(out.status.success(), "{path}: {stderr}{stdout}");
        seen += 1;
    }
    assert_eq!(seen, 9);
}

#[test]
fn unreadable_files_are_refused() {
    for (args, name) in [
        (["boot", "--map", "/no/such/map"], "/no/such/map"),
        (["boot", "--map", "/"], "/"),
        (["boot", "--trace", "/no/such/trace"], "/no/such/trace"),
    ] {
        let out = kmem(&args);
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{args:?}: {stderr}");
        assert!(
            stderr.starts_with(&format!("{name}:0: file: {name}: ")),
            "{stderr}"
        );
        assert_eq!(stderr.lines().count(), 1);
    }
}
