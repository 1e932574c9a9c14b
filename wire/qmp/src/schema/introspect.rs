//! `query-qmp-schema`: the description in QAPI's own introspection form. Types have numbers for names, as clients
//! must not rely on their names.

use std::collections::HashMap;

use super::Program;
use super::ty::{Member, Object, Type};
use crate::json::{self, Value};

/// Every command, event and type of a program.
pub fn query_qmp_schema(program: Program) -> Value {
    let mut writer = Writer::default();
    let mut entries = Vec::new();
    for command in program.commands() {
        let arguments = writer.object(command.arguments);
        let returns = writer.name(&command.returns);
        let mut entry = entry(command.name, "command").with("arg-type", arguments).with("ret-type", returns);
        let features: Vec<_> = features(command.name).iter().map(|feature| Value::from(*feature)).collect();
        if !features.is_empty() {
            entry.insert("features", features);
        }
        entries.push(Value::Object(entry));
    }
    for event in program.events() {
        let data = writer.object(event.data);
        entries.push(Value::Object(entry(event.name, "event").with("arg-type", data)));
    }
    entries.extend(writer.entries.into_iter().map(Value::Object));
    Value::List(entries)
}

/// What clients should know before they rely on a command.
fn features(command: &str) -> &'static [&'static str] {
    match command {
        "nbd-server-add" | "nbd-server-remove" => &["deprecated"],
        "x-debug-query-block-graph" | "x-debug-block-dirty-bitmap-sha256" => &["unstable"],
        "blockdev-snapshot" => &["allow-write-only-overlay"],
        "device_add" => &["json-cli", "json-cli-hotplug"],
        _ => &[],
    }
}

fn entry(name: &str, meta_type: &str) -> json::Object {
    json::Object::new().with("name", name).with("meta-type", meta_type)
}

#[derive(Default)]
struct Writer {
    names: HashMap<usize, String>,
    builtins: Vec<&'static str>,
    entries: Vec<json::Object>,
}

impl Writer {
    fn builtin(&mut self, name: &'static str, json_type: &str) -> String {
        if !self.builtins.contains(&name) {
            self.builtins.push(name);
            self.entries.push(entry(name, "builtin").with("json-type", json_type));
        }
        name.to_owned()
    }

    /// The name of a type, which is described the first time that it is asked for.
    fn name(&mut self, ty: &Type) -> String {
        match ty {
            Type::Str => self.builtin("str", "string"),
            Type::Int | Type::U16 | Type::U32 | Type::U64 => self.builtin("int", "int"),
            Type::Bool => self.builtin("bool", "boolean"),
            Type::Number => self.builtin("number", "number"),
            Type::Null => self.builtin("null", "null"),
            Type::Any => self.builtin("any", "value"),
            Type::Object(object) => self.object(object),
            Type::Enum(words) => {
                let address = std::ptr::from_ref(*words).addr();
                self.described(address, |_, name| {
                    let values = words.values.iter().map(|value| Value::from(*value)).collect::<Vec<_>>();
                    let member = |value: &&str| Value::Object(json::Object::new().with("name", *value));
                    let members = words.values.iter().map(member).collect::<Vec<_>>();
                    entry(name, "enum").with("members", members).with("values", values)
                })
            }
            Type::Alternate(alternate) => {
                let address = std::ptr::from_ref(*alternate).addr();
                self.described(address, |writer, name| {
                    let choice = |ty| Value::Object(json::Object::new().with("type", writer.name(ty)));
                    entry(name, "alternate")
                        .with("members", alternate.choices.iter().map(choice).collect::<Vec<_>>())
                })
            }
            Type::List(item) => {
                let item = self.name(item);
                let name = format!("[{item}]");
                if !self.entries.iter().any(|entry| entry.get("name").and_then(Value::as_str) == Some(&name))
                {
                    self.entries.push(entry(&name, "array").with("element-type", item));
                }
                name
            }
        }
    }

    fn object(&mut self, object: &'static Object) -> String {
        self.described(std::ptr::from_ref(object).addr(), |writer, name| {
            let members = object.members.iter().map(|member| Value::Object(writer.member(member)));
            let mut described = entry(name, "object").with("members", members.collect::<Vec<_>>());
            if let Some(tag) = object.tag {
                let case = |(case, ty): &(&str, &'static Object)| {
                    Value::Object(json::Object::new().with("case", *case).with("type", writer.object(ty)))
                };
                let variants = object.cases.iter().map(case).collect::<Vec<_>>();
                described = described.with("tag", tag).with("variants", variants);
            }
            described
        })
    }

    fn member(&mut self, member: &'static Member) -> json::Object {
        let described = json::Object::new().with("name", member.name).with("type", self.name(&member.ty));
        if member.optional { described.with("default", Value::Null) } else { described }
    }

    /// Names a type by a number, and describes it when it is new. Types may contain themselves.
    fn described(
        &mut self,
        address: usize,
        describe: impl FnOnce(&mut Self, &str) -> json::Object,
    ) -> String {
        if let Some(name) = self.names.get(&address) {
            return name.clone();
        }
        let name = self.names.len().to_string();
        self.names.insert(address, name.clone());
        let described = describe(self, &name);
        self.entries.push(described);
        name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_that_is_named_is_described() {
        let Value::List(entries) = query_qmp_schema(Program::Machine) else { panic!("a list") };
        let name = |entry: &Value| entry.as_object().and_then(|e| e.get("name")?.as_str().map(str::to_owned));
        let names: Vec<_> = entries.iter().filter_map(name).collect();
        let mut used = Vec::new();
        for entry in entries.iter().filter_map(Value::as_object) {
            for member in ["arg-type", "ret-type", "element-type"] {
                used.extend(entry.get(member).and_then(Value::as_str).map(str::to_owned));
            }
            for list in ["members", "variants"] {
                for member in entry.get(list).and_then(Value::as_list).unwrap_or_default() {
                    used.extend(member.as_object().and_then(|m| m.get("type")?.as_str().map(str::to_owned)));
                }
            }
        }
        assert!(used.len() > 100);
        for name in used {
            assert!(names.contains(&name), "{name}");
        }
        let mut sorted = names.clone();
        sorted.sort();
        sorted.dedup();
        assert_eq!(sorted.len(), names.len(), "no name twice");
    }
}
