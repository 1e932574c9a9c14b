//! What each line does: requests to the handlers of QMP's commands, and their answers as text.

use underlay_drivers::options::nest;
use underlay_graph::units::is_well_formed_id;
use underlay_qmp::json::{Object, Value};
use underlay_qmp::option_list;
use underlay_qmp::session::Request;
use underlay_sys::complain;

use super::table::{COMMANDS, INFO, Line};
use super::{disks, parse, show};
use crate::command::{self, object};
use crate::device::given::Input;
use crate::device::model::{self, Model};
use crate::device::{self, plug};
use crate::error::{CommandError, CommandResult};
use crate::machine::{Machine, hot};
use crate::state::Daemon;

/// Does what a line says; what is to be shown.
pub async fn execute(daemon: &Daemon, line: &str, history: &[Vec<u8>]) -> String {
    let (name, rest) = parse::word(line);
    if name.is_empty() {
        return String::new();
    }
    let Some(found) = COMMANDS.iter().find(|known| known.is(name)) else {
        return format!("unknown command: '{name}'\n");
    };
    if found.name() == "info" {
        return info(daemon, line, rest, history).await;
    }
    let arguments = match read(found, line, rest) {
        Ok(arguments) => arguments,
        Err(text) => return text,
    };
    match run(daemon, found.name(), &arguments).await {
        Ok(text) => text,
        Err(error) => format!("Error: {}\n", error.in_full()),
    }
}

/// Reads what follows a command in a line.
fn read(found: &Line, line: &str, rest: &str) -> Result<Object, String> {
    // What was typed for it.
    let typed = &line[..line.len() - rest.len()];
    parse::arguments(found.names, found.arguments, rest)
        .map_err(|wrong| format!("{wrong}\nTry \"help {typed}\" for more information\n"))
}

/// What a part of a line says.
struct Given<'a>(&'a Object);

impl Given<'_> {
    fn text(&self, name: &str) -> Option<&str> {
        self.0.get(name).and_then(Value::as_str)
    }

    fn flag(&self, name: &str) -> bool {
        self.0.get(name).is_some()
    }

    /// A request with some of the arguments under the same names.
    fn pass(&self, names: &[&str]) -> Object {
        let mut object = Object::new();
        for name in names {
            if let Some(value) = self.0.get(name) {
                object.insert(name, value.clone());
            }
        }
        object
    }
}

async fn ask(daemon: &Daemon, command: &'static str, arguments: Object) -> CommandResult<Value> {
    command::execute(daemon, Request { command, arguments, id: None }).await
}

async fn tell(daemon: &Daemon, command: &'static str, arguments: Object) -> CommandResult<String> {
    ask(daemon, command, arguments).await.map(|_| String::new())
}

async fn run(daemon: &Daemon, name: &str, arguments: &Object) -> CommandResult<String> {
    let given = Given(arguments);
    let device = || given.pass(&["device"]);
    match name {
        "help" => Ok(help(given.text("name").unwrap_or_default())),
        "quit" => tell(daemon, "quit", Object::new()).await,
        "stop" => tell(daemon, "stop", Object::new()).await,
        "cont" => tell(daemon, "cont", Object::new()).await,
        "system_reset" => tell(daemon, "system_reset", Object::new()).await,
        "block_job_cancel" => {
            tell(daemon, "block-job-cancel", device().with("force", given.flag("force"))).await
        }
        "block_job_complete" => tell(daemon, "block-job-complete", device()).await,
        "block_job_pause" => tell(daemon, "block-job-pause", device()).await,
        "block_job_resume" => tell(daemon, "block-job-resume", device()).await,
        "block_job_set_speed" => tell(daemon, "block-job-set-speed", given.pass(&["device", "speed"])).await,
        "block_resize" => tell(daemon, "block_resize", given.pass(&["device", "size"])).await,
        "block_set_io_throttle" => {
            let names = ["device", "bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"];
            tell(daemon, "block_set_io_throttle", given.pass(&names)).await
        }
        "block_stream" => {
            let job = given.text("device").unwrap_or_default();
            let request = given.pass(&["device", "speed", "base"]).with("job-id", job);
            tell(daemon, "block-stream", request).await
        }
        "change" => change(daemon, &given).await,
        "eject" => tell(daemon, "eject", device().with("force", given.flag("force"))).await,
        "commit" => disks::commit(daemon, given.text("device").unwrap_or_default()).await,
        "device_add" => device_add(daemon, given.text("device").unwrap_or_default()).await,
        "device_del" => tell(daemon, "device_del", given.pass(&["id"])).await,
        // What these two say of errors the reference says without a word in front.
        "drive_add" => Ok(drive_add(daemon, &given).await.unwrap_or_else(plainly)),
        "drive_del" => {
            let name = given.text("device").unwrap_or_default();
            let _turn = daemon.turn.lock().await;
            let done = hot::del(daemon, machine(daemon)?, name).await;
            Ok(done.map_or_else(plainly, |()| String::new()))
        }
        "drive_backup" => {
            let request = copy_to(&given).with("compress", given.flag("compress"));
            tell(daemon, "drive-backup", request).await
        }
        "drive_mirror" => tell(daemon, "drive-mirror", copy_to(&given)).await,
        "nbd_server_start" => nbd_server_start(daemon, &given).await,
        "nbd_server_add" => {
            let request = given.pass(&["device", "name"]).with("writable", given.flag("writable"));
            tell(daemon, "nbd-server-add", request).await
        }
        "nbd_server_remove" => {
            let mode = if given.flag("force") { "hard" } else { "safe" };
            tell(daemon, "nbd-server-remove", given.pass(&["name"]).with("mode", mode)).await
        }
        "nbd_server_stop" => tell(daemon, "nbd-server-stop", Object::new()).await,
        "qemu-io" => {
            let (name, line) = (given.text("device"), given.text("command"));
            let (name, line) = (name.unwrap_or_default(), line.unwrap_or_default());
            disks::qemu_io(daemon, name, given.flag("qdev"), line).await
        }
        "snapshot_blkdev" => {
            if given.text("snapshot-file").is_none() {
                // The reference says it so.
                return Err(CommandError::new("Parameter 'snapshot-file' is missing"));
            }
            let request = given.pass(&["device", "snapshot-file", "format"]).with("mode", mode(&given));
            tell(daemon, "blockdev-snapshot-sync", request).await
        }
        "snapshot_blkdev_internal" => {
            tell(daemon, "blockdev-snapshot-internal-sync", given.pass(&["device", "name"])).await
        }
        "snapshot_delete_blkdev_internal" => {
            let request = given.pass(&["device", "name", "id"]);
            tell(daemon, "blockdev-snapshot-delete-internal-sync", request).await
        }
        other => Err(CommandError::new(format!("The command {other} has no handler"))),
    }
}

