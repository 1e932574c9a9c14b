//! The two programs that are measured.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use serde::Serialize;
use underlay_sys::process;

use crate::measure::{Outcome, Sample};

/// Who does the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Side {
    Qemu,
    Underlay,
}

/// Where the programs are.
#[derive(Clone, Debug)]
pub struct Programs {
    underlay: PathBuf,
}

impl Programs {
    /// Our binary, and QEMU's tools on the search path.
    pub fn find(underlay: &Path) -> Outcome<Self> {
        let underlay = underlay.canonicalize().map_err(|error| {
            format!("{}: {error}; build it first: cargo build --release", underlay.display())
        })?;
        for program in ["qemu-img", "qemu-storage-daemon"] {
            let found = Command::new(program).arg("--version").stdout(Stdio::null()).status();
            found.map_err(|error| format!("{program}: {error} (Debian: qemu-utils)"))?;
        }
        Ok(Self { underlay })
    }

    /// `tool` is `img` or `storage-daemon`.
    pub fn command(&self, side: Side, tool: &str) -> Command {
        match side {
            Side::Qemu => Command::new(format!("qemu-{tool}")),
            Side::Underlay => {
                let mut command = Command::new(&self.underlay);
                command.arg(tool);
                command
            }
        }
    }

    /// Runs an image tool to its end; seconds.
    pub fn run<A: AsRef<OsStr>>(&self, side: Side, arguments: &[A]) -> Outcome<Sample> {
        let mut command = self.command(side, "img");
        command.args(arguments).stdout(Stdio::null());
        let begun = Instant::now();
        let (status, usage) = process::wait_with_usage(command.spawn()?)?;
        let value = begun.elapsed().as_secs_f64();
        if !status.success() {
            return Err(format!("{command:?} failed").into());
        }
        Ok(Sample { value, cpu: usage.cpu.as_secs_f64(), peak: usage.peak as f64 / f64::from(1 << 20) })
    }
}

/// The version of the installed QEMU.
pub fn qemu_version() -> Outcome<String> {
    let output = Command::new("qemu-img").arg("--version").output()?;
    Ok(String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned())
}
