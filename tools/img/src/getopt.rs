//! Reading options as getopt_long does: short ones together, long ones abbreviated, anything else in between.

use crate::Failure;

/// What a subcommand knows: its short options (a colon behind one that takes an argument) and its long ones, with
/// the letter that each stands for and whether it takes an argument.
#[derive(Clone, Copy, Debug)]
pub struct Known {
    /// As for getopt: `f:qU`.
    pub short: &'static str,
    /// Name, the letter or word it is reported as, whether it takes an argument.
    pub long: &'static [(&'static str, &'static str, bool)],
}

/// Options in their order, and the other words.
pub type Parsed = (Vec<(String, String)>, Vec<String>);

/// Reads `words`. Options come out under their letter, with their argument or an empty text.
pub fn parse(known: Known, words: &[String]) -> Result<Parsed, Failure> {
    let (mut options, mut others) = (Vec::new(), Vec::new());
    let mut words = words.iter();
    while let Some(word) = words.next() {
        if word == "--" {
            others.extend(words.cloned());
            break;
        }
        if let Some(long) = word.strip_prefix("--") {
            let (name, attached) = match long.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (long, None),
            };
            let (full, letter, takes) = find_long(known, name, word)?;
            let value = match (takes, attached) {
                (false, Some(_)) => {
                    return Err(Failure::new(format!("option '--{full}' doesn't allow an argument")));
                }
                (false, None) => String::new(),
                (true, Some(value)) => value,
                (true, None) => words
                    .next()
                    .cloned()
                    .ok_or_else(|| Failure::new(format!("option '--{full}' requires an argument")))?,
            };
            options.push((letter.to_owned(), value));
            continue;
        }
        match word.strip_prefix('-').filter(|rest| !rest.is_empty()) {
            Some(letters) => short(known, letters, &mut words, &mut options)?,
            None => others.push(word.clone()),
        }
    }
    Ok((options, others))
}

fn find_long(known: Known, name: &str, word: &str) -> Result<(&'static str, &'static str, bool), Failure> {
    if let Some(exact) = known.long.iter().find(|(long, _, _)| *long == name) {
        return Ok(*exact);
    }
    let matches: Vec<_> = known.long.iter().filter(|(long, _, _)| long.starts_with(name)).collect();
    match matches.as_slice() {
        [one] => Ok(**one),
        [] => Err(Failure::new(format!("unrecognized option '{word}'"))),
        several => {
            let names: Vec<_> = several.iter().map(|(long, _, _)| format!("'--{long}'")).collect();
            let names = names.join(" ");
            Err(Failure::new(format!("option '{word}' is ambiguous; possibilities: {names}")))
        }
    }
}

fn short(
    known: Known,
    letters: &str,
    words: &mut std::slice::Iter<'_, String>,
    options: &mut Vec<(String, String)>,
) -> Result<(), Failure> {
    for (at, letter) in letters.char_indices() {
        let Some(found) = known.short.find(letter).filter(|_| letter != ':') else {
            return Err(Failure::new(format!("invalid option -- '{letter}'")));
        };
        if !known.short[found + 1..].starts_with(':') {
            options.push((letter.to_string(), String::new()));
            continue;
        }
        let attached = &letters[at + letter.len_utf8()..];
        let value = match attached.is_empty() {
            false => attached.to_owned(),
            true => words
                .next()
                .cloned()
                .ok_or_else(|| Failure::new(format!("option requires an argument -- '{letter}'")))?,
        };
        options.push((letter.to_string(), value));
        break;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: Known = Known { short: "f:qU", long: &[("output", "output", true), ("quiet", "q", false)] };

    fn words(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn options_stand_anywhere() {
        let (options, others) = parse(KNOWN, &words("a -qf raw b --out=json -fqcow2 -- -U")).expect("valid");
        let flat: Vec<_> = options.iter().map(|(name, value)| format!("{name}={value}")).collect();
        assert_eq!(flat, ["q=", "f=raw", "output=json", "f=qcow2"]);
        assert_eq!(others, ["a", "b", "-U"]);
        for (line, text) in [
            ("-x", "invalid option -- 'x'"),
            ("-f", "option requires an argument -- 'f'"),
            ("--foo", "unrecognized option '--foo'"),
            ("--quiet=1", "option '--quiet' doesn't allow an argument"),
        ] {
            let failure = parse(KNOWN, &words(line)).expect_err("refused");
            assert_eq!(failure.message.as_deref(), Some(text));
        }
    }
}
