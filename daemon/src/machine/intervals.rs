//! `-drive stats-intervals.0=…,stats-intervals.1=…`: of how many seconds the statistics are.

use underlay_qmp::json::{Object, Value};

use crate::error::{CommandError, CommandResult};

const PREFIX: &str = "stats-intervals.";

/// Takes the lengths out of the options of a drive, as they are written. Without numbers behind it, it is an option of
/// the disk's driver, which has none of that name.
pub fn take(options: &mut Object) -> Vec<(String, String)> {
    let names = options.iter().filter_map(|(name, _)| name.strip_prefix(PREFIX).map(str::to_owned));
    let names: Vec<_> = names.collect();
    let taken = names.into_iter().filter_map(|name| match options.remove(&format!("{PREFIX}{name}")) {
        Some(Value::Str(length)) => Some((name, length)),
        _ => None,
    });
    taken.collect()
}

/// The lengths of a list that has no holes.
pub fn seconds(given: Vec<(String, String)>) -> CommandResult<Vec<u32>> {
    if given.iter().any(|(name, _)| name.contains('.')) {
        return Err(CommandError::new("The specification of stats-intervals is invalid"));
    }
    let is_of_list = |name: &String| (0..given.len()).any(|at| *name == at.to_string());
    if let Some((name, _)) = given.iter().find(|(name, _)| !is_of_list(name)) {
        return Err(CommandError::new(format!("Invalid option {PREFIX}{name}")));
    }
    let mut lengths = vec![0; given.len()];
    for (name, length) in given {
        let seconds = length.parse::<u32>().ok().filter(|seconds| *seconds > 0);
        let invalid = || CommandError::new(format!("Invalid interval length: {length}"));
        if let Some(place) = name.parse::<usize>().ok().and_then(|at| lengths.get_mut(at)) {
            *place = seconds.ok_or_else(invalid)?;
        }
    }
    Ok(lengths)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(words: &[(&str, &str)]) -> (Result<Vec<u32>, String>, Object) {
        let with = |object: Object, (name, value): &(&str, &str)| object.with(name, *value);
        let mut options = words.iter().fold(Object::new(), with);
        let read = seconds(take(&mut options)).map_err(|error| error.desc);
        (read, options)
    }

    /// The texts are those of the reference.
    #[test]
    fn reads_a_list() {
        let of = |words: &[(&str, &str)]| read(words).0;
        let (lengths, rest) =
            read(&[("stats-intervals.1", "+3600"), ("file", "a"), ("stats-intervals.0", "060")]);
        assert_eq!(lengths, Ok(vec![60, 3600]));
        assert_eq!(rest, Object::new().with("file", "a"));
        assert_eq!(of(&[]), Ok(Vec::new()));
        for wrong in ["0", "-1", "x", "", "1.5", "0x10", "1k", "4294967296"] {
            let text = format!("Invalid interval length: {wrong}");
            assert_eq!(of(&[("stats-intervals.0", wrong)]), Err(text));
        }
        assert_eq!(of(&[("stats-intervals.0", "4294967295")]), Ok(vec![u32::MAX]));
        for hole in ["1", "x", "00"] {
            let text = format!("Invalid option stats-intervals.{hole}");
            assert_eq!(of(&[(&format!("stats-intervals.{hole}"), "1")]), Err(text));
        }
        let nested = Err("The specification of stats-intervals is invalid".to_owned());
        assert_eq!(of(&[("stats-intervals.0.1", "5")]), nested);
        assert_eq!(read(&[("stats-intervals", "5")]).1.iter().count(), 1);
    }
}
