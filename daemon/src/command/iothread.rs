//! Objects of the type `iothread`.
//!
//! In the reference one thread serves everything until others are asked for by such an object. Here the I/O threads,
//! one for each processor, serve all exports from the beginning, whatever an export asks for. So an iothread is no more
//! than a name that exports can be given, with properties that are checked and remembered, and any export can have any
//! of them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use underlay_qmp::json::{Object, Value};

use super::arguments::Arguments;
use crate::error::{CommandError, CommandResult};

/// The properties with their defaults, in the order in which the reference lists them.
const PROPERTIES: [(&str, i64); 6] = [
    ("thread-pool-min", 0),
    ("aio-max-batch", 0),
    ("thread-pool-max", 64),
    ("poll-max-ns", 32768),
    ("poll-grow", 0),
    ("poll-shrink", 0),
];
const POOL_MIN: usize = 0;
const POOL_MAX: usize = 2;

type Values = [i64; PROPERTIES.len()];

/// One of them.
#[derive(Debug)]
pub struct Iothread {
    values: Mutex<Values>,
    /// How many have been there before it.
    at: usize,
}

impl Iothread {
    /// With what is given; the options have been checked against their description.
    pub fn new(given: &mut Arguments) -> CommandResult<Self> {
        let mut values = PROPERTIES.map(|(_, default)| default);
        for (value, (name, default)) in values.iter_mut().zip(PROPERTIES) {
            *value = in_range(name, given.number(name, default))?;
        }
        check(&values)?;
        static MADE: AtomicUsize = AtomicUsize::new(0);
        Ok(Self { values: Mutex::new(values), at: MADE.fetch_add(1, Ordering::Relaxed) })
    }

    /// The names of the properties but for `type`.
    pub fn properties() -> impl Iterator<Item = &'static str> {
        PROPERTIES.iter().map(|(name, _)| *name)
    }

    fn values(&self) -> MutexGuard<'_, Values> {
        self.values.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A property; nothing if there is none of that name.
    pub fn get(&self, property: &str) -> Option<Value> {
        let at = Self::properties().position(|name| name == property)?;
        Some(Value::Int(self.values()[at]))
    }

    /// Sets a property, which must be one.
    pub fn set(&self, property: &str, value: &Value) -> CommandResult<()> {
        let wrong_type = || format!("Invalid parameter type for '{property}', expected: integer");
        let value = match value {
            Value::Int(number) => *number,
            Value::UInt(_) => -1,
            _ => return Err(CommandError::new(wrong_type())),
        };
        let mut values = self.values();
        let mut changed = *values;
        if let Some(at) = Self::properties().position(|name| name == property) {
            changed[at] = in_range(property, value)?;
        }
        check(&changed)?;
        *values = changed;
        Ok(())
    }
}

fn in_range(name: &str, value: i64) -> CommandResult<i64> {
    let text = || CommandError::new(format!("{name} value must be in range [0, {}]", i64::MAX));
    if value < 0 { Err(text()) } else { Ok(value) }
}

fn check(values: &Values) -> CommandResult<()> {
    let (least, most) = (values[POOL_MIN], values[POOL_MAX]);
    if most == 0 || least > most || most > i64::from(i32::MAX) {
        return Err(CommandError::new("bad thread-pool-min/thread-pool-max values"));
    }
    Ok(())
}

/// All of them, by name.
#[derive(Debug, Default)]
pub struct Iothreads {
    all: Mutex<BTreeMap<String, Arc<Iothread>>>,
}

impl Iothreads {
    fn all(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Iothread>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The one called `id`.
    pub fn get(&self, id: &str) -> Option<Arc<Iothread>> {
        self.all().get(id).cloned()
    }

    /// Takes one in, under a name that is free.
    pub fn add(&self, id: &str, iothread: Iothread) {
        self.all().insert(id.to_owned(), Arc::new(iothread));
    }

    /// Lets one go; false if there is none of that name.
    pub fn remove(&self, id: &str) -> bool {
        self.all().remove(id).is_some()
    }

    /// query-iothreads. `thread` knows the thread that an iothread is told to be: several may be one, and each serves
    /// everything.
    pub fn query(&self, thread: impl Fn(usize) -> i32) -> Value {
        let info = |(id, iothread): (&String, &Arc<Iothread>)| {
            let object = Object::new().with("id", id.as_str());
            let object = object.with("thread-id", i64::from(thread(iothread.at)));
            let shown = ["poll-max-ns", "poll-grow", "poll-shrink", "aio-max-batch"];
            let with =
                |object: Object, name: &str| object.with(name, iothread.get(name).unwrap_or(Value::Null));
            shown.into_iter().fold(object, with).into()
        };
        Value::List(self.all().iter().map(info).collect())
    }

    /// All names.
    pub fn names(&self) -> Vec<String> {
        self.all().keys().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_property_that_is_refused_stays_as_it_was() {
        let thread =
            Iothread::new(&mut Arguments::new(Object::new().with("poll-grow", 2_i64))).expect("fine");
        assert_eq!(thread.get("poll-grow"), Some(Value::Int(2)));
        assert_eq!(thread.get("poll-max-ns"), Some(Value::Int(32768)));
        assert_eq!(thread.get("thread-id"), None);
        for (name, value) in [
            ("thread-pool-min", Value::Int(65)),
            ("thread-pool-max", Value::Int(0)),
            ("poll-grow", Value::Int(-1)),
            ("poll-grow", Value::Str("1".into())),
        ] {
            let before = thread.get(name);
            assert!(thread.set(name, &value).is_err(), "{name} {value}");
            assert_eq!(thread.get(name), before);
        }
        thread.set("thread-pool-min", &Value::Int(64)).expect("as many as there may be");
        assert_eq!(thread.get("thread-pool-min"), Some(Value::Int(64)));
    }
}
