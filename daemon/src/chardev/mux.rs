//! One character device for several monitors: what they say goes out over the same connection, what comes in goes to
//! one of them. Ctrl-a and a letter change which one that is, and more.
//!
//! The monitors begin anew with each connection. Whose turn it is stays.

use std::fmt::Write as _;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc;
use underlay_sys::rt;

use super::Backend;
use super::wire::{Carrier, Wire};
use crate::monitor::{self, Mode};
use crate::state::{Daemon, Why};

/// Most monitors of one device. Source: the reference's error.
pub const MOST: usize = 4;

/// What begins a command: Ctrl-a.
const ESCAPE: u8 = 1;

/// Bytes read at a time.
const READ: usize = 64 << 10;

/// What Ctrl-a h says. Source: the reference.
const HELP: &str = "\n\r\
    C-a h    print this help\n\r\
    C-a x    exit emulator\n\r\
    C-a s    save disk data back to file (if -snapshot)\n\r\
    C-a t    toggle console timestamps\n\r\
    C-a b    send break (magic sysrq)\n\r\
    C-a c    switch between console and monitor\n\r\
    C-a C-a  sends C-a\n\r";

/// See the module.
pub struct Mux {
    /// The device below.
    base: String,
    state: Mutex<State>,
}

struct State {
    /// What is below, until a monitor wants it.
    backend: Option<Backend>,
    /// The monitors, in the order in which they came.
    monitors: Vec<Mode>,
    /// Whose turn it is.
    focus: usize,
    now: Option<Connection>,
}

/// While somebody is there.
struct Connection {
    wire: Wire,
    output: Arc<tokio::sync::Mutex<Stamps>>,
    /// To each monitor.
    inputs: Vec<mpsc::Sender<Vec<u8>>>,
    sessions: Vec<rt::JoinHandle<()>>,
}

/// What one of the monitors has for its connection.
pub struct Front {
    wire: Wire,
    output: Arc<tokio::sync::Mutex<Stamps>>,
    input: tokio::sync::Mutex<Input>,
}

struct Input {
    from: mpsc::Receiver<Vec<u8>>,
    /// What did not fit.
    rest: Vec<u8>,
}

