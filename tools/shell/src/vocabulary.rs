//! What the server understands, by its own account (`query-qmp-schema`), and from that what may be typed next.
//!
//! The server is not trusted: names that are not plain ASCII are left out, types that contain themselves end somewhere.

use std::collections::{BTreeMap, HashMap, HashSet};

use underlay_qmp::json::{Object, Value};

use crate::words::cut;

#[derive(Debug)]
enum Type {
    Object { members: Vec<(String, String)>, tag: Option<String>, cases: Vec<(String, String)> },
    Enum(Vec<String>),
    Alternate(Vec<String>),
    List(String),
    Boolean,
    Other,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Vocabulary {
    /// Commands, and the type of their arguments where it is known.
    commands: BTreeMap<String, String>,
    types: HashMap<String, Type>,
}

/// What may follow, and where in the line it begins, in bytes.
pub type Completion = (usize, Vec<String>);

impl Vocabulary {
    /// From the answer to query-qmp-schema.
    pub fn from_schema(schema: &Value) -> Self {
        let mut vocabulary = Self::default();
        for entry in objects(schema) {
            let (Some(name), Some(meta)) = (text(entry, "name"), text(entry, "meta-type")) else { continue };
            if meta == "command" {
                if is_plain(name) {
                    let arguments = text(entry, "arg-type").unwrap_or_default();
                    vocabulary.commands.insert(name.to_owned(), arguments.to_owned());
                }
                continue;
            }
            vocabulary.types.insert(name.to_owned(), described(entry, meta));
        }
        vocabulary
    }

    /// Only commands, without their arguments.
    pub fn from_names(names: impl IntoIterator<Item = String>) -> Self {
        let plain = names.into_iter().filter(|name| is_plain(name));
        Self { commands: plain.map(|name| (name, String::new())).collect(), types: HashMap::new() }
    }

    /// What may stand at the end of `line`; `action` if it is the line of a transaction.
    pub fn complete(&self, line: &str, action: bool) -> Completion {
        let nothing = (line.len(), Vec::new());
        let Ok(mut words) = cut(line) else { return nothing };
        let (at, current) = match words.last() {
            Some(last) if last.at + last.text.len() == line.len() => (last.at, last.text),
            _ => (line.len(), ""),
        };
        if at < line.len() {
            words.pop();
        }
        let mut words: Vec<&str> = words.into_iter().map(|word| word.text).collect();
        let action = action || words.first() == Some(&"transaction(");
        if words.first() == Some(&"transaction(") {
            words.remove(0);
        }
        let Some((command, given)) = words.split_first() else {
            let names = if action { self.actions() } else { self.commands.keys().cloned().collect() };
            let more = if action { ")" } else { "transaction(" };
            return (at, beginning_with(current, names.into_iter().chain([more.to_owned()])));
        };
        let arguments = if action { self.action_type(command) } else { self.commands.get(*command).cloned() };
        let Some(arguments) = arguments else { return nothing };
        let given: HashMap<&str, &str> = given.iter().filter_map(|word| word.split_once('=')).collect();
        if let Some((key, value)) = current.split_once('=') {
            let values = self.find(&arguments, key, &given).map(|ty| self.values(&ty));
            return (line.len() - value.len(), beginning_with(value, values.unwrap_or_default()));
        }
        let (path, part) = current.rsplit_once('.').map_or(("", current), |(path, part)| (path, part));
        let parent = if path.is_empty() { Some(arguments) } else { self.find(&arguments, path, &given) };
        let dotted = if path.is_empty() { String::new() } else { format!("{path}.") };
        let members = parent.map(|ty| self.members(&ty, &dotted, &given)).unwrap_or_default();
        let free =
            members.into_iter().filter(|(name, _)| !given.contains_key(format!("{dotted}{name}").as_str()));
        let ways = free.flat_map(|(name, ty)| self.ways(&name, &ty));
        (line.len() - part.len(), beginning_with(part, ways))
    }

    /// The names of what may stand in a transaction.
    fn actions(&self) -> Vec<String> {
        self.action_union()
            .map(|(_, cases)| cases.iter().map(|(name, _)| name.clone()).collect())
            .unwrap_or_default()
    }

    /// The type of the data of an action.
    fn action_type(&self, action: &str) -> Option<String> {
        let (_, cases) = self.action_union()?;
        let (_, ty) = cases.iter().find(|(name, _)| name == action)?;
        let Type::Object { members, .. } = self.types.get(ty)? else { return None };
        members.iter().find(|(name, _)| name == "data").map(|(_, ty)| ty.clone())
    }

