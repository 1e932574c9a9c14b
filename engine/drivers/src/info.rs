//! What is told about images, as JSON.

use underlay_graph::info::SnapshotInfo;
use underlay_qmp::json::{Object, Value};

const NANOSECONDS: u64 = 1_000_000_000;

/// SnapshotInfo
pub fn snapshot(info: &SnapshotInfo) -> Value {
    let mut object = Object::new()
        .with("id", info.id.as_str())
        .with("name", info.name.as_str())
        .with("vm-state-size", info.vm_state_size)
        .with("date-sec", u64::from(info.seconds))
        .with("date-nsec", u64::from(info.nanoseconds))
        .with("vm-clock-sec", info.clock / NANOSECONDS)
        .with("vm-clock-nsec", info.clock % NANOSECONDS);
    if let Some(icount) = info.icount {
        object.insert("icount", icount);
    }
    Value::Object(object)
}
