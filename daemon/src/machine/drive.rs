//! `-drive`, `-hda`, `-cdrom`: disks with names, most of them in devices that come along.

use underlay_disk::{Modes, Request, Source, guessed_raw, temporary};
use underlay_drivers::protocol::file::Aio;
use underlay_drivers::throttle::Limits;
use underlay_drivers::{BackingPolicy, NodeSpec};
use underlay_graph::Plan;
use underlay_graph::plan::{DetectZeroes, NewNode};
use underlay_jobs::OnError;
use underlay_qmp::json::{Object, Value};

use super::Machine;
use super::args::{DriveWords, Typed};
use super::intervals;
use crate::device::guest::{Policies, on_error};
use crate::device::{BackendId, plug};
use crate::error::{CommandError, CommandResult};
use crate::number;
use crate::state::Daemon;

/// Where the device of a disk goes that comes along with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// There is none: a `-device` takes the disk. They are counted all the same.
    None(u32),
    /// A virtio device.
    Virtio(u32),
    /// An IDE drive: its bus and its place there.
    Ide {
        /// The bus.
        bus: u32,
        /// The place on it.
        unit: u32,
        /// It takes CDs.
        cd: bool,
    },
}

/// A disk that was opened.
#[derive(Debug)]
pub struct Drive {
    /// Its name.
    pub name: String,
    /// Where its device goes.
    pub place: Place,
}

/// Options that are taken out one by one.
struct Words(Object);

impl Words {
    fn text(&mut self, name: &str) -> Option<String> {
        match self.0.remove(name) {
            Some(Value::Str(text)) => Some(text),
            _ => None,
        }
    }

    fn flag(&mut self, name: &str) -> CommandResult<Option<bool>> {
        match self.text(name).as_deref() {
            None => Ok(None),
            Some("on" | "yes" | "true" | "y") => Ok(Some(true)),
            Some("off" | "no" | "false" | "n") => Ok(Some(false)),
            Some(_) => Err(CommandError::new(format!("Parameter '{name}' expects 'on' or 'off'"))),
        }
    }

    fn number(&mut self, name: &str) -> CommandResult<Option<u32>> {
        let Some(text) = self.text(name) else { return Ok(None) };
        let wrong = || CommandError::new(format!("Parameter '{name}' expects a number"));
        text.parse().map(Some).map_err(|_| wrong())
    }
}

/// Opens the disk of an option. `others` are those that have been opened before.
pub async fn open(
    daemon: &Daemon,
    machine: &Machine,
    snapshot: bool,
    given: Typed<DriveWords>,
    others: &[Drive],
    remark: &(dyn Fn(&str) + Sync),
) -> CommandResult<Drive> {
    let DriveWords { options, default_bus } = given.value;
    let mut words = Words(options);
    let media = words.text("media");
    let is_cd = match media.as_deref() {
        None | Some("disk") => false,
        Some("cdrom") => true,
        Some(other) => return Err(CommandError::new(format!("'{other}' invalid media"))),
    };
    let bus = words.text("if").unwrap_or_else(|| default_bus.to_owned());
    let (place, automatic) = place(machine, &bus, is_cd, &mut words, others)?;
    let name = words.text("id").unwrap_or(automatic);
    if machine.devices.named(&name).is_some() {
        return Err(CommandError::new(format!("Device with id '{name}' already exists")));
    }
    crate::command::machine::check_backend_name(&daemon.graph.plan(), &name)?;
    let accounts = (words.flag("stats-account-failed")?, words.flag("stats-account-invalid")?);
    let intervals = intervals::seconds(intervals::take(&mut words.0))?;
    let policies = policies(&mut words)?;
    let limits = limits(&mut words)?;
    let group = words.text("throttling.group");
    let mut snapshot = snapshot;
    if let Some(flag) = words.flag("snapshot")? {
        snapshot = flag;
    }
    if words.0.get("readonly").is_some() && words.0.get("read-only").is_some() {
        let text = "'read-only' and its alias 'readonly' can't be used at the same time";
        return Err(CommandError::new(text));
    }
    if let Some(value) = words.0.remove("readonly") {
        words.0.insert("read-only", value);
    }
    let read_only = words.flag("read-only")?.unwrap_or(is_cd);
    let modes = modes(&mut words)?;
    let backend = machine.new_backend(daemon, &name);
    let opened = fill(daemon, machine, backend, words, Wanted { modes, read_only, snapshot }, remark).await;
    if let Err(error) = opened {
        machine.devices.remove_backend(backend);
        return Err(error);
    }
    machine.devices.edit(backend, |backend| {
        let stats = backend.io.stats();
        stats.account(accounts.0, accounts.1);
        intervals.into_iter().for_each(|seconds| stats.add_interval(seconds));
        (backend.modes, backend.read_only, backend.writethrough) = (modes, read_only, modes.writethrough);
        backend.io.set_policies(policies);
        backend.io.set_copy_on_read(modes.copy_on_read && !read_only);
        if !limits.is_none() {
            let group = machine.devices.group(&daemon.groups, group.as_deref().unwrap_or(&name));
            group.set_limits(limits);
            backend.io.set_group(Some(group));
        }
    });
    Ok(Drive { name, place })
}

