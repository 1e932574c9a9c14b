//! The command line, in two goes as the reference has it: first all options are looked at by name, then their values
//! are read in their order. What they ask for is carried out later, kind by kind.

use underlay_graph::units::is_well_formed_id;
use underlay_qmp::json::{self, Object, Value};
use underlay_qmp::keyval;
use underlay_qmp::option_list::{self, OptionList};
use underlay_qmp::schema::{self, Input as Kind, ty};

use super::options::{self, Fate};
use super::{compat, help};
use crate::command::object;
use crate::device::given::Input;
use crate::device::model::{self, Model};
use crate::error::{CommandError, CommandResult};
use crate::storage_daemon::is_stdio;

/// Something that an option asks for, and the option as it was typed, for messages.
#[derive(Debug)]
pub struct Typed<T> {
    /// As it was typed.
    pub typed: String,
    /// What it asks for.
    pub value: T,
}

/// A disk of `-drive` and its like.
#[derive(Debug)]
pub struct DriveWords {
    /// Its options.
    pub options: Object,
    /// `if=` that is not said.
    pub default_bus: &'static str,
}

/// What a command line asks for.
#[derive(Debug, Default)]
pub struct Setting {
    /// `-name`
    pub name: Option<String>,
    /// `-uuid`
    pub uuid: String,
    /// `-machine`
    machine: String,
    /// Whether that is `q35` or its like.
    pub is_q35: bool,
    /// `-incoming`
    pub incoming: bool,
    /// `-S`
    pub paused: bool,
    /// `-daemonize`
    pub daemonize: bool,
    /// `-nographic` without another monitor: a monitor for people comes to the terminal.
    pub nographic: bool,
    /// `-nodefaults`
    pub no_defaults: bool,
    /// `-snapshot`
    pub snapshot: bool,
    /// `-pidfile`
    pub pid_file: Option<String>,
    /// `-object`
    pub objects: Vec<Typed<Object>>,
    /// `-chardev`, and those that monitors bring along.
    pub chardevs: Vec<Typed<OptionList>>,
    /// `-blockdev`
    pub blockdevs: Vec<Typed<Object>>,
    /// `-drive`, `-hda`, `-cdrom`
    pub drives: Vec<Typed<DriveWords>>,
    /// `-mon`, `-monitor`, `-qmp`
    pub monitors: Vec<Typed<Object>>,
    /// `-device`
    pub devices: Vec<Typed<(Object, Input)>>,
    /// `-nbd-server`
    pub nbd_servers: Vec<Typed<Object>>,
    /// `-export`
    pub exports: Vec<Typed<Object>>,
    /// To be told before anything else.
    pub remarks: Vec<String>,
    /// What is told of to be without effect, beside whole options.
    without_effect: Vec<String>,
    /// How many monitors have brought their own character device.
    compat_monitors: u32,
}

/// What a command line asks for.
#[derive(Debug)]
pub enum Asked {
    /// A text; `%s` stands for the program.
    Text(String),
    /// A machine.
    Run(Box<Setting>),
}

/// An option whose name is known.
struct Word<'a> {
    name: &'static str,
    value: &'a str,
    typed: String,
}

/// Reads a command line (without the program's name). Errors are whole messages but for the program's name.
pub fn parse(words: &[String]) -> Result<Asked, String> {
    let uuid = "00000000-0000-0000-0000-000000000000".to_owned();
    let mut setting = Setting { uuid, machine: "pc".to_owned(), ..Setting::default() };
    let mut without_effect: Vec<String> = Vec::new();
    let words = names(words)?;
    for word in &words {
        match options::find(word.name).map_or(Fate::Works, |(.., fate)| *fate) {
            Fate::Works => {}
            // The monitor that comes on a serial line is worth having without the line.
            Fate::NoEffect if word.name == "serial" && word.value.starts_with("mon:") => {
                let added = setting.compat_monitor(&word.typed, word.value, "readline", false);
                added.map_err(|error| format!("{}: {}", word.typed, error.in_full()))?;
                continue;
            }
            Fate::NoEffect if word.name == "global" && is_of_disks(word.value) => {
                return Err(format!("{}: not supported for devices of disks", word.typed));
            }
            Fate::NoEffect => {
                without_effect.push(format!("-{}", word.name));
                continue;
            }
            Fate::Refused => return Err(format!("{}: not supported", word.typed)),
        }
        let text = setting.take(word).map_err(|error| format!("{}: {}", word.typed, error.in_full()))?;
        if let Some(text) = text {
            return Ok(Asked::Text(text));
        }
    }
    setting.is_q35 = options::machine(&setting.machine).ok_or_else(|| {
        let kind = &setting.machine;
        format!("unsupported machine type: \"{kind}\"\nUse -machine help to list supported machines")
    })?;
    let mut names: Vec<String> = Vec::new();
    for name in without_effect.into_iter().chain(std::mem::take(&mut setting.without_effect)) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    if !names.is_empty() {
        let text = format!("warning: without effect, as there is no CPU here: {}", names.join(", "));
        setting.remarks.insert(0, text);
    }
    if setting.nographic && !setting.no_defaults && setting.monitors.is_empty() {
        setting.compat_monitor("-nographic", "stdio", "readline", false).map_err(|error| error.in_full())?;
    }
    let stdio = |chardev: &&Typed<OptionList>| is_stdio(&chardev.value);
    match setting.chardevs.iter().find(stdio).filter(|_| setting.daemonize) {
        Some(chardev) => Err(format!("{}: cannot use stdio with -daemonize", chardev.typed)),
        None => Ok(Asked::Run(Box::new(setting))),
    }
}

