//! The commands: names, how many words they take, and what they need.

/// A command.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Command {
    /// Its name.
    pub name: &'static str,
    /// A short one.
    pub short: &'static str,
    /// Its words, as they are shown.
    pub words: Option<&'static str>,
    /// What it does, as it is shown.
    pub summary: &'static str,
    /// Fewest words that may follow.
    pub least: usize,
    /// Most words that may follow.
    pub most: usize,
    /// Only with an open disk.
    pub needs: Needs,
}

/// What must be there before a command is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// Nothing.
    Nothing,
    /// An open disk.
    Disk,
    /// An open disk that may be written to.
    Writable,
}

const ANY: usize = usize::MAX;

const fn command(
    names: (&'static str, &'static str),
    words: Option<&'static str>,
    summary: &'static str,
    (least, most): (usize, usize),
    needs: Needs,
) -> Command {
    Command { name: names.0, short: names.1, words, summary, least, most, needs }
}

use Needs::{Disk, Nothing, Writable};

/// All commands by name; words and summaries are what the reference shows.
pub const COMMANDS: [Command; 32] = [
    command(("abort", ""), None, "simulate a program crash using abort(3)", (0, 0), Nothing),
    command(("aio_flush", ""), None, "completes all outstanding aio requests", (0, 0), Disk),
    command(
        ("aio_read", ""),
        Some("[-Ciqrv] [-P pattern] off len [len..]"),
        "asynchronously reads a number of bytes",
        (2, ANY),
        Disk,
    ),
    command(
        ("aio_write", ""),
        Some("[-Cfiqruz] [-P pattern] off len [len..]"),
        "asynchronously writes a number of bytes",
        (2, ANY),
        Writable,
    ),
    command(
        ("alloc", "a"),
        Some("offset [count]"),
        "checks if offset is allocated in the file",
        (1, 2),
        Disk,
    ),
    command(
        ("break", ""),
        Some("event tag"),
        "sets a breakpoint on event and tags the stopped request as tag",
        (2, 2),
        Disk,
    ),
    command(("close", "c"), None, "close the current open file", (0, 0), Disk),
    command(
        ("discard", "d"),
        Some("[-Cq] off len"),
        "discards a number of bytes at a specified offset",
        (2, ANY),
        Writable,
    ),
    command(("flush", "f"), None, "flush all in-core file state to disk", (0, 0), Disk),
    command(("help", "?"), Some("[command]"), "help for one or all commands", (0, 1), Nothing),
    command(("info", "i"), None, "prints information about the current file", (0, 0), Disk),
    command(("length", "l"), None, "gets the length of the current file", (0, 0), Disk),
    command(("map", ""), Some(""), "prints the allocated areas of a file", (0, 0), Disk),
    command(
        ("open", "o"),
        Some("[-rsCnkU] [-t cache] [-d discard] [-o options] [path]"),
        "open the file specified by path",
        (1, ANY),
        Nothing,
    ),
    command(("quit", "q"), None, "exit the program", (0, ANY), Nothing),
    command(
        ("read", "r"),
        Some("[-abCqrv] [-P pattern [-s off] [-l len]] off len"),
        "reads a number of bytes at a specified offset",
        (2, ANY),
        Disk,
    ),
    command(
        ("readv", ""),
        Some("[-Cqrv] [-P pattern] off len [len..]"),
        "reads a number of bytes at a specified offset",
        (2, ANY),
        Disk,
    ),
    command(("remove_break", ""), Some("tag"), "remove a breakpoint by tag", (1, 1), Disk),
    command(
        ("reopen", ""),
        Some("[(-r|-w)] [-c cache] [-o options]"),
        "reopens an image with new options",
        (0, ANY),
        Disk,
    ),
    command(("resume", ""), Some("tag"), "resumes the request tagged as tag", (1, 1), Disk),
    command(("sigraise", ""), Some("signal"), "raises a signal", (1, 1), Nothing),
    command(("sleep", ""), None, "waits for the given value in milliseconds", (1, 1), Nothing),
    command(
        ("truncate", "t"),
        Some("[-m prealloc_mode] off"),
        "truncates the current file at the given offset",
        (1, 3),
        Writable,
    ),
    command(("wait_break", ""), Some("tag"), "waits for the suspension of a request", (1, 1), Disk),
    command(
        ("write", "w"),
        Some("[-bcCfnqruz] [-P pattern | -s source_file] off len"),
        "writes a number of bytes at a specified offset",
        (2, ANY),
        Writable,
    ),
    command(
        ("writev", ""),
        Some("[-Cfqr] [-P pattern] off len [len..]"),
        "writes a number of bytes at a specified offset",
        (2, ANY),
        Writable,
    ),
    command(
        ("zone_append", "zap"),
        Some("offset len [len..]"),
        "append write a number of bytes at a specified offset",
        (3, 4),
        Disk,
    ),
    command(
        ("zone_close", "zc"),
        Some("offset len"),
        "close a range of zones in zone block device",
        (2, 2),
        Disk,
    ),
    command(
        ("zone_finish", "zf"),
        Some("offset len"),
        "finish a range of zones in zone block device",
        (2, 2),
        Disk,
    ),
    command(
        ("zone_open", "zo"),
        Some("offset len"),
        "explicit open a range of zones in zone block device",
        (2, 2),
        Disk,
    ),
    command(("zone_report", "zrp"), Some("offset number"), "report zone information", (2, 2), Disk),
    command(
        ("zone_reset", "zrs"),
        Some("offset len"),
        "reset a zone write pointer in zone block device",
        (2, 2),
        Disk,
    ),
];

/// The command of this name, long or short.
pub fn find(name: &str) -> Option<&'static Command> {
    COMMANDS.iter().find(|command| command.name == name || (!name.is_empty() && command.short == name))
}

impl Command {
    /// One line about it under the name that the user knows it by.
    pub fn line(&self, name: &str) -> String {
        match self.words {
            Some(words) => format!("{name} {words} -- {}", self.summary),
            None => format!("{name} -- {}", self.summary),
        }
    }

    /// Whether monitors have it: the disk there is not theirs to open or to close, and the program not theirs to end.
    pub fn is_of_monitors(&self) -> bool {
        !matches!(self.name, "abort" | "close" | "open" | "quit" | "sigraise")
    }

    /// What is wrong with `count` words behind it, if that is wrong.
    pub fn wrong_count(&self, name: &str, count: usize) -> Option<String> {
        if (self.least..=self.most).contains(&count) {
            return None;
        }
        let expected = match (self.least, self.most) {
            (least, ANY) => format!("at least {least}"),
            (least, most) if least == most => least.to_string(),
            (least, most) => format!("between {least} and {most}"),
        };
        Some(format!("bad argument count {count} to {name}, expected {expected} arguments"))
    }
}

#[cfg(test)]
mod tests {
    use super::{COMMANDS, find};

    #[test]
    fn sorted_by_name_and_no_name_twice() {
        assert!(COMMANDS.is_sorted_by_key(|command| command.name));
        for command in COMMANDS {
            assert_eq!(find(command.name), Some(&command));
            assert!(command.short.is_empty() || find(command.short) == Some(&command));
        }
        assert_eq!(find(""), None);
    }
}
