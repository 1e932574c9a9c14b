//! How a line may go on: commands, what `info` can tell, drives and nodes, jobs, devices, files.

use super::table::{COMMANDS, INFO, Line};
use crate::device::model;
use crate::state::Daemon;

/// Most completions that are looked for. Source: the reference's readline.
const MOST: usize = 256;

/// Most entries of a folder that are looked at.
const MOST_READ: usize = 10_000;

/// The words with which a line may go on, and how many bytes of them have been typed.
pub fn completions(daemon: &Daemon, typed: &str) -> (Vec<String>, usize) {
    let last = typed.rsplit(char::is_whitespace).next().unwrap_or_default();
    let before: Vec<&str> = typed[..typed.len() - last.len()].split_whitespace().collect();
    let names = |lines: &[Line]| -> Vec<String> {
        lines.iter().flat_map(|line| line.names.split('|')).map(str::to_owned).collect()
    };
    let words = match before.as_slice() {
        [] | ["help" | "?"] => names(COMMANDS),
        ["info"] | ["help" | "?", "info"] => names(INFO),
        ["info", item, rest @ ..] => {
            let line = INFO.iter().find(|line| line.is(item));
            line.map_or_else(Vec::new, |line| argument(daemon, line, rest, last))
        }
        [name, rest @ ..] => {
            let line = COMMANDS.iter().find(|line| line.is(name));
            line.map_or_else(Vec::new, |line| argument(daemon, line, rest, last))
        }
    };
    (words.into_iter().filter(|word| word.starts_with(last)).collect(), last.len())
}

/// What the next argument of a command may be, behind those that are there; `last` is what there is of it.
fn argument(daemon: &Daemon, line: &Line, there: &[&str], last: &str) -> Vec<String> {
    let mut kinds = line.arguments.split(',').filter_map(|argument| argument.split_once(':'));
    let given = there.iter().filter(|word| !word.starts_with('-')).count();
    let kind = kinds.by_ref().filter(|(_, kind)| !kind.starts_with('-')).nth(given);
    match (line.name(), kind.map(|(_, kind)| kind.trim_end_matches('?'))) {
        ("device_add", Some(_)) => model::names().map(str::to_owned).collect(),
        ("device_del", Some(_)) => {
            let devices = daemon.machine.iter().flat_map(|machine| machine.devices.devices());
            devices.filter_map(|device| device.id).collect()
        }
        (name, Some("B")) if name.starts_with("block_job") => {
            daemon.jobs.query().into_iter().map(|job| job.id.to_string()).collect()
        }
        (_, Some("B")) => disks(daemon),
        (_, Some("F")) => files(last),
        _ => Vec::new(),
    }
}

/// The names of drives and nodes.
fn disks(daemon: &Daemon) -> Vec<String> {
    let devices = daemon.machine.iter().flat_map(|machine| machine.devices.backends());
    let devices = devices.map(|backend| backend.name).filter(|name| !name.is_empty());
    let plan = daemon.graph.plan();
    let nodes = plan.nodes().map(|(_, node)| node.name.to_string());
    devices.chain(nodes.filter(|name| !name.starts_with('#'))).collect()
}

/// The files whose names begin so, folders with a slash.
fn files(typed: &str) -> Vec<String> {
    let (folder, begin) = typed.rsplit_once('/').map_or(("", typed), |(folder, begin)| (folder, begin));
    let front = &typed[..typed.len() - begin.len()];
    let folder = match (folder, front) {
        ("", "") => ".",
        ("", _) => "/",
        (folder, _) => folder,
    };
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let names = entries.take(MOST_READ).flatten().filter_map(|entry| {
        // What would do something to a terminal is not shown.
        let name = entry.file_name().into_string().ok().filter(|name| !name.chars().any(char::is_control))?;
        let slash = if entry.path().is_dir() { "/" } else { "" };
        name.starts_with(begin).then(|| format!("{front}{name}{slash}"))
    });
    names.take(MOST).collect()
}

#[cfg(test)]
mod tests {
    use super::files;

    #[test]
    fn files_and_folders() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = folder.path().to_string_lossy().into_owned();
        std::fs::create_dir(folder.path().join("inner")).expect("a folder");
        for name in ["in.img", "other", ".hidden", "in\x1b[2J"] {
            std::fs::write(folder.path().join(name), "").expect("a file");
        }
        let found = |typed: &str| {
            let mut names = files(&format!("{at}/{typed}"));
            names.sort();
            names.into_iter().map(|name| name.replace(&at, "")).collect::<Vec<_>>()
        };
        assert_eq!(found("in"), ["/in.img", "/inner/"]);
        assert_eq!(found(""), ["/.hidden", "/in.img", "/inner/", "/other"]);
        assert!(found("inner/").is_empty() && found("nothing/x").is_empty());
        assert!(files("/").contains(&"/tmp/".to_owned()));
    }
}
