//! The `kmem` command.

use clap::Parser;
use kmem_cli::Status;
use kmem_cli::args::{Boot, Cli, Command};
use std::process::ExitCode;

fn main() -> ExitCode {
    let command = Cli::parse()
        .command
        .unwrap_or(Command::Boot(Boot::default()));
    let done = match command {
        Command::Boot(args) => kmem_cli::boot::run(&args),
        Command::Replay(args) => kmem_cli::replay::command::main(&args),
        Command::Top(args) => kmem_cli::top::main(&args),
    };
    let status = done.unwrap_or_else(|bad_input| {
        eprintln!("{bad_input}");
        Status::Unusable
    });
    ExitCode::from(status as u8)
}
