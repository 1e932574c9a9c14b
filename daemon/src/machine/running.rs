//! Whether the machine runs: guests' requests go on only while it does.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// What the machine does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RunState {
    /// It waits for its first `cont`.
    #[default]
    Prelaunch,
    /// It waits for another one to be continued by it: its disks are still somebody else's.
    InMigrate,
    /// It runs.
    Running,
    /// It was stopped.
    Paused,
    /// It was stopped by an error of a disk.
    IoError,
}

impl RunState {
    /// As query-status calls it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Prelaunch => "prelaunch",
            Self::InMigrate => "inmigrate",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::IoError => "io-error",
        }
    }
}

#[derive(Debug, Default)]
struct Inside {
    state: RunState,
    /// Requests that were let in and are not back yet.
    requests: usize,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Running {
    inside: Mutex<Inside>,
    changed: Notify,
}

impl Running {
    fn inside(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the machine does.
    pub fn state(&self) -> RunState {
        self.inside().state
    }

    /// From now on it does something else.
    pub fn set(&self, state: RunState) {
        self.inside().state = state;
        self.changed.notify_waiters();
    }

    /// A machine that does not run is at its beginning again.
    pub fn reset(&self) {
        let mut inside = self.inside();
        if !matches!(inside.state, RunState::Running | RunState::InMigrate) {
            inside.state = RunState::Prelaunch;
        }
    }

    /// Those that wait look again whether they still have to.
    pub fn wake(&self) {
        self.changed.notify_waiters();
    }

    /// Stops the machine if it runs; whether it did.
    pub fn stop_if_running(&self, state: RunState) -> bool {
        let mut inside = self.inside();
        let ran = inside.state == RunState::Running;
        if ran {
            inside.state = state;
        }
        ran
    }

    /// Waits until the machine runs; false if `given_up` comes first.
    pub async fn runs(&self, given_up: &AtomicBool) -> bool {
        loop {
            let changed = self.changed.notified();
            let mut changed = std::pin::pin!(changed);
            changed.as_mut().enable();
            if given_up.load(Ordering::Acquire) {
                return false;
            }
            if self.state() == RunState::Running {
                return true;
            }
            changed.await;
        }
    }

    /// Lets a request in, unless the machine is stopped by now.
    pub fn enter(&self) -> bool {
        let mut inside = self.inside();
        let runs = inside.state == RunState::Running;
        inside.requests += usize::from(runs);
        runs
    }

    /// A request is back.
    pub fn leave(&self) {
        let mut inside = self.inside();
        inside.requests = inside.requests.saturating_sub(1);
        if inside.requests == 0 {
            drop(inside);
            self.changed.notify_waiters();
        }
    }

    /// Waits until no request is on its way.
    pub async fn quiet(&self) {
        loop {
            let changed = self.changed.notified();
            let mut changed = std::pin::pin!(changed);
            changed.as_mut().enable();
            if self.inside().requests == 0 {
                return;
            }
            changed.await;
        }
    }
}
