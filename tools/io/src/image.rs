//! Commands about the image as a whole: open, close, reopen, truncate, info, length, map, alloc.

use underlay_disk::{Disk, Modes, Request, Source, parse_options};
use underlay_graph::status::status;
use underlay_graph::{ByteRange, IoError, Kind, Preallocation};
use underlay_qmp::json::{Object, Value};

use crate::number;
use crate::report;
use crate::session::{Done, Fault, Session, options};

/// The refusal of what is not there yet.
pub fn not_yet(what: &str) -> String {
    format!("{what} is not supported yet")
}

/// A word of `-t`, `-d` or `-i`.
pub fn set_mode(modes: &mut Modes, letter: char, value: &str) -> Result<(), String> {
    let (known, kind) = match letter {
        't' | 'c' => (modes.set_cache(value), "cache"),
        'd' => (modes.set_discard(value), "discard"),
        _ => (modes.set_aio(value), "aio"),
    };
    if known { Ok(()) } else { Err(format!("Invalid {kind} option: {value}")) }
}

impl Session {
    /// Adds the options of a list, and says what is wrong with how they are written.
    fn add_options(&self, text: &str, to: &mut Object) {
        let list = parse_options(text, None);
        for warning in list.warnings {
            self.out.complain(format_args!("{}: {warning}", self.program));
        }
        list.options.into_iter().for_each(|(name, value)| to.insert(&name, value));
    }

    /// Opens a disk; the sentence that says why not is printed by the caller.
    pub async fn open_disk(&mut self, request: Request) -> Result<(), String> {
        let what = match &request.source {
            Source::Name(name) => format!("can't open device {name}"),
            Source::Options(_) => "can't open".to_owned(),
        };
        let disk = Disk::open(request).await.map_err(|error| format!("{what}: {error}"))?;
        if disk.is_guessed_raw() {
            self.out.complain(underlay_disk::guessed_raw(&disk.name()));
        }
        self.disk = Some(disk);
        Ok(())
    }
}

/// open
pub async fn open(session: &mut Session, name: &str, words: &[String]) -> Done {
    let (options, others) = options(name, "rsCnki:t:d:o:U", words)?;
    let mut request = Request::named("");
    let mut list = Object::new();
    for (letter, value) in options {
        match letter {
            'r' => request.read_only = true,
            's' => request.temporary = true,
            'C' => request.modes.copy_on_read = true,
            'n' => drop(request.modes.set_cache("none")),
            'k' => drop(request.modes.set_aio("native")),
            'U' => request.force_share = true,
            'o' => session.add_options(&value, &mut list),
            mode => set_mode(&mut request.modes, mode, &value).map_err(Fault::Disk)?,
        }
    }
    match others.as_slice() {
        [] => request.source = Source::Options(list),
        [path] => (request.source, request.options) = (Source::Name(path.clone()), list),
        _ => return Err(Fault::Usage),
    }
    if session.disk.is_some() {
        return Err(Fault::Disk("file open already, try 'help close'".to_owned()));
    }
    session.open_disk(request).await.map_err(Fault::Disk)
}

/// close
pub async fn close(session: &mut Session) -> Done {
    session.drain().await;
    match session.disk.take() {
        Some(disk) => disk.close().await.map_err(Fault::Disk),
        None => Ok(()),
    }
}

/// What `reopen -o` may change. Others stay as they were when the disk was opened.
const CHANGEABLE: [&str; 6] =
    ["auto-read-only", "cache.direct", "cache.no-flush", "detect-zeroes", "discard", "read-only"];

/// The same of raw images.
const OF_RAW: [&str; 2] = ["offset", "size"];

/// And of qcow2 images.
const OF_QCOW2: [&str; 11] = [
    "cache-clean-interval",
    "cache-size",
    "discard-no-unref",
    "l2-cache-entry-size",
    "l2-cache-size",
    "lazy-refcounts",
    "overlap-check",
    "pass-discard-other",
    "pass-discard-request",
    "pass-discard-snapshot",
    "refcount-cache-size",
];

/// reopen
pub async fn reopen(session: &mut Session, name: &str, words: &[String]) -> Done {
    let change = Change::parse(session, name, words)?;
    let request = change.request(session.disk()?)?;
    session.drain().await;
    let Some(disk) = session.disk.take() else { return Ok(()) };
    match disk.reopen(request).await {
        Ok(disk) => session.disk = Some(disk),
        Err((disk, error)) => {
            session.disk = disk;
            return Err(Fault::Disk(error));
        }
    }
    Ok(())
}

/// What `reopen` is to change.
struct Change {
    /// The disk's modes, if -c changes them.
    modes: Option<Modes>,
    /// -r or -w: whether it is read only then.
    read_only: Option<bool>,
    /// -o
    options: Object,
}

