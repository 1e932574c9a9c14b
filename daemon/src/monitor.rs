//! Monitors: QMP sessions on character devices, any number at once.
//!
//! Each client has a task that reads, a task that executes one command after the other, and a task that writes what
//! waits in its outbox. What is asked out of band is answered by the one that reads. A client that sends nonsense,
//! stops reading or goes away is its own problem only.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use underlay_exports::listen::cannot_connect;
use underlay_qmp::json::Value;
use underlay_qmp::session::{self, ErrorClass, Incoming, Session};
use underlay_sys::net::{Address, Listener, Stream};
use underlay_sys::rt;

use crate::chardev::wire::{Carrier, Wire};
use crate::chardev::{Backend, End, Mux, Shown, terminal};
use crate::command;
use crate::error::CommandError;
use crate::event::Outbox;
use crate::hmp;
use crate::state::Daemon;

/// Bytes read from a client at a time.
const READ: usize = 64 << 10;

/// Most commands that wait behind the one that is executed: then the client is not heard any more, not even out of
/// band. Source: the reference answers a request out of band behind seven that wait, and does not behind eight.
const MOST_WAITING: usize = 8;

/// A message of more bytes has the queue to itself.
const LARGE: usize = 2 * READ;

/// What is spoken on a monitor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// QMP.
    Qmp {
        /// Replies are printed over several lines.
        pretty: bool,
    },
    /// What people type.
    Human,
}

/// Who talks to what is behind a character device.
#[derive(Clone)]
enum Speaker {
    /// One monitor.
    Alone(Mode),
    /// Several.
    Together(Arc<Mux>),
}

/// Serves a monitor on a character device, until the daemon ends.
pub fn serve(daemon: &Arc<Daemon>, backend: Backend, mode: Mode) {
    match backend.end {
        End::Mux(mux) => mux.join(daemon, mode),
        _ => speak(daemon, backend, Speaker::Alone(mode)),
    }
}

/// Serves several monitors on a character device.
pub fn serve_together(daemon: &Arc<Daemon>, backend: Backend, mux: Arc<Mux>) {
    speak(daemon, backend, Speaker::Together(mux));
}

fn speak(daemon: &Arc<Daemon>, backend: Backend, mode: Speaker) {
    let daemon = daemon.clone();
    rt::spawn(async move {
        let shown = &backend.shown;
        let wire = |carrier| Wire::new(carrier, backend.log.clone());
        match backend.end {
            End::Listener(listener) => {
                let wire = |stream| match backend.telnet {
                    true => wire(stream).with_telnet(),
                    false => wire(stream),
                };
                clients(&daemon, listener, shown, wire, &mode).await;
            }
            End::Stream(stream) => connection(&daemon, stream, shown, wire, &mode).await,
            End::Caller(address, pause) => calls(&daemon, &address, pause, shown, wire, &mode).await,
            End::Pty(pty) => {
                let pty = Arc::new(pty);
                while !daemon.quit.is_raised() && pty.opened().await.is_ok() {
                    talk(&daemon, wire(Carrier::Pty(pty.clone())), &mode).await;
                }
            }
            End::Fixed(carrier) => {
                if !matches!(mode, Speaker::Alone(Mode::Qmp { .. })) && matches!(carrier, Carrier::Stdio) {
                    terminal::take(backend.signals);
                }
                talk(&daemon, wire(carrier), &mode).await;
            }
            // One above another is refused.
            End::Mux(_) => {}
        }
    });
}

