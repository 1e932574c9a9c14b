//! `COMMAND --help`: how a command is called, and a phrase for each option that it takes.

use std::fmt::Write;

use underlay_sys::say_part;

use crate::Outcome;
use crate::getopt::Known;

/// The help of a command.
pub struct Help {
    pub command: &'static str,
    /// How it is called, without a line's end.
    pub usage: &'static str,
    pub known: Known,
}

/// Commands (all if there is none), an option as it is reported, its argument, and what it does.
type Row = (&'static [&'static str], &'static str, &'static str, &'static str);

/// The first that fits an option tells of it.
const ROWS: &[Row] = &[
    (&[], "h", "", "show this text"),
    (&[], "q", "", "say nothing but errors"),
    (&[], "p", "", "show how much is done"),
    (
        &[],
        "image-opts",
        "",
        "the image is given by a list of options instead of a name; not together with -f",
    ),
    (&[], "output", "human|json", "for people (the default) or for programs"),
    (&[], "U", "", "open the image also while somebody writes to it"),
    (&["amend"], "force", "", "also what is not safe"),
    (&["amend"], "o", "OPTIONS", "what to change: NAME=VALUE,...; 'help' lists the names"),
    (&["bitmap"], "b", "SOURCE_FILENAME", "the image that the source of --merge is in, if it is another one"),
    (&["bitmap"], "F", "SOURCE_FMT", "its format"),
    (&["bitmap"], "g", "SIZE", "how many bytes one bit of the bitmap of --add stands for"),
    (&["bitmap"], "add", "", "make the bitmap, and record in it from now on"),
    (&["bitmap"], "remove", "", "remove the bitmap"),
    (&["bitmap"], "clear", "", "forget what is recorded"),
    (&["bitmap"], "enable", "", "record from now on"),
    (&["bitmap"], "disable", "", "record nothing from now on"),
    (&["bitmap"], "merge", "SOURCE", "add what the bitmap SOURCE has recorded"),
    (&["check"], "r", "leaks|all", "repair clusters that nobody uses, or all there is; not together with -U"),
    (&["commit"], "b", "BASE", "the image of the chain that gets the data (the next one else); implies -d"),
    (&["commit"], "d", "", "do not empty the image afterwards"),
    (&["compare"], "f", "FMT", "format of the first image; found out if not given"),
    (&["compare"], "F", "FMT", "format of the second image"),
    (&["compare"], "s", "", "the images must have the same length and the same allocated places, too"),
    (&["compare"], "T", "CACHE", "cache mode of both images (writeback)"),
    (&["convert"], "f", "FMT", "format of the sources; found out if not given"),
    (
        &["convert"],
        "source-image-opts",
        "",
        "the sources are given by lists of options; not together with -f",
    ),
    (
        &["convert"],
        "l",
        "SNAPSHOT",
        "copy an internal snapshot: its ID or name, snapshot.id=… or snapshot.name=…",
    ),
    (&["convert"], "T", "CACHE", "cache mode of the sources (writeback)"),
    (&["convert"], "target-image-opts", "", "the target is given by a list of options; needs -n"),
    (&["convert"], "c", "", "compress what is copied (qcow2)"),
    (&["convert"], "t", "CACHE", "cache mode of the target (unsafe)"),
    (
        &["convert"],
        "B",
        "BACKING",
        "backing file of the target; what it shares with the source is not copied",
    ),
    (&["convert", "create", "rebase"], "F", "FMT", "format of the backing file"),
    (&["convert"], "n", "", "the target is there already; it is not made"),
    (
        &["convert"],
        "target-is-zero",
        "",
        "the target reads as zeroes now, which need not be written; needs -n",
    ),
    (&["convert"], "S", "SIZE", "runs of zeroes of this length become holes (4k); 0: none do"),
    (&["convert"], "bitmaps", "", "copy the persistent bitmaps, too"),
    (&["convert"], "skip-broken-bitmaps", "", "leave out those that are inconsistent"),
    (&["convert"], "m", "COUNT", "how many parts are copied at the same time, 1 to 16 (8)"),
    (&["convert"], "C", "", "let the kernel copy, which is tried in any case where it shares the storage"),
    (&["convert"], "salvage", "", "what cannot be read becomes zeroes"),
    (&["convert"], "W", "", "write out of order, which is done anyway"),
    (&["commit", "convert"], "r", "RATE", "bytes per second at most"),
    (&["create"], "f", "FMT", "format of the new image (raw)"),
    (&["create"], "b", "BACKING", "the new image starts as what this file has, which stays as it is"),
    (&["create"], "u", "", "do not open the backing file"),
    (
        &["convert", "create", "measure"],
        "o",
        "OPTIONS",
        "of the new image: NAME=VALUE,...; 'help' lists the names",
    ),
    (&["convert", "dd", "measure"], "O", "FMT", "format of the target (raw)"),
    (&["info"], "b", "", "tell of all the images below it, too"),
    (&["map"], "s", "OFFSET", "begin here"),
    (&["map"], "l", "LENGTH", "tell of so many bytes"),
    (&["measure"], "l", "SNAPSHOT", "measure for this internal snapshot"),
    (&["measure"], "size", "SIZE", "measure for an empty image of this size"),
    (&["rebase"], "b", "BACKING", "the new backing file; '' for none"),
    (&["rebase"], "T", "CACHE", "cache mode of the backing files (writeback)"),
    (
        &["rebase"],
        "u",
        "",
        "only name the backing file, and copy nothing: the old one must have the same data",
    ),
    (&["rebase"], "c", "", "compress what is copied into the image (qcow2)"),
    (&["resize"], "preallocation", "MODE", "what to reserve of the new part: off, metadata, falloc or full"),
    (&["resize"], "shrink", "", "the disk may become smaller, and lose its end"),
    (&["snapshot"], "l", "", "list the snapshots (the default)"),
    (&["snapshot"], "a", "SNAPSHOT", "the disk becomes what it was then"),
    (&["snapshot"], "c", "SNAPSHOT", "make a snapshot of this name"),
    (&["snapshot"], "d", "SNAPSHOT", "delete it"),
    (&[], "f", "FMT", "format of the image; found out if not given"),
    (&["amend", "commit", "rebase"], "t", "CACHE", "cache mode of the image (writeback)"),
    (&["check"], "T", "CACHE", "cache mode of the image (writeback)"),
];

