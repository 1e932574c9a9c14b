//! Temporary overlays (`snapshot=on`, `-s`): what is written goes to a file without a name, and is gone with the
//! program.

use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use underlay_drivers::options::{Backing, Child, DriverSpec, FileSpec};
use underlay_drivers::protocol::file::Locking;
use underlay_drivers::{NodeSpec, OpenError, Opener};
use underlay_graph::plan::NewNode;
use underlay_graph::{Graph, Role, Wiring};
use underlay_qcow2::CreateOptions;

use crate::Modes;

/// An overlay of an image that is open, opened with `opener`, which does not follow the overlay's own backing file.
pub async fn above(
    graph: &Graph,
    opener: &Opener,
    below: NewNode,
    modes: Modes,
) -> Result<NewNode, OpenError> {
    let path = temporary();
    let name = path.to_string_lossy().into_owned();
    let size = below.view(&graph.wires()).cx().length();
    let opened = async {
        underlay_drivers::create::qcow2(&name, &CreateOptions::new(size)).await?;
        let file = FileSpec {
            driver: "file",
            filename: name.clone(),
            locking: Locking::default(),
            aio: modes.aio.unwrap_or_default(),
        };
        let file = Child::Inline(Box::new(NodeSpec::with_driver(DriverSpec::File(file))));
        let driver = DriverSpec::Qcow2 { file, backing: Backing::None, options: Box::default() };
        let mut spec = NodeSpec::with_driver(driver);
        (spec.cache_no_flush, spec.discard, spec.read_only) = (Some(true), Some(true), Some(false));
        opener.open(spec).await
    };
    let opened = opened.await;
    // Its name is not needed any more, whatever has become of it.
    let _ = std::fs::remove_file(&path);
    let mut new = opened?;
    new.children.push((Role::Backing, Wiring::New(Box::new(below))));
    Ok(new)
}

/// A name for a file that nobody has yet.
fn temporary() -> PathBuf {
    let folder = std::env::var_os("TMPDIR").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
    let mut number = 0_u64;
    loop {
        let path = folder.join(format!("vl.{}.{number}", std::process::id()));
        let mut how = std::fs::OpenOptions::new();
        // What is written is nobody else's to read.
        match how.write(true).create_new(true).mode(0o600).open(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => number += 1,
            // What is wrong with the folder comes out when the image is made.
            _ => return path,
        }
    }
}
