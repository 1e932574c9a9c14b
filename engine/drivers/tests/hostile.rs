//! Images that name things below them to do harm: loops of every kind, chains without an end, files that are not for
//! them. A clear error, in bounded time, and no file is changed.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use underlay_drivers::create;
use underlay_drivers::open::{BackingPolicy, Opener};
use underlay_drivers::options::NodeSpec;
use underlay_graph::{BackingRef, Graph};
use underlay_qcow2::CreateOptions;
use underlay_sys::thread::block_on;

fn image(folder: &Path, name: &str, backing: &str) {
    let backing = Some(BackingRef { file: backing.to_owned(), format: Some("qcow2".to_owned()) });
    let options = CreateOptions { backing, cluster_size: 4096, ..CreateOptions::new(1 << 20) };
    block_on(create::qcow2(&folder.join(name).to_string_lossy(), &options)).unwrap();
}

/// Opens an image with all that it names; the error's text.
fn open(folder: &Path, name: &str, policy: BackingPolicy) -> Result<(), String> {
    let path = folder.join(name).to_string_lossy().into_owned();
    let open = async {
        let graph = Graph::new();
        let spec = NodeSpec::image(&path, None)?;
        Opener::new(&graph, policy, None).open(spec).await.map(drop)
    };
    block_on(open).map_err(|error| error.to_string())
}

#[test]
fn a_chain_that_bites_its_tail_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    image(at, "self", "self");
    image(at, "a", "b");
    image(at, "b", "c");
    image(at, "c", "a");
    image(at, "absolute", &at.join("absolute").to_string_lossy());
    image(at, "protocol", &format!("file:{}", at.join("protocol").display()));
    image(at, "link", "symlink");
    std::os::unix::fs::symlink(at.join("link"), at.join("symlink")).unwrap();
    image(at, "hard", "hard2");
    std::fs::hard_link(at.join("hard"), at.join("hard2")).unwrap();
    let options = |name: &str| {
        let file = format!("{{\"driver\": \"file\", \"filename\": \"{}\"}}", at.join(name).display());
        format!("json:{{\"driver\": \"qcow2\", \"file\": {{\"driver\": \"raw\", \"file\": {file}}}}}")
    };
    image(at, "json", &options("json"));
    image(at, "json2", &options("json3"));
    image(at, "json3", "json2");
    std::fs::create_dir(at.join("inner")).unwrap();
    image(at, "dots", "./inner/.././dots");
    let names = ["self", "a", "b", "absolute", "protocol", "link", "hard", "json", "json2", "dots"];
    for name in names {
        let before = std::fs::read(at.join(name)).unwrap();
        let error = open(at, name, BackingPolicy::Follow).unwrap_err();
        assert!(error.contains("creates an infinite loop"), "{name}: {error}");
        assert_eq!(open(at, name, BackingPolicy::Ignore), Ok(()), "{name} is an image like any other");
        assert!(std::fs::read(at.join(name)).unwrap() == before, "{name} has been changed");
    }
}

#[test]
fn what_cannot_be_opened_below_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    for (name, backing, says) in [
        ("nothing", "missing", "missing"),
        ("folder", ".", "Could not open"),
        ("device", "/dev/tty0/x", "/dev/tty0/x"),
        ("protocol", "gopher://x", "Unknown protocol 'gopher'"),
        ("garbage", "json:{", "JSON"),
        ("list", "json:[]", "JSON"),
        ("driver", "json:{\"driver\": \"qcow2\", \"file\": {\"driver\": \"nonsense\"}}", "nonsense"),
    ] {
        image(at, name, backing);
        let error = open(at, name, BackingPolicy::Follow).unwrap_err();
        assert!(error.contains("backing file") && error.contains(says), "{name}: {error}");
    }
}

#[test]
fn the_format_in_the_header_counts_and_not_the_one_in_json() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    block_on(create::qcow2(&at.join("base").to_string_lossy(), &CreateOptions::new(1 << 20))).unwrap();
    let file = format!("{{\"driver\": \"file\", \"filename\": \"{}\"}}", at.join("base").display());
    for driver in ["qcow2", "raw"] {
        image(at, driver, &format!("json:{{\"driver\": \"{driver}\", \"file\": {file}}}"));
        assert_eq!(open(at, driver, BackingPolicy::Follow), Ok(()), "{driver}");
    }
}

#[test]
fn a_long_chain_opens_without_a_deep_stack() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let length = 400;
    for layer in 1..length {
        image(at, &format!("layer{layer}"), &format!("layer{}", layer - 1));
    }
    block_on(create::qcow2(&at.join("layer0").to_string_lossy(), &CreateOptions::new(1 << 20))).unwrap();
    let top = format!("layer{}", length - 1);
    assert_eq!(open(at, &top, BackingPolicy::Follow), Ok(()));
    std::fs::remove_file(at.join("layer0")).unwrap();
    let error = open(at, &top, BackingPolicy::Follow).unwrap_err();
    assert!(error.contains("layer0"), "{error}");
}
