//! The one door for control: a checked request comes in, its handler's result goes out.

pub mod arguments;
pub mod backup;
pub mod bitmap;
pub mod blockdev;
pub mod chardev;
pub mod create;
pub mod experimental;
pub mod export;
pub mod internal_snapshot;
pub mod iothread;
pub mod job;
pub mod lookup;
pub mod machine;
pub mod mirror;
pub mod object;
pub mod query;
pub mod snapshot;
pub mod statistics;
pub mod transaction;
pub mod types;

use underlay_qmp::json::{Object, Value};
use underlay_qmp::schema;
use underlay_qmp::session::Request;

use crate::error::{CommandError, CommandResult};
use crate::hmp;
use crate::state::{Daemon, Why};
use arguments::Arguments;

/// The version of QEMU whose interface this is, and our own.
pub fn version() -> Value {
    let qemu = Object::new().with("major", 10_i64).with("minor", 0_i64).with("micro", 2_i64);
    let package = concat!("Underlay ", env!("CARGO_PKG_VERSION"));
    Object::new().with("qemu", qemu).with("package", package).into()
}

/// Executes a request. Queries never wait; everything else takes turns.
pub async fn execute(daemon: &Daemon, request: Request) -> CommandResult<Value> {
    daemon.ready.raised().await;
    let mut arguments = Arguments::new(request.arguments);
    if let Some(answer) = query(daemon, request.command, &mut arguments) {
        return answer;
    }
    if request.command == "human-monitor-command" {
        // Each of the requests that the line makes takes its own turn.
        let line = arguments.text("command-line");
        if arguments.number("cpu-index", i64::MIN) != i64::MIN {
            // There is none.
            return Err(CommandError::new("Parameter 'cpu-index' expects a CPU number"));
        }
        return Ok(Value::Str(Box::pin(hmp::execute(daemon, &line, &[])).await));
    }
    if request.command == "quit" {
        // The reply is the last thing that the client hears, behind the events of the end.
        daemon.end(Why::Quit);
        daemon.ended.raised().await;
        return Ok(Value::Object(Object::new()));
    }
    let _turn = daemon.turn.lock().await;
    if request.command == "blockdev-snapshot-delete-internal-sync" {
        return internal_snapshot::delete(daemon, &mut arguments).await;
    }
    if let Some(done) = chardev::change(daemon, request.command, &mut arguments).await {
        return done;
    }
    change(daemon, request.command, arguments).await.map(|()| Value::Object(Object::new()))
}

fn query(daemon: &Daemon, command: &str, arguments: &mut Arguments) -> Option<CommandResult<Value>> {
    Some(Ok(match command {
        "qom-list" => return Some(object::qom_list(daemon, &arguments.text("path"))),
        "qom-list-types" => {
            let implements = arguments.optional_text("implements");
            types::list(daemon, implements.as_deref(), arguments.flag("abstract", false))
        }
        "qom-list-properties" => return Some(types::properties(daemon, &arguments.text("typename"))),
        "device-list-properties" => {
            return Some(types::device_properties(daemon, &arguments.text("typename")));
        }
        "qom-get" => {
            let path = arguments.text("path");
            return Some(object::qom_get(daemon, &path, &arguments.text("property")));
        }
        "query-version" => version(),
        "query-commands" => {
            let name = |command: &schema::ty::Command| Object::new().with("name", command.name).into();
            Value::List(daemon.program().commands().map(name).collect())
        }
        "query-qmp-schema" => schema::introspect::query_qmp_schema(daemon.program()),
        "query-named-block-nodes" => query::named_block_nodes(daemon, arguments.flag("flat", false)),
        "query-block" => query::block(daemon),
        "query-blockstats" => statistics::blockstats(daemon, arguments.flag("query-nodes", false)),
        "x-debug-query-block-graph" => query::block_graph(daemon),
        "x-debug-block-dirty-bitmap-sha256" => return Some(bitmap::sha256(daemon, arguments)),
        "query-jobs" => job::query_jobs(daemon),
        "query-block-jobs" => job::query_block_jobs(daemon),
        "query-block-exports" => export::query(daemon),
        "query-iothreads" => daemon.iothreads.query(|at| daemon.thread_number(at)),
        other => {
            let told = chardev::query(daemon, other);
            return told.or_else(|| machine::query(daemon.machine.as_ref()?, other)).map(Ok);
        }
    }))
}

