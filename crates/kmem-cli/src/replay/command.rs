//! The command itself: which files, what is printed, which status.
//!
//! One line a file on stdout, `PASS name calls=N` or `FAIL name line=N expected=.. got=..`, and at the end `N passed, M failed`.
//! A file that cannot be read or is malformed gives one line on stderr instead; the others are replayed all the same.

use super::mm::MmUnderTest;
use super::{Outcome, Report, replay, short_name};
use crate::Status;
use crate::args::Replay;
use crate::boot::figures::Tags;
use crate::embedded::{self, FUZZ, TRACES};
use crate::input::lines::Source;
use crate::input::{InputError, map};
use crate::say;
use crate::world::World;
use crate::world::process::Process;
use std::fmt::Write as _;
use std::io::Write;

/// The machine that recordings are replayed on: large enough for every program that was recorded.
const MACHINE: &str = "firecracker-24g";
/// Its processors: a child runs on another one than its parent.
const CPUS: usize = 2;

/// Runs the command on a mock machine.
///
/// # Errors
/// If the machine itself cannot come up.
pub fn main(args: &Replay) -> Result<Status, InputError> {
    if args.unsupported {
        say!("{}", unsupported().trim_end());
        return Ok(Status::Held);
    }
    let map = embedded::find(embedded::MAPS, MACHINE).map_or_else(
        || {
            Err(InputError::new(
                "embedded",
                0,
                "map",
                MACHINE,
                "is not embedded",
            ))
        },
        |m| map::read(m.open()?),
    )?;
    let world = World::new(&map, CPUS)?;
    world.settle();
    let mut idle = Tags::of(world).without_slab();
    let make = || Process::new(world).map_err(|e| e.to_string());
    // What a run leaves behind, once its last process is gone.
    let left = || {
        if let Some(story) = world.violations().first() {
            return Err((
                "no-stale-translation".into(),
                story
                    .lines()
                    .next()
                    .unwrap_or("a-violation")
                    .replace(' ', "-"),
            ));
        }
        world.settle();
        let before = core::mem::replace(&mut idle, Tags::of(world).without_slab());
        if idle == before {
            return Ok(());
        }
        Err((format!("{before}-pages-in-use"), idle.to_string()))
    };
    Ok(run(
        sources(&args.files),
        make,
        left,
        &mut std::io::stdout().lock(),
        &mut std::io::stderr(),
    ))
}

/// Says of every call and advice that is accepted without its full effect what is missing.
pub fn unsupported() -> String {
    let mut out = String::new();
    for advice in kmem_cow_mm::Advice::ALL {
        if let Some(missing) = advice.missing_effect() {
            let _ = writeln!(out, "madvise {advice:?} ({}): {missing}", advice as i32);
        }
    }
    for (call, missing) in CALLS {
        let _ = writeln!(out, "{call}: {missing}");
    }
    out
}

/// Calls and arguments, and what is missing of their effect.
const CALLS: [(&str, &str); 5] = [
    (
        "x lines of traces (mlock, shmat, mseal, ..)",
        "counted and not made: no line of a recorded list depends on them",
    ),
    (
        "n lines of traces (PR_SET_VMA_ANON_NAME)",
        "counted and not made: the recording kernel kept no names",
    ),
    ("mmap MAP_DENYWRITE, MAP_EXECUTABLE", "ignored, as in Linux"),
    (
        "mmap, mprotect PROT_EXEC alone",
        "readable too, as on a processor without protection keys",
    ),
    (
        "mmap MAP_HUGETLB",
        "refused with EINVAL: there is no pool of huge pages",
    ),
];

/// Opens the files that were named, or all embedded runs if none was.
pub fn sources(files: &[String]) -> Vec<(String, Result<Source, InputError>)> {
    if files.is_empty() {
        return TRACES
            .iter()
            .chain(FUZZ)
            .map(|e| (e.name.to_string(), e.open()))
            .collect();
    }
    files.iter().map(|f| (f.clone(), Source::open(f))).collect()
}

/// What differs: expected, and got.
type Difference = (String, String);

