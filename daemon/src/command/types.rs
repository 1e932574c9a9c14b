//! Types of objects: qom-list-types, qom-list-properties, device-list-properties.

use underlay_graph::Class;
use underlay_qmp::json::{Object, Value};

use super::object;
use crate::device::model::Model;
use crate::error::{CommandError, CommandResult};
use crate::state::Daemon;

/// See the file's own first line.
const TYPES: &str = include_str!("types.txt");

/// Where the types begin that only machines have.
const OF_MACHINES: &str = "# Those of machines.";

/// A type of objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Type {
    name: &'static str,
    parent: Option<&'static str>,
    is_abstract: bool,
}

fn types(of_machine: bool) -> impl Iterator<Item = Type> {
    let (common, more) = TYPES.split_once(OF_MACHINES).unwrap_or((TYPES, ""));
    let more = if of_machine { more } else { "" };
    let lines = common.lines().chain(more.lines()).filter(|line| !line.starts_with('#'));
    lines.filter_map(|line| {
        let mut words = line.split(' ');
        let (name, parent) = (words.next()?, words.next()?);
        let parent = Some(parent).filter(|parent| *parent != "-");
        Some(Type { name, parent, is_abstract: words.next() == Some("abstract") })
    })
}

/// Types whose objects a user makes.
const USER_CREATABLE: [&str; 2] = ["event-loop-base", "throttle-group"];

impl Type {
    /// Whether its objects are of the type `name`, too.
    fn implements(self, name: &str, of_machine: bool) -> bool {
        let above = |ty: &Type| types(of_machine).find(|other| Some(other.name) == ty.parent);
        std::iter::successors(Some(self), above)
            .any(|ty| ty.name == name || name == "user-creatable" && USER_CREATABLE.contains(&ty.name))
    }

    fn find(daemon: &Daemon, name: &str) -> Option<Self> {
        types(daemon.machine.is_some()).find(|ty| ty.name == name)
    }
}

/// qom-list-types
pub fn list(daemon: &Daemon, implements: Option<&str>, with_abstract: bool) -> Value {
    let of_machine = daemon.machine.is_some();
    let wanted = |ty: &Type| {
        (with_abstract || !ty.is_abstract) && implements.is_none_or(|name| ty.implements(name, of_machine))
    };
    let told = |ty: Type| {
        let mut object = Object::new().with("name", ty.name);
        if ty.is_abstract {
            object.insert("abstract", true);
        }
        if let Some(parent) = ty.parent {
            object.insert("parent", parent);
        }
        object.into()
    };
    Value::List(types(of_machine).filter(wanted).map(told).collect())
}

fn not_found(what: &str, name: &str) -> CommandError {
    CommandError { class: Class::DeviceNotFound, ..CommandError::new(format!("{what} '{name}' not found")) }
}

fn property(name: &str, kind: &str) -> Value {
    Object::new().with("name", name).with("type", kind).into()
}

/// qom-list-properties
pub fn properties(daemon: &Daemon, name: &str) -> CommandResult<Value> {
    let ty = Type::find(daemon, name).ok_or_else(|| not_found("Class", name))?;
    let of_machine = daemon.machine.is_some();
    if ty.implements("interface", of_machine) {
        return Err(CommandError::new("Parameter 'typename' expects a QOM type"));
    }
    if let Some(known) = object::properties(name) {
        return Ok(Value::List(known));
    }
    let mut list = vec![property("type", "string")];
    if name == "chardev-socket" {
        list.extend([property("connected", "bool"), property("addr", "SocketAddress")]);
    }
    if ty.implements("device", of_machine) {
        list.push(property("parent_bus", "link<bus>"));
        list.extend(["realized", "hotplugged", "hotpluggable"].map(|name| property(name, "bool")));
        list.extend(of_device(name));
    }
    Ok(Value::List(list))
}

/// device-list-properties
pub fn device_properties(daemon: &Daemon, name: &str) -> CommandResult<Value> {
    let ty = Type::find(daemon, name).ok_or_else(|| not_found("Device", name))?;
    if ty.is_abstract || !ty.implements("device", daemon.machine.is_some()) {
        return Err(CommandError::new("Parameter 'typename' expects a non-abstract device type"));
    }
    Ok(Value::List(of_device(name)))
}

/// Those that a device may be given.
fn of_device(name: &str) -> Vec<Value> {
    let model = Model::find(name).filter(|model| model.name == name);
    model.and_then(Model::properties).into_iter().flatten().filter_map(described).collect()
}

/// A property from its line: `NAME=<TYPE>`, ` - ` and a description, `(default: …)`.
fn described(line: &str) -> Option<Value> {
    let (name, rest) = line.split_once("=<")?;
    let (head, text) = rest.split_once(" - ").unwrap_or((rest, ""));
    let kind = head.trim_end().strip_suffix('>')?;
    let (description, default) = match text.rsplit_once("(default: ") {
        Some((description, default)) => (description, default.strip_suffix(')')),
        None => (text, None),
    };
    let mut object = Object::new().with("name", name).with("type", kind);
    if !description.trim().is_empty() {
        object.insert("description", description.trim());
    }
    if let Some(default) = default {
        let value = match (kind, default, default.parse::<i64>()) {
            ("bool", word, _) => Value::Bool(word == "on"),
            (_, _, Ok(number)) => Value::Int(number),
            (_, word, _) => Value::from(word),
        };
        object.insert("default-value", value);
    }
    Some(object.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_has_its_parents() {
        let all: Vec<_> = types(true).collect();
        assert!(all.len() > 80, "{}", all.len());
        for ty in &all {
            assert!(ty.name == "object" || ty.name == "interface" || ty.parent.is_some(), "{ty:?}");
            assert_eq!(ty.implements("object", true), !ty.implements("interface", true), "{ty:?}");
        }
        let implement = |name: &str, of_machine| {
            types(of_machine)
                .filter(|ty| ty.implements(name, of_machine))
                .map(|ty| ty.name)
                .collect::<Vec<_>>()
        };
        assert_eq!(implement("chardev-ringbuf", false), ["chardev-ringbuf", "chardev-memory"]);
        assert_eq!(
            implement("user-creatable", false),
            ["iothread", "event-loop-base", "user-creatable", "throttle-group"]
        );
        assert!(implement("device", false).is_empty());
        assert!(implement("device", true).contains(&"scsi-hd"));
        assert!(implement("nope", true).is_empty());
    }

    /// As the reference describes them.
    #[test]
    fn properties_of_a_device() {
        let all: Vec<_> = of_device("scsi-hd").iter().map(ToString::to_string).collect();
        assert_eq!(all.len(), 39);
        for wanted in [
            r#"{"default-value": 4294967295, "name": "scsi-id", "type": "uint32"}"#,
            r#"{"default-value": false, "name": "share-rw", "description": "on/off", "type": "bool"}"#,
            r#"{"name": "drive", "description": "Node name or ID of a block device to use as a backend", "type": "str"}"#,
            r#"{"default-value": "auto", "name": "write-cache", "description": "on/off/auto", "type": "OnOffAuto"}"#,
            r#"{"name": "bootindex", "type": "int32"}"#,
        ] {
            assert!(all.iter().any(|found| found == wanted), "{wanted} in {all:#?}");
        }
        assert!(of_device("e1000").is_empty() && of_device("virtio-blk").is_empty());
    }
}
