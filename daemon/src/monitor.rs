//! Monitors: QMP sessions on character devices, any number at once.
//!
//! Each client has a task that reads, a task that executes one command after the other, and a task that writes what waits
//! in its outbox. What is asked out of band is answered by the one that reads. A client that sends nonsense, stops reading or goes away is its own problem only.

use std::sync::Arc;

use tokio::sync::mpsc;
use underlay_qmp::json::Value;
use underlay_qmp::session::{self, ErrorClass, Incoming, Session};
use underlay_sys::net::{Listener, Stream};
use underlay_sys::{rt, stdio};

use crate::chardev::Backend;
use crate::command;
use crate::error::CommandError;
use crate::event::Outbox;
use crate::state::Daemon;

/// Bytes read from a client at a time.
const READ: usize = 64 << 10;

/// Most commands that wait behind the one that is executed: then the client is not heard any more, not even out of band.
/// Source: the reference answers a request out of band behind seven that wait, and does not behind eight.
const MOST_WAITING: usize = 8;

/// A message of more bytes has the queue to itself.
const LARGE: usize = 2 * READ;

/// Serves QMP on a character device, until the daemon ends.
pub fn serve(daemon: &Arc<Daemon>, backend: Backend, pretty: bool) {
    let daemon = daemon.clone();
    rt::spawn(async move {
        match backend {
            Backend::Listener(listener) => clients(&daemon, listener, pretty).await,
            Backend::Stream(stream) => client(&daemon, Wire::Socket(Arc::new(stream)), pretty).await,
            Backend::Stdio => client(&daemon, Wire::Stdio, pretty).await,
            Backend::File(file) => client(&daemon, Wire::File(Arc::new(file)), pretty).await,
        }
    });
}

/// One client after the other, as a character device has one other end.
async fn clients(daemon: &Arc<Daemon>, listener: Listener, pretty: bool) {
    while !daemon.quit.is_raised() {
        match listener.accept().await {
            Ok(stream) => client(daemon, Wire::Socket(Arc::new(stream)), pretty).await,
            Err(error) => {
                tracing::warn!(%error, "a monitor could not accept a client");
                rt::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

/// The two directions of a character device.
#[derive(Clone)]
enum Wire {
    Socket(Arc<Stream>),
    Stdio,
    /// Output only.
    File(Arc<std::fs::File>),
}

impl Wire {
    async fn read(&self, into: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Self::Socket(stream) => stream.recv(into).await,
            Self::Stdio => stdio::read(into).await,
            Self::File(_) => std::future::pending().await,
        }
    }

    async fn write(&self, bytes: &[u8]) -> std::io::Result<()> {
        match self {
            Self::Socket(stream) => stream.send_all(bytes).await,
            Self::Stdio => stdio::write_all(bytes).await,
            Self::File(file) => std::io::Write::write_all(&mut &**file, bytes),
        }
    }

    fn shut(&self) {
        if let Self::Socket(stream) = self {
            stream.shutdown();
        }
    }
}

async fn client(daemon: &Arc<Daemon>, wire: Wire, pretty: bool) {
    let outbox = daemon.events.subscribe();
    let writer = rt::spawn(write_out(wire.clone(), outbox.clone()));
    push(&outbox, session::greeting(command::version()), pretty);
    let (orders, waiting) = mpsc::channel(MOST_WAITING);
    let worker = rt::spawn(work(daemon.clone(), waiting, outbox.clone(), pretty));
    listen(&wire, &orders, &outbox, pretty).await;
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
async fn listen(wire: &Wire, orders: &mpsc::Sender<Order>, outbox: &Outbox, pretty: bool) {
    let mut session = Session::default();
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
                    if !outbox.has_room().await {
                        return;
                    }
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

/// Executes one command after the other, each once its client has read enough of the replies before.
async fn work(daemon: Arc<Daemon>, mut waiting: mpsc::Receiver<Order>, outbox: Arc<Outbox>, pretty: bool) {
    while let Some(Order { incoming, negotiated }) = waiting.recv().await {
        if !outbox.has_room().await {
            return;
        }
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
const LAST_WORDS: (u32, std::time::Duration) = (100, std::time::Duration::from_millis(10));

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
