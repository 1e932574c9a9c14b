//! Option lists as QEMU's older options take them: `driver=qcow2,file.filename=a,read-only`.
//!
//! Unlike those of `--blockdev`, a word without a value is a switch (`x` is `x=on`, `nox` is `x=off`), and a doubled
//! comma is a comma. Source: the reference's behaviour.

use crate::json::Object;
use crate::keyval::take_value;

/// The options with their dotted names, and what users are to be told.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OptionList {
    /// Name and value, both as text. Of two with one name the later one counts.
    pub options: Object,
    /// Warnings, without the program's name.
    pub warnings: Vec<String>,
}

/// Reads a list; `implied` is the name that the first word may leave out.
pub fn parse(text: &str, implied: Option<&str>) -> OptionList {
    parse_knowing(text, implied, &[])
}

/// As [`parse`], with `names` that begin with "no" and mean what they say.
pub fn parse_knowing(text: &str, implied: Option<&str>, names: &[&str]) -> OptionList {
    let mut list = OptionList::default();
    let mut implied = implied;
    let mut rest = text;
    while !rest.is_empty() {
        let name_end = rest.find(['=', ',']).unwrap_or(rest.len());
        let named = rest[name_end..].starts_with('=');
        let name = if named { &rest[..name_end] } else { "" };
        let (value, after) = take_value(if named { &rest[name_end + 1..] } else { rest });
        rest = after;
        match (named, implied.take()) {
            (true, _) => list.options.insert(name, value),
            (false, Some(implied)) => list.options.insert(implied, value),
            (false, None) => switch(&mut list, &value, names),
        }
    }
    list
}

fn switch(list: &mut OptionList, word: &str, names: &[&str]) {
    let (name, value) = match word.strip_prefix("no") {
        Some(name) if !name.is_empty() && !names.contains(&word) => (name, "off"),
        _ => (word, "on"),
    };
    list.options.insert(name, value);
    list.warnings.push(format!(
        "warning: short-form boolean option '{word}' deprecated\nPlease use {name}={value} instead"
    ));
}

#[cfg(test)]
mod tests {
    use super::{parse, parse_knowing};
    use crate::json::Object;

    #[test]
    fn values_switches_and_commas() {
        let list = parse("driver=raw,file.filename=a,,b=c,read-only,nolocking", None);
        let flat: Vec<_> = list
            .options
            .iter()
            .map(|(name, value)| format!("{name}={}", value.as_str().unwrap_or("?")))
            .collect();
        assert_eq!(flat, ["driver=raw", "file.filename=a,b=c", "read-only=on", "locking=off"]);
        assert_eq!(
            list.warnings[1],
            "warning: short-form boolean option 'nolocking' deprecated\nPlease use locking=off instead"
        );
        let list = parse_knowing("nodelay,noipv4", None, &["nodelay"]).options;
        assert_eq!(list, Object::new().with("nodelay", "on").with("ipv4", "off"));
        assert_eq!(parse("a.img", Some("file")).options.get("file").and_then(|v| v.as_str()), Some("a.img"));
    }
}