fn plainly(error: CommandError) -> String {
    format!("{}\n", error.in_full())
}

pub fn machine(daemon: &Daemon) -> CommandResult<&Machine> {
    daemon.machine.as_deref().ok_or_else(|| CommandError::new("There is no machine"))
}

async fn device_add(daemon: &Daemon, words: &str) -> CommandResult<String> {
    let machine = machine(daemon)?;
    let options = option_list::parse(words, Some("driver")).options;
    let text = |name: &str| options.get(name).and_then(Value::as_str);
    let asks = words.split(',').any(|word| matches!(word, "help" | "?"));
    match text("driver") {
        Some("help" | "?") => return Ok(model::help()),
        Some(name) if asks => {
            if let Some(model) = Model::find(name) {
                return Ok(model.help());
            }
        }
        _ => {}
    }
    if text("id").is_some_and(|id| !is_well_formed_id(id)) {
        let error = object::bad_id().in_full();
        return Ok(format!("Try \"help device_add\" for more information\n{error}\n"));
    }
    let _turn = daemon.turn.lock().await;
    let device = device::given::Given::read(options, Input::Words)?;
    plug::plug(daemon, machine, device, &|text| complain!("{text}")).await?;
    Ok(String::new())
}

/// A drive, or with `-n` a node.
async fn drive_add(daemon: &Daemon, given: &Given<'_>) -> CommandResult<String> {
    let words = given.text("opts").unwrap_or_default();
    if given.flag("node") {
        let options = nest(option_list::parse(words, None).options);
        if options.get("node-name").is_none() {
            return Err(CommandError::new("'node-name' needs to be specified"));
        }
        return tell(daemon, "blockdev-add", options).await;
    }
    let _turn = daemon.turn.lock().await;
    hot::add(daemon, machine(daemon)?, words).await?;
    Ok("OK\n".to_owned())
}

