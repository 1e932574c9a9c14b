//! `info`: what an image is.

use underlay_drivers::filename;
use underlay_drivers::names::resolve_backing;
use underlay_graph::plan::Wires;
use underlay_graph::{FormatInfo, InfoValue, Kind, NodeId, Role};
use underlay_qmp::json::{Object, Value};
use underlay_sys::{say, say_part};

use crate::getopt::Known;
use crate::help::Help;
use crate::open::{How, image};
use crate::sizes::human;
use crate::{Failure, Outcome};

const KNOWN: Known = Known {
    short: "f:hbU",
    long: &[
        ("help", "h", false),
        ("format", "f", true),
        ("output", "output", true),
        ("backing-chain", "b", false),
        ("object", "object", true),
        ("image-opts", "image-opts", false),
        ("force-share", "U", false),
    ],
};

/// See [`Help`].
pub const HELP: Help = Help {
    command: "info",
    usage: "Usage: qemu-img info [-f FMT] [--output=human|json] [--backing-chain] [-U] FILENAME",
    known: KNOWN,
};

pub async fn run(words: &[String]) -> Outcome {
    let (options, others) = crate::options("info", KNOWN, words)?;
    let (mut format, mut json, mut chain, mut force_share) = (None, false, false, false);
    let mut image_opts = false;
    for (name, value) in options {
        match name.as_str() {
            "f" => format = Some(value),
            "output" => json = is_json(&value, "info")?,
            "b" => chain = true,
            "U" => force_share = true,
            "image-opts" => image_opts = true,
            "h" => return HELP.print(),
            other => return Err(crate::unsupported(other)),
        }
    }
    let [name] = others.as_slice() else {
        return Err(Failure::usage("Expecting one image file name", "info"));
    };
    let mut infos = Vec::new();
    let mut next = Some((name.clone(), format, image_opts));
    let mut seen = std::collections::HashSet::new();
    while let Some((given, format, image_opts)) = next.take() {
        if !seen.insert(std::fs::canonicalize(&given).unwrap_or_else(|_| given.clone().into())) {
            return Err(Failure::new(format!("Backing file '{given}' creates an infinite loop.")));
        }
        let how =
            How { format: format.as_deref(), image_opts, force_share, no_backing: true, ..How::default() };
        let opened = image(&given, how).await?;
        let info = Info::of(&opened.wires(), opened.node());
        if chain && let Some(backing) = &info.backing {
            next = Some((backing.full.clone(), backing.format.clone(), false));
        }
        infos.push(info);
        opened.close().await?;
    }
    if json {
        let mut values: Vec<_> = infos.iter().map(|info| Value::Object(info.json())).collect();
        let value = if chain { Value::List(values) } else { values.remove(0) };
        say!("{}", value.to_pretty());
    } else {
        let texts: Vec<_> = infos.iter().map(Info::human).collect();
        say_part!("{}", texts.join("\n"));
    }
    Ok(())
}

/// `--output`
pub fn is_json(value: &str, command: &'static str) -> Result<bool, Failure> {
    match value {
        "json" => Ok(true),
        "human" => Ok(false),
        other => Err(Failure::usage(format!("--output expects 'human' or 'json' not '{other}'"), command)),
    }
}

struct Backing {
    name: String,
    full: String,
    format: Option<String>,
}

/// What is told about one image and, below it, about its file.
struct Info {
    filename: String,
    driver: &'static str,
    is_protocol: bool,
    length: u64,
    allocated: Option<u64>,
    image: underlay_graph::info::ImageInfo,
    dirty: Option<bool>,
    backing: Option<Backing>,
    children: Vec<(&'static str, Info)>,
}

impl Info {
    fn of(wires: &Wires, id: NodeId) -> Self {
        let view = wires.view(id);
        let node = view.node();
        let image = filename::of_file(&view).unwrap_or_else(|| filename::of(&view));
        let backing = node.backing_ref().map(|backing| Backing {
            full: resolve_backing(&image, &backing.file),
            name: backing.file,
            format: backing.format,
        });
        let children = view.children().iter().filter(|(role, _)| *role == Role::File);
        let children: Vec<_> =
            children.map(|(role, child)| (role.as_str(), Self::of(wires, child.id()))).collect();
        let below = children.iter().find_map(|(_, child)| child.allocated);
        let own = (node.kind() == Kind::Protocol).then(|| node.allocated_size()).flatten();
        Self {
            filename: filename::of_alone(&view),
            driver: node.driver(),
            is_protocol: node.kind() == Kind::Protocol,
            length: view.cx().length().next_multiple_of(512),
            allocated: own.or(below),
            image: node.image_info(),
            dirty: underlay_graph::info::dirty_flag(&view),
            backing,
            children,
        }
    }

    fn human(&self) -> String {
        let mut text = String::new();
        self.lines("", &mut |line| text.push_str(&(line + "\n")));
        text
    }

