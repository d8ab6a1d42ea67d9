//! `compare`: kmem beside its peers in one run.

#[cfg(kmem_counting)]
fn main() {
    let asked = std::env::args().nth(1);
    assert_eq!(asked.as_deref(), Some(kmem_benches::counting::FLAG));
    let rows = kmem_benches::counting::measure();
    print!("{}", kmem_benches::output::json(&rows));
}

#[cfg(all(feature = "programs", not(kmem_counting)))]
fn main() -> std::process::ExitCode {
    program::main()
}

#[cfg(not(any(feature = "programs", kmem_counting)))]
fn main() -> std::process::ExitCode {
    eprintln!("compare: built without the feature `peers`: there is nothing to compare with");
    std::process::ExitCode::from(2)
}

#[cfg(all(feature = "programs", not(kmem_counting)))]
mod program {
    use std::path::PathBuf;
    use std::process::ExitCode;

    use kmem_benches::area::{self, AREAS};
    use kmem_benches::harness::{Options, Runner};
    use kmem_benches::hosted::{self, Switch};
    use kmem_benches::output::{self, Row};

    /// The host's malloc, but in the processes that measure whole programs over other heaps.
    #[global_allocator]
    static HEAP: Switch = Switch::new();

    const USAGE: &str = "\
usage: compare [AREA] [--quick] [--json FILE] [--markdown FILE] [--only PREFIX]
  AREA             buddy, slab, paging, fork, vma, vmalloc or all (the default)
  --quick          small sizes and budgets: less than a minute an area
  --json FILE      writes all figures there as one JSON array
  --markdown FILE  writes kmem's figures there, each with its peers', as a table
  --only PREFIX    runs the workloads whose names begin so
Exit code 0 if every check held, 1 if one failed, 2 for a wrong command line.";

    #[derive(Debug, Default, PartialEq)]
    struct Arguments {
        area: Option<String>,
        quick: bool,
        json: Option<PathBuf>,
        markdown: Option<PathBuf>,
        only: Option<String>,
        help: bool,
    }

    fn parse(arguments: impl Iterator<Item = String>) -> Result<Arguments, String> {
        let mut parsed = Arguments::default();
        let mut arguments = arguments;
        while let Some(argument) = arguments.next() {
            let mut value = |name| arguments.next().ok_or(format!("{name} needs a value"));
            match argument.as_str() {
                "--quick" => parsed.quick = true,
                "--json" => parsed.json = Some(value("--json")?.into()),
                "--markdown" => parsed.markdown = Some(value("--markdown")?.into()),
                "--only" => parsed.only = Some(value("--only")?),
                "--help" | "-h" => parsed.help = true,
                area if parsed.area.is_none() && (area == "all" || AREAS.contains(&area)) => {
                    parsed.area = Some(argument);
                }
                other => return Err(format!("what is {other:?}?")),
            }
        }
        Ok(parsed)
    }

    /// `--hosted PROGRAM N`: what this program starts itself with.
    fn hosted_program() -> Option<ExitCode> {
        let mut arguments = std::env::args().skip(1);
        if arguments.next()? != hosted::FLAG {
            return None;
        }
        let program = arguments.next()?;
        let n = arguments.next()?.parse().ok()?;
        Some(match hosted::answer(&program, n) {
            Some(answer) => {
                println!("{answer}");
                ExitCode::SUCCESS
            }
            None => ExitCode::from(2),
        })
    }

    pub fn main() -> ExitCode {
        if let Some(code) = hosted_program() {
            return code;
        }
        let arguments = match parse(std::env::args().skip(1)) {
            Ok(arguments) if arguments.help => {
                println!("{USAGE}");
                return ExitCode::SUCCESS;
            }
            Ok(arguments) => arguments,
            Err(problem) => {
                eprintln!("compare: {problem}\n{USAGE}");
                return ExitCode::from(2);
            }
        };
        // A program that panics loses its row; the message is enough.
        std::panic::set_hook(Box::new(|panic| eprintln!("compare: {panic}")));
        let mut runner = Runner::new(Options {
            only: arguments.only,
            ..Options::new(arguments.quick)
        });
        let area = arguments.area.as_deref().unwrap_or("all");
        for &name in AREAS {
            if area == "all" || area == name {
                area::run(name, &mut runner);
            }
        }
        let files = [
            (arguments.json, output::json as fn(&[Row]) -> String),
            (arguments.markdown, output::markdown),
        ];
        for (file, write) in files {
            if let Some(file) = file
                && let Err(error) = std::fs::write(&file, write(runner.rows()))
            {
                runner.problem(format!("{} cannot be written: {error}", file.display()));
            }
        }
        if runner.rows().is_empty() {
            runner.problem("nothing was measured".into());
        }
        for loss in runner.losses() {
            println!("LOST {loss}");
        }
        if runner.problems().is_empty() {
            println!("{} figures, every check held", runner.rows().len());
            return ExitCode::SUCCESS;
        }
        for problem in runner.problems() {
            println!("FAILED {problem}");
        }
        ExitCode::FAILURE
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        fn parsed(line: &str) -> Result<Arguments, String> {
            parse(line.split_whitespace().map(str::to_owned))
        }

        #[test]
        fn arguments_come_in_any_order() {
            let want = Arguments {
                area: Some("vma".into()),
                quick: true,
                json: Some("x.json".into()),
                ..Arguments::default()
            };
            assert_eq!(parsed("vma --quick --json x.json"), Ok(want));
            assert_eq!(
                parsed("--json x.json --quick vma"),
                parsed("vma --quick --json x.json")
            );
            assert_eq!(parsed(""), Ok(Arguments::default()));
        }

        #[test]
        fn nonsense_is_refused() {
            for line in [
                "bud",
                "buddy slab",
                "--json",
                "--markdown",
                "--fast",
                "buddy --only",
            ] {
                assert!(parsed(line).is_err(), "{line}");
            }
        }
    }
}