    /// The tag and the cases of the items of `actions` of the command `transaction`.
    fn action_union(&self) -> Option<(&String, &Vec<(String, String)>)> {
        let Type::Object { members, .. } = self.types.get(self.commands.get("transaction")?)? else {
            return None;
        };
        let (_, list) = members.iter().find(|(name, _)| name == "actions")?;
        let Type::List(item) = self.types.get(list)? else { return None };
        let Type::Object { tag: Some(tag), cases, .. } = self.types.get(item)? else { return None };
        Some((tag, cases))
    }

    /// The type of the member that a dotted name stands for.
    fn find(&self, ty: &str, path: &str, given: &HashMap<&str, &str>) -> Option<String> {
        let (mut ty, mut dotted) = (ty.to_owned(), String::new());
        for part in path.split('.') {
            ty = match self.types.get(&ty)? {
                Type::List(item) => item.clone(),
                _ => self.members(&ty, &dotted, given).into_iter().find(|(name, _)| name == part)?.1,
            };
            dotted.push_str(part);
            dotted.push('.');
        }
        Some(ty)
    }

    /// What a value of a type may be: itself, or the choices of an alternate; and for an object also the case that
    /// is decided by what is given. Each once, as types may contain themselves.
    fn kinds(&self, ty: &str, dotted: &str, given: &HashMap<&str, &str>) -> Vec<&Type> {
        let (mut kinds, mut seen, mut next) = (Vec::new(), HashSet::new(), vec![ty]);
        while let Some((name, ty)) = next.pop().and_then(|name| self.types.get_key_value(name)) {
            if !seen.insert(name) {
                continue;
            }
            kinds.push(ty);
            match ty {
                Type::Alternate(choices) => next.extend(choices.iter().map(String::as_str)),
                Type::Object { tag: Some(tag), cases, .. } => {
                    let value = given.get(format!("{dotted}{tag}").as_str());
                    let case = value.and_then(|value| cases.iter().find(|(case, _)| case == value));
                    next.extend(case.map(|(_, ty)| ty.as_str()));
                }
                _ => {}
            }
        }
        kinds
    }

    /// The members of a type that may be dotted into, as far as what is given decides on them.
    fn members(&self, ty: &str, dotted: &str, given: &HashMap<&str, &str>) -> Vec<(String, String)> {
        let mut all = Vec::new();
        for kind in self.kinds(ty, dotted, given) {
            if let Type::Object { members, .. } = kind {
                all.extend(members.iter().cloned());
            }
        }
        all
    }

    /// How a member can be typed: with a value, with members of its own, or either.
    fn ways(&self, name: &str, ty: &str) -> Vec<String> {
        let kinds = self.kinds(ty, "", &HashMap::new());
        let is_object = |kind: &&Type| matches!(kind, Type::Object { .. });
        let is_value = |kind: &&Type| !matches!(kind, Type::Object { .. } | Type::Alternate(_));
        let mut ways = Vec::new();
        if kinds.iter().any(is_object) {
            ways.push(format!("{name}."));
        }
        if ways.is_empty() || kinds.iter().any(is_value) {
            ways.push(format!("{name}="));
        }
        ways
    }