/// Where a disk goes, and what it is called if nobody says.
fn place(
    machine: &Machine,
    bus: &str,
    is_cd: bool,
    words: &mut Words,
    others: &[Drive],
) -> CommandResult<(Place, String)> {
    let (index, bus_number, unit) = (words.number("index")?, words.number("bus")?, words.number("unit")?);
    if index.is_some() && (bus_number.is_some() || unit.is_some()) {
        return Err(CommandError::new("index cannot be used with bus and unit"));
    }
    let units = units_per_bus(machine, bus)?;
    if let Some(unit) = unit.filter(|unit| units > 0 && *unit >= units) {
        let most = units - 1;
        return Err(CommandError::new(format!("unit {unit} too big (max is {most})")));
    }
    let at = |index: u32| match units {
        0 => (0, index),
        units => (index / units, index % units),
    };
    let is_free = |place: Place| !others.iter().any(|other| is_same_place(place, other.place));
    let called = |(number, unit): (u32, u32)| {
        let kind = if is_cd { "cd" } else { "hd" };
        match bus {
            "ide" => (Place::Ide { bus: number, unit, cd: is_cd }, format!("ide{number}-{kind}{unit}")),
            "virtio" => (Place::Virtio(unit), format!("virtio{unit}")),
            _ => (Place::None(unit), format!("none{unit}")),
        }
    };
    let (number, unit) = match (index, bus_number, unit) {
        (Some(index), ..) => at(index),
        (None, number, Some(unit)) => (number.unwrap_or(0), unit),
        // The first one that is free.
        (None, number, None) => (0..)
            .map(|index| if number.is_some() { (number.unwrap_or(0), index) } else { at(index) })
            .find(|at| is_free(called(*at).0))
            .unwrap_or((0, 0)),
    };
    let (place, name) = called((number, unit));
    if !is_free(place) {
        let index = u64::from(number) * u64::from(units.max(1)) + u64::from(unit);
        let text = format!("drive with bus={number}, unit={unit} (index={index}) exists");
        return Err(CommandError::new(text));
    }
    let has_bus = matches!(bus, "none" | "virtio")
        || bus == "ide" && (number as usize) < machine.own_buses(crate::device::model::Bus::Ide).len();
    match has_bus && (units == 0 || unit < units) {
        true => Ok((place, name)),
        false => {
            let text = format!("machine type does not support if={bus},bus={number},unit={unit}");
            Err(CommandError::new(text))
        }
    }
}

