//! Character devices in the short form that `-qmp` and `-monitor` take: `unix:PATH,server=on`, `tcp:HOST:PORT`,
//! `stdio`, …

use underlay_qmp::option_list::{self, OptionList};

use crate::error::{CommandError, CommandResult};

/// The options of `-chardev` that say the same.
pub fn parse(text: &str) -> CommandResult<OptionList> {
    // Several on one device are not supported; one is.
    let text = text.strip_prefix("mon:").unwrap_or(text);
    let bad = || CommandError {
        hint: Some(format!("parse error: {text}")),
        ..CommandError::new(format!("'{text}' is not a valid char driver"))
    };
    let with = |backend: &str, options: &str| {
        let mut list = option_list::parse_knowing(options, None, &["nodelay"]);
        // The short form takes switches without a word about it.
        list.warnings.clear();
        list.options.insert("backend", backend);
        list
    };
    if let "stdio" | "null" | "pty" = text {
        return Ok(with(text, ""));
    }
    let (kind, rest) = text.split_once(':').ok_or_else(bad)?;
    let (place, options) = split(rest);
    let mut list = match kind {
        "unix" | "tcp" | "telnet" => with("socket", options),
        "pipe" | "file" => with(kind, options),
        _ => return Err(bad()),
    };
    match kind {
        "tcp" | "telnet" => {
            let (host, port) =
                host_and_port(&place).ok_or_else(|| CommandError::new(format!("parse error: {text}")))?;
            list.options.insert("host", host);
            list.options.insert("port", port);
            if kind == "telnet" {
                list.options.insert("telnet", "on");
            }
        }
        _ => list.options.insert("path", place),
    }
    Ok(list)
}

/// What comes before the options, with doubled commas undone, and the options.
fn split(text: &str) -> (String, &str) {
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        if bytes[at] == b',' {
            if bytes.get(at + 1) != Some(&b',') {
                return (text[..at].replace(",,", ","), &text[at + 1..]);
            }
            at += 1;
        }
        at += 1;
    }
    (text.replace(",,", ","), "")
}

/// `HOST:PORT`, `[HOST]:PORT`
fn host_and_port(place: &str) -> Option<(&str, &str)> {
    match place.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']')?;
            Some((host, port.strip_prefix(':')?))
        }
        None => place.split_once(':'),
    }
}

#[cfg(test)]
mod tests {
    use super::parse;
    use underlay_qmp::json::Object;

    #[test]
    fn short_forms() {
        let options = |text| parse(text).expect("fine").options;
        let sorted = |object: Object| {
            let mut all: Vec<_> = object
                .iter()
                .map(|(name, value)| format!("{name}={}", value.as_str().unwrap_or("?")))
                .collect();
            all.sort();
            all.join(" ")
        };
        for (text, same) in [
            ("unix:/tmp/a,,b,server,nowait", "backend=socket path=/tmp/a,b server=on wait=off"),
            ("tcp:localhost:44,server=on", "backend=socket host=localhost port=44 server=on"),
            ("telnet:[::1]:44", "backend=socket host=::1 port=44 telnet=on"),
            ("stdio", "backend=stdio"),
            ("pipe:p", "backend=pipe path=p"),
        ] {
            assert_eq!(sorted(options(text)), same, "{text}");
        }
        let error = parse("nope").expect_err("no such kind");
        assert_eq!(error.in_full(), "'nope' is not a valid char driver\nparse error: nope");
        assert_eq!(parse("tcp:x").expect_err("no port").in_full(), "parse error: tcp:x");
    }
}
