//! What each driver makes of its options.

use std::time::Duration;

use underlay_qcow2::OpenOptions as Qcow2Options;
use underlay_qmp::json::{Object, Value};

use super::fields::Fields;
use super::{Backing, DriverSpec, FileSpec, Given, NodeSpec, NullSpec};
use crate::error::OpenError;
use crate::filter::copy_before_write::{CbwOptions, OnCbwError};
use crate::format::raw::RawOptions;
use crate::protocol::file::{Aio, Locking};
use crate::protocol::nbd::spec::NbdSpec;

/// What was given for an image that has turned out to be of `format`. Its file is open already.
pub(crate) fn probed(format: &str, mut rest: Object) -> Result<DriverSpec, OpenError> {
    rest.insert("file", "");
    let mut fields = Fields { object: rest, prefix: String::new() };
    let spec = driver_spec(&mut fields, format, 0)?;
    match fields.object.iter().next() {
        None => Ok(spec),
        Some((option, _)) => {
            Err(OpenError::UnknownFormatOption { driver: format.to_owned(), option: option.to_owned() })
        }
    }
}

pub(super) fn driver_spec(fields: &mut Fields, driver: &str, depth: u32) -> Result<DriverSpec, OpenError> {
    let missing = |child: &str| OpenError::text(format!("A block device must be specified for \"{child}\""));
    let given = fields.given(&["offset", "size", "read-zeroes"]);
    match driver {
        "file" | "host_device" => file_spec(fields, if driver == "file" { "file" } else { "host_device" }),
        "null-co" | "null-aio" => Ok(DriverSpec::Null(NullSpec {
            driver: if driver == "null-co" { "null-co" } else { "null-aio" },
            size: fields.size("size")?.unwrap_or(NullSpec::SIZE),
            latency_ns: latency(fields)?,
            read_zeroes: fields.flag("read-zeroes")?.unwrap_or(false),
            given,
        })),
        "nbd" => nbd_spec(fields),
        "raw" => {
            let options = RawOptions { offset: fields.size("offset")?, size: fields.size("size")?, given };
            let file = fields.child("file", depth)?.ok_or_else(|| missing("file"))?;
            Ok(DriverSpec::Raw { file, options })
        }
        "qcow2" => qcow2_spec(fields, depth),
        "copy-on-read" => {
            let bottom = fields.text("bottom")?;
            Ok(DriverSpec::CopyOnRead {
                file: fields.child("file", depth)?.ok_or_else(|| missing("file"))?,
                bottom,
            })
        }
        "throttle" => {
            let group = fields.text("throttle-group")?;
            let group = group.ok_or_else(|| {
                OpenError::text(format!("Parameter '{}throttle-group' is missing", fields.prefix))
            })?;
            Ok(DriverSpec::Throttle {
                file: fields.child("file", depth)?.ok_or_else(|| missing("file"))?,
                group,
            })
        }
        "copy-before-write" => cbw_spec(fields, depth),
        "snapshot-access" => {
            let file = fields.child("file", depth)?.ok_or_else(|| missing("file"))?;
            Ok(DriverSpec::SnapshotAccess { file })
        }
        "" => {
            let file = fields.child("file", depth)?.ok_or_else(|| missing("file"))?;
            Ok(DriverSpec::Probe { file, rest: std::mem::take(&mut fields.object) })
        }
        other => Err(OpenError::UnknownDriver(other.to_owned())),
    }
}

/// What a name like `null-co://` stands for.
pub(super) fn null_by_name(name: &str, driver: &'static str) -> Result<NodeSpec, OpenError> {
    if name.strip_prefix(driver) != Some("://") {
        return Err(OpenError::text(format!("The only allowed filename for this driver is '{driver}://'")));
    }
    let (size, given) = (NullSpec::SIZE, Given::new());
    let null = NullSpec { driver, size, latency_ns: 0, read_zeroes: false, given };
    Ok(NodeSpec::with_driver(DriverSpec::Null(null)))
}

fn latency(fields: &mut Fields) -> Result<u64, OpenError> {
    if matches!(fields.object.get("latency-ns"), Some(Value::Int(..0))) {
        return Err(OpenError::text("latency-ns is invalid".to_owned()));
    }
    Ok(fields.size("latency-ns")?.unwrap_or(0))
}

