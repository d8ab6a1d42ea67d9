//! One boot: what the machine has, and how it ended.

use std::fmt;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::sh::Stop;

/// The emulator.
pub const QEMU: &str = "qemu-system-x86_64";
/// What QEMU ends with when the kernel writes 0x10, 0x11 or 0x12 to the exit device: `(value << 1) | 1`.
const SUCCESS: i32 = 33;
const FAILURE: i32 = 35;
const SKIPPED: i32 = 37;
/// Seconds for one scenario; the longest takes some on a busy machine.
const LIMIT: u32 = 60;
/// Seconds for [`Machine::boots`]: a hypervisor that cannot go on keeps QEMU waiting.
const SHORT_LIMIT: u32 = 10;

/// A machine and what it shall do.
pub struct Machine {
    /// The scenario's name.
    pub scenario: String,
    /// CPUs.
    pub cpus: u32,
    /// Memory, as QEMU's -m takes it.
    pub memory: String,
    /// Whether the CPU has five levels of page tables (LA57).
    pub five_levels: bool,
    /// Whether KVM runs it: the host's own processor, with PCID and INVPCID where KVM gives them. QEMU's emulation has neither.
    pub kvm: bool,
    /// What the CPU has not, by QEMU's names.
    pub without: Vec<String>,
    /// A fault to plant.
    pub plant: Option<String>,
    /// Whether to print every system call.
    pub trace: bool,
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} CPU", self.scenario, self.cpus)?;
        if self.cpus != 1 {
            f.write_str("s")?;
        }
        write!(f, ", {}", self.memory)?;
        if self.five_levels {
            f.write_str(", LA57")?;
        }
        if self.kvm {
            f.write_str(", KVM")?;
        }
        if !self.without.is_empty() {
            write!(f, ", no {}", self.without.join(" "))?;
        }
        if let Some(plant) = &self.plant {
            write!(f, ", planted {plant}")?;
        }
        f.write_str(")")
    }
}

/// How a run ended.
#[derive(Clone)]
pub enum End {
    /// The kernel reported success.
    Passed,
    /// It did not.
    Failed(String),
    /// It could not do what it should.
    Skipped(String),
}

/// A run's end and the serial port's output.
pub struct Run {
    /// How it ended.
    pub end: End,
    /// What the kernel printed.
    pub text: String,
}

impl Machine {
    /// Boots the image.
    ///
    /// # Errors
    /// When QEMU cannot be started.
    pub fn boot(&self, image: &Path) -> Result<Run, Stop> {
        self.boot_within(image, LIMIT)
    }

    /// Whether it boots at all, and what it printed; the reason where it does not.
    ///
    /// # Errors
    /// As [`boot`](Self::boot).
    pub fn boots(&self, image: &Path) -> Result<Result<String, String>, Stop> {
        let run = self.boot_within(image, SHORT_LIMIT)?;
        Ok(match run.end {
            End::Passed => Ok(run.text),
            End::Failed(why) | End::Skipped(why) => {
                Err(why.lines().next().unwrap_or("no reason given").to_owned())
            }
        })
    }

    fn cpu(&self) -> String {
        let mut cpu = "max".to_owned();
        if !self.five_levels {
            cpu += ",la57=off";
        }
        if self.kvm {
            // Its register is one that a hypervisor below this one may refuse, which ends QEMU.
            cpu += ",arch-capabilities=off";
        }
        for feature in &self.without {
            cpu += &format!(",{feature}=off");
        }
        cpu
    }

    fn boot_within(&self, image: &Path, seconds: u32) -> Result<Run, Stop> {
        let mut line = format!("scenario={} cpus={}", self.scenario, self.cpus);
        if let Some(plant) = &self.plant {
            line += &format!(" plant={plant}");
        }
        if self.trace {
            line += " trace=1";
        }
        let accelerator = if self.kvm { "kvm" } else { "tcg" };
        let mut command = Command::new("timeout");
        command.args([&seconds.to_string(), QEMU, "-machine", "q35"]);
        command.args(["-accel", accelerator, "-cpu", &self.cpu()]);
        command.args(["-m", &self.memory]);
        command.args(["-smp", &self.cpus.to_string()]);
        command.arg("-kernel").arg(image).args(["-append", &line]);
        command.args(["-display", "none", "-serial", "stdio", "-monitor", "none"]);
        command.args(["-no-reboot", "-nodefaults"]);
        command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x04"]);
        command.stdin(Stdio::null());
        let output = command.output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let failed = |why: &str| End::Failed(why.to_owned());
        let end = match output.status.code() {
            Some(SUCCESS) => End::Passed,
            Some(FAILURE) => failed("the kernel reported a failure"),
            Some(SKIPPED) => {
                let why = text.lines().find_map(|line| line.strip_prefix("SKIPPED: "));
                End::Skipped(why.unwrap_or("no reason given").to_owned())
            }
            Some(0) => failed("the machine was reset (triple fault)"),
            Some(124) => match String::from_utf8_lossy(&output.stderr).lines().next() {
                Some(said) if said.starts_with("KVM") => End::Failed(said.to_owned()),
                _ => failed("no end within the time limit"),
            },
            _ => End::Failed(format!(
                "QEMU itself failed: {}",
                String::from_utf8_lossy(&output.stderr)
            )),
        };
        Ok(Run { end, text })
    }
}
