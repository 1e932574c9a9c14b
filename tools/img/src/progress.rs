//! The progress line of `-p`.

use std::io::Write;
use underlay_sys::{say, say_part};

/// Shows how much is done, if anybody wants to know, and leaves its line at the end.
#[derive(Debug)]
pub struct Progress {
    on: bool,
}

impl Progress {
    /// Shows nothing yet.
    pub fn new(on: bool) -> Self {
        Self { on }
    }

    /// Begins with nothing done.
    pub fn start(on: bool) -> Self {
        let progress = Self::new(on);
        progress.show(0.0);
        progress
    }

    /// So much is done, in percent.
    pub fn show(&self, percent: f64) {
        if self.on {
            say_part!("    ({percent:.2}/100%)\r");
            // Where it cannot be shown there is nobody to see it.
            let _ = std::io::stdout().flush();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.on {
            say!();
        }
    }
}