fn file_spec(fields: &mut Fields, driver: &'static str) -> Result<DriverSpec, OpenError> {
    let Some(filename) = fields.text("filename")? else {
        let text = format!("The '{driver}' block driver requires a file name");
        return Err(OpenError::text(text));
    };
    let locking = fields
        .choice("locking", &[("auto", Locking::Auto), ("on", Locking::On), ("off", Locking::Off)])?
        .unwrap_or_default();
    let aio = fields
        .choice("aio", &[("threads", Aio::Threads), ("native", Aio::Native), ("io_uring", Aio::IoUring)])?
        .unwrap_or_default();
    // It is about handing a disk over to another host, which does not happen here.
    fields.flag("drop-cache")?;
    for unsupported in ["pr-manager", "aio-max-batch", "x-check-cache-dropped"] {
        if fields.take(unsupported).is_some() {
            return Err(OpenError::text(format!("Option '{unsupported}' is not supported yet")));
        }
    }
    // An option is the path itself, whatever it looks like.
    Ok(DriverSpec::File(FileSpec { driver, filename, locking, aio }))
}

fn nbd_spec(fields: &mut Fields) -> Result<DriverSpec, OpenError> {
    for unsupported in ["tls-creds", "tls-hostname"] {
        if fields.take(unsupported).is_some() {
            let text = format!("TLS of NBD servers is not supported yet (option '{unsupported}')");
            return Err(OpenError::text(text));
        }
    }
    // As they were before there was `server`.
    let old = ["path", "host", "port"].map(|name| fields.take(name));
    let server = match (fields.take("server"), old) {
        (Some(Value::Object(server)), [None, None, None]) => server,
        (Some(Value::Object(_)), _) => {
            let text = "host/port/path and server cannot be used at the same time";
            return Err(OpenError::text(text.to_owned()));
        }
        (Some(_), _) => return Err(fields.wrong_type("server", "object")),
        (None, [Some(path), None, None]) => Object::new().with("type", "unix").with("path", path),
        (None, [None, Some(host), port]) => {
            let port = match port {
                Some(Value::Int(number)) => Value::Str(number.to_string()),
                port => port.unwrap_or_else(|| Value::Str("10809".to_owned())),
            };
            Object::new().with("type", "inet").with("host", host).with("port", port)
        }
        (None, [None, None, None]) => return Err(OpenError::text("NBD server address missing".to_owned())),
        (None, _) => {
            return Err(OpenError::text("path and host/port cannot be used at the same time".to_owned()));
        }
    };
    let mut seconds =
        |name| Ok::<_, OpenError>(std::time::Duration::from_secs(fields.size(name)?.unwrap_or(0)));
    let (reconnect_delay, open_timeout) = (seconds("reconnect-delay")?, seconds("open-timeout")?);
    let export = fields.text("export")?.unwrap_or_default();
    let context = fields.text("x-dirty-bitmap")?;
    let server = NbdSpec::server(&server)?;
    Ok(DriverSpec::Nbd(NbdSpec { server, export, reconnect_delay, open_timeout, context }))
}

fn cbw_spec(fields: &mut Fields, depth: u32) -> Result<DriverSpec, OpenError> {
    let bitmap = fields.take("bitmap").map(|bitmap| bitmap_of(fields, bitmap)).transpose()?;
    let on_error = fields.choice(
        "on-cbw-error",
        &[("break-guest-write", OnCbwError::BreakGuestWrite), ("break-snapshot", OnCbwError::BreakSnapshot)],
    )?;
    let seconds = fields.size("cbw-timeout")?.unwrap_or(0);
    if seconds > u64::from(u32::MAX) {
        return Err(OpenError::text("Parameter 'cbw-timeout' expects uint32_t".to_owned()));
    }
    let options = CbwOptions {
        on_error: on_error.unwrap_or_default(),
        timeout: std::time::Duration::from_secs(seconds),
        min_cluster: fields.size("min-cluster-size")?.unwrap_or(0),
        ..CbwOptions::default()
    };
    let mut child = |name: &str| {
        let missing = || OpenError::text(format!("A block device must be specified for \"{name}\""));
        fields.child(name, depth)?.ok_or_else(missing)
    };
    Ok(DriverSpec::CopyBeforeWrite { file: child("file")?, target: child("target")?, options, bitmap })
}

