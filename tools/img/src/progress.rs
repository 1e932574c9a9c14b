//! The progress line of `-p`.

use std::io::Write;

/// Shows how much is done, if anybody wants to know.
#[derive(Debug)]
pub struct Progress {
    on: bool,
}

impl Progress {
    /// Begins with nothing done.
    pub fn start(on: bool) -> Self {
        let progress = Self { on };
        progress.show(0.0);
        progress
    }

    /// So much is done, in percent.
    pub fn show(&self, percent: f64) {
        if self.on {
            print!("    ({percent:.2}/100%)\r");
            // Where it cannot be shown there is nobody to see it.
            let _ = std::io::stdout().flush();
        }
    }

    /// Leaves the line.
    pub fn end(self) {
        if self.on {
            println!();
        }
    }
}
