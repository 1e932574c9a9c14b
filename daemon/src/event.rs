//! Events on their way to the monitors.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::Notify;
use underlay_jobs::{EventSink, JobEvent, Progress};
use underlay_qmp::json::{Object, Value};
use underlay_qmp::session;

/// Most bytes that wait for one client. Who does not read that many is cut off: nobody else may suffer for it.
const MAX_WAITING: usize = 64 << 20;

/// With so many bytes waiting for it, a client's next command is not read before it has read some.
const ENOUGH_WAITING: usize = 1 << 20;

/// What waits to be sent to one client.
#[derive(Debug, Default)]
pub struct Outbox {
    state: Mutex<Waiting>,
    changed: Notify,
    /// Something was taken, or nothing will be any more.
    taken: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    messages: VecDeque<String>,
    bytes: usize,
    wants_events: bool,
    closed: bool,
}

impl Outbox {
    fn state(&self) -> MutexGuard<'_, Waiting> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a message; closes the box when too much waits already.
    pub fn push(&self, message: &str) {
        let mut state = self.state();
        if state.closed {
            return;
        }
        // A message may have several lines: texts in it have their line ends escaped.
        let message = format!("{message}\n").replace('\n', "\r\n");
        state.bytes += message.len();
        state.messages.push_back(message);
        if state.bytes > MAX_WAITING {
            tracing::warn!("a monitor's client does not read; it is cut off");
            *state = Waiting { closed: true, ..Waiting::default() };
            self.taken.notify_waiters();
        }
        drop(state);
        self.changed.notify_one();
    }

    /// Waits until the client has read so much of what waits for it that it may ask for more, or never will read it.
    pub async fn room(&self) {
        loop {
            let taken = self.taken.notified();
            let mut taken = std::pin::pin!(taken);
            taken.as_mut().enable();
            {
                let state = self.state();
                if state.closed || state.bytes < ENOUGH_WAITING {
                    return;
                }
            }
            taken.await;
        }
    }

    /// From now on events go here too.
    pub fn want_events(&self) {
        self.state().wants_events = true;
    }

    /// Nothing more will come.
    pub fn close(&self) {
        self.state().closed = true;
        self.changed.notify_one();
        self.taken.notify_waiters();
    }

    /// Everything that waits, as soon as there is something; `None` once closed and empty.
    pub async fn take(&self) -> Option<Vec<u8>> {
        loop {
            {
                let mut state = self.state();
                if !state.messages.is_empty() {
                    state.bytes = 0;
                    self.taken.notify_waiters();
                    let messages: Vec<String> = state.messages.drain(..).collect();
                    return Some(messages.concat().into_bytes());
                }
                if state.closed {
                    return None;
                }
            }
            self.changed.notified().await;
        }
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.state().messages.is_empty()
    }
}

/// Sends every event to every monitor that wants events.
#[derive(Debug, Default)]
pub struct EventBus {
    outboxes: Mutex<Vec<Weak<Outbox>>>,
}

impl EventBus {
    /// A new client's box.
    pub fn subscribe(&self) -> Arc<Outbox> {
        let outbox = Arc::new(Outbox::default());
        let mut outboxes = self.outboxes.lock().unwrap_or_else(PoisonError::into_inner);
        outboxes.retain(|outbox| outbox.strong_count() > 0);
        outboxes.push(Arc::downgrade(&outbox));
        outbox
    }

    /// Whether nothing waits for any client.
    pub fn is_quiet(&self) -> bool {
        let outboxes = self.outboxes.lock().unwrap_or_else(PoisonError::into_inner);
        outboxes.iter().filter_map(Weak::upgrade).all(|outbox| outbox.is_empty())
    }

    /// Sends an event with the present time.
    pub fn emit(&self, name: &str, data: Object) {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        let message = session::event(name, data, since).to_string();
        let outboxes = self.outboxes.lock().unwrap_or_else(PoisonError::into_inner);
        for outbox in outboxes.iter().filter_map(Weak::upgrade) {
            let wanted = outbox.state().wants_events;
            if wanted {
                outbox.push(&message);
            }
        }
    }
}

fn progress(id: String, progress: Progress) -> Object {
    Object::new()
        .with("type", progress.kind.as_str())
        .with("device", id)
        .with("len", progress.len)
        .with("offset", progress.offset)
        .with("speed", progress.speed)
}

impl EventSink for EventBus {
    fn emit(&self, event: JobEvent) {
        let (name, data) = match event {
            JobEvent::StatusChange { id, status } => {
                ("JOB_STATUS_CHANGE", Object::new().with("id", id).with("status", status.as_str()))
            }
            JobEvent::Ready { id, progress: at } => ("BLOCK_JOB_READY", progress(id, at)),
            JobEvent::Pending { id, kind } => {
                ("BLOCK_JOB_PENDING", Object::new().with("type", kind.as_str()).with("id", id))
            }
            JobEvent::Completed { id, progress: at, error } => {
                let mut data = progress(id, at);
                if let Some(error) = error {
                    data.insert("error", error);
                }
                ("BLOCK_JOB_COMPLETED", data)
            }
            JobEvent::Cancelled { id, progress: at } => ("BLOCK_JOB_CANCELLED", progress(id, at)),
            JobEvent::Error { id, is_read, action } => {
                let operation = if is_read { "read" } else { "write" };
                let data = Object::new().with("device", id).with("operation", operation);
                ("BLOCK_JOB_ERROR", data.with("action", action.as_str()))
            }
        };
        Self::emit(self, name, data);
    }
}

/// The data of BLOCK_IMAGE_CORRUPTED.
pub fn corrupted(node_name: &str, corruption: &underlay_qcow2::Corruption) -> Object {
    let mut data = Object::new().with("device", "");
    if !node_name.is_empty() {
        data.insert("node-name", node_name);
    }
    data.insert("msg", corruption.message.as_str());
    for (name, value) in [("offset", corruption.offset), ("size", corruption.size)] {
        if let Some(value) = value {
            data.insert(name, Value::from(value));
        }
    }
    data.with("fatal", corruption.fatal)
}
