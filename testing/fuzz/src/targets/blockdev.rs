//! `--blockdev` and the other options: dotted keys and JSON, checked against the schema and read as a node's options;
//! file names with protocols and `json:`.

use underlay_drivers::options::{NodeSpec, parse_size};
use underlay_qmp::json::{self, Value};
use underlay_qmp::{keyval, schema};

/// Reads the bytes as every kind of option text.
pub fn run(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    for implied in [None, Some("driver")] {
        if let Ok(object) = keyval::parse(&text, implied)
            && let Ok(checked) = schema::check(object, schema::blockdev_options(), schema::Input::Words)
        {
            let _ = NodeSpec::parse(checked);
        }
    }
    if let Ok(Value::Object(object)) = json::parse(data) {
        let _ = NodeSpec::parse(object.clone());
        if let Ok(checked) = schema::check(object, schema::blockdev_options(), schema::Input::Json) {
            let _ = NodeSpec::parse(checked);
        }
    }
    let _ = keyval::parse(&text, Some("type"))
        .map(|object| schema::check(object, schema::block_export_options(), schema::Input::Words));
    let _ = NodeSpec::image(&text, None);
    let _ = parse_size(&text);
}

/// Options that are fine.
pub fn seeds() -> Vec<Vec<u8>> {
    [
        "driver=qcow2,node-name=a,file.driver=file,file.filename=a.qcow2,discard=unmap,cache.direct=on",
        "qcow2,node-name=a,file=b,backing.driver=null-co,backing.size=64k,l2-cache-size=1M,lazy-refcounts=on",
        "raw,offset=512,size=1M,file.driver=host_device,file.filename=/dev/a,,b,read-only=on,detect-zeroes=unmap",
        r#"{"driver": "qcow2", "node-name": "a", "file": {"driver": "file", "filename": "a"}, "backing": null}"#,
        r#"{"driver": "qcow2", "file": {"driver": "raw", "file": {"driver": "null-co", "read-zeroes": true}}}"#,
        "nbd,id=e,node-name=a,name=disk,writable=on,multi-conn=auto,description=x",
        r#"json:{"driver": "qcow2", "file.driver": "file", "file.filename": "a.qcow2"}"#,
        "nbd+unix:///disk?socket=/tmp/s",
        "1.5G",
    ]
    .map(|text| text.as_bytes().to_vec())
    .to_vec()
}
