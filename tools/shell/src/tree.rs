//! Arguments with dots in their names: `file.driver=file file.filename=a` is an object in an object, and numbers in a
//! row (`a.0=x a.1=y`) are a list.

use underlay_qmp::json::{Object, Value};

use crate::line::LineError;

/// Deepest nesting by dots.
const MAX_DOTS: usize = 64;

/// Arguments while they are put together.
#[derive(Debug)]
enum Tree {
    Leaf(Value),
    Branch(Vec<(String, Tree)>),
}

/// The arguments of one command.
#[derive(Debug, Default)]
pub(crate) struct Arguments(Vec<(String, Tree)>);

impl Arguments {
    /// Adds one.
    pub(crate) fn insert(&mut self, key: &str, value: Value) -> Result<(), LineError> {
        let parts: Vec<&str> = key.split('.').collect();
        if parts.iter().any(|part| part.is_empty()) || parts.len() > MAX_DOTS {
            return Err(LineError::Key(key.to_owned()));
        }
        insert(&mut self.0, &parts, value, key)
    }

    /// All of them as the object that is sent.
    pub(crate) fn finish(self) -> Result<Object, LineError> {
        let mut object = Object::new();
        for (name, tree) in self.0 {
            let value = finish(tree, &name)?;
            object.insert(&name, value);
        }
        Ok(object)
    }
}

fn insert(
    branch: &mut Vec<(String, Tree)>,
    parts: &[&str],
    value: Value,
    key: &str,
) -> Result<(), LineError> {
    let Some((first, rest)) = parts.split_first() else { return Ok(()) };
    let at = branch.iter().position(|(name, _)| name == first);
    if rest.is_empty() {
        return match at.and_then(|at| branch.get(at)) {
            None => {
                branch.push(((*first).to_owned(), Tree::Leaf(value)));
                Ok(())
            }
            Some((_, Tree::Leaf(_))) => Err(LineError::Twice(key.to_owned())),
            Some((_, Tree::Branch(_))) => Err(LineError::LeafAndBranch(key.to_owned())),
        };
    }
    let at = at.unwrap_or_else(|| {
        branch.push(((*first).to_owned(), Tree::Branch(Vec::new())));
        branch.len() - 1
    });
    let Some((_, tree)) = branch.get_mut(at) else { return Ok(()) };
    if let Tree::Leaf(Value::Object(object)) = tree {
        // An object that was given as one may be added to.
        let members = std::mem::take(object).into_iter();
        *tree = Tree::Branch(members.map(|(name, value)| (name, Tree::Leaf(value))).collect());
    }
    match tree {
        Tree::Branch(inner) => insert(inner, rest, value, key),
        Tree::Leaf(_) => {
            let above = &key[..key.len() - rest.join(".").len() - 1];
            Err(LineError::LeafAndBranch(above.to_owned()))
        }
    }
}

fn finish(tree: Tree, path: &str) -> Result<Value, LineError> {
    let members = match tree {
        Tree::Leaf(value) => return Ok(value),
        Tree::Branch(members) => members,
    };
    let mut object = Object::new();
    for (name, tree) in members {
        let value = finish(tree, &format!("{path}.{name}"))?;
        object.insert(&name, value);
    }
    let numbers = object.iter().filter(|(name, _)| name.bytes().all(|byte| byte.is_ascii_digit())).count();
    match numbers {
        0 => Ok(object.into()),
        all if all == object.len() => {
            let missing = |at: usize| LineError::Hole(path.to_owned(), at);
            let item = |at: usize| object.remove(&at.to_string()).ok_or_else(|| missing(at));
            (0..all).map(item).collect::<Result<Vec<_>, _>>().map(Value::List)
        }
        _ => Err(LineError::ListAndObject(path.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(words: &str) -> String {
        let mut arguments = Arguments::default();
        for word in words.split(' ') {
            let (key, value) = word.split_once('=').expect("a pair");
            let value = if value == "{}" { Object::new().with("x", true).into() } else { value.into() };
            if let Err(error) = arguments.insert(key, value) {
                return error.to_string();
            }
        }
        arguments.finish().map_or_else(|error| error.to_string(), |all| Value::Object(all).as_it_came(false))
    }

    #[test]
    fn dots_nest_and_numbers_make_lists() {
        for (words, result) in [
            ("a.b=1 a.c.d=2 e=3", r#"{"a": {"b": "1", "c": {"d": "2"}}, "e": "3"}"#),
            ("a.1=y a.0=x", r#"{"a": ["x", "y"]}"#),
            ("a.0.b=x a.1.b=y", r#"{"a": [{"b": "x"}, {"b": "y"}]}"#),
            ("0=x", r#"{"0": "x"}"#),
            ("a={} a.y=2", r#"{"a": {"x": true, "y": "2"}}"#),
            ("a={} a.x=2", "Cannot set \"a.x\" multiple times"),
            ("a.1=x", "\"a.0\" is missing"),
            ("a.00=x", "\"a.0\" is missing"),
            ("a.0=x a.b=y", "\"a\" cannot be both a list and an object"),
            ("a=1 a=2", "Cannot set \"a\" multiple times"),
            ("a=1 a.b=2", "Cannot use \"a\" as both leaf and non-leaf key"),
            ("a.b.c=1 a.b=2", "Cannot use \"a.b\" as both leaf and non-leaf key"),
            ("a.b=1 a.b.c.d=2", "Cannot use \"a.b\" as both leaf and non-leaf key"),
            ("=1", "'' is not the name of an argument"),
            ("a..b=1", "'a..b' is not the name of an argument"),
        ] {
            assert_eq!(arguments(words), result, "{words}");
        }
        let deep = vec!["a"; MAX_DOTS + 1].join(".") + "=1";
        assert!(arguments(&deep).ends_with("is not the name of an argument"));
    }
}