/// Of words that are no options: the command, the word, what it is.
const OPERANDS: &[(&str, &str, &str)] = &[
    ("create", "SIZE", "of the disk, with a suffix perhaps; that of the backing file if not given"),
    ("dd", "bs=SIZE", "of a block (512)"),
    ("dd", "count=BLOCKS", "how many blocks to copy (all)"),
    ("dd", "skip=BLOCKS", "how many blocks of the input to leave out"),
    ("dd", "if=INPUT", "the image to read"),
    ("dd", "of=OUTPUT", "the image to make"),
    ("resize", "[+|-]SIZE", "of the disk, or how much it becomes longer or shorter"),
];

/// Options that are known, but refused.
const REFUSED: [&str; 1] = ["object"];

impl Help {
    /// Prints it.
    pub fn print(&self) -> Outcome {
        say_part!("{}", self.text());
        Ok(())
    }

    fn text(&self) -> String {
        let mut text = format!("{}\n\n", self.usage);
        for option in self.options() {
            let (argument, phrase) = self.row(option).unwrap_or_default();
            line(&mut text, &format!("{} {argument}", self.names(option).join(", ")), phrase);
        }
        for (_, word, phrase) in OPERANDS.iter().filter(|(command, _, _)| *command == self.command) {
            line(&mut text, word, phrase);
        }
        text
    }

    /// All options that are taken, as they are reported: once each.
    fn options(&self) -> Vec<&'static str> {
        let short = self.known.short;
        let letters = (0..short.len()).map(|at| &short[at..=at]).filter(|letter| *letter != ":");
        let mut options = Vec::new();
        for option in self.known.long.iter().map(|(_, option, _)| *option).chain(letters) {
            if !options.contains(&option) && !REFUSED.contains(&option) {
                options.push(option);
            }
        }
        options
    }

    /// All names of an option, with dashes.
    fn names(&self, option: &str) -> Vec<String> {
        let letter = (option.len() == 1).then(|| format!("-{option}"));
        let long = self.known.long.iter().filter(|(_, reported, _)| *reported == option);
        letter.into_iter().chain(long.map(|(name, _, _)| format!("--{name}"))).collect()
    }

    fn row(&self, option: &str) -> Option<(&'static str, &'static str)> {
        let fits = |row: &&Row| row.1 == option && (row.0.is_empty() || row.0.contains(&self.command));
        ROWS.iter().find(fits).map(|(_, _, argument, phrase)| (*argument, *phrase))
    }
}

/// A word and what it does; on a line of its own where the word is long.
fn line(text: &mut String, word: &str, phrase: &str) {
    const WIDTH: usize = 34;
    let word = word.trim_end();
    let gap = if word.len() > WIDTH { format!("\n  {:WIDTH$}", "") } else { String::new() };
    // Writing to a text does not fail.
    let _ = writeln!(text, "  {word:WIDTH$}{gap}  {phrase}");
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Help; 14] = [
        crate::amend::HELP,
        crate::bitmap::HELP,
        crate::check::HELP,
        crate::commit::HELP,
        crate::compare::HELP,
        crate::convert::HELP,
        crate::create::HELP,
        crate::dd::HELP,
        crate::info::HELP,
        crate::map::HELP,
        crate::measure::HELP,
        crate::rebase::HELP,
        crate::resize::HELP,
        crate::snapshot::HELP,
    ];

    /// Every option that is taken has its phrase, and an argument if it takes one.
    #[test]
    fn all_options_are_told() {
        for help in ALL {
            let (command, text) = (help.command, help.text());
            assert!(text.starts_with(&format!("Usage: qemu-img {command} ")), "{text}");
            for option in help.options() {
                let (argument, phrase) = help.row(option).unwrap_or_default();
                assert!(!phrase.is_empty() && text.contains(phrase), "{command}: {option}");
                for name in help.names(option) {
                    assert!(text.contains(&name), "{command}: {name}");
                }
                let short = help.known.short.contains(&format!("{option}:"));
                let long = help.known.long.iter().any(|(_, reported, takes)| *reported == option && *takes);
                assert_eq!(!argument.is_empty(), short || long, "{command}: {option}");
            }
            let mut told = text.lines().skip_while(|line| !line.is_empty());
            assert!(told.all(|line| line.len() <= 120), "{text}");
        }
    }

    /// A row that no command needs would be a mistake.
    #[test]
    fn all_rows_are_of_use() {
        for (commands, option, _, phrase) in ROWS {
            for command in *commands {
                let help = ALL.iter().find(|help| help.command == *command).expect("a command");
                let told =
                    help.options().contains(option) && help.row(option).map(|row| row.1) == Some(*phrase);
                assert!(told, "{command} {option}");
            }
        }
    }
}