/// Finds the options. A word that is none is a disk.
fn names(words: &[String]) -> Result<Vec<Word<'_>>, String> {
    let mut found = Vec::new();
    let mut words = words.iter();
    while let Some(typed) = words.next() {
        let Some(name) = typed.strip_prefix('-').filter(|name| !name.is_empty()) else {
            found.push(Word { name: "hda", value: typed, typed: typed.clone() });
            continue;
        };
        let name = name.strip_prefix('-').unwrap_or(name);
        let name = if name == "?" { "help" } else { name };
        let (name, has_value, _) = options::find(name).ok_or_else(|| format!("{typed}: invalid option"))?;
        found.push(match has_value {
            false => Word { name, value: "", typed: typed.clone() },
            true => {
                let value = words.next().ok_or_else(|| format!("{typed}: requires an argument"))?;
                Word { name, value, typed: format!("{typed} {value}") }
            }
        });
    }
    Ok(found)
}

impl Setting {
    /// Takes an option in. A text ends it.
    fn take(&mut self, word: &Word<'_>) -> CommandResult<Option<String>> {
        let (typed, value) = (word.typed.clone(), word.value);
        match word.name {
            "help" | "h" => return Ok(Some(help::HELP.to_owned())),
            "version" => return Ok(Some(help::version())),
            "machine" | "M" => return self.machine(value),
            "device" => return self.device(typed, value),
            "chardev" if matches!(value, "help" | "?") => {
                return Ok(Some(crate::chardev::HELP.to_owned()));
            }
            "chardev" => {
                let list = option_list::parse_knowing(value, Some("backend"), &["nodelay"]);
                self.chardevs.push(Typed { typed, value: list });
            }
            "blockdev" => {
                let value = checked(value, Some("driver"), schema::blockdev_options())?;
                self.blockdevs.push(Typed { typed, value });
            }
            "object" => self.objects.push(Typed { typed, value: crate::args::object(value)? }),
            "nbd-server" => {
                let value = checked(value, None, schema::nbd_server_options())?;
                self.nbd_servers.push(Typed { typed, value });
            }
            "export" => {
                let value = checked(value, Some("type"), schema::block_export_options())?;
                self.exports.push(Typed { typed, value });
            }
            "drive" => self.drive(typed, value)?,
            "hda" | "hdb" | "hdc" | "hdd" => {
                let index = ["hda", "hdb", "hdc", "hdd"].iter().position(|name| *name == word.name);
                let index = index.unwrap_or(0).to_string();
                let options = Object::new().with("media", "disk").with("index", index).with("file", value);
                self.drives.push(Typed { typed, value: DriveWords { options, default_bus: "ide" } });
            }
            "cdrom" => {
                let options = Object::new().with("media", "cdrom").with("index", "2").with("file", value);
                self.drives.push(Typed { typed, value: DriveWords { options, default_bus: "ide" } });
            }
            "mon" => {
                let list = self.list(&typed, value, Some("chardev"));
                let known = ["id", "mode", "pretty", "chardev"];
                if let Some((name, _)) = list.iter().find(|(name, _)| !known.contains(name)) {
                    return Err(CommandError::new(format!("Invalid parameter '{name}'")));
                }
                let value = schema::check(list, schema::monitor_options(), Kind::Words).map_err(text)?;
                self.monitors.push(Typed { typed, value });
            }
            "qmp" => self.compat_monitor(&typed, value, "control", false)?,
            "qmp-pretty" => self.compat_monitor(&typed, value, "control", true)?,
            "monitor" if matches!(value, "none" | "vc" | "null") => {}
            "monitor" => self.compat_monitor(&typed, value, "readline", false)?,
            "name" => {
                let list = self.list(&typed, value, Some("guest"));
                let known = ["guest", "process", "debug-threads"];
                if let Some((name, _)) = list.iter().find(|(name, _)| !known.contains(name)) {
                    return Err(CommandError::new(format!("Invalid parameter '{name}'")));
                }
                self.name = list.get("guest").and_then(Value::as_str).map(str::to_owned);
            }
            "uuid" => self.uuid = uuid(value)?,
            "incoming" => self.incoming(&typed, value)?,
            "display" => display(value)?,
            "S" => self.paused = true,
            "daemonize" => self.daemonize = true,
            "nographic" => self.nographic = true,
            "nodefaults" => self.no_defaults = true,
            "snapshot" => self.snapshot = true,
            "pidfile" => self.pid_file = Some(value.to_owned()),
            // There is no configuration to read.
            _ => {}
        }
        Ok(None)
    }

