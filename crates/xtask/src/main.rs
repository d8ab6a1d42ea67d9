//! `cargo xtask`: the gate, the QEMU runner, the no-std image, golden files.
//!
//! Everything that a continuous-integration machine or a contributor has to run is a subcommand here, so that
//! no script holds a rule that the gate does not.

mod book;
mod counts;
mod gate;
mod golden;
mod image;
mod models;
mod mutants;
mod night;
mod oracle;
mod package;
mod qemu;
mod sh;
mod steps;
mod tools;
mod workspace;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// The program's exit status when a tool it cannot do without is missing (the convention of Automake).
const EXIT_MISSING: u8 = 77;

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    about = "The gate, the QEMU runner and golden files of kmem."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs every check that a change must pass.
    Gate(gate::Options),
    /// Compares the public API of every published crate with its file in docs/api.
    Golden(golden::Options),
    /// Links every library crate into an image without std and inspects its machine code.
    NoStd(image::Options),
    /// Counts instructions with callgrind and compares with the committed figures.
    Counts(counts::Options),
    /// Plants faults in the page tables, one at a time, and sees each noticed on the mock machine.
    Mutants(mutants::Options),
    /// Runs the tests that have a longer form in it: an hour.
    Night(night::Options),
    /// Replays the recorded runs of Linux and compares with the list of those that pass.
    Oracle(oracle::Options),
    /// Builds the demo kernel and boots it in QEMU; only the kernel's own success code counts.
    Qemu(qemu::Options),
}

fn main() -> ExitCode {
    let root = root();
    match Cli::parse().command {
        Command::Gate(options) => gate::run(&root, &options),
        Command::Golden(options) => golden::main(&root, &options),
        Command::NoStd(options) => image::main(&root, &options),
        Command::Mutants(options) => mutants::main(&root, &options),
        Command::Night(options) => night::main(&root, &options),
        Command::Oracle(options) => oracle::main(&root, &options),
        Command::Counts(options) => counts::main(&root, &options),
        Command::Qemu(options) => qemu::main(&root, &options),
    }
}

/// The workspace's root: two folders above this crate.
fn root() -> PathBuf {
    let mut path = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    path.pop();
    path.pop();
    path
}
