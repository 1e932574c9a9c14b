//! The line above the prompt that says how far the running jobs are.
//!
//! Events tell when there is a job; as long as one runs the server is asked several times a second (query-jobs).

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use underlay_qmp::client::Reply;
use underlay_qmp::json::{Object, Value};

use crate::line::execute;
use crate::link::Link;
use crate::screen::{Screen, harmless};

/// Time between two looks.
const TICK: Duration = Duration::from_millis(200);

/// Length of the bar, in characters.
const BAR: u64 = 20;

/// Longest line.
const MAX_LINE: usize = 1000;

#[derive(Debug, Default)]
struct State {
    /// A job is on its way.
    running: bool,
    /// An event has told of one since the server was asked.
    news: bool,
}

/// What is known about the server's jobs.
#[derive(Debug, Default)]
pub(crate) struct Jobs {
    state: Mutex<State>,
    changed: Condvar,
}

impl Jobs {
    /// Whether a job is on its way.
    pub(crate) fn are_running(&self) -> bool {
        self.lock().running
    }

    /// Takes note of an event.
    pub(crate) fn heard(&self, event: &Object) {
        let status = event.get("data").and_then(Value::as_object).map_or("", |data| text(data, "status"));
        let is_end = matches!(status, "concluded" | "null");
        if event.get("event").and_then(Value::as_str) == Some("JOB_STATUS_CHANGE") && !is_end {
            *self.lock() = State { running: true, news: true };
            self.changed.notify_all();
        }
    }

    /// Asks the server once; whether it can tell.
    pub(crate) fn look(&self, link: &Link, screen: &Screen) -> bool {
        self.lock().news = false;
        let reply = link.execute(&execute("query-jobs", Object::new()), Reply::result);
        let Ok(Ok(jobs)) = reply else {
            self.lock().running = false;
            return false;
        };
        let line = line(&jobs);
        let mut state = self.lock();
        state.running = line.is_some() || state.news;
        screen.show_progress(&line.unwrap_or_else(|| "no job is running".to_owned()));
        true
    }

    /// Asks again and again while jobs run, until the connection ends; for a thread of its own.
    pub(crate) fn watch(&self, link: &Link, screen: &Screen) {
        loop {
            let idle = |state: &mut State| !state.running;
            drop(self.changed.wait_while(self.lock(), idle).unwrap_or_else(PoisonError::into_inner));
            if !self.look(link, screen) {
                return;
            }
            std::thread::sleep(TICK);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What to say about the jobs; nothing if none is on its way.
fn line(jobs: &Value) -> Option<String> {
    let jobs = jobs.as_list().unwrap_or_default().iter().filter_map(Value::as_object);
    let mut jobs = jobs.filter(|job| !matches!(text(job, "status"), "concluded" | "null")).peekable();
    jobs.peek()?;
    let mut line = String::new();
    for job in jobs {
        if line.len() > MAX_LINE {
            break;
        }
        line.push_str(if line.is_empty() { "" } else { "   " });
        line.push_str(&one(job));
    }
    Some(harmless(&line).replace(['\n', '\t'], " "))
}

fn one(job: &Object) -> String {
    let number = |name| job.get(name).and_then(Value::as_u64).unwrap_or(0);
    let (done, total) = (number("current-progress"), number("total-progress"));
    let of = |whole: u64| {
        u64::try_from(u128::from(done.min(total)) * u128::from(whole) / u128::from(total.max(1)))
    };
    let filled = usize::try_from(of(BAR).unwrap_or(0)).unwrap_or(0);
    let empty = usize::try_from(BAR).unwrap_or(0).saturating_sub(filled);
    format!(
        "{} {} [{}{}] {}% {}",
        text(job, "id"),
        text(job, "type"),
        "#".repeat(filled),
        "-".repeat(empty),
        of(100).unwrap_or(0),
        text(job, "status")
    )
}

fn text<'a>(job: &'a Object, name: &str) -> &'a str {
    job.get(name).and_then(Value::as_str).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use underlay_qmp::json;

    use super::*;

    #[test]
    fn a_line_about_jobs() {
        let said = |jobs: &str| line(&json::parse(jobs.as_bytes()).expect("JSON"));
        let one = r#"{"id": "a", "type": "commit", "status": "running", "current-progress": 30, "total-progress": 40}"#;
        let two = r#"{"id": "b\u001b", "type": "mirror", "status": "ready", "current-progress": 7, "total-progress": 7}"#;
        let new = r#"{"id": "c", "type": "stream", "status": "created", "current-progress": 0, "total-progress": 0}"#;
        let big = r#"{"id": "d", "type": "x", "status": "y", "current-progress": 18446744073709551615, "total-progress": 1}"#;
        assert_eq!(said(&format!("[{one}]")).as_deref(), Some("a commit [###############-----] 75% running"));
        assert_eq!(
            said(&format!("[{one},{two},{new}]")).as_deref(),
            Some(
                "a commit [###############-----] 75% running   b mirror [####################] 100% ready   \
                 c stream [--------------------] 0% created"
            )
        );
        assert_eq!(said(&format!("[{big}]")).as_deref(), Some("d x [####################] 100% y"));
        assert_eq!(said(r#"[{"id": "a", "status": "concluded"}]"#), None);
        assert_eq!(said("[]"), None);
        assert_eq!(said("{}"), None);
        let many = format!("[{}{one}]", format!("{one},").repeat(1000));
        assert!(said(&many).expect("a line").len() < 2 * MAX_LINE);
    }
}
