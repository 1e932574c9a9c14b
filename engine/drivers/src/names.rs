//! File names of images: where a relative backing name leads, and how a node is named in messages and headers.

/// The name behind a backing file's name as an image stores it: relative names count from the folder of the image
/// that stores them. Names with a protocol (`nbd:…`, `json:…`) and absolute ones stand for themselves.
pub fn resolve_backing(image: &str, backing: &str) -> String {
    if backing.is_empty() || backing.starts_with('/') || has_protocol(backing) {
        return backing.to_owned();
    }
    match plain_path(image).rfind('/') {
        Some(end) => format!("{}{backing}", &image[..=end + (image.len() - plain_path(image).len())]),
        None => backing.to_owned(),
    }
}

/// Whether the name begins with a protocol: a colon before any slash. Source: QEMU's rule, seen with `qemu-img`.
pub fn has_protocol(name: &str) -> bool {
    name.find(':').is_some_and(|colon| !name[..colon].contains('/'))
}

/// The path of a local file name: `file:` in front of it is allowed and means nothing.
pub fn plain_path(name: &str) -> &str {
    name.strip_prefix("file:").unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_names_count_from_the_overlay() {
        for (image, backing, leads_to) in [
            ("/a/b/top.qcow2", "base.qcow2", "/a/b/base.qcow2"),
            ("top.qcow2", "base.qcow2", "base.qcow2"),
            ("dir/top.qcow2", "../base", "dir/../base"),
            ("dir/top.qcow2", "/base", "/base"),
            ("dir/top.qcow2", "nbd://host/x", "nbd://host/x"),
            ("dir/top.qcow2", "json:{\"driver\":\"raw\"}", "json:{\"driver\":\"raw\"}"),
            ("file:dir/top.qcow2", "base", "file:dir/base"),
        ] {
            assert_eq!(resolve_backing(image, backing), leads_to, "{image} {backing}");
        }
    }
}
