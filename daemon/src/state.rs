//! The daemon's state: what commands work on.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tokio::sync::Notify;
use underlay_drivers::open::OnCorrupt;
use underlay_drivers::open::tell_trouble_on_stderr;
use underlay_drivers::throttle::Groups;
use underlay_drivers::{BackingPolicy, Opener};
use underlay_exports::NbdServer;
use underlay_graph::{Graph, GraphError, NodeId, Plan};
use underlay_jobs::{GRACE, Jobs};
use underlay_qmp::json::Object;
use underlay_qmp::schema::Program;
use underlay_sys::complain;
use underlay_sys::rt::{self, StopSign};
use underlay_sys::thread::{IoThread, Spawner};

use crate::chardev::Chardevs;
use crate::command::export::Export;
use crate::command::iothread::Iothreads;
use crate::command::lookup::Names;
use crate::event::{self, EventBus};
use crate::machine::Machine;

/// Most I/O threads that are started, however many processors there are.
const MAX_IO_THREADS: usize = 16;

/// Why a daemon ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// The command `quit`.
    Quit,
    /// A signal.
    Signal,
}

/// See the module. Commands run on the control thread, requests and jobs on the I/O threads.
pub struct Daemon {
    /// Itself, for what goes on when a command has been answered.
    pub me: Weak<Self>,
    /// The disks.
    pub graph: Arc<Graph>,
    /// The disks' limits.
    pub groups: Arc<Groups>,
    /// Names of threads, for who asks for them.
    pub iothreads: Iothreads,
    /// The character devices.
    pub chardevs: Chardevs,
    /// The jobs.
    pub jobs: Arc<Jobs>,
    /// The way to the monitors.
    pub events: Arc<EventBus>,
    /// Raised when everything that the command line asks for is there: commands wait for it.
    pub ready: StopSign,
    /// Raised when the daemon is to end.
    pub quit: StopSign,
    /// Raised when everything is closed and only the last replies are left.
    pub ended: StopSign,
    /// One command that changes something at a time, whichever monitor it comes from.
    pub turn: tokio::sync::Mutex<()>,
    /// The machine that the disks are in, if this is one.
    pub machine: Option<Arc<Machine>>,
    nbd: Mutex<Option<Arc<NbdServer>>>,
    exports: Mutex<Vec<Export>>,
    /// Told when an export is gone, or stays after all.
    pub exports_changed: Notify,
    threads: Vec<IoThread>,
    next_job_thread: AtomicUsize,
}

impl Daemon {
    /// With nothing in it, and its I/O threads running.
    pub fn start(machine: Option<Arc<Machine>>) -> std::io::Result<Arc<Self>> {
        let count = std::thread::available_parallelism().map_or(1, usize::from).min(MAX_IO_THREADS);
        let threads = IoThread::start_crew("io", count)?;
        let events = Arc::<EventBus>::default();
        let graph = Graph::new();
        graph.let_bitmaps_last();
        graph.on_trouble(tell_trouble_on_stderr);
        Ok(Arc::new_cyclic(|me| Self {
            me: me.clone(),
            graph,
            groups: Arc::default(),
            iothreads: Iothreads::default(),
            chardevs: Chardevs::default(),
            jobs: Jobs::new(events.clone()),
            events,
            ready: StopSign::default(),
            quit: StopSign::default(),
            ended: StopSign::default(),
            turn: tokio::sync::Mutex::default(),
            machine,
            nbd: Mutex::default(),
            exports: Mutex::default(),
            exports_changed: Notify::new(),
            threads,
            next_job_thread: AtomicUsize::new(0),
        }))
    }

    /// Which program this is.
    pub fn program(&self) -> Program {
        if self.machine.is_some() { Program::Machine } else { Program::StorageDaemon }
    }

    /// Begins the end. Of a machine, everybody is told.
    pub fn end(&self, why: Why) {
        if self.machine.is_some() && !self.quit.is_raised() {
            let reason = match why {
                Why::Quit => "host-qmp-quit",
                Why::Signal => "host-signal",
            };
            self.events.emit("SHUTDOWN", Object::new().with("guest", false).with("reason", reason));
        }
        self.quit.raise();
    }

    /// Every I/O thread, for a server to spread its clients over.
    pub fn spawners(&self) -> Vec<Spawner> {
        self.threads.iter().map(IoThread::spawner).collect()
    }

    /// The system's number of an I/O thread; `at` counts on and on.
    pub fn thread_number(&self, at: usize) -> i32 {
        self.threads[at % self.threads.len()].number()
    }

    /// An I/O thread for a job: the last one first, as clients begin with the first.
    pub fn job_thread(&self) -> Spawner {
        let at = self.next_job_thread.fetch_add(1, Ordering::Relaxed);
        self.threads[self.threads.len() - 1 - at % self.threads.len()].spawner()
    }

    /// For nodes that this daemon opens.
    pub fn opener(&self, policy: BackingPolicy) -> Opener {
        let names = Names::of(self);
        let opener = Opener::new(&self.graph, policy, Some(self.on_corrupt())).with_groups(&self.groups);
        opener.with_names(Arc::new(move |plan, name| names.find(plan, name).ok().flatten()))
    }

    /// What a node calls when it finds its image damaged: a line on stderr and an event.
    pub fn on_corrupt(&self) -> OnCorrupt {
        let events = self.events.clone();
        Arc::new(move |node_name, corruption| {
            complain!("{corruption}");
            events.emit("BLOCK_IMAGE_CORRUPTED", event::corrupted(node_name, &corruption));
        })
    }

    /// The NBD server, while one runs.
    pub fn nbd(&self) -> MutexGuard<'_, Option<Arc<NbdServer>>> {
        self.nbd.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The exports, oldest first.
    pub fn exports(&self) -> MutexGuard<'_, Vec<Export>> {
        self.exports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The end: jobs cancelled, exports closed, nodes flushed and closed.
    pub async fn shut_down(&self) {
        self.graph.give_up_draft();
        let jobs = self.jobs.cancel_all().await;
        crate::command::export::close_all(self).await;
        let mut closing = std::pin::pin!(self.close_all_nodes());
        if rt::by(Some(rt::now() + GRACE), closing.as_mut()).await.is_none() {
            // A target that does not answer cannot be flushed either.
            jobs.iter().for_each(|job| job.give_up());
            closing.await;
        }
        self.ended.raise();
    }

    async fn close_all_nodes(&self) {
        let nodes: Vec<_> = self.graph.plan().nodes().map(|(id, _)| id).collect();
        if self.close_nodes(&nodes).await.is_err() {
            // One that cannot be flushed must not keep the others from it.
            for node in nodes {
                if let Err(error) = self.close_nodes(&[node]).await {
                    complain!("Could not close all block nodes: {error}");
                }
            }
        }
    }

    async fn close_nodes(&self, nodes: &[NodeId]) -> Result<(), GraphError> {
        let edit = |plan: &mut Plan| {
            for backend in self.machine.iter().flat_map(|machine| machine.devices.backends()) {
                backend.medium.into_iter().for_each(|medium| plan.remove_root(medium));
            }
            for id in nodes {
                if plan.get(*id).is_some() {
                    plan.node_mut(*id).monitor_owned = false;
                }
            }
            Ok(())
        };
        self.graph.change(edit).await
    }
}
