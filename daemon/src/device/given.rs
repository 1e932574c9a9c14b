//! The properties that a device is given: from a command line, where everything is a word, or from a monitor.

use underlay_drivers::options::parse_size;
use underlay_qmp::json::{Object, Value};

use super::model::Model;
use crate::error::{CommandError, CommandResult};

/// Where properties come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// `-device`
    Words,
    /// device_add, and `-device` in JSON.
    Json,
}

/// A device that is asked for.
#[derive(Debug)]
pub struct Given {
    /// Its model.
    pub model: &'static Model,
    /// Its name.
    pub id: Option<String>,
    /// The bus that it goes to.
    pub bus: Option<String>,
    input: Input,
    properties: Object,
}

impl Given {
    /// Reads what every device may be given.
    pub fn read(mut options: Object, input: Input) -> CommandResult<Self> {
        let mut text = |name: &str| match options.remove(name) {
            None => Ok(None),
            Some(Value::Str(text)) => Ok(Some(text)),
            Some(_) => Err(wrong_type(name, "string")),
        };
        let driver = text("driver")?.ok_or_else(|| CommandError::new("Parameter 'driver' is missing"))?;
        let (id, bus) = (text("id")?, text("bus")?);
        let model = Model::find(&driver)
            .ok_or_else(|| CommandError::new(format!("'{driver}' is not a valid device model name")))?;
        Ok(Self { model, id, bus, input, properties: options })
    }

    /// Reads the properties.
    pub fn check(&mut self) -> CommandResult<()> {
        let model = self.model;
        if model.properties().is_none() {
            return Ok(());
        }
        for (name, value) in std::mem::take(&mut self.properties).into_iter() {
            let ty = model
                .property(&name)
                .ok_or_else(|| CommandError::new(format!("Property '{}.{name}' not found", model.name)))?;
            self.properties.insert(&name, checked(&name, value, ty, self.input)?);
        }
        Ok(())
    }

    /// A text.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.properties.get(name).and_then(Value::as_str)
    }

    /// A flag.
    pub fn flag(&self, name: &str) -> Option<bool> {
        match self.properties.get(name) {
            Some(Value::Bool(flag)) => Some(*flag),
            _ => None,
        }
    }

    /// The property `unit`, even before the others are looked at.
    pub fn wanted_unit(&self) -> CommandResult<Option<u32>> {
        let Some(value) = self.properties.get("unit") else { return Ok(None) };
        let value = checked("unit", value.clone(), "uint32", self.input)?;
        Ok(value.as_u64().and_then(|unit| u32::try_from(unit).ok()).filter(|unit| *unit != u32::MAX))
    }

    /// A number.
    pub fn number(&self, name: &str) -> Option<u64> {
        self.properties.get(name).and_then(Value::as_u64)
    }
}

fn wrong_type(name: &str, expected: &str) -> CommandError {
    CommandError::new(format!("Invalid parameter type for '{name}', expected: {expected}"))
}

fn checked(name: &str, value: Value, ty: &str, input: Input) -> CommandResult<Value> {
    let expects = |what: &str| CommandError::new(format!("Parameter '{name}' expects {what}"));
    match (ty, value) {
        ("bool", Value::Bool(flag)) => Ok(Value::Bool(flag)),
        ("bool", Value::Str(word)) if input == Input::Words => match word.as_str() {
            "on" | "yes" | "true" | "y" => Ok(Value::Bool(true)),
            "off" | "no" | "false" | "n" => Ok(Value::Bool(false)),
            _ => Err(expects("'on' or 'off'")),
        },
        ("bool", _) => Err(wrong_type(name, "boolean")),
        ("size", Value::Str(word)) => parse_size(&word).map(Value::from).ok_or_else(|| expects("size")),
        ("size" | "uint16" | "uint32" | "uint64" | "int32", Value::Int(number)) => in_range(name, number, ty),
        ("uint16" | "uint32" | "uint64" | "int32", Value::Str(word)) if input == Input::Words => {
            let number = whole_number(&word).ok_or_else(|| expects("integer"))?;
            match i64::try_from(number) {
                Ok(number) => in_range(name, number, ty),
                Err(_) if ty == "uint64" => Ok(Value::UInt(u64::try_from(number).unwrap_or(u64::MAX))),
                Err(_) => Err(CommandError::new(format!("Parameter '{name}' expects {ty}_t"))),
            }
        }
        ("size" | "uint64", Value::UInt(number)) => Ok(Value::UInt(number)),
        ("size" | "uint16" | "uint32" | "uint64" | "int32", _) => Err(wrong_type(name, "integer")),
        (_, Value::Str(word)) => {
            let words: &[&str] = match ty {
                "OnOffAuto" => &["auto", "on", "off"],
                "BiosAtaTranslation" => &["auto", "none", "lba", "large", "rechs"],
                "BlockdevOnError" => &["report", "ignore", "enospc", "stop", "auto"],
                _ => return Ok(Value::Str(word)),
            };
            match words.contains(&word.as_str()) {
                true => Ok(Value::Str(word)),
                false => Err(CommandError::new(format!("Parameter '{name}' does not accept value '{word}'"))),
            }
        }
        _ => Err(wrong_type(name, "string")),
    }
}

