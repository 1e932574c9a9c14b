//! What an image tells about itself for `img info` and `query-named-block-nodes`.

use underlay_graph::info::ImageInfo;
use underlay_graph::{FormatInfo, InfoValue};

use crate::bitmaps::{AUTO, IN_USE, StoredBitmap};
use crate::features;
use crate::header::{Crypt, Header, Version};

/// The image's own part of the answer. `bitmaps` are those of [`crate::bitmaps::read`].
pub fn image_info(header: &Header, bitmaps: &[StoredBitmap]) -> ImageInfo {
    ImageInfo {
        cluster_size: Some(header.cluster_size()),
        dirty: Some(header.has(features::DIRTY)),
        encrypted: header.crypt != Crypt::None,
        format_specific: Some(FormatInfo { kind: "qcow2", fields: fields(header, bitmaps) }),
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