    /// Options in a list of words, and what is to be told of them.
    fn list(&mut self, typed: &str, value: &str, implied: Option<&str>) -> Object {
        let list = option_list::parse(value, implied);
        self.remarks.extend(list.warnings.iter().map(|warning| format!("{typed}: {warning}")));
        list.options
    }

    fn machine(&mut self, value: &str) -> CommandResult<Option<String>> {
        let list = keyval::parse(value, Some("type"));
        if list == Err(keyval::KeyvalError::NoHelp) {
            return Ok(Some(options::MACHINES.to_owned()));
        }
        let list = list.map_err(text)?;
        if let Some(kind) = list.get("type").and_then(Value::as_str) {
            self.machine = kind.to_owned();
        }
        let others = list.iter().filter(|(name, _)| *name != "type");
        self.without_effect.extend(others.map(|(name, _)| format!("-machine {name}")));
        Ok(None)
    }

    fn device(&mut self, typed: String, value: &str) -> CommandResult<Option<String>> {
        if value.starts_with('{') {
            let object = match json::parse(value.as_bytes()).map_err(text)? {
                Value::Object(object) => object,
                _ => return Err(CommandError::new("JSON object expected")),
            };
            self.devices.push(Typed { typed, value: (object, Input::Json) });
            return Ok(None);
        }
        let words: Vec<_> = value.split(',').collect();
        if matches!(words.first(), Some(&("help" | "?"))) {
            return Ok(Some(model::help()));
        }
        let options = self.list(&typed, value, Some("driver"));
        if words.iter().any(|word| matches!(*word, "help" | "?"))
            && let Some(model) = options.get("driver").and_then(Value::as_str).and_then(Model::find)
        {
            return Ok(Some(model.help()));
        }
        if options.get("id").and_then(Value::as_str).is_some_and(|id| !is_well_formed_id(id)) {
            return Err(object::bad_id());
        }
        self.devices.push(Typed { typed, value: (options, Input::Words) });
        Ok(None)
    }

    fn drive(&mut self, typed: String, value: &str) -> CommandResult<()> {
        let options = self.list(&typed, value, None);
        if let Some(id) = options.get("id").and_then(Value::as_str) {
            if !is_well_formed_id(id) {
                return Err(object::bad_id());
            }
            let has_it =
                |drive: &Typed<DriveWords>| drive.value.options.get("id").and_then(Value::as_str) == Some(id);
            if self.drives.iter().any(has_it) {
                return Err(CommandError::new(format!("Duplicate ID '{id}' for drive")));
            }
        }
        self.drives.push(Typed { typed, value: DriveWords { options, default_bus: "ide" } });
        Ok(())
    }

    /// A monitor with a character device of its own, in the old short form, or on one that is there.
    fn compat_monitor(&mut self, typed: &str, value: &str, mode: &str, pretty: bool) -> CommandResult<()> {
        let chardev = match value.strip_prefix("chardev:") {
            Some(chardev) => chardev.to_owned(),
            None => {
                let id = format!("compat_monitor{}", self.compat_monitors);
                self.compat_monitors += 1;
                let mut list = compat::parse(value)?;
                list.options.insert("id", id.as_str());
                self.chardevs.push(Typed { typed: typed.to_owned(), value: list });
                id
            }
        };
        let options = Object::new().with("chardev", chardev).with("mode", mode).with("pretty", pretty);
        self.monitors.push(Typed { typed: typed.to_owned(), value: options });
        Ok(())
    }

    fn incoming(&mut self, typed: &str, value: &str) -> CommandResult<()> {
        let ways = ["tcp", "unix", "fd", "file", "exec", "rdma", "vsock"];
        let is_known = value.split_once(':').is_some_and(|(way, _)| ways.contains(&way));
        if value == "defer" {
        } else if is_known {
            self.remarks.push(format!(
                "{typed}: warning: nobody listens there, as there is no memory to be received; `cont` ends the waiting"
            ));
        } else {
            let text = format!("Parameter 'channel-type' does not accept value '{value}'");
            return Err(CommandError::new(text));
        }
        self.incoming = true;
        Ok(())
    }
}