/// A number as C writes them: decimal, `0x…` or octal with a zero in front.
fn whole_number(word: &str) -> Option<i128> {
    let (sign, digits) = match word.strip_prefix('-') {
        Some(digits) => (-1, digits),
        None => (1, word.strip_prefix('+').unwrap_or(word)),
    };
    let (radix, digits) = match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        Some(hex) => (16, hex),
        None if digits.len() > 1 && digits.starts_with('0') => (8, &digits[1..]),
        None => (10, digits),
    };
    let is_one = |digit: char| digit.is_digit(radix);
    let number =
        u64::from_str_radix(Some(digits).filter(|digits| digits.chars().all(is_one))?, radix).ok()?;
    Some(sign * i128::from(number))
}

fn in_range(name: &str, number: i64, ty: &str) -> CommandResult<Value> {
    let fits = match ty {
        "uint16" => u16::try_from(number).is_ok(),
        "uint32" => u32::try_from(number).is_ok(),
        "int32" => i32::try_from(number).is_ok(),
        _ => true,
    };
    match fits {
        true => Ok(Value::Int(number)),
        false => Err(CommandError::new(format!("Parameter '{name}' expects {ty}_t"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complaint(driver: &str, name: &str, value: impl Into<Value>, input: Input) -> String {
        let options = Object::new().with("driver", driver).with(name, value);
        let read = Given::read(options, input).and_then(|mut given| given.check());
        read.map_or_else(|error| error.desc, |()| String::new())
    }

    /// The texts are those of the reference.
    #[test]
    fn complains_as_the_reference() {
        for (name, value, text) in [
            ("share-rw", "foo", "Parameter 'share-rw' expects 'on' or 'off'"),
            ("share-rw", "on", ""),
            ("lun", "x", "Parameter 'lun' expects integer"),
            ("lun", "-1", "Parameter 'lun' expects uint32_t"),
            ("port_index", "70000", "Parameter 'port_index' expects uint16_t"),
            ("logical_block_size", "x", "Parameter 'logical_block_size' expects size"),
            ("logical_block_size", "4k", ""),
            ("werror", "foo", "Parameter 'werror' does not accept value 'foo'"),
            ("write-cache", "foo", "Parameter 'write-cache' does not accept value 'foo'"),
            ("wwn", "0xffffffffffffffff", ""),
            ("lun", "010", ""),
            ("lun", "09", "Parameter 'lun' expects integer"),
            ("lun", "99999999999999999999", "Parameter 'lun' expects integer"),
            ("nope", "1", "Property 'scsi-hd.nope' not found"),
        ] {
            assert_eq!(complaint("scsi-hd", name, value, Input::Words), text, "{name}={value}");
        }
        let json = |name, value: Value| complaint("scsi-hd", name, value, Input::Json);
        assert_eq!(json("share-rw", "on".into()), "Invalid parameter type for 'share-rw', expected: boolean");
        assert_eq!(json("drive", 5_i64.into()), "Invalid parameter type for 'drive', expected: string");
        assert_eq!(
            json("bootindex", "a".into()),
            "Invalid parameter type for 'bootindex', expected: integer"
        );
        assert_eq!(json("share-rw", true.into()), "");
    }
}