    /// The words that a value may be.
    fn values(&self, ty: &str) -> Vec<String> {
        let mut words = Vec::new();
        for kind in self.kinds(ty, "", &HashMap::new()) {
            match kind {
                Type::Enum(values) => words.extend(values.iter().cloned()),
                Type::Boolean => words.extend(["true", "false"].map(str::to_owned)),
                _ => {}
            }
        }
        words
    }
}

fn beginning_with(start: &str, names: impl IntoIterator<Item = String>) -> Vec<String> {
    let mut fitting: Vec<_> = names.into_iter().filter(|name| name.starts_with(start)).collect();
    fitting.sort();
    fitting.dedup();
    fitting
}

fn described(entry: &Object, meta: &str) -> Type {
    let list = |name: &str| entry.get(name).map(objects).into_iter().flatten();
    let pairs = |list: &str, name: &str| -> Vec<(String, String)> {
        let pair = |item: &Object| Some((text(item, name)?.to_owned(), text(item, "type")?.to_owned()));
        entry
            .get(list)
            .map(objects)
            .into_iter()
            .flatten()
            .filter_map(pair)
            .filter(|(name, _)| is_plain(name))
            .collect()
    };
    match meta {
        "object" => Type::Object {
            members: pairs("members", "name"),
            tag: text(entry, "tag").map(str::to_owned),
            cases: pairs("variants", "case"),
        },
        "enum" => {
            let values = entry.get("values").and_then(Value::as_list).unwrap_or_default();
            let values = values.iter().filter_map(Value::as_str);
            let names = list("members").filter_map(|member| text(member, "name"));
            Type::Enum(values.chain(names).filter(|name| is_plain(name)).map(str::to_owned).collect())
        }
        "alternate" => Type::Alternate(
            list("members").filter_map(|member| text(member, "type").map(str::to_owned)).collect(),
        ),
        "array" => Type::List(text(entry, "element-type").unwrap_or_default().to_owned()),
        "builtin" if text(entry, "json-type") == Some("boolean") => Type::Boolean,
        _ => Type::Other,
    }
}

fn objects(list: &Value) -> impl Iterator<Item = &Object> {
    list.as_list().unwrap_or_default().iter().filter_map(Value::as_object)
}

fn text<'a>(object: &'a Object, name: &str) -> Option<&'a str> {
    object.get(name).and_then(Value::as_str)
}

/// Whether a name may be shown and typed.
fn is_plain(name: &str) -> bool {
    !name.is_empty() && name.len() < 256 && name.bytes().all(|byte| byte.is_ascii_graphic())
}

#[cfg(test)]
mod tests {
    use underlay_qmp::json;
    use underlay_qmp::schema::Program;
    use underlay_qmp::schema::introspect::query_qmp_schema;

    use super::*;

    fn completed(line: &str, action: bool) -> String {
        let (at, names) = Vocabulary::from_schema(&query_qmp_schema(Program::Machine)).complete(line, action);
        format!("{}|{}", &line[at..], names.join(" "))
    }

    #[test]
    fn commands_arguments_and_values() {
        for (line, completion) in [
            ("block-com", "block-com|block-commit"),
            ("transac", "transac|transaction transaction("),
            ("block-commit dev", "dev|device="),
            ("block-commit device=a dev", "dev|"),
            ("block-commit on-error=s", "s|stop"),
            ("block-commit auto-finalize=", "|false true"),
            ("block-commit device=", "|"),
            ("blockdev-add driver=qcow2 fi", "fi|file. file="),
            ("blockdev-add fi", "fi|"),
            ("blockdev-add driver=qcow2 file.dri", "dri|driver="),
            ("blockdev-add driver=qcow2 file.driver=file file.file", "file|filename="),
            ("blockdev-add driver=qcow2 file.driver=fi", "fi|file"),
            ("nope a", "|"),
            ("a b='", "|"),
            ("transaction( blockdev-snapshot-s", "blockdev-snapshot-s|blockdev-snapshot-sync"),
            ("transaction( blockdev-snapshot-sync mo", "mo|mode="),
        ] {
            assert_eq!(completed(line, false), completion, "{line}");
        }
        assert_eq!(completed("blockdev-snapshot-sync node-", true), "node-|node-name=");
        assert_eq!(completed(")", true), ")|)");
        assert!(
            completed("", false).contains(" query-jobs ")
                && completed("block-commit ", false).contains(" top=")
        );
    }

    #[test]
    fn a_hostile_description_does_no_harm() {
        let schema = r#"[{"name": "c", "meta-type": "command", "arg-type": "1"},
            {"name": "\u001b[2J", "meta-type": "command", "arg-type": "1"}, {"name": 1}, 2,
            {"name": "1", "meta-type": "object", "members": [{"name": "a b", "type": "1"}, {"name": "x", "type": "1"},
             {"name": "y", "type": "2"}], "tag": "x", "variants": [{"case": "v", "type": "1"}]},
            {"name": "2", "meta-type": "alternate", "members": [{"type": "2"}, {"type": "2"}]}]"#;
        let schema = json::parse(schema.replace('\n', " ").as_bytes()).expect("JSON");
        let vocabulary = Vocabulary::from_schema(&schema);
        assert_eq!(vocabulary.complete("", false).1, ["c", "transaction("]);
        assert_eq!(vocabulary.complete("c x=v ", false).1, ["y="]);
        assert_eq!(vocabulary.complete("c x.x.x.x", false).1, ["x."]);
        assert_eq!(vocabulary.complete("c y=", false).1, [] as [&str; 0]);
    }
}