/// How many units a bus of this kind has; 0: there are no buses, only units.
fn units_per_bus(machine: &Machine, bus: &str) -> CommandResult<u32> {
    match bus {
        "ide" if machine.has_one_unit_per_ide_bus() => Ok(1),
        "ide" => Ok(2),
        "none" | "virtio" | "scsi" | "sd" | "mtd" | "xen" => Ok(0),
        "floppy" | "pflash" => {
            Err(CommandError::new(format!("if={bus} is not supported: nothing would ever read it")))
        }
        other => Err(CommandError::new(format!("unsupported bus type '{other}'"))),
    }
}

/// Whether two disks cannot be at these places: a CD drive takes the place of a disk.
fn is_same_place(one: Place, other: Place) -> bool {
    match (one, other) {
        (Place::Ide { bus, unit, .. }, Place::Ide { bus: other_bus, unit: other_unit, .. }) => {
            (bus, unit) == (other_bus, other_unit)
        }
        _ => one == other,
    }
}

fn policies(words: &mut Words) -> CommandResult<Policies> {
    let mut policies = Policies::default();
    if let Some(word) = words.text("werror") {
        let invalid = || CommandError::new(format!("'{word}' invalid write error action"));
        policies.write = on_error(&word).ok_or_else(invalid)?;
    }
    if let Some(word) = words.text("rerror") {
        let invalid = || CommandError::new(format!("'{word}' invalid read error action"));
        policies.read = on_error(&word).filter(|policy| *policy != OnError::Enospc).ok_or_else(invalid)?;
    }
    Ok(policies)
}

/// `throttling.LIMIT`, and the short names of old.
fn limits(words: &mut Words) -> CommandResult<Limits> {
    let mut limits = Limits::default();
    let old = |name: &str| {
        let (rate, rest) = name.split_once('-')?;
        let (direction, rest) =
            rest.split_once('-').map_or((rest, ""), |(direction, rest)| (direction, rest));
        let direction = match direction {
            "total" => "",
            "read" => "_rd",
            "write" => "_wr",
            _ => return (name == "iops-size").then(|| "iops_size".to_owned()),
        };
        let rest = if rest.is_empty() { String::new() } else { format!("_{}", rest.replace('-', "_")) };
        Some(format!("{rate}{direction}{rest}"))
    };
    for name in Limits::names() {
        let long = format!("throttling.{name}");
        let given = words.text(&long).or_else(|| words.text(&old(&name)?));
        let Some(given) = given else { continue };
        let value = number::of_option(&long, &given)?;
        if let Some(number) = limits.number_mut(&name) {
            *number = value;
        }
    }
    limits.check().map_err(|error| CommandError::new(error.to_string()))?;
    Ok(limits)
}

fn modes(words: &mut Words) -> CommandResult<Modes> {
    let mut modes = Modes::default();
    let take = |words: &mut Words, name: &str, set: &mut dyn FnMut(&str) -> bool| match words.text(name) {
        Some(word) if !set(&word) => Err(word),
        _ => Ok(()),
    };
    take(words, "cache", &mut |word| modes.set_cache(word))
        .map_err(|_| CommandError::new("invalid cache option"))?;
    for (name, flag) in [("cache.direct", 0), ("cache.no-flush", 1), ("cache.writeback", 2)] {
        if let Some(on) = words.flag(name)? {
            match flag {
                0 => modes.direct = on,
                1 => modes.no_flush = on,
                _ => modes.writethrough = !on,
            }
        }
    }
    take(words, "aio", &mut |word| modes.set_aio(word))
        .map_err(|_| CommandError::new("invalid aio option"))?;
    if modes.aio == Some(Aio::Native) && !modes.direct {
        let text = "aio=native was specified, but it requires cache.direct=on, which was not specified.";
        return Err(CommandError::new(text));
    }
    take(words, "discard", &mut |word| modes.set_discard(word))
        .map_err(|_| CommandError::new("Invalid discard option"))?;
    take(words, "detect-zeroes", &mut |word| modes.set_detect_zeroes(word)).map_err(|word| {
        CommandError::new(format!("Parameter 'detect-zeroes' does not accept value '{word}'"))
    })?;
    modes.copy_on_read = words.flag("copy-on-read")?.unwrap_or(false);
    Ok(modes)
}

