//! Cuts a typed line into words. Blanks separate them, but not inside a value that begins with a bracket or a quote:
//! `a=1 file={"driver": "file"} filename='a b'` is three words.

use crate::line::LineError;

/// A word, and where in the line it begins, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Word<'a> {
    pub(crate) at: usize,
    pub(crate) text: &'a str,
}

/// The words of a line.
pub(crate) fn cut(line: &str) -> Result<Vec<Word<'_>>, LineError> {
    let mut words = Vec::new();
    let mut at = 0;
    while let Some(blanks) = line[at..].find(|c: char| !c.is_whitespace()) {
        at += blanks;
        let len = word_len(&line[at..])?;
        words.push(Word { at, text: &line[at..at + len] });
        at += len;
    }
    Ok(words)
}

/// The length of the word at the start of `text`, in bytes.
fn word_len(text: &str) -> Result<usize, LineError> {
    let bare = text.find(char::is_whitespace).unwrap_or(text.len());
    let Some(equals) = text[..bare].find('=') else { return Ok(bare) };
    let value = equals + 1;
    let key = &text[..equals];
    let len = match text[value..].chars().next() {
        Some('{' | '[') => bracketed(&text[value..]),
        Some(quote @ ('"' | '\'')) => quoted(&text[value..], quote),
        _ => return Ok(bare),
    };
    let end = value + len.ok_or_else(|| LineError::NotClosed(key.to_owned()))?;
    match text[end..].chars().next() {
        Some(c) if !c.is_whitespace() => Err(LineError::Trailing(key.to_owned())),
        _ => Ok(end),
    }
}

/// The length of the quoted text at the start of `text`, with its quotes.
pub(crate) fn quoted(text: &str, quote: char) -> Option<usize> {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return Some(at + 1),
            _ => {}
        }
    }
    None
}

/// The length of what stands in brackets at the start of `text`. Which bracket closes which is for the parser to say.
fn bracketed(text: &str) -> Option<usize> {
    let (mut depth, mut at) = (0_u32, 0);
    while let Some(c) = text[at..].chars().next() {
        match c {
            '"' | '\'' => at += quoted(&text[at..], c)? - 1,
            '{' | '[' => depth += 1,
            '}' | ']' => depth -= 1,
            _ => {}
        }
        // A quote that was passed over ends with a byte of its own, as every other character here.
        at += c.len_utf8();
        if depth == 0 {
            return Some(at);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(line: &str) -> Vec<&str> {
        cut(line).expect("words").into_iter().map(|word| word.text).collect()
    }

    #[test]
    fn blanks_in_values_do_not_separate() {
        assert_eq!(texts("  a  b=1\tc= "), ["a", "b=1", "c="]);
        assert_eq!(
            texts(r#"a f={"x": "} ]", 'y': [1, 2]} g='a "b' h="\" x""#),
            ["a", r#"f={"x": "} ]", 'y': [1, 2]}"#, "g='a \"b'", r#"h="\" x""#]
        );
        assert_eq!(
            texts("a=it's b=nbd:h:1:exportname=x c=é\u{3000}d"),
            ["a=it's", "b=nbd:h:1:exportname=x", "c=é", "d"]
        );
        assert_eq!(cut(" é b").expect("words")[1], Word { at: 4, text: "b" });
    }

    #[test]
    fn what_is_not_closed_is_refused() {
        for line in ["a b={", "a b=[1", "a b='x", "a b={\"}", "a b=[{]"] {
            assert_eq!(cut(line), Err(LineError::NotClosed("b".to_owned())), "{line}");
        }
        assert_eq!(cut("a b={}c"), Err(LineError::Trailing("b".to_owned())));
        assert_eq!(cut("a b='x'y"), Err(LineError::Trailing("b".to_owned())));
    }
}
