//! The command line, which other programs drive: names and exit codes are stable.
//!
//! | status | meaning |
//! |---|---|
//! | 0 | everything ran and every figure and invariant held |
//! | 1 | kmem is wrong: an invariant did not hold, or a recorded run was not reproduced |
//! | 2 | the input or the command line is unusable; one line on stderr says where and why |

use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;

/// A whole memory manager on a mock machine: boot it, replay real programs on it, watch it.
#[derive(Debug, Parser)]
#[command(name = "kmem", version, about, propagate_version = true)]
pub struct Cli {
    /// What to do; `boot` if nothing is said.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Boot the whole stack from a real machine's memory map and run real programs' memory calls on it.
    Boot(Boot),
    /// Replay recorded runs of Linux on the memory manager, call by call.
    Replay(Replay),
    /// Watch recorded programs run side by side: zones, object caches, address spaces.
    Top(Top),
}

/// Arguments of `kmem top`.
#[derive(Debug, Clone, Default, Args)]
pub struct Top {
    /// A memory map, as for boot [default: an embedded map of a machine with 24 GiB].
    #[arg(long, value_name = "FILE")]
    pub map: Option<String>,
    /// A recorded program, may be given several times [default: all embedded ones].
    #[arg(long, value_name = "FILE")]
    pub trace: Vec<String>,
    /// Let every program end once and print one picture as text (also without a terminal).
    #[arg(long)]
    pub once: bool,
}

/// Arguments of `kmem replay`.
#[derive(Debug, Clone, Default, Args)]
pub struct Replay {
    /// Recorded runs, plain or gzip [default: all embedded ones].
    #[arg(value_name = "FILE")]
    pub files: Vec<String>,
    /// List every call and advice that is accepted without its full effect, and replay nothing.
    #[arg(long)]
    pub unsupported: bool,
}

/// Arguments of `kmem boot`.
#[derive(Debug, Clone, Default, Args)]
pub struct Boot {
    /// A memory map: BIOS-e820 lines, a whole boot log that contains such lines, or /proc/iomem; `-` is standard input
    /// [default: an embedded map of a machine with 24 GiB].
    #[arg(long, value_name = "FILE")]
    pub map: Option<String>,
    /// A recorded run to replay, may be given several times [default: embedded runs of real programs].
    #[arg(long, value_name = "FILE")]
    pub trace: Vec<String>,
    /// Where to write the report (text, and a picture of physical memory).
    #[arg(long, value_name = "DIR")]
    pub report: Option<PathBuf>,
}