impl Change {
    fn parse(session: &mut Session, name: &str, words: &[String]) -> Result<Self, Fault> {
        let (options, others) = options(name, "rwc:o:", words)?;
        let mut change = Self { modes: None, read_only: None, options: Object::new() };
        for (letter, value) in options {
            match letter {
                'c' => {
                    let mut modes = session.disk()?.request().modes;
                    set_mode(&mut modes, 'c', &value).map_err(Fault::Disk)?;
                    change.modes = Some(modes);
                }
                'o' => session.add_options(&value, &mut change.options),
                letter => {
                    if change.read_only.replace(letter == 'r').is_some() {
                        return Err(Fault::Disk("Only one -r/-w option may be given".to_owned()));
                    }
                }
            }
        }
        if !others.is_empty() {
            return Err(Fault::Usage);
        }
        if change.modes.is_some() && change.options.iter().any(|(name, _)| name.starts_with("cache.")) {
            return Err(Fault::Disk("Cannot set both -c and the cache options".to_owned()));
        }
        if change.read_only.is_some() && change.options.get("read-only").is_some() {
            return Err(Fault::Disk("Cannot set both -r/-w and 'read-only'".to_owned()));
        }
        Ok(change)
    }

    /// How the disk is to be opened now; an error if that is more than can change.
    fn request(self, disk: &Disk) -> Result<Request, Fault> {
        self.check(disk)?;
        let mut request = disk.request().clone();
        if let Some(modes) = self.modes {
            without(&mut request, &["cache.direct", "cache.no-flush"]);
            request.modes = modes;
        }
        if let Some(read_only) = self.read_only {
            without(&mut request, &["read-only"]);
            request.read_only = read_only;
        }
        let is_image =
            |name: &str| !matches!(name, "read-only" | "auto-read-only" | "discard" | "detect-zeroes");
        let has_driver = request.format.is_some() || request.options.get("driver").is_some();
        let for_image = self.options.iter().any(|(name, _)| is_image(name) && !name.starts_with("cache."));
        if matches!(request.source, Source::Name(_)) && !has_driver && for_image {
            request.format = Some(disk.driver().to_owned());
        }
        match self.options.get("read-only").and_then(|value| value.as_str()) {
            // Its user still wants to write: only -r asks that user, too.
            Some("on" | "yes" | "true" | "y") if !disk.is_read_only() => {
                let name = disk.node_name();
                let text = format!("Read-only block node '{name}' cannot support read-write users");
                return Err(Fault::Disk(text));
            }
            Some("off" | "no" | "false" | "n") => request.read_only = false,
            _ => {}
        }
        if request.read_only && request.modes.copy_on_read {
            let name = disk.node_name();
            return Err(Fault::Disk(format!("Can't set node '{name}' to r/o with copy-on-read enabled")));
        }
        let changes = self.options.into_iter().filter(|(name, _)| name != "driver");
        changes.for_each(|(name, value)| request.options.insert(&name, value));
        Ok(request)
    }

    /// Whether all options are among those that can change.
    fn check(&self, disk: &Disk) -> Done {
        let own: &[&str] = match disk.driver() {
            "qcow2" => &OF_QCOW2,
            "raw" => &OF_RAW,
            _ => &[],
        };
        let is_known = |(name, value): &(&str, &Value)| {
            let is_own = own.iter().any(|own| name.strip_prefix(own).is_some_and(is_all_or_member));
            // What stays as it is may be named.
            CHANGEABLE.contains(name) || is_own || *name == "driver" && value.as_str() == Some(disk.driver())
        };
        let Some((name, _)) = self.options.iter().find(|option| !is_known(option)) else { return Ok(()) };
        Err(Fault::Disk(match name {
            "backing" => not_yet("reopening with option 'backing'"),
            _ => format!("Cannot change the option '{}'", name.rsplit("file.").next().unwrap_or(name)),
        }))
    }
}

/// Whether an option's name ends here, or goes on with a member's.
fn is_all_or_member(rest: &str) -> bool {
    rest.is_empty() || rest.starts_with('.')
}

/// Takes options back that were given before.
fn without(request: &mut Request, names: &[&str]) {
    for name in names {
        request.options.remove(name);
        if let Source::Options(options) = &mut request.source {
            options.remove(name);
        }
    }
}

/// truncate
pub async fn truncate(session: &mut Session, name: &str, words: &[String]) -> Done {
    let (options, others) = options(name, "m:", words)?;
    let mut preallocation = Preallocation::Off;
    for (_, value) in options {
        preallocation = match value.as_str() {
            "off" => Preallocation::Off,
            "metadata" => Preallocation::Metadata,
            "falloc" => Preallocation::Falloc,
            "full" => Preallocation::Full,
            other => return Err(Fault::Disk(format!("Invalid preallocation mode '{other}'"))),
        };
    }
    let size = others.first().map_or("", String::as_str);
    // The reference tells of the first word, whichever it is that it does not understand.
    let of_first = |text: String| match (text.strip_suffix(size), words.first()) {
        (Some(text), Some(first)) => format!("{text}{first}"),
        _ => text,
    };
    let size = number::bytes(size).map_err(of_first)?;
    session.drain().await;
    let resized = session.disk()?.resize(size, preallocation).await;
    resized.map_err(Fault::Disk)
}

