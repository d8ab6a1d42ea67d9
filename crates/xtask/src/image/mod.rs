//! `cargo xtask no-std`: what the compiler made of kmem for a machine without an operating system.
//!
//! The image `calls` of the demo kernel links every library crate without std and holds one function for each
//! public call, named `call_CRATE_NAME`. Of its machine code this program proves two things:
//!
//! * **No vector registers.** No function that was compiled for the image uses xmm, ymm, zmm, mm or x87 registers, so
//!   that a kernel need not save them at an interrupt. Functions that come ready-made in the toolchain's own `core`
//!   for a hosted target are listed apart: with a bare-metal target they are free of them too.
//! * **Stack depth.** The bytes of stack that each public call needs, its callees included, stay within [`BUDGETS`].

mod program;
mod stack;
mod vectors;

use std::path::Path;
use std::process::ExitCode;

use clap::Args;

use crate::sh::{Shell, Stop, fail};
use program::Program;

/// Bytes of stack that a public call may need with kmem's own allocators beneath it, by the beginning of its name; the
/// first that fits counts. These are the figures of today: they keep a call from growing unseen.
const BUDGETS: [(&str, u64); 6] = [
    ("vmalloc_", 5376),
    ("cow_mm_", 8064),
    ("heap_init", 5376),
    ("buddy_init", 5376),
    ("vma_tree_", 5376),
    ("", 3712),
];
/// What every call is to need at most, so that a kernel stack of 8 KiB is enough: calls above it are marked.
const AIM: u64 = 4096;

/// What to print.
#[derive(Args)]
pub struct Options {
    /// Print the deepest chain of calls under each public call.
    #[arg(long)]
    paths: bool,
    /// Write the depths to docs/figures/stack.txt.
    #[arg(long)]
    bless: bool,
    /// List the ready-made functions that use vector registers.
    #[arg(long)]
    prebuilt: bool,
}

/// The subcommand.
pub fn main(root: &Path, options: &Options) -> ExitCode {
    match check(&mut Shell::terminal(root), options) {
        Ok(note) => {
            println!("no-std: {note}");
            ExitCode::SUCCESS
        }
        Err(why) => {
            eprintln!("no-std: FAILED: {why}");
            ExitCode::FAILURE
        }
    }
}

/// For the gate: everything in the log.
///
/// # Errors
/// As for the subcommand.
pub fn gate(shell: &mut Shell) -> Result<String, Stop> {
    check(
        shell,
        &Options {
            paths: true,
            bless: false,
            prebuilt: true,
        },
    )
}

fn check(shell: &mut Shell, options: &Options) -> Result<String, Stop> {
    let folder = shell.root().join("crates/demo-kernel");
    let mut cargo = shell.cargo(["build", "--release", "--bin", "calls"]);
    cargo.current_dir(&folder);
    shell.run(&mut cargo)?;
    let sysroot = shell.output(
        shell
            .command("rustc")
            .current_dir(&folder)
            .args(["--print", "target-libdir"]),
    )?;
    let image = folder.join("target/x86_64-unknown-linux-gnu/release/calls");
    let program = Program::read(&image, Path::new(sysroot.trim()))?;

    let vector = vectors::users(&program);
    let (ready, own): (Vec<_>, Vec<_>) = vector.into_iter().partition(|user| user.prebuilt);
    for user in &own {
        shell.say(format_args!(
            "vector register: {} in {} at {:#x}",
            user.register, user.function, user.address
        ));
    }
    if options.prebuilt {
        for user in &ready {
            shell.say(format_args!(
                "ready-made, uses {}: {}",
                user.register, user.function
            ));
        }
    }

    let depths = stack::depths(&program);
    let mut over = Vec::new();
    shell.say(format_args!("{:>7}  public call", "bytes"));
    for depth in &depths {
        let mut note = String::new();
        if !depth.indirect.is_empty() {
            note += &format!(
                "  (+ what {} calls through pointers need)",
                depth.indirect.len()
            );
        }
        if depth.bytes > AIM {
            note += "  (over the aim)";
        }
        if depth.panics {
            note += "  (a panic is compiled in)";
        }
        shell.say(format_args!("{:>7}  {}{note}", depth.bytes, depth.entry));
        if options.paths {
            for step in &depth.path {
                shell.say(format_args!("           {step}"));
            }
        }
        if options.paths {
            for function in &depth.indirect {
                shell.say(format_args!(
                    "           calls through a pointer: {function}"
                ));
            }
        }
        if let Some(cycle) = &depth.cycle {
            shell.say(format_args!("           recursion through {cycle}"));
        }
        let budget = BUDGETS
            .iter()
            .find(|(prefix, _)| depth.entry.starts_with(prefix));
        if depth.cycle.is_some() || budget.is_none_or(|(_, bytes)| depth.bytes > *bytes) {
            over.push(depth.entry.as_str());
        }
    }
    if options.bless {
        let mut text = format!(
            "# Bytes of stack of each public call, with kmem's own allocators beneath it (aim: {AIM})\n"
        );
        for depth in &depths {
            text += &format!("{:<28} {:>6}\n", depth.entry, depth.bytes);
        }
        std::fs::write(shell.root().join("docs/figures/stack.txt"), text)?;
    }
    if !own.is_empty() {
        return fail(format!(
            "{} functions of the image use vector registers",
            own.len()
        ));
    }
    if !over.is_empty() {
        return fail(format!(
            "more stack than the budget, or recursion: {}",
            over.join(", ")
        ));
    }
    if depths.is_empty() {
        return fail("the image has no call_ function");
    }
    let above = depths.iter().filter(|depth| depth.bytes > AIM).count();
    let deepest = depths
        .iter()
        .max_by_key(|depth| depth.bytes)
        .expect("not empty");
    Ok(format!(
        "{} functions, none with vector registers ({} ready-made ones of core do); {} public calls, deepest {} with {} bytes of stack, {above} over the aim of {AIM}",
        program.functions.len(),
        ready.len(),
        depths.len(),
        deepest.entry,
        deepest.bytes
    ))
}
