//! Commands whose whole output goes to a log: a step prints one line when it passes and the end of its log when
//! it fails.

use std::ffi::OsStr;
use std::fmt;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

/// Why a step did not pass.
#[derive(Debug)]
pub enum Stop {
    /// A check failed; the text says which.
    Failed(String),
    /// A tool or an input is missing; the text says which and how to get it.
    Missing(String),
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed(why) | Self::Missing(why) => f.write_str(why),
        }
    }
}

impl From<std::io::Error> for Stop {
    fn from(error: std::io::Error) -> Self {
        Self::Failed(error.to_string())
    }
}

/// Shorthand for a failed check.
pub fn fail<T>(why: impl Into<String>) -> Result<T, Stop> {
    Err(Stop::Failed(why.into()))
}

/// Where commands run and where their output goes.
pub struct Shell {
    root: PathBuf,
    log: Option<File>,
}

impl Shell {
    /// A shell at `root` whose commands write to the terminal.
    pub fn terminal(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            log: None,
        }
    }

    /// A shell at `root` whose commands write to the file `log`.
    pub fn logged(root: &Path, log: &Path) -> std::io::Result<Self> {
        if let Some(folder) = log.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let log = File::options()
            .create(true)
            .truncate(true)
            .read(true)
            .write(true)
            .open(log)?;
        Ok(Self {
            root: root.to_owned(),
            log: Some(log),
        })
    }

    /// The workspace's root.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Writes a line to the log (or the terminal).
    pub fn say(&mut self, line: impl fmt::Display) {
        match &mut self.log {
            Some(log) => drop(writeln!(log, "{line}")),
            None => println!("{line}"),
        }
    }

    /// A command at the root. `cargo` is the one that runs this program, unless the arguments choose a toolchain.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command.current_dir(&self.root).stdin(Stdio::null());
        // Set by `cargo run` for this program; in a child they would choose the wrong toolchain or package.
        for name in [
            "RUSTFLAGS",
            "RUSTDOCFLAGS",
            "CARGO_TARGET_DIR",
            "RUSTUP_TOOLCHAIN",
            "RUSTC",
            "RUSTDOC",
        ] {
            if std::env::var_os(name).is_some() && name != "CARGO_TARGET_DIR" {
                command.env_remove(name);
            }
        }
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy().into_owned();
            if name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") {
                command.env_remove(name);
            }
        }
        command
    }

    /// `cargo` with arguments, at the root.
    pub fn cargo<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Command {
        let mut command = self.command("cargo");
        command.args(arguments);
        command
    }

    /// Runs a command to its end and gives its status.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn status(&mut self, command: &mut Command) -> Result<ExitStatus, Stop> {
        self.say(format_args!("$ {}", shown(command)));
        if let Some(log) = &self.log {
            command.stdout(log.try_clone()?).stderr(log.try_clone()?);
        }
        let status = command.status().map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Stop::Missing(format!(
                "{} is not installed",
                command.get_program().display()
            )),
            _ => Stop::Failed(format!("{}: {error}", command.get_program().display())),
        })?;
        if let Some(log) = &mut self.log {
            log.seek(SeekFrom::End(0))?;
        }
        Ok(status)
    }

    /// Runs a command that must succeed.
    ///
    /// # Errors
    /// When it cannot be started or ends with another status than 0.
    pub fn run(&mut self, command: &mut Command) -> Result<(), Stop> {
        let status = self.status(command)?;
        if status.success() {
            Ok(())
        } else {
            fail(format!("{}: {status}", shown(command)))
        }
    }

    /// Runs a command that must succeed and gives its standard output, which the log gets too.
    ///
    /// # Errors
    /// As for [`run`](Self::run).
    pub fn output(&mut self, command: &mut Command) -> Result<String, Stop> {
        let (status, text) = self.outcome(command)?;
        if status.success() {
            Ok(text)
        } else {
            fail(format!("{}: {status}", shown(command)))
        }
    }

    /// Runs a command and gives its status and standard output, which the log gets too.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn outcome(&mut self, command: &mut Command) -> Result<(ExitStatus, String), Stop> {
        self.say(format_args!("$ {}", shown(command)));
        if let Some(log) = &self.log {
            command.stderr(log.try_clone()?);
        } else {
            command.stderr(Stdio::inherit());
        }
        let output = command.output().map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Stop::Missing(format!(
                "{} is not installed",
                command.get_program().display()
            )),
            _ => Stop::Failed(format!("{}: {error}", command.get_program().display())),
        })?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if let Some(log) = &mut self.log {
            log.seek(SeekFrom::End(0))?;
            log.write_all(text.as_bytes())?;
        }
        Ok((output.status, text))
    }

    /// Everything the log holds; empty for a terminal.
    pub fn text(&mut self) -> String {
        let mut bytes = Vec::new();
        if let Some(log) = &mut self.log {
            let _ = log.rewind().and_then(|()| log.read_to_end(&mut bytes));
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// A command as one would type it.
fn shown(command: &Command) -> String {
    let mut line = String::new();
    for (name, value) in command.get_envs() {
        if let Some(value) = value {
            line += &format!("{}={:?} ", name.display(), value.to_string_lossy());
        }
    }
    line += &command.get_program().to_string_lossy();
    for argument in command.get_args() {
        if line.len() > 400 {
            line += " ...";
            break;
        }
        line += " ";
        line += &argument.to_string_lossy();
    }
    line
}
