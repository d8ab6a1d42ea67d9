//! Faults on purpose, one at a time: each must be noticed on the mock machine. Built with `--cfg kmem_mutants` alone:
//!
//! ```text
//! cargo xtask mutants
//! ```
//!
//! The parent starts this program again for each mutant, two at a time; the child goes through the trials until one fails.
//! A child that hangs or dies has noticed too. `KMEM_MUTANT=name` with the test `child` tries one by hand.

#![cfg(all(kmem_mutants, not(loom)))]

#[path = "common/crowd.rs"]
mod crowd;
#[path = "common/directed/mod.rs"]
mod directed;
#[path = "common/family.rs"]
mod family;
#[path = "common/hostile/mod.rs"]
mod hostile;
#[path = "common/hostile_env.rs"]
mod hostile_env;
#[path = "common/modes.rs"]
mod modes;
#[path = "common/switch_env.rs"]
mod switch_env;
#[path = "common/switching.rs"]
mod switching;

use std::io::{BufRead, BufReader, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, mpsc};
use std::time::{Duration, Instant};

use hostile::{Setup, World};
use hostile_env::Caller;
use kmem_mock_x86::{Adversary, Registers};
use kmem_paging::format::Format;
use modes::Kind;

/// Longer than any trial takes; a mutant that makes one take longer is noticed.
const HANGS: Duration = Duration::from_secs(10);
/// For all mutants together.
const LIMIT: Duration = Duration::from_secs(60);

/// A run whose end is quick: what the mutant spoiled is not taken down.
fn hostile<F: Format>(kind: Kind, caller: Caller, seed: u64, operations: u64) {
    let setup = Setup {
        caller,
        ..Setup::new::<F>(kind.registers())
    };
    let mut world = World::<F>::new(setup, seed);
    for _ in 0..operations {
        world.step();
    }
    world.finish();
}

type Trial = (String, Box<dyn Fn(Caller)>);

/// Spaces that share tables.
fn family_trials() -> Vec<Trial> {
    let trial = |seed| -> Trial {
        let run = move |_| {
            family::family(seed, 200);
        };
        (format!("family {seed}"), Box::new(run))
    };
    (0..8).map(trial).collect()
}

/// CPUs that switch, are lazy, and go to user mode.
fn switching_trials() -> Vec<Trial> {
    let trial = |seed: u64| -> Trial {
        let isolated = seed % 2 == 1;
        let registers = if seed % 8 == 7 {
            Registers::LONG
        } else {
            Registers::LONG_PCID
        };
        let run = move |_| {
            switching::switching(seed, 250, isolated, registers, Adversary::FULL);
        };
        (format!("switching {seed}"), Box::new(run))
    };
    let overtaken: Trial = ("overtaken".to_owned(), Box::new(|_| switching::overtaken()));
    [overtaken].into_iter().chain((0..160).map(trial)).collect()
}

/// Everything that a mutant has to get past, cheap things first. Those that were made for its part of the sources come before all others.
fn trials_for(mutant: &str) -> Vec<Trial> {
    let switching = mutant.starts_with("asid-")
        || mutant.starts_with("isolation-")
        || mutant == "flush-of-all-spares-global";
    let shared = mutant.starts_with("share-") || mutant.starts_with("quiescent-");
    let mut all = if switching {
        switching_trials()
    } else if shared {
        family_trials()
    } else {
        Vec::new()
    };
    all.extend(trials());
    if !switching {
        all.extend(switching_trials().into_iter().take(8));
    }
    all
}

/// What mutants of the tables themselves have to get past.
fn trials() -> Vec<Trial> {
    let mut trials: Vec<Trial> = Vec::new();
    let mut random = |kind: Kind, seed: u64, operations| {
        trials.push((
            format!("hostile {} {seed}", kind.name()),
            Box::new(move |caller| {
                modes::with_format!(kind, F => hostile::<F>(kind, caller, seed, operations));
            }),
        ));
    };
    random(Kind::Tagged, 0, 200);
    random(Kind::Long, 1, 200);
    random(Kind::Pae, 2, 200);
    random(Kind::TwoLevel, 3, 200);
    random(Kind::La57, 4, 200);
    random(Kind::Pse36, 6, 200);
    random(Kind::Absent, 5, 200);
    for &(name, run) in directed::ALL {
        trials.push((name.to_owned(), Box::new(move |_| run())));
    }
    trials.extend(family_trials());
    for seed in 0..4 {
        trials.push((
            format!("duel {seed}"),
            Box::new(move |_| {
                crowd::duel(seed, 100);
            }),
        ));
    }
    for seed in 0..6 {
        trials.push((
            format!("crowd {seed}"),
            Box::new(move |caller| {
                crowd::crowd(seed, 60, Adversary::FULL, caller);
            }),
        ));
    }
    let mut random = |kind: Kind, seed: u64, operations| {
        trials.push((
            format!("hostile {} {seed}", kind.name()),
            Box::new(move |caller| {
                modes::with_format!(kind, F => hostile::<F>(kind, caller, seed, operations));
            }),
        ));
    };
    for seed in 10..13 {
        for kind in Kind::ALL {
            random(kind, seed, 1000);
        }
    }
    for seed in 4..12 {
        trials.push((
            format!("duel {seed}"),
            Box::new(move |_| {
                crowd::duel(seed, 200);
            }),
        ));
    }
    for seed in 6..64 {
        trials.push((
            format!("crowd {seed}"),
            Box::new(move |caller| {
                crowd::crowd(seed, 150, Adversary::FULL, caller);
            }),
        ));
    }
    trials
}