impl Mux {
    /// Above the device `base`, with what is behind that.
    pub fn new(base: String, backend: Backend) -> Self {
        let state = State { backend: Some(backend), monitors: Vec::new(), focus: 0, now: None };
        Self { base, state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The name of the device below.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// How many monitors there are.
    pub fn monitors(&self) -> usize {
        self.state().monitors.len()
    }

    /// Gives back what is below, if no monitor has wanted it yet.
    pub fn give_back(&self) -> Option<Backend> {
        self.state().backend.take()
    }

    /// One more monitor, which speaks at once if somebody is there.
    pub fn join(self: &Arc<Self>, daemon: &Arc<Daemon>, mode: Mode) {
        let backend = {
            let mut state = self.state();
            state.monitors.push(mode);
            if let Some(now) = &mut state.now {
                now.start(daemon, mode);
            }
            state.backend.take()
        };
        if let Some(backend) = backend {
            monitor::serve_together(daemon, backend, self.clone());
        }
    }

    /// From the beginning to the end of a connection.
    pub async fn session(&self, daemon: &Arc<Daemon>, wire: Wire) {
        {
            let mut state = self.state();
            let output = Arc::default();
            let mut now = Connection { wire: wire.clone(), output, inputs: Vec::new(), sessions: Vec::new() };
            state.monitors.iter().for_each(|mode| now.start(daemon, *mode));
            state.now = Some(now);
        }
        self.listen(daemon, &wire).await;
        let Some(Connection { inputs, sessions, .. }) = self.state().now.take() else { return };
        // That is the end for each of them.
        drop(inputs);
        for session in sessions {
            session.await;
        }
        wire.shut();
    }

    async fn listen(&self, daemon: &Arc<Daemon>, wire: &Wire) {
        let mut buffer = vec![0; READ];
        let mut escaped = false;
        loop {
            let bytes = match wire.read(&mut buffer).await {
                Ok(0) | Err(_) => return,
                Ok(count) => &buffer[..count],
            };
            let mut kept = Vec::new();
            for byte in bytes {
                match (std::mem::take(&mut escaped), *byte) {
                    (false, ESCAPE) => escaped = true,
                    (true, b'c') => {
                        self.send(std::mem::take(&mut kept)).await;
                        self.turn();
                    }
                    (true, letter) if letter != ESCAPE => self.command(daemon, letter).await,
                    (_, byte) => kept.push(byte),
                }
            }
            self.send(kept).await;
        }
    }

    /// To the monitor whose turn it is.
    async fn send(&self, bytes: Vec<u8>) {
        let to = {
            let state = self.state();
            state.now.as_ref().and_then(|now| now.inputs.get(state.focus).cloned())
        };
        if let Some(to) = to.filter(|_| !bytes.is_empty()) {
            // A monitor that has gone does not listen.
            let _ = to.send(bytes).await;
        }
    }

    fn turn(&self) {
        let mut state = self.state();
        state.focus = (state.focus + 1) % state.monitors.len().max(1);
    }

    async fn command(&self, daemon: &Arc<Daemon>, letter: u8) {
        let now = self.state().now.as_ref().map(|now| (now.wire.clone(), now.output.clone()));
        let Some((wire, output)) = now else { return };
        let mut output = output.lock().await;
        // Who does not listen any more is noticed by the one who reads.
        let _ = match letter {
            b'h' | b'?' => wire.write(HELP.as_bytes()).await,
            b'x' => {
                let told = wire.write(b"QEMU: Terminated\n\r").await;
                daemon.end(Why::Quit);
                told
            }
            b't' => {
                output.toggle();
                Ok(())
            }
            // There is nothing that a break could be sent to, and no disk that is to be saved.
            _ => Ok(()),
        };
    }
}

impl Connection {
    fn start(&mut self, daemon: &Arc<Daemon>, mode: Mode) {
        let (to, from) = mpsc::channel(1);
        let input = tokio::sync::Mutex::new(Input { from, rest: Vec::new() });
        let front = Front { wire: self.wire.clone(), output: self.output.clone(), input };
        let (daemon, wire) = (daemon.clone(), Wire::new(Carrier::Front(Arc::new(front)), None));
        self.inputs.push(to);
        self.sessions.push(rt::spawn(async move { monitor::client(&daemon, wire, mode).await }));
    }
}

impl Front {
    /// Reads what is there, at least a byte; 0 at the end.
    pub async fn read(&self, into: &mut [u8]) -> io::Result<usize> {
        let mut input = self.input.lock().await;
        if input.rest.is_empty() {
            match input.from.recv().await {
                None => return Ok(0),
                Some(bytes) => input.rest = bytes,
            }
        }
        let count = input.rest.len().min(into.len());
        into[..count].copy_from_slice(&input.rest[..count]);
        input.rest.drain(..count);
        Ok(count)
    }

    /// Writes all of `bytes`, with nothing of the others in between.
    pub async fn write(&self, bytes: &[u8]) -> io::Result<()> {
        let mut output = self.output.lock().await;
        match output.stamped(bytes, rt::now()) {
            None => self.wire.write(bytes).await,
            Some(stamped) => self.wire.write(&stamped).await,
        }
    }
}

/// Puts the time before each line, if it is to.
#[derive(Default)]
struct Stamps {
    on: bool,
    /// A line begins.
    at_line: bool,
    /// When the first of these lines began.
    since: Option<Duration>,
}

impl Stamps {
    fn toggle(&mut self) {
        *self = Self { on: !self.on, ..Self::default() };
    }

    fn stamped(&mut self, bytes: &[u8], now: Duration) -> Option<Vec<u8>> {
        if !self.on {
            return None;
        }
        let mut out = Vec::new();
        for byte in bytes {
            if std::mem::replace(&mut self.at_line, *byte == b'\n') {
                let passed = now.saturating_sub(*self.since.get_or_insert(now));
                let (seconds, milliseconds) = (passed.as_secs(), passed.subsec_millis());
                let (minutes, hours) = (seconds / 60 % 60, seconds / 3600);
                let mut stamp = String::new();
                let _ = write!(stamp, "[{hours:02}:{minutes:02}:{:02}.{milliseconds:03}] ", seconds % 60);
                out.extend_from_slice(stamp.as_bytes());
            }
            out.push(*byte);
        }
        Some(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_get_the_time_since_the_first_of_them() {
        let at = |milliseconds| Duration::from_millis(milliseconds);
        let mut stamps = Stamps::default();
        assert_eq!(stamps.stamped(b"x\n", at(1)), None);
        stamps.toggle();
        // The reference begins with the next line.
        assert_eq!(stamps.stamped(b"a\n", at(5)).unwrap(), b"a\n");
        assert_eq!(stamps.stamped(b"b\nc", at(7)).unwrap(), b"[00:00:00.000] b\n[00:00:00.000] c");
        assert_eq!(stamps.stamped(b"d\n", at(8)).unwrap(), b"d\n");
        assert_eq!(stamps.stamped(b"e", at(3_723_016)).unwrap(), b"[01:02:03.009] e");
        stamps.toggle();
        assert_eq!(stamps.stamped(b"\nf", at(9)), None);
    }
}