/// Whether `-global` is about a model with a disk, whose properties count.
fn is_of_disks(value: &str) -> bool {
    let list = option_list::parse(value, None).options;
    let named = list.get("driver").and_then(Value::as_str);
    let model = named.or_else(|| value.split('.').next()).and_then(Model::find);
    model.is_some_and(|model| model.properties().is_some())
}

fn text(error: impl std::fmt::Display) -> CommandError {
    CommandError::new(error.to_string())
}

fn checked(value: &str, implied: Option<&str>, by: &ty::Object) -> CommandResult<Object> {
    crate::args::checked(value, implied, by)
}

/// Displays are known by name and have no effect.
fn display(value: &str) -> CommandResult<()> {
    let kinds = ["none", "gtk", "sdl", "curses", "egl-headless", "dbus", "spice-app"];
    let kind = value.split(',').next().unwrap_or_default();
    if let ("none", Some((_, options))) = (kind, value.split_once(',')) {
        let name = options.split('=').next().unwrap_or_default();
        return Err(CommandError::new(format!("Parameter '{name}' is unexpected")));
    }
    match kinds.contains(&kind) || kind.starts_with("vnc=") {
        true => Ok(()),
        false => Err(CommandError::new(format!("Parameter 'type' does not accept value '{kind}'"))),
    }
}

fn uuid(value: &str) -> CommandResult<String> {
    let lengths: Vec<_> = value.split('-').map(str::len).collect();
    let is_hex = value.bytes().all(|byte| byte == b'-' || byte.is_ascii_hexdigit());
    match lengths == [8, 4, 4, 4, 12] && is_hex {
        true => Ok(value.to_ascii_lowercase()),
        false => Err(CommandError::new("failed to parse UUID string: wrong format")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complaint(words: &str) -> String {
        let words: Vec<String> = words.split(' ').map(str::to_owned).collect();
        match parse(&words) {
            Err(error) => error,
            Ok(Asked::Text(text)) => text.lines().next().unwrap_or_default().to_owned(),
            Ok(Asked::Run(_)) => String::new(),
        }
    }

    /// The texts are those of the reference.
    #[test]
    fn complains_as_the_reference() {
        for (words, text) in [
            ("-foo", "-foo: invalid option"),
            ("--bar=1", "--bar=1: invalid option"),
            ("-blockdev nope -foo", "-foo: invalid option"),
            ("-device", "-device: requires an argument"),
            ("-blockdev nope", "-blockdev nope: Parameter 'driver' does not accept value 'nope'"),
            ("-display foo", "-display foo: Parameter 'type' does not accept value 'foo'"),
            ("-qmp none", "-qmp none: 'none' is not a valid char driver\nparse error: none"),
            ("-mon foo,mode=x", "-mon foo,mode=x: Parameter 'mode' does not accept value 'x'"),
            ("-mon foo,foo=x", "-mon foo,foo=x: Invalid parameter 'foo'"),
            ("-mon mode=control", "-mon mode=control: Parameter 'chardev' is missing"),
            ("-name a,b=c", "-name a,b=c: Invalid parameter 'b'"),
            ("-uuid x", "-uuid x: failed to parse UUID string: wrong format"),
            ("-incoming foo", "-incoming foo: Parameter 'channel-type' does not accept value 'foo'"),
            ("-drive if=none,id=a -drive if=none,id=a", "-drive if=none,id=a: Duplicate ID 'a' for drive"),
            ("-daemonize -qmp stdio", "-qmp stdio: cannot use stdio with -daemonize"),
            ("-device virtio-blk,help", "virtio-blk-pci options:"),
            ("-machine help", "Supported machines are:"),
            ("-m 64 -M q35 -cpu host -nographic -nodefaults", ""),
            ("-global PIIX4_PM.disable_s3=1 -global driver=cfi.pflash01,property=secure,value=on", ""),
            (
                "-global virtio-blk-pci.share-rw=on",
                "-global virtio-blk-pci.share-rw=on: not supported for devices of disks",
            ),
            ("-daemonize -serial mon:stdio", "-serial mon:stdio: cannot use stdio with -daemonize"),
        ] {
            assert_eq!(complaint(words), text, "{words}");
        }
    }

    #[test]
    fn what_has_no_effect_is_told_once() {
        let words = ["-m", "512", "-smp", "2", "-m", "1G", "-S", "-M", "q35,accel=tcg"].map(str::to_owned);
        let Ok(Asked::Run(setting)) = parse(&words) else { panic!("a machine") };
        assert!(setting.paused);
        assert_eq!(
            setting.remarks,
            ["warning: without effect, as there is no CPU here: -m, -smp, -machine accel"]
        );
    }
}