/// Every mutant: those of the library, and those of the kernel around it.
fn mutants() -> Vec<(String, String)> {
    let library = kmem_paging::mutants::ALL.iter();
    let callers = Caller::FAULTS.iter();
    library
        .map(|&(name, what)| (name.to_owned(), what.to_owned()))
        .chain(callers.map(|caller| {
            (
                format!("caller-{caller:?}"),
                "the kernel's Mmu does this wrong".to_owned(),
            )
        }))
        .collect()
}

/// Goes through the trials with the chosen mutant until one fails. Only of use in a process of its own.
#[test]
#[ignore = "started by the parent"]
fn child() {
    let name = std::env::var("KMEM_MUTANT").unwrap_or_default();
    let mut caller = Caller::Right;
    match name.strip_prefix("caller-") {
        None => kmem_paging::mutants::select(&name),
        Some(fault) => {
            caller = *[Caller::Right]
                .iter()
                .chain(&Caller::FAULTS)
                .find(|caller| format!("{caller:?}") == fault)
                .expect("a caller's fault");
        }
    }
    if std::env::var_os("KMEM_LOUD").is_none() {
        std::panic::set_hook(Box::new(|_| {}));
    }
    for (trial, run) in trials_for(&name) {
        println!("\ntrying {trial}");
        std::io::stdout().flush().unwrap();
        if catch_unwind(AssertUnwindSafe(|| run(caller))).is_err() {
            println!("\nnoticed by {trial}");
            std::process::exit(0);
        }
    }
    println!("\nnoticed by nobody");
}

/// Who notices a mutant, if anybody does.
fn noticed(name: &str, without_tlb: bool) -> Option<String> {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["child", "--exact", "--ignored", "--nocapture"])
        .env("KMEM_MUTANT", name)
        .env("RUST_BACKTRACE", "0")
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    if without_tlb {
        command.env("KMEM_MOCK_WITHOUT_TLB", "1");
    }
    let mut process = command.spawn().unwrap();
    let lines = BufReader::new(process.stdout.take().unwrap()).lines();
    let (send, receive) = mpsc::channel();
    let reader = std::thread::spawn(move || {
        for line in lines.map_while(Result::ok) {
            if send.send(line).is_err() {
                return;
            }
        }
    });
    let mut trying = String::from("the start");
    let mut answer = None;
    let by = loop {
        match receive.recv_timeout(HANGS) {
            Ok(line) => {
                if let Some(trial) = line.strip_prefix("trying ") {
                    trying = trial.to_owned();
                } else if let Some(by) = line.strip_prefix("noticed by ") {
                    answer = Some(by.to_owned());
                }
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {
                let _ = process.kill();
                break Some(format!("{trying} (never ends)"));
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                break match answer {
                    Some(by) if by == "nobody" => None,
                    Some(by) => Some(by),
                    None => Some(format!("{trying} (dies)")),
                };
            }
        }
    };
    let _ = process.wait();
    let _ = reader.join();
    by
}

/// Tries all, two at a time; who noticed which.
fn try_all(without_tlb: bool) -> Vec<(String, String, Option<String>)> {
    let all = mutants();
    let next = AtomicUsize::new(0);
    let results = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let Some((name, what)) = all.get(number) else {
                        return;
                    };
                    let by = noticed(name, without_tlb);
                    results
                        .lock()
                        .unwrap()
                        .push((number, name.clone(), what.clone(), by));
                }
            });
        }
    });
    let mut results = results.into_inner().unwrap();
    results.sort();
    results
        .into_iter()
        .map(|(_, name, what, by)| (name, what, by))
        .collect()
}

/// The controls: without a fault every trial passes, in the library and in the kernel around it.
#[test]
fn nobody_complains_without_a_mutant() {
    assert_eq!(noticed("", false), None);
    assert_eq!(noticed("caller-Right", false), None);
}

#[test]
fn every_mutant_is_noticed() {
    let start = Instant::now();
    let results = try_all(false);
    let took = start.elapsed();
    for (name, what, by) in &results {
        println!(
            "| `{name}` | {what} | {} |",
            by.as_deref().unwrap_or("NOBODY")
        );
    }
    let missed: Vec<_> = results
        .iter()
        .filter(|result| result.2.is_none())
        .map(|result| &result.0)
        .collect();
    println!(
        "{} of {} mutants noticed in {:.1} s",
        results.len() - missed.len(),
        results.len(),
        took.as_secs_f64()
    );
    assert!(missed.is_empty(), "nobody noticed {missed:?}");
    assert!(took < LIMIT, "{took:?}");
}

/// The same trials on a machine that caches nothing: what a test without stale translations finds.
#[test]
#[ignore = "a comparison, not a check"]
fn without_stale_translations() {
    let results = try_all(true);
    for (name, _, by) in &results {
        println!("| `{name}` | {} |", by.as_deref().unwrap_or("nobody"));
    }
    let noticed = results.iter().filter(|result| result.2.is_some()).count();
    println!(
        "{noticed} of {} mutants noticed without TLBs",
        results.len()
    );
    assert!(noticed < results.len());
}