/// Replays all of them; `make` builds an empty manager for each, `left` looks for what a run left behind, `out` and `err`
/// are stdout and stderr.
pub fn run<M: MmUnderTest>(
    sources: Vec<(String, Result<Source, InputError>)>,
    mut make: impl FnMut() -> Result<M, String>,
    mut left: impl FnMut() -> Result<(), Difference>,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> Status {
    let (mut passed, mut failed, mut unusable) = (0, 0, false);
    for (name, source) in sources {
        let outcome = source.and_then(|s| match make() {
            Ok(mm) => replay(s, || mm),
            Err(why) => Ok(Outcome::Fail {
                line: 0,
                expected: "an-address-space".into(),
                got: why,
            }),
        });
        // A difference ends a run half-way; what it leaves behind is no second one.
        let outcome = outcome.map(|outcome| match (outcome, left()) {
            (Outcome::Pass { .. }, Err((expected, got))) => Outcome::Fail {
                line: 0,
                expected,
                got,
            },
            (outcome, _) => outcome,
        });
        match outcome {
            Ok(outcome) => {
                let good = matches!(outcome, Outcome::Pass { .. });
                passed += usize::from(good);
                failed += usize::from(!good);
                // A closed pipe ends the output and not the verdict.
                let _ = writeln!(
                    out,
                    "{}",
                    Report {
                        name: short_name(&name),
                        outcome: &outcome
                    }
                );
            }
            Err(bad) => {
                unusable = true;
                let _ = writeln!(err, "{bad}");
            }
        }
    }
    let _ = writeln!(out, "{passed} passed, {failed} failed");
    if unusable {
        Status::Unusable
    } else if failed > 0 {
        Status::Broken
    } else {
        Status::Held
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replay::echo::Echo;
    use kmem_cow_mm::{Advice, Errno, MapFlags, MapRequest, Prot};

    const GOOD: &str =
        "# vmatrace 1 prog x linux 6\nI 1000 2000 r-xp 0 -\nE\n= 1000 2000 r-xp 0 -\n";

    fn run_all(texts: &[(&str, &str)]) -> (Status, String, String) {
        run_and_leave(texts, || Ok(()))
    }

    fn run_and_leave(
        texts: &[(&str, &str)],
        left: impl FnMut() -> Result<(), Difference>,
    ) -> (Status, String, String) {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let sources = texts
            .iter()
            .map(|(n, t)| (format!("/some/where/{n}"), Ok(Source::text(n, t))))
            .collect();
        let status = run(
            sources,
            || Ok(Echo::trace(Source::text("x", GOOD))),
            left,
            &mut out,
            &mut err,
        );
        (
            status,
            String::from_utf8(out).unwrap(),
            String::from_utf8(err).unwrap(),
        )
    }

    #[test]
    fn what_has_no_full_effect_is_listed() {
        let text = unsupported();
        let (advice, calls): (Vec<_>, Vec<_>) =
            text.lines().partition(|line| line.starts_with("madvise "));
        let number = |line: &&str| -> i32 {
            let (_, rest) = line.split_once('(').unwrap();
            rest.split_once(')').unwrap().0.parse().unwrap()
        };
        let listed: Vec<_> = advice.iter().map(number).collect();
        let missing = Advice::ALL.into_iter();
        let missing = missing.filter(|advice| advice.missing_effect().is_some());
        assert_eq!(
            listed,
            missing.map(|advice| advice as i32).collect::<Vec<_>>()
        );
        for line in advice {
            let of = Advice::from_number(number(&line)).unwrap();
            assert!(line.starts_with(&format!("madvise {of:?} (")), "{line}");
            assert!(line.ends_with(of.missing_effect().unwrap()), "{line}");
        }
        assert_eq!(calls.len(), CALLS.len());
        for (line, (call, missing)) in calls.into_iter().zip(CALLS) {
            assert_eq!(line, format!("{call}: {missing}"));
        }
    }

    /// What the table says of arguments of mmap is what mmap does.
    #[test]
    fn the_rows_about_mmap_are_true() {
        let map = embedded::find(embedded::MAPS, MACHINE).unwrap();
        let world = World::new(&map::read(map.open().unwrap()).unwrap(), 1).unwrap();
        let process = Process::new(world).unwrap();
        let space = process.space();
        let map = |prot, flags| {
            let flags = MapFlags::PRIVATE | MapFlags::ANONYMOUS | flags;
            space.mmap(&MapRequest {
                flags,
                ..MapRequest::anonymous(4096, prot)
            })
        };
        let text = unsupported();
        assert!(text.contains("MAP_HUGETLB: refused with EINVAL"));
        assert_eq!(map(Prot::READ, MapFlags::HUGETLB), Err(Errno::EINVAL));
        assert!(text.contains("MAP_DENYWRITE, MAP_EXECUTABLE: ignored"));
        let ignored = MapFlags::DENYWRITE | MapFlags::EXECUTABLE;
        map(Prot::READ, ignored).unwrap();
        assert!(text.contains("PROT_EXEC alone: readable too"));
        let code = map(Prot::EXEC, MapFlags::empty()).unwrap();
        space.read_memory(code, &mut [0]).unwrap();
    }

    #[test]
    fn a_run_that_leaves_pages_behind_fails() {
        let (status, out, _) = run_and_leave(&[("a", GOOD)], || {
            Err(("5-pages-in-use".into(), "7".into()))
        });
        assert_eq!(status, Status::Broken);
        assert_eq!(
            out,
            "FAIL a line=0 expected=5-pages-in-use got=7\n0 passed, 1 failed\n"
        );
    }

    #[test]
    fn the_last_line_counts_and_the_status_follows() {
        assert_eq!(
            run_all(&[("a", GOOD)]),
            (
                Status::Held,
                "PASS a calls=0\n1 passed, 0 failed\n".into(),
                String::new()
            )
        );
        let wrong = GOOD.replace("= 1000 2000 r-xp", "= 1000 2000 rw-p");
        let (status, out, _) = run_all(&[("a", GOOD), ("b", &wrong)]);
        assert_eq!(status, Status::Broken);
        assert_eq!(
            out,
            "PASS a calls=0\nFAIL b line=3 expected=1000-2000:rw-p:0:- got=1000-2000:r-xp:0:-\n1 passed, 1 failed\n"
        );
        let (status, out, err) = run_all(&[("bad", "hello\n"), ("a", GOOD)]);
        assert_eq!(status, Status::Unusable);
        assert_eq!(out, "PASS a calls=0\n1 passed, 0 failed\n");
        assert_eq!(err.lines().count(), 1);
    }
}