fn mode(given: &Given<'_>) -> &'static str {
    if given.flag("reuse") { "existing" } else { "absolute-paths" }
}

fn copy_to(given: &Given<'_>) -> Object {
    let sync = if given.flag("full") { "full" } else { "top" };
    given.pass(&["device", "target", "format"]).with("sync", sync).with("mode", mode(given))
}

async fn change(daemon: &Daemon, given: &Given<'_>) -> CommandResult<String> {
    let mut request = given.pass(&["device", "read-only-mode"]).with("force", given.flag("force"));
    if let Some(mode) = given.text("read-only-mode")
        && !matches!(mode, "retain" | "read-only" | "read-write")
    {
        return Err(CommandError::new(format!("invalid parameter value: {mode}")));
    }
    for (from, to) in [("target", "filename"), ("arg", "format")] {
        if let Some(text) = given.text(from) {
            request.insert(to, text);
        }
    }
    tell(daemon, "blockdev-change-medium", request).await
}

async fn nbd_server_start(daemon: &Daemon, given: &Given<'_>) -> CommandResult<String> {
    let (all, writable) = (given.flag("all"), given.flag("writable"));
    if writable && !all {
        return Err(CommandError::new("-w only valid together with -a"));
    }
    let place = given.text("uri").unwrap_or_default();
    let address = match place.strip_prefix("unix:") {
        Some("") => return Err(CommandError::new("invalid Unix socket address")),
        Some(path) => Object::new().with("type", "unix").with("data", Object::new().with("path", path)),
        None => {
            let (host, port) = host_and_port(place)?;
            let data = Object::new().with("host", host).with("port", port);
            Object::new().with("type", "inet").with("data", data)
        }
    };
    ask(daemon, "nbd-server-start", Object::new().with("addr", address)).await?;
    if !all {
        return Ok(String::new());
    }
    let devices = ask(daemon, "query-block", Object::new()).await?;
    for device in show::objects(&devices) {
        let name = device.get("device").and_then(Value::as_str).unwrap_or_default();
        if device.get("inserted").is_none() || name.is_empty() {
            continue;
        }
        let request = Object::new().with("device", name).with("writable", writable);
        if let Err(error) = ask(daemon, "nbd-server-add", request).await {
            ask(daemon, "nbd-server-stop", Object::new()).await?;
            return Err(error);
        }
    }
    Ok(String::new())
}

/// `HOST:PORT`, `[HOST]:PORT`, `:PORT`
fn host_and_port(place: &str) -> CommandResult<(&str, &str)> {
    let (what, found) = if let Some(port) = place.strip_prefix(':') {
        ("port in address", Some(("", port)))
    } else if let Some(rest) = place.strip_prefix('[') {
        ("IPv6 address", rest.split_once("]:"))
    } else {
        ("address", place.split_once(':').filter(|(host, _)| !host.is_empty()))
    };
    let found = found.filter(|(_, port)| !port.is_empty());
    let (host, port) = found.ok_or_else(|| CommandError::new(format!("error parsing {what} '{place}'")))?;
    match port.contains(',') {
        true => Err(CommandError::new(format!("Options in the address '{place}' are not supported"))),
        false => Ok((host, port)),
    }
}

fn help(asked: &str) -> String {
    let (name, rest) = parse::word(asked);
    let (item, _) = parse::word(rest);
    match (name, item) {
        ("", _) => COMMANDS.iter().map(|line| line.describe("")).collect(),
        ("info", "") => INFO.iter().map(|line| line.describe("info ")).collect(),
        ("info", item) => match INFO.iter().find(|line| line.is(item)) {
            Some(line) => line.describe("info "),
            None => format!("unknown command: 'info {item}'\n"),
        },
        (name, _) => match COMMANDS.iter().find(|line| line.is(name)) {
            Some(line) => line.describe(""),
            None => format!("unknown command: '{name}'\n"),
        },
    }
}

async fn info(daemon: &Daemon, line: &str, rest: &str, history: &[Vec<u8>]) -> String {
    let (item, rest) = parse::word(rest);
    if item.is_empty() {
        return help("info");
    }
    let Some(found) = INFO.iter().find(|line| line.is(item)) else {
        return format!("unknown command: 'info {item}'\n");
    };
    let arguments = match read(found, line, rest) {
        Ok(arguments) => arguments,
        Err(text) => return text,
    };
    match told(daemon, found.name(), &Given(&arguments), history).await {
        Ok(text) => text,
        Err(error) => format!("Error: {}\n", error.in_full()),
    }
}

async fn told(daemon: &Daemon, item: &str, given: &Given<'_>, history: &[Vec<u8>]) -> CommandResult<String> {
    let asked = async |command| ask(daemon, command, Object::new()).await;
    let member = |answer: Value, name: &str| {
        let text = answer.as_object().and_then(|answer| answer.get(name)).and_then(Value::as_str);
        text.map_or_else(String::new, |text| format!("{text}\n"))
    };
    Ok(match item {
        "block" => {
            let (devices, nodes) = (asked("query-block").await?, asked("query-named-block-nodes").await?);
            show::block(&devices, &nodes, given.text("device"), given.flag("nodes"), given.flag("verbose"))
        }
        "block-jobs" => show::block_jobs(&asked("query-block-jobs").await?),
        "blockstats" => show::blockstats(&asked("query-blockstats").await?),
        "history" => history
            .iter()
            .enumerate()
            .map(|(number, line)| format!("{number}: '{}'\n", String::from_utf8_lossy(line)))
            .collect(),
        "name" => member(asked("query-name").await?, "name"),
        "named-block-nodes" => {
            let nodes = asked("query-named-block-nodes").await?;
            show::block(&Value::Null, &nodes, given.text("node"), true, given.flag("verbose"))
        }
        "snapshots" => show::snapshots(&asked("query-block").await?),
        "status" => show::status(&asked("query-status").await?),
        "uuid" => member(asked("query-uuid").await?, "UUID"),
        "version" => show::version(&asked("query-version").await?),
        other => return Err(CommandError::new(format!("'info {other}' has no handler"))),
    })
}