    /// All lines; `path` leads to this node.
    fn lines(&self, path: &str, line: &mut dyn FnMut(String)) {
        line(format!("image: {}", self.filename));
        line(format!("file format: {}", self.driver));
        line(format!("virtual size: {} ({} bytes)", human(self.length), self.length));
        line(format!("disk size: {}", self.allocated.map_or("unavailable".to_owned(), human)));
        if self.image.encrypted {
            line("encrypted: yes".to_owned());
        }
        if let Some(size) = self.image.cluster_size {
            line(format!("cluster_size: {size}"));
        }
        if self.dirty == Some(true) {
            line("cleanly shut down: no".to_owned());
        }
        if let Some(backing) = &self.backing {
            let actual = match backing.full == backing.name {
                true => String::new(),
                false => format!(" (actual path: {})", backing.full),
            };
            line(format!("backing file: {}{actual}", backing.name));
            if let Some(format) = &backing.format {
                line(format!("backing file format: {format}"));
            }
        }
        if !self.image.snapshots.is_empty() {
            line("Snapshot list:".to_owned());
            crate::snapshot_list::lines(&self.image.snapshots).into_iter().for_each(&mut *line);
        }
        if let Some(specific) = &self.image.format_specific
            && !specific.fields.is_empty()
        {
            line("Format specific information:".to_owned());
            format_lines(specific, &mut |text| line(text));
        }
        for (role, child) in &self.children {
            let path = format!("{path}/{role}");
            line(format!("Child node '{path}':"));
            let mut inner = |text: String| line(format!("    {text}"));
            if child.is_protocol {
                child.protocol_lines(&mut inner);
            } else {
                child.lines(&path, &mut inner);
            }
        }
    }

    fn protocol_lines(&self, line: &mut dyn FnMut(String)) {
        line(format!("filename: {}", self.filename));
        line(format!("protocol type: {}", self.driver));
        line(format!("file length: {} ({} bytes)", human(self.length), self.length));
        line(format!("disk size: {}", self.allocated.map_or("unavailable".to_owned(), human)));
    }

    fn json(&self) -> Object {
        let mut object = Object::new()
            .with("filename", self.filename.as_str())
            .with("format", self.driver)
            .with("virtual-size", self.length);
        if !self.image.snapshots.is_empty() {
            let snapshots = self.image.snapshots.iter().map(underlay_drivers::info::snapshot);
            object.insert("snapshots", snapshots.collect::<Vec<_>>());
        }
        if let Some(dirty) = self.dirty {
            object.insert("dirty-flag", dirty);
        }
        if let Some(size) = self.allocated {
            object.insert("actual-size", size);
        }
        if let Some(size) = self.image.cluster_size {
            object.insert("cluster-size", size);
        }
        if let Some(backing) = &self.backing {
            object.insert("full-backing-filename", backing.full.as_str());
            object.insert("backing-filename", backing.name.as_str());
            if let Some(format) = &backing.format {
                object.insert("backing-filename-format", format.as_str());
            }
        }
        if let Some(specific) = &self.image.format_specific {
            let mut data = Object::new();
            specific.fields.iter().for_each(|(name, value)| data.insert(name, json_value(value)));
            object.insert("format-specific", Object::new().with("type", specific.kind).with("data", data));
        }
        let child = |(role, child): &(&str, Info)| {
            Value::Object(Object::new().with("name", *role).with("info", child.json()))
        };
        object.with("children", self.children.iter().map(child).collect::<Vec<_>>())
    }
}

fn json_value(value: &InfoValue) -> Value {
    match value {
        InfoValue::Bool(flag) => Value::Bool(*flag),
        InfoValue::Int(number) => Value::Int(*number),
        InfoValue::Text(text) => Value::Str(text.clone()),
        InfoValue::List(values) => Value::List(values.iter().map(json_value).collect()),
        InfoValue::Object(fields) => {
            let mut object = Object::new();
            fields.iter().for_each(|(name, value)| object.insert(name, json_value(value)));
            Value::Object(object)
        }
    }
}

/// The lines of "Format specific information", one after the other.
pub fn format_lines(specific: &FormatInfo, line: &mut impl FnMut(String)) {
    fields(&specific.fields, 1, line);
}

/// Fields in the order in which their JSON is printed, four blanks a level.
fn fields(fields_here: &[(&'static str, InfoValue)], depth: usize, line: &mut impl FnMut(String)) {
    let mut object = Object::new();
    fields_here.iter().for_each(|(name, _)| object.insert(name, true));
    let order = underlay_qmp::json::printed_order(&object);
    for name in order {
        let Some((_, value)) = fields_here.iter().find(|(field, _)| *field == name) else { continue };
        one(&name.replace('-', " "), value, depth, line);
    }
}

fn one(name: &str, value: &InfoValue, depth: usize, line: &mut impl FnMut(String)) {
    let indent = " ".repeat(depth * 4);
    match value {
        InfoValue::Bool(flag) => line(format!("{indent}{name}: {flag}")),
        InfoValue::Int(number) => line(format!("{indent}{name}: {number}")),
        InfoValue::Text(text) => line(format!("{indent}{name}: {text}")),
        InfoValue::List(values) => {
            line(format!("{indent}{name}:"));
            for (at, value) in values.iter().enumerate() {
                one(&format!("[{at}]"), value, depth + 1, line);
            }
        }
        InfoValue::Object(inner) => {
            line(format!("{indent}{name}:"));
            fields(inner, depth + 1, line);
        }
    }
}
