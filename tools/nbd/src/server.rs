//! Serving: from a command line to clients to the end.

use std::sync::Arc;

use underlay_disk::{Disk, guessed_raw};
use underlay_exports::listen::{cannot_listen, reason};
use underlay_exports::{NamedBits, NbdExport, NbdServer, ServerOptions, Shown, ShownBitmaps};
use underlay_sys::net::{Address, Listener};
use underlay_sys::process::{self, Birth, PidFile};
use underlay_sys::rt::{self, StopSign};
use underlay_sys::signal::Ending;
use underlay_sys::thread::{IoThread, block_on};

use crate::activation;
use crate::command_line::{Serving, default_address};

/// More threads than this do not help one disk.
const MOST_THREADS: usize = 16;

/// Serves the disk until it is over.
pub fn run(program: &str, serving: Serving) -> Result<(), String> {
    let ending = Ending::hold_back().map_err(|error| format!("Cannot handle signals: {}", reason(&error)))?;
    // Before the process number changes: the variables name it.
    let handed_over = activation::socket(serving.placed_by)?;
    // Forking must come before the first thread.
    let birth = match serving.fork {
        true => Some(process::daemonize().map_err(|error| format!("Failed to fork: {}", reason(&error)))?),
        false => None,
    };
    let address = handed_over.or_else(|| serving.address.clone()).unwrap_or_else(default_address);
    let listener = Listener::bind(&address).map_err(|error| match &address {
        Address::Fd(fd) => {
            format!("Socket activation failed: invalid file descriptor fd = {fd}: {}", reason(&error))
        }
        address => cannot_listen(address, &error),
    })?;
    let pid_file = match &serving.pid_file {
        Some(path) => Some(
            PidFile::create(path)
                .map_err(|error| format!("Could not create '{}': {}", path.display(), reason(&error)))?,
        ),
        None => None,
    };
    let count = std::thread::available_parallelism().map_or(1, usize::from).min(MOST_THREADS);
    let threads = IoThread::start_crew("io", count)
        .map_err(|error| format!("Cannot start the I/O threads: {}", reason(&error)))?;
    let done = block_on(serve(program, serving, listener, &threads, ending, birth));
    drop(pid_file);
    done
}

async fn serve(
    program: &str,
    serving: Serving,
    listener: Listener,
    threads: &[IoThread],
    ending: Ending,
    birth: Option<Birth>,
) -> Result<(), String> {
    let disk = open(&serving).await?;
    let (locked, bitmaps) = match lock_bitmaps(&disk, &serving.bitmaps).await {
        Ok(locked) => locked,
        Err(error) => {
            disk.close().await?;
            return Err(error);
        }
    };
    let export = NbdExport {
        id: "qemu-nbd".to_owned(),
        name: serving.name.clone(),
        description: serving.description.clone(),
        root: disk.root.clone(),
        guest: None,
        writable: !disk.is_read_only(),
        writethrough: serving.request.modes.writethrough,
        allocation_depth: serving.allocation_depth,
        bitmaps,
    };
    let options = ServerOptions { max_connections: serving.clients, handshake_timeout: serving.handshake };
    let spawners = threads.iter().map(IoThread::spawner).collect();
    let server = match NbdServer::serve(listener, options, spawners, vec![export]) {
        Ok(server) => Arc::new(server),
        Err(error) => {
            disk.close().await?;
            return Err(error.to_string());
        }
    };
    if serving.verbose {
        crate::complain(&format!("{program}: listening on {}", server.local_address()));
    }
    disk.refresh_bitmaps();
    let begun = birth.map_or(Ok(()), Birth::succeeded);
    if begun.is_ok() {
        until_over(&server, serving.persistent, ending).await;
    }
    server.stop().await;
    let unlocked = disk.graph().change(|plan| {
        locked.unlock(plan);
        Ok(())
    });
    unlocked.await.map_err(|error| error.to_string())?;
    let closed = disk.close().await;
    begun.map_err(|error| format!("Failed to fork: {}", reason(&error)))?;
    closed
}

async fn lock_bitmaps(disk: &Disk, names: &[String]) -> Result<(ShownBitmaps, NamedBits), String> {
    let wanted: Vec<_> = names.iter().cloned().map(Shown::Somewhere).collect();
    let (node, writable) = (disk.node(), !disk.is_read_only());
    let locked = disk.graph().change(|plan| ShownBitmaps::lock(plan, node, &wanted, writable));
    locked.await.map_err(|error| error.to_string())
}

async fn open(serving: &Serving) -> Result<Disk, String> {
    let cannot = |error: String| match serving.request.offset {
        // The window lies over the image, which could be opened.
        Some(_) if error.starts_with("Offset (") => error,
        _ => format!("Failed to blk_new_open '{}': {error}", serving.file),
    };
    let disk = Disk::open(serving.request.clone()).await.map_err(cannot)?;
    if disk.is_guessed_raw() {
        crate::complain(&guessed_raw(&serving.file));
    }
    if let Some(wanted) = &serving.snapshot {
        let shown = match disk.root.enter().await {
            Ok(inside) => wanted.show(&inside.cx()).await,
            Err(error) => Err(error.to_string()),
        };
        if let Err(error) = shown {
            disk.close().await?;
            return Err(error);
        }
    }
    Ok(disk)
}

/// Waits for a signal or, unless it is `persistent`, for the last client to leave.
async fn until_over(server: &Arc<NbdServer>, persistent: bool, ending: Ending) {
    let over = StopSign::default();
    let signalled = over.clone();
    rt::spawn(async move {
        if ending.wait().await.is_ok() {
            signalled.raise();
        }
    });
    if !persistent {
        let (server, deserted) = (server.clone(), over.clone());
        rt::spawn(async move {
            server.deserted().await;
            deserted.raise();
        });
    }
    over.raised().await;
}
