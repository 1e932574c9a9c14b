//! Whether making an image would destroy another one: the same file may have several names.

use std::fs::Metadata;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use underlay_drivers::NodeSpec;
use underlay_drivers::names::plain_path;
use underlay_drivers::options::{Child, DriverSpec};
use underlay_drivers::protocol::file::FileNode;

use crate::open::Image;

/// What is one and the same under all of its names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// A file, by its file system and its number there.
    File(u64, u64),
    /// A block device.
    Device(u64),
}

/// Where a local name leads; `None` if there is nothing.
fn place(path: &str) -> Option<Place> {
    let at = |found: Metadata| match found.file_type().is_block_device() {
        true => Place::Device(found.rdev()),
        false => Place::File(found.dev(), found.ino()),
    };
    std::fs::metadata(path).ok().map(at)
}

/// The place that a new image called `name` would take. (Of an export nobody can say.)
fn taken_by(name: &str) -> Option<Place> {
    file_of(&NodeSpec::image(name, None).ok()?).and_then(place)
}

/// The name of the file at the bottom of a description.
fn file_of(spec: &NodeSpec) -> Option<&str> {
    match &spec.driver {
        DriverSpec::File(file) => Some(&file.filename),
        DriverSpec::Raw { file: Child::Inline(file), .. }
        | DriverSpec::Qcow2 { file: Child::Inline(file), .. }
        | DriverSpec::Probe { file: Child::Inline(file), .. } => file_of(file),
        _ => None,
    }
}

/// Whether two names lead to the same file.
pub fn is_same(one: &str, other: &str) -> bool {
    taken_by(one).is_some_and(|place| taken_by(other) == Some(place))
}

/// Whether a new image called `name` would take the place of a file that the open image consists of: its own, or one
/// of those below it.
pub fn is_in(image: &Image, name: &str) -> bool {
    let Some(taken) = taken_by(name) else { return false };
    let wires = image.wires();
    let mut nodes = wires.plan().nodes().map(|(_, node)| &node.node);
    nodes.any(|node| {
        let own = node.as_any().is::<FileNode>().then(|| node.exact_filename()).flatten();
        own.and_then(|own| place(plain_path(&own))) == Some(taken)
    })
}

#[cfg(test)]
mod tests {
    use super::is_same;

    #[test]
    fn names_of_one_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
        std::fs::write(at("a"), "").expect("a file");
        std::fs::write(at("other"), "").expect("a file");
        std::fs::hard_link(at("a"), at("hard")).expect("a link");
        std::os::unix::fs::symlink(at("a"), at("soft")).expect("a link");
        let json =
            format!(r#"json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{}"}}}}"#, at("a"));
        for name in [at("a"), at("./a"), at("hard"), at("soft"), format!("file:{}", at("a")), json] {
            assert!(is_same(&at("a"), &name), "{name}");
        }
        assert!(!is_same(&at("a"), &at("other")));
        assert!(!is_same(&at("none"), &at("none")), "there is nothing to destroy");
    }
}