/// How a disk is to be opened.
struct Wanted {
    modes: Modes,
    read_only: bool,
    snapshot: bool,
}

/// Opens what the other options say and puts it into a backend; without any it stays empty.
async fn fill(
    daemon: &Daemon,
    machine: &Machine,
    backend: BackendId,
    mut words: Words,
    wanted: Wanted,
    remark: &(dyn Fn(&str) + Sync),
) -> CommandResult<()> {
    let file = words.text("file").filter(|file| !file.is_empty());
    let mut format = words.text("format");
    if file.is_none() && format.is_none() && words.0.is_empty() {
        return Ok(());
    }
    let Wanted { modes, read_only, snapshot } = wanted;
    let is_probed = file.is_some() && format.is_none() && words.0.get("driver").is_none();
    // Which options there are depends on the format.
    let mut found = format.clone();
    if let Some(file) = file.as_deref().filter(|_| is_probed && !words.0.is_empty()) {
        found = Some(format_of(daemon, file).await?);
        // A guest may not make something else of an image that looked like none.
        format = found.clone().filter(|format| format != "raw");
    }
    if let Some((option, _)) = words.0.iter().find(|(name, _)| name.starts_with("throttling.")) {
        let format = found.unwrap_or_default();
        let text = format!("Block format '{format}' does not support the option '{option}'");
        return Err(CommandError::new(text));
    }
    let source = match &file {
        Some(file) => Source::Name(file.clone()),
        None => {
            let mut options = std::mem::take(&mut words.0);
            if let Some(format) = &format {
                options.insert("driver", format.as_str());
            }
            Source::Options(options)
        }
    };
    let mut request = Request::named("");
    (request.source, request.options) = (source, words.0);
    request.format = format.filter(|_| file.is_some());
    request.read_only = read_only || snapshot;
    // Discards need not be passed on for zeroes to be found.
    request.modes = Modes { detect_zeroes: DetectZeroes::Off, ..modes };
    let mut spec = request.spec().map_err(CommandError::told)?;
    if spec.detect_zeroes == DetectZeroes::Off {
        spec.detect_zeroes = modes.detect_zeroes;
    }
    if let Some(name) = spec.node_name.as_deref().filter(|name| machine.devices.named(name).is_some()) {
        return Err(CommandError::new(format!("node-name={name} is conflicting with a device id")));
    }
    let mut new = daemon.opener(BackingPolicy::Follow).open(spec).await?;
    if is_probed && new.node.driver() == "raw" && !read_only {
        remark(&guessed_raw(file.as_deref().unwrap_or_default()));
    }
    if snapshot {
        let opener = daemon.opener(BackingPolicy::Ignore);
        new = temporary::above(&daemon.graph, &opener, new, modes).await?;
    }
    put_in(daemon, machine, backend, new).await
}

/// The format of an image that nobody has told.
async fn format_of(daemon: &Daemon, file: &str) -> CommandResult<String> {
    let mut spec = NodeSpec::image(file, None)?;
    (spec.read_only, spec.force_share) = (Some(true), Some(true));
    let image = daemon.opener(BackingPolicy::Ignore).open(spec).await?;
    Ok(image.node.driver().to_owned())
}

async fn put_in(daemon: &Daemon, machine: &Machine, id: BackendId, new: NewNode) -> CommandResult<()> {
    let Some(backend) = machine.devices.backend(id) else { return Ok(()) };
    let edit = |plan: &mut Plan| {
        let node = plan.add(new)?;
        plug::put_in(&backend, plan, node)
    };
    let medium = daemon.graph.change(edit).await?;
    machine.devices.edit(id, |backend| backend.medium = Some(medium));
    Ok(())
}
