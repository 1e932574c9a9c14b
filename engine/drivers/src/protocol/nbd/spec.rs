//! Where an NBD export is, as options and as a name. Source: QEMU's `qapi/block-core.json` as its schema reports it,
//! the NBD URI specification, and what `qemu-img` 10.0.2 makes of names.

use std::time::Duration;

use underlay_qmp::json::{Object, Value};
use underlay_sys::net::{Address, Inet};

use underlay_graph::IoError;
use underlay_nbd::MAX_NAME;

use crate::error::OpenError;
use crate::socket_address;

/// The port of the protocol.
const PORT: &str = "10809";

/// Options of `nbd`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdSpec {
    /// `server`
    pub server: Address,
    /// `export`; empty is the server's default export.
    pub export: String,
    /// `reconnect-delay`: how long requests wait for a server that is gone.
    pub reconnect_delay: Duration,
    /// `open-timeout`: how long to try to connect at first.
    pub open_timeout: Duration,
    /// `x-dirty-bitmap`: the meta context that is asked for instead of `base:allocation`.
    pub context: Option<String>,
}

impl NbdSpec {
    fn at(server: Address, export: &str) -> Self {
        let (reconnect_delay, open_timeout) = (Duration::ZERO, Duration::ZERO);
        Self { server, export: export.to_owned(), reconnect_delay, open_timeout, context: None }
    }

    /// From the value of `server`.
    pub fn server(object: &Object) -> Result<Address, OpenError> {
        let kind = object.get("type").and_then(Value::as_str);
        let kind = kind.ok_or_else(|| OpenError::text("Parameter 'type' is missing".to_owned()))?;
        socket_address::from_options(kind, object).map_err(OpenError::text)
    }

    /// From a name: `nbd:…` or a URI.
    pub fn parse(name: &str) -> Result<Self, OpenError> {
        match name.strip_prefix("nbd:").filter(|rest| !rest.starts_with("//")) {
            Some(rest) => old_name(rest),
            None => uri(name).ok_or_else(|| OpenError::text("No valid URL specified".to_owned())),
        }
    }

    /// Refuses a name of an export that the protocol has no room for.
    pub fn check_export(&self) -> std::result::Result<(), IoError> {
        match self.export.len() > MAX_NAME || self.export.contains('\0') {
            true => Err(IoError::EINVAL.with("export name too long to send to server")),
            false => Ok(()),
        }
    }

    /// The name that leads there; `None` where options say more than a name can.
    pub fn name(&self) -> Option<String> {
        let export = encode(&self.export);
        match &self.server {
            Address::Unix(path) => {
                let path = encode_path(&path.to_string_lossy());
                Some(match export.is_empty() {
                    true => format!("nbd+unix://?socket={path}"),
                    false => format!("nbd+unix:///{export}?socket={path}"),
                })
            }
            Address::Inet(inet) if says_more(inet) => None,
            Address::Inet(Inet { host, port, .. }) => {
                let host = if host.contains(':') { format!("[{host}]") } else { host.clone() };
                Some(match export.is_empty() {
                    true => format!("nbd://{host}:{port}"),
                    false => format!("nbd://{host}:{port}/{export}"),
                })
            }
            Address::Abstract(_) | Address::Fd(_) => None,
        }
    }

    /// The options that lead there, for `json:{…}`.
    pub fn options(&self) -> Vec<(String, Value)> {
        let server = socket_address::to_options(&self.server);
        let mut options: Vec<_> =
            server.iter().map(|(name, value)| (format!("server.{name}"), value.clone())).collect();
        if !self.export.is_empty() {
            options.push(("export".to_owned(), Value::Str(self.export.clone())));
        }
        options
    }
}

/// Whether it matters for where a connection leads, as the reference sees it.
fn says_more(inet: &Inet) -> bool {
    inet.to.is_some() || [inet.ipv4, inet.ipv6, inet.numeric].iter().any(Option::is_some)
}

/// Whether a file name means an export.
pub fn is_name(name: &str) -> bool {
    ["nbd:", "nbd+tcp:", "nbd+unix:"].iter().any(|scheme| name.starts_with(scheme))
}

/// `unix:PATH` or `HOST:PORT`, and perhaps `:exportname=NAME`.
fn old_name(rest: &str) -> Result<NbdSpec, OpenError> {
    let (address, export) = rest.split_once(":exportname=").unwrap_or((rest, ""));
    if let Some(path) = address.strip_prefix("unix:") {
        return Ok(NbdSpec::at(Address::Unix(path.into()), export));
    }
    let wrong = || OpenError::text(format!("error parsing address '{address}'"));
    let (host, port) = address.rsplit_once(':').ok_or_else(wrong)?;
    if port.is_empty() {
        return Err(wrong());
    }
    let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    Ok(NbdSpec::at(Inet::new(host, port).into(), export))
}

