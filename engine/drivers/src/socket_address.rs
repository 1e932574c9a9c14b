//! Socket addresses as options say them. Source: `SocketAddress` of the reference's `query-qmp-schema`.

use underlay_qmp::json::{Object, Value};
use underlay_sys::net::{Abstract, Address, Inet};

/// The address that `members` describe, which is of the type `kind`. Names and types of the members have been checked.
pub fn from_options(kind: &str, members: &Object) -> Result<Address, String> {
    let text = |name: &str| members.get(name).and_then(Value::as_str).map(str::to_owned);
    let need = |name: &str| text(name).ok_or_else(|| format!("Parameter '{name}' is missing"));
    let flag = |name: &str| match members.get(name) {
        Some(Value::Bool(flag)) => Some(*flag),
        _ => None,
    };
    match kind {
        "unix" => Ok(unix(need("path")?, flag("abstract"), flag("tight"))),
        "inet" => Ok(Address::Inet(Inet {
            host: need("host")?,
            port: need("port")?,
            to: members.get("to").and_then(Value::as_u64).and_then(|port| u16::try_from(port).ok()),
            ipv4: flag("ipv4"),
            ipv6: flag("ipv6"),
            keep_alive: flag("keep-alive"),
            mptcp: flag("mptcp"),
            numeric: flag("numeric"),
        })),
        "fd" => fd(&need("str")?),
        other => Err(format!("Socket address type '{other}' is not supported")),
    }
}

/// A UNIX socket; `tight` says something only of one without a file.
pub fn unix(path: String, has_no_file: Option<bool>, tight: Option<bool>) -> Address {
    match has_no_file {
        Some(true) => Address::Abstract(Abstract { name: path, tight: tight.unwrap_or(true) }),
        _ => Address::Unix(path.into()),
    }
}

/// A descriptor, by its number.
pub fn fd(number: &str) -> Result<Address, String> {
    number.parse().map(Address::Fd).map_err(|_| format!("Unable to parse FD number {number}"))
}

/// The options that describe an address: type and members.
pub fn to_options(address: &Address) -> Object {
    match address {
        Address::Unix(path) => {
            Object::new().with("type", "unix").with("path", path.to_string_lossy().into_owned())
        }
        Address::Abstract(Abstract { name, tight }) => {
            let object = Object::new().with("type", "unix").with("path", name.clone());
            object.with("abstract", true).with("tight", *tight)
        }
        Address::Fd(fd) => Object::new().with("type", "fd").with("str", fd.to_string()),
        Address::Inet(inet) => {
            let mut object = Object::new().with("type", "inet").with("host", inet.host.clone());
            object.insert("port", inet.port.clone());
            if let Some(to) = inet.to {
                object.insert("to", u64::from(to));
            }
            let wishes = [
                ("ipv4", inet.ipv4),
                ("ipv6", inet.ipv6),
                ("keep-alive", inet.keep_alive),
                ("mptcp", inet.mptcp),
                ("numeric", inet.numeric),
            ];
            for (name, wish) in wishes {
                if let Some(wish) = wish {
                    object.insert(name, wish);
                }
            }
            object
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_come_back() {
        for text in [
            r#"{"type": "unix", "path": "/s"}"#,
            r#"{"type": "unix", "path": "s", "abstract": true, "tight": false}"#,
            r#"{"type": "inet", "host": "h", "port": "1", "to": 5, "ipv4": true, "ipv6": false}"#,
            r#"{"type": "inet", "host": "", "port": "x", "keep-alive": true, "mptcp": false, "numeric": true}"#,
            r#"{"type": "fd", "str": "7"}"#,
        ] {
            let Ok(Value::Object(object)) = underlay_qmp::json::parse(text.as_bytes()) else {
                panic!("{text}")
            };
            let kind = object.get("type").and_then(Value::as_str).expect("a type");
            let address = from_options(kind, &object).expect("an address");
            assert_eq!(Value::Object(to_options(&address)).to_string(), Value::Object(object).to_string());
        }
    }
}
