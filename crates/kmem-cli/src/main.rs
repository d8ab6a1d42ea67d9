//! The `kmem` command.

use clap::Parser;
use kmem_cli::args::{Boot, Cli, Command};
use std::process::ExitCode;

fn main() -> ExitCode {
    let command = Cli::parse()
        .command
        .unwrap_or(Command::Boot(Boot::default()));
    let done = match command {
        Command::Boot(args) => kmem_cli::boot::run(&args),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(bad_input) => {
            eprintln!("{bad_input}");
            ExitCode::from(2)
        }
    }
}