fn uri(name: &str) -> Option<NbdSpec> {
    let (scheme, rest) = name.split_once("://")?;
    // A fragment is for whoever uses the URI, and who the user is nobody asks.
    let rest = rest.split_once('#').map_or(rest, |(rest, _)| rest);
    let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, path) = place.split_once('/').unwrap_or((place, ""));
    let authority = authority.rsplit_once('@').map_or(authority, |(_, authority)| authority);
    let export = decode(path)?;
    let mut socket = None;
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        socket = Some(pair.strip_prefix("socket=")?);
    }
    if scheme == "nbd+unix" {
        let path = decode(socket?)?;
        return authority.is_empty().then(|| NbdSpec::at(Address::Unix(path.into()), &export));
    }
    if !matches!(scheme, "nbd" | "nbd+tcp") || authority.is_empty() || socket.is_some() {
        return None;
    }
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']')?;
            (host, port.strip_prefix(':').unwrap_or(PORT))
        }
        None => authority.split_once(':').unwrap_or((authority, PORT)),
    };
    let port = if matches!(port, "" | "0") { PORT } else { port };
    let valid = !host.is_empty() && port.parse::<u16>().is_ok();
    valid.then(|| NbdSpec::at(Inet::new(decode(host).unwrap_or_default(), port).into(), &export))
}

/// `%41` is `A`. `None` for what is no text, or what ends within it as other programs see it.
fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, later)) = rest.split_first() {
        if first == b'%' {
            let digits = std::str::from_utf8(later.get(..2)?).ok()?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
            rest = &later[2..];
        } else {
            bytes.push(first);
            rest = later;
        }
    }
    String::from_utf8(bytes).ok().filter(|text| !text.contains('\0'))
}

fn encode_where(text: &str, plain: impl Fn(u8) -> bool) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || plain(byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

fn encode(text: &str) -> String {
    encode_where(text, |byte| b"/!$&'()*+,;=:@".contains(&byte))
}

fn encode_path(text: &str) -> String {
    encode_where(text, |byte| b"/!$'()*+,;=:@".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_to_servers() {
        let unix = |path: &str| Address::Unix(path.into());
        let inet = |host: &str, port: &str| Address::from(Inet::new(host, port));
        for (name, server, export) in [
            ("nbd:unix:/s", unix("/s"), ""),
            ("nbd:unix:/s:exportname=a:b", unix("/s"), "a:b"),
            ("nbd:host:10:exportname=x", inet("host", "10"), "x"),
            ("nbd:[::1]:10", inet("::1", "10"), ""),
            ("nbd://host", inet("host", "10809"), ""),
            ("nbd+tcp://host:5/a/b", inet("host", "5"), "a/b"),
            ("nbd://[::1]:5/", inet("::1", "5"), ""),
            ("nbd+unix:///d%20k?socket=/a%3Fb", unix("/a?b"), "d k"),
            ("nbd+unix://?socket=s", unix("s"), ""),
        ] {
            let spec = NbdSpec::parse(name).unwrap();
            assert_eq!((&spec.server, spec.export.as_str()), (&server, export), "{name}");
            assert_eq!(NbdSpec::parse(&spec.name().unwrap()).unwrap(), spec, "{name}");
        }
    }

    #[test]
    fn names_may_say_more_than_is_asked() {
        for (name, same) in [
            ("nbd+unix:///x?socket=r&socket=s", "nbd+unix:///x?socket=s"),
            ("nbd+unix://u:p@/x?socket=s#f", "nbd+unix:///x?socket=s"),
            ("nbd://u@h/x#f", "nbd://h/x"),
            ("nbd://h:/x", "nbd://h:10809/x"),
        ] {
            assert_eq!(NbdSpec::parse(name).unwrap(), NbdSpec::parse(same).unwrap());
        }
    }

    #[test]
    fn names_that_lead_nowhere() {
        for name in [
            "nbd:foo",
            "nbd:",
            "nbd://",
            "nbd+unix:///x",
            "nbd+unix:///x?socket=s&other=1",
            "nbd+unix:///x%00?socket=s",
            "nbd://h?x=y",
            "nbd://h:x/",
            "nbd+unix://h/x?socket=s",
            "nbd://h/%zz",
        ] {
            assert!(NbdSpec::parse(name).is_err(), "{name}");
        }
    }
}