/// A node and its bitmap.
fn bitmap_of(fields: &Fields, bitmap: Value) -> Result<(String, String), OpenError> {
    let Value::Object(mut bitmap) = bitmap else { return Err(fields.wrong_type("bitmap", "object")) };
    let mut text = |name: &str| match bitmap.remove(name) {
        Some(Value::Str(text)) => Ok(text),
        Some(_) => Err(fields.wrong_type(&format!("bitmap.{name}"), "string")),
        None => Err(OpenError::text(format!("Parameter '{}bitmap.{name}' is missing", fields.prefix))),
    };
    Ok((text("node")?, text("name")?))
}

fn qcow2_spec(fields: &mut Fields, depth: u32) -> Result<DriverSpec, OpenError> {
    let options = qcow2_options(fields)?;
    let backing = match fields.object.get("backing") {
        Some(Value::Null) => {
            fields.take("backing");
            Backing::None
        }
        Some(Value::Str(name)) if name.is_empty() => {
            fields.take("backing");
            Backing::None
        }
        Some(Value::Object(with)) if with.get("driver").is_none() && with.get("file").is_none() => {
            let with = with.clone();
            fields.take("backing");
            Backing::FromImageWith(with)
        }
        _ => fields.child("backing", depth)?.map_or(Backing::FromImage, Backing::Child),
    };
    for (unsupported, what) in [("data-file", "External data files"), ("encrypt", "Encryption")] {
        if fields.take(unsupported).is_some() {
            return Err(OpenError::text(format!("{what} of qcow2 images are not supported yet")));
        }
    }
    let file = fields.child("file", depth)?;
    let file =
        file.ok_or_else(|| OpenError::text("A block device must be specified for \"file\"".to_owned()))?;
    Ok(DriverSpec::Qcow2 { file, backing, options: Box::new(options) })
}

/// `cache-clean-interval` of which nothing is said, in seconds. Source: QEMU's documentation of the L2 cache, for
/// Linux.
const CACHE_CLEAN_INTERVAL: u64 = 600;

fn qcow2_options(fields: &mut Fields) -> Result<Qcow2Options, OpenError> {
    let mut options = Qcow2Options {
        l2_cache_size: fields.size("l2-cache-size")?,
        refcount_cache_size: fields.size("refcount-cache-size")?,
        cache_size: fields.size("cache-size")?,
        l2_cache_entry_size: fields.size("l2-cache-entry-size")?,
        pass_discard_request: fields.flag("pass-discard-request")?,
        ..Qcow2Options::default()
    };
    options.discard_no_unref = fields.flag("discard-no-unref")?.unwrap_or(false);
    options.pass_discard_other = fields.flag("pass-discard-other")?.unwrap_or(false);
    options.lazy_refcounts = fields.flag("lazy-refcounts")?.unwrap_or(false);
    options.pass_discard_snapshot = fields.flag("pass-discard-snapshot")?;
    overlap_check(fields)?;
    let seconds = fields.number("cache-clean-interval")?.unwrap_or(CACHE_CLEAN_INTERVAL);
    let seconds =
        u32::try_from(seconds).map_err(|_| OpenError::text("Cache clean interval too big".to_owned()))?;
    options.cache_clean_interval = (seconds > 0).then(|| Duration::from_secs(u64::from(seconds)));
    Ok(options)
}

/// `overlap-check`, short or long. Whatever it asks for: every write is held against all tables in use, which costs
/// nothing worth switching off; against those of internal snapshots too.
fn overlap_check(fields: &mut Fields) -> Result<(), OpenError> {
    const TEMPLATES: [(&str, ()); 4] = [("none", ()), ("constant", ()), ("cached", ()), ("all", ())];
    const TABLES: [&str; 9] = [
        "main-header",
        "active-l1",
        "active-l2",
        "refcount-table",
        "refcount-block",
        "snapshot-table",
        "inactive-l1",
        "inactive-l2",
        "bitmap-directory",
    ];
    let Some(Value::Object(object)) = fields.object.get("overlap-check").cloned() else {
        return fields.choice("overlap-check", &TEMPLATES).map(drop);
    };
    fields.take("overlap-check");
    let mut flags = Fields { object, prefix: format!("{}overlap-check.", fields.prefix) };
    flags.choice("template", &TEMPLATES)?;
    for table in TABLES {
        flags.flag(table)?;
    }
    match flags.object.iter().next() {
        Some((name, _)) => Err(OpenError::text(format!("Parameter '{}{name}' is unexpected", flags.prefix))),
        None => Ok(()),
    }
}