/// One client after the other, as a character device has one other end.
async fn clients(
    daemon: &Arc<Daemon>,
    listener: Listener,
    shown: &Shown,
    wire: impl Fn(Carrier) -> Wire,
    mode: &Speaker,
) {
    while !daemon.quit.is_raised() {
        match listener.accept().await {
            Ok(stream) => connection(daemon, stream, shown, &wire, mode).await,
            Err(error) => {
                tracing::warn!(%error, "a monitor could not accept a client");
                rt::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Connects, and connects again whenever that fails or the other side has gone.
async fn calls(
    daemon: &Arc<Daemon>,
    address: &Address,
    pause: Duration,
    shown: &Shown,
    wire: impl Fn(Carrier) -> Wire,
    mode: &Speaker,
) {
    while !daemon.quit.is_raised() {
        match Stream::connect(address).await {
            Ok(stream) => connection(daemon, stream, shown, &wire, mode).await,
            Err(error) => tracing::warn!("a monitor: {}", cannot_connect(address, &error)),
        }
        rt::sleep(pause).await;
    }
}

/// From the beginning to the end of a connection.
async fn connection(
    daemon: &Arc<Daemon>,
    stream: Stream,
    shown: &Shown,
    wire: impl Fn(Carrier) -> Wire,
    mode: &Speaker,
) {
    shown.connected(&stream);
    let wire = wire(Carrier::Socket(Arc::new(stream)));
    // Who has gone already is noticed soon.
    let _ = wire.hello().await;
    talk(daemon, wire, mode).await;
    shown.gone();
}

async fn talk(daemon: &Arc<Daemon>, wire: Wire, mode: &Speaker) {
    match mode {
        Speaker::Alone(mode) => client(daemon, wire, *mode).await,
        Speaker::Together(mux) => mux.session(daemon, wire).await,
    }
}

/// Talks to who is at the other end of `wire`, until they go.
pub async fn client(daemon: &Arc<Daemon>, wire: Wire, mode: Mode) {
    match mode {
        Mode::Qmp { pretty } => qmp(daemon, wire, pretty).await,
        Mode::Human => hmp::session(daemon, wire).await,
    }
}

async fn qmp(daemon: &Arc<Daemon>, wire: Wire, pretty: bool) {
    let outbox = daemon.events.subscribe();
    let writer = rt::spawn(write_out(wire.clone(), outbox.clone()));
    push(&outbox, session::greeting(command::version()), pretty);
    let (orders, waiting) = mpsc::channel(MOST_WAITING);
    let worker = rt::spawn(work(daemon.clone(), waiting, outbox.clone(), pretty));
    listen(Session::new(daemon.program()), &wire, &orders, &outbox, pretty).await;
    // What the client has sent is executed, whether it is still there or not.
    drop(orders);
    worker.await;
    outbox.close();
    writer.await;
}

/// What a client has sent, in its turn.
struct Order {
    incoming: Incoming,
    /// The client may get events from the reply on.
    negotiated: bool,
}

/// Reads what a client sends until it goes, or nobody works for it any more.
async fn listen(
    mut session: Session,
    wire: &Wire,
    orders: &mpsc::Sender<Order>,
    outbox: &Outbox,
    pretty: bool,
) {
    let mut buffer = vec![0; READ];
    // Bytes since the last message.
    let mut length = 0;
    loop {
        let bytes = match wire.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(count) => &buffer[..count],
        };
        length += bytes.len();
        for incoming in session.push(bytes) {
            let Ok(place) = orders.reserve().await else { return };
            match incoming {
                Incoming::Urgent(reply) => {
                    outbox.room().await;
                    push(outbox, reply, pretty);
                }
                incoming => place.send(Order { incoming, negotiated: session.is_negotiated() }),
            }
            // A large message waits alone: eight of them would be too much.
            if std::mem::take(&mut length) > LARGE && orders.reserve_many(MOST_WAITING).await.is_err() {
                return;
            }
        }
    }
}

/// Executes one command after the other, each once its client has read enough of the replies before, or reads no more.
async fn work(daemon: Arc<Daemon>, mut waiting: mpsc::Receiver<Order>, outbox: Arc<Outbox>, pretty: bool) {
    while let Some(Order { incoming, negotiated }) = waiting.recv().await {
        outbox.room().await;
        let reply = match incoming {
            Incoming::Reply(reply) | Incoming::Urgent(reply) => reply,
            Incoming::Request(request) => execute(&daemon, request).await,
        };
        push(&outbox, reply, pretty);
        // Events begin with the reply to the negotiation.
        if negotiated {
            outbox.want_events();
        }
    }
}

async fn execute(daemon: &Daemon, request: session::Request) -> Value {
    let id = request.id.clone();
    match command::execute(daemon, request).await {
        Ok(result) => session::reply(result, id),
        Err(CommandError { class, desc, .. }) => {
            let class = match class {
                underlay_graph::Class::Generic => ErrorClass::GenericError,
                underlay_graph::Class::DeviceNotFound => ErrorClass::DeviceNotFound,
                underlay_graph::Class::DeviceNotActive => ErrorClass::DeviceNotActive,
            };
            session::error(class, &desc, id)
        }
    }
}

fn push(outbox: &Outbox, message: Value, pretty: bool) {
    outbox.push(&if pretty { message.to_pretty() } else { message.to_string() });
}

async fn write_out(wire: Wire, outbox: Arc<Outbox>) {
    while let Some(bytes) = outbox.take().await {
        if wire.write(&bytes).await.is_err() {
            outbox.close();
            break;
        }
    }
    wire.shut();
}

/// How often, and how long apart, the end of the daemon looks whether its last replies and events are out.
const LAST_WORDS: (u32, Duration) = (100, Duration::from_millis(10));

/// Gives the clients that still read a moment to get what waits for them.
pub async fn last_words(daemon: &Daemon) {
    for _ in 0..LAST_WORDS.0 {
        rt::yield_now().await;
        if daemon.events.is_quiet() {
            return;
        }
        rt::sleep(LAST_WORDS.1).await;
    }
}
