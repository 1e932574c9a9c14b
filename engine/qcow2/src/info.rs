//! What an image tells about itself for `img info` and `query-named-block-nodes`.

use std::sync::Arc;

use underlay_graph::info::{ImageInfo, SnapshotInfo};
use underlay_graph::{FormatInfo, InfoValue};

use crate::bitmaps::{AUTO, IN_USE, StoredBitmap};
use crate::features;
use crate::header::{Crypt, Header, Version};
use crate::snapshots::Snapshot;

/// The image's own part of the answer. `bitmaps` are those of [`crate::bitmaps::read`].
pub fn image_info(header: &Header, bitmaps: &[StoredBitmap], snapshots: &Arc<[SnapshotInfo]>) -> ImageInfo {
    ImageInfo {
        cluster_size: Some(header.cluster_size()),
        dirty: Some(header.has(features::DIRTY)),
        encrypted: header.crypt != Crypt::None,
        format_specific: Some(FormatInfo { kind: "qcow2", fields: fields(header, bitmaps) }),
        snapshots: snapshots.clone(),
    }
}

/// What is told about a snapshot. Texts end at a zero, as in the reference.
pub(crate) fn snapshot_info(snapshot: &Snapshot) -> SnapshotInfo {
    let text = |text: &str| text.split('\0').next().unwrap_or_default().to_owned();
    SnapshotInfo {
        id: text(&snapshot.id),
        name: text(&snapshot.name),
        vm_state_size: snapshot.vm_state_size,
        seconds: snapshot.seconds,
        nanoseconds: snapshot.nanoseconds,
        clock: snapshot.clock,
        icount: snapshot.icount,
    }
}

fn fields(header: &Header, bitmaps: &[StoredBitmap]) -> Vec<(&'static str, InfoValue)> {
    let v3 = header.version == Version::V3;
    let mut fields = vec![
        ("compat", InfoValue::Text(if v3 { "1.1" } else { "0.10" }.into())),
        ("compression-type", InfoValue::Text(header.compression.as_str().into())),
    ];
    if v3 {
        fields.push(("lazy-refcounts", InfoValue::Bool(header.lazy_refcounts())));
    }
    if v3 && header.autoclear & features::BITMAPS != 0 && !bitmaps.is_empty() {
        fields.push(("bitmaps", InfoValue::List(bitmaps.iter().map(bitmap).collect())));
    }
    fields.push(("refcount-bits", InfoValue::Int(1 << header.refcount_order)));
    if v3 {
        fields.push(("corrupt", InfoValue::Bool(header.has(features::CORRUPT))));
        fields.push(("extended-l2", InfoValue::Bool(header.extended_l2())));
    }
    fields
}

fn bitmap(stored: &StoredBitmap) -> InfoValue {
    let flags = [(IN_USE, "in-use"), (AUTO, "auto")];
    let flags = flags.iter().filter(|(bit, _)| stored.flags & bit != 0);
    InfoValue::Object(vec![
        ("flags", InfoValue::List(flags.map(|(_, name)| InfoValue::Text((*name).into())).collect())),
        ("name", InfoValue::Text(stored.name.clone())),
        ("granularity", InfoValue::Int(1 << stored.granularity_bits)),
    ])
}