async fn change(daemon: &Daemon, command: &str, mut arguments: Arguments) -> CommandResult<()> {
    if let Some(done) = transaction::alone(daemon, command, &mut arguments).await {
        return done;
    }
    if let Some(machine) = &daemon.machine
        && let Some(done) = machine::change(daemon, machine, command, &mut arguments).await
    {
        return done;
    }
    match command {
        "blockdev-add" => {
            blockdev::add(daemon, arguments.rest()).await?;
        }
        "object-add" => object::add(daemon, arguments)?,
        "object-del" => object::del(daemon, &arguments.text("id"))?,
        "qom-set" => object::qom_set(daemon, &mut arguments).await?,
        "blockdev-del" => blockdev::del(daemon, &arguments.text("node-name")).await?,
        "blockdev-reopen" => blockdev::reopen(daemon, arguments.objects("options")).await?,
        "blockdev-create" => create::blockdev_create(daemon, &mut arguments).await?,
        "x-blockdev-amend" => experimental::amend(daemon, &mut arguments).await?,
        "x-blockdev-change" => experimental::change(daemon, &mut arguments)?,
        "x-blockdev-set-iothread" => experimental::set_iothread(daemon, &mut arguments)?,
        "transaction" => transaction::transaction(daemon, &mut arguments).await?,
        "block-set-write-threshold" => {
            let node_name = arguments.text("node-name");
            blockdev::set_write_threshold(daemon, &node_name, arguments.unsigned("write-threshold"))?;
        }
        "change-backing-file" => {
            let (device, image) = (arguments.text("device"), arguments.text("image-node-name"));
            blockdev::change_backing_file(daemon, &device, &image, &arguments.text("backing-file")).await?;
        }
        "block_resize" => {
            let (device, node_name) =
                (arguments.optional_text("device"), arguments.optional_text("node-name"));
            let size = arguments.number("size", 0);
            blockdev::resize(daemon, device.as_deref(), node_name.as_deref(), size).await?;
        }
        "block-stream" => job::stream(daemon, &mut arguments).await?,
        "block-commit" => job::commit(daemon, &mut arguments).await?,
        "blockdev-mirror" => mirror::blockdev_mirror(daemon, &mut arguments).await?,
        "drive-mirror" => mirror::drive_mirror(daemon, &mut arguments).await?,
        "blockdev-backup" => backup::blockdev_backup(daemon, &mut arguments).await?,
        "drive-backup" => backup::drive_backup(daemon, &mut arguments).await?,
        "block-job-change" => mirror::change(daemon, &mut arguments)?,
        "nbd-server-start" => export::server_start(daemon, &mut arguments)?,
        "nbd-server-stop" => export::server_stop(daemon).await?,
        "nbd-server-add" => export::server_add(daemon, &mut arguments).await?,
        "nbd-server-remove" => {
            let name = arguments.text("name");
            export::del(daemon, &name, arguments.optional_text("mode").as_deref() == Some("hard")).await?;
        }
        "block-export-add" => export::add(daemon, &mut arguments).await?,
        "block-export-del" => {
            let id = arguments.text("id");
            export::del(daemon, &id, arguments.optional_text("mode").as_deref() == Some("hard")).await?;
        }
        verb => job::verb(daemon, verb, &mut arguments)
            .await
            .unwrap_or_else(|| Err(CommandError::new(format!("The command {verb} has no handler"))))?,
    }
    Ok(())
}
