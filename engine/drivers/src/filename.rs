//! How a node is called in messages, in query replies and in the headers of its overlays.
//!
//! A node whose plain name would open just the same gets that name; any other gets `json:{…}` with the options
//! that matter for its content. Source: `design/qemu-surface.md` 4.1, "File names".

use underlay_graph::plan::Wires;
use underlay_graph::{BackingRef, Kind, NodeId, Role, View};
use underlay_qmp::json::{Object, Value};

use crate::filter::copy_on_read::CopyOnRead;
use crate::filter::throttle::Throttle;
use crate::format::raw::Raw;
use crate::names;
use crate::protocol::nbd::NbdNode;
use crate::protocol::null::NullNode;

/// The plain name that opens the same node (with its format given), if there is one.
pub fn exact(view: &View) -> Option<String> {
    let node = view.node();
    match node.kind() {
        Kind::Protocol => node.exact_filename(),
        Kind::Filter => None,
        Kind::Format if backing_is_overridden(view) => None,
        Kind::Format => exact_alone(view),
    }
}

/// The same for a format, whatever is below its image.
fn exact_alone(view: &View) -> Option<String> {
    let file = view.child(Role::File).filter(|_| !is_window(view))?;
    exact(file).filter(|_| file.node().kind() != Kind::Format)
}

/// The name of an image that was opened without what is below it, which does not count.
pub fn of_alone(view: &View) -> String {
    exact_alone(view).unwrap_or_else(|| match view.node().kind() {
        Kind::Format => format!("json:{}", Value::Object(options_and(view, false))),
        _ => of(view),
    })
}

/// The name of a node: plain or `json:{…}`. A filter that a job has put in is called as what it filters, and
/// snapshot-access as the disk.
pub fn of(view: &View) -> String {
    let (kind, own) = (view.node().kind(), view.node().as_any());
    let is_over_file = kind == Kind::Protocol && view.child(Role::File).is_some();
    if is_over_file || kind == Kind::Filter && !own.is::<Throttle>() && !own.is::<CopyOnRead>() {
        let below = view.child(Role::File).or(view.child(Role::Backing));
        return below.map_or_else(String::new, |below| of(below));
    }
    exact(view).unwrap_or_else(|| format!("json:{}", Value::Object(options(view))))
}

/// The name of a node in the header of an image that shall open without the daemon's objects: no filter appears in it.
pub fn for_header(view: &View) -> String {
    of(&view.without_filters())
}

/// The file name of the image file itself, whatever is below the image: for relative names inside it.
pub fn of_file(view: &View) -> Option<String> {
    match view.node().kind() {
        Kind::Protocol => view.node().exact_filename(),
        _ => of_file(view.child(Role::File).or(view.child(Role::Backing))?),
    }
}

/// The image of the chain below `top`, itself included, that a file name means: as the image is called, or as its
/// overlay calls it.
pub fn find_in_chain(wires: &Wires, top: NodeId, file: &str) -> Option<NodeId> {
    let absolute = |name: &str| std::fs::canonicalize(name).ok();
    let wanted = absolute(file);
    let mut called = false;
    for id in wires.plan().chain(top) {
        let view = wires.view(id);
        let same_file = wanted.is_some() && exact(&view).and_then(|name| absolute(&name)) == wanted;
        if of(&view) == file || called || same_file {
            return Some(id);
        }
        let image = of_file(&view).unwrap_or_default();
        let from_here = |name: &str| names::resolve_backing(&image, name);
        called = view.node().backing_ref().is_some_and(|BackingRef { file: below, .. }| {
            let below_is = absolute(&from_here(&below));
            below == file
                || from_here(&below) == file
                || below_is.is_some() && below_is == absolute(&from_here(file))
        });
    }
    None
}

fn is_window(view: &View) -> bool {
    view.node().as_any().downcast_ref::<Raw>().is_some_and(|raw| raw.window().is_some())
}

/// Whether the backing node is another than the one that the image names.
fn backing_is_overridden(view: &View) -> bool {
    if !view.node().supports_backing() {
        return false;
    }
    let named = view.node().backing_ref();
    match (named, view.child(Role::Backing)) {
        (None, None) => false,
        (Some(named), Some(backing)) => {
            let (own, is) = (of_file(view).unwrap_or_default(), of(backing));
            let from_here = names::resolve_backing(&own, &named.file);
            // The image may say in full what was opened by a shorter name: a snapshot writes it so.
            let mean = |name| exact(backing).is_some_and(|is| is_same_file(name, &is));
            named.file != is && from_here != is && !mean(&named.file) && !mean(&from_here)
        }
        _ => true,
    }
}

/// Whether two names, which count from our own folder, lead to one file, also one that is not there any more.
fn is_same_file(one: &str, other: &str) -> bool {
    let whole = |name: &str| std::path::absolute(name).ok();
    let real = |name: &str| std::fs::canonicalize(name).ok();
    let (one_real, other_real) = (real(one), real(other));
    whole(one).is_some_and(|one| Some(one) == whole(other)) || one_real.is_some() && one_real == other_real
}

/// The options that matter for the content of a node, children inline.
pub fn options(view: &View) -> Object {
    options_and(view, backing_is_overridden(view))
}

fn options_and(view: &View, backing: bool) -> Object {
    let node = view.node();
    let mut object = Object::new();
    object.insert("driver", Value::Str(node.driver().to_owned()));
    if let Some(null) = node.as_any().downcast_ref::<NullNode>() {
        null.filename_options().into_iter().for_each(|(name, value)| object.insert(name, value));
        return object;
    }
    if let Some(nbd) = node.as_any().downcast_ref::<NbdNode>() {
        nbd.spec().options().into_iter().for_each(|(name, value)| object.insert(&name, value));
        return object;
    }
    if node.kind() == Kind::Protocol {
        object.insert("filename", Value::Str(node.exact_filename().unwrap_or_default()));
        return object;
    }
    if let Some(window) = node.as_any().downcast_ref::<Raw>().and_then(Raw::window) {
        window.iter().for_each(|(name, value)| object.insert(name, value.clone()));
    }
    if let Some(throttle) = node.as_any().downcast_ref::<Throttle>() {
        object.insert("throttle-group", throttle.member().group().name());
    }
    for (role, child) in view.children() {
        if *role == Role::File || backing {
            object.insert(role.as_str(), Value::Object(options(child)));
        }
    }
    if backing && view.child(Role::Backing).is_none() {
        object.insert("backing", Value::Null);
    }
    object
}