/// info
pub async fn info(session: &Session) -> Done {
    let (out, disk) = (&session.out, session.disk()?);
    let view = disk.wires().view(disk.node());
    let node = view.node();
    out.line(format_args!("format name: {}", node.driver()));
    if node.kind() == Kind::Protocol {
        out.line(format_args!("format name: {}", node.driver()));
    }
    // What has neither clusters nor a file below it has nothing more to tell.
    let told = node.kind() == Kind::Protocol && !matches!(node.driver(), "file" | "host_device");
    let over_null = view.children().iter().any(|(_, child)| child.node().driver().starts_with("null"));
    if told || (node.driver() == "raw" && over_null) {
        return Err(Fault::Silent);
    }
    let info = node.image_info();
    let cluster = info.cluster_size.unwrap_or(0);
    out.line(format_args!("cluster size: {}", report::size(cluster as f64)));
    let extended = info.format_specific.as_ref().is_some_and(|specific| {
        specific.fields.contains(&("extended-l2", underlay_graph::InfoValue::Bool(true)))
    });
    let vm_state = vm_state_offset(view.cx().length(), cluster, extended);
    out.line(format_args!("vm state offset: {}", report::size(vm_state as f64)));
    if let Some(specific) = info.format_specific.filter(|specific| !specific.fields.is_empty()) {
        out.line("Format specific information:");
        underlay_img::info_lines(&specific, &mut |line| out.line(line));
    }
    Ok(())
}

/// Where a qcow2 image keeps the state of a virtual machine: behind the disk, at the next L1 entry. Source: qcow2's
/// specification for what an L1 entry covers; the reference for the place.
fn vm_state_offset(length: u64, cluster: u64, extended: bool) -> u64 {
    let entries = cluster / if extended { 16 } else { 8 };
    match cluster.checked_mul(entries) {
        Some(covered) if covered > 0 => length.checked_next_multiple_of(covered).unwrap_or(u64::MAX),
        _ => 0,
    }
}

/// length
pub async fn length(session: &Session) -> Done {
    let (out, disk) = (&session.out, session.disk()?);
    out.line(report::size(length_of(disk).await? as f64));
    Ok(())
}

async fn length_of(disk: &Disk) -> Result<u64, Fault> {
    let length = disk.root.length().await;
    length.map_err(|error| Fault::Plain(format!("getlength: {error}")))
}

/// Whether the first bytes of `range` are in the top image, and how many are alike.
async fn allocated(disk: &Disk, range: ByteRange) -> Result<(bool, u64), IoError> {
    let inside = disk.root.enter().await?;
    let cx = inside.cx();
    let mut rest = range;
    let mut first = None;
    while !rest.is_empty() {
        let found = status(&cx, rest, None).await?;
        let here = found.allocated && found.depth == 0;
        if *first.get_or_insert(here) != here {
            break;
        }
        rest = rest.split(found.len).1;
    }
    Ok((first.unwrap_or(false), range.len() - rest.len()))
}

/// map
pub async fn map(session: &Session) -> Done {
    let (out, disk) = (&session.out, session.disk()?);
    let mut rest = ByteRange::between(0, length_of(disk).await?);
    while !rest.is_empty() {
        let found = allocated(disk, rest).await;
        let (here, len) =
            found.map_err(|error| Fault::Words(format!("Failed to get allocation status: {error}")))?;
        let (start, not) = (rest.start(), if here { "    " } else { "not " });
        let (of, at) = (report::size(len as f64), report::size(start as f64));
        out.line(format_args!("{of} ({len:#x}) bytes {not}allocated at offset {at} ({start:#x})"));
        rest = rest.split(len).1;
    }
    Ok(())
}

/// alloc
pub async fn alloc(session: &Session, words: &[String]) -> Done {
    let (out, disk) = (&session.out, session.disk()?);
    let start = number::bytes(&words[0])?;
    let asked = words.get(1).map_or(Ok(512), |word| number::bytes(word))?;
    let count = asked.min(length_of(disk).await?.saturating_sub(start));
    let (mut rest, mut sum) = (ByteRange::between(start, start + count), 0);
    while !rest.is_empty() {
        let found = allocated(disk, rest).await;
        let (here, len) = found.map_err(|error| Fault::Plain(format!("is_allocated failed: {error}")))?;
        sum += if here { len } else { 0 };
        rest = rest.split(len).1;
    }
    out.line(format_args!("{sum}/{count} bytes allocated at offset {}", report::size(start as f64)));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::vm_state_offset;

    /// As the reference shows them.
    #[test]
    fn the_vm_state_is_behind_the_disk() {
        for (length, cluster, extended, offset) in [
            (4 << 20, 64 << 10, false, 512 << 20),
            (100 << 20, 4 << 10, false, 100 << 20),
            (3 << 30, 64 << 10, true, 3 << 30),
            (1 << 20, 0, false, 0),
        ] {
            assert_eq!(vm_state_offset(length, cluster, extended), offset);
        }
    }
}
