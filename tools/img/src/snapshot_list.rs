//! Internal snapshots as a table.

use underlay_graph::info::SnapshotInfo;
use underlay_sys::clock::local_time;

use crate::sizes::human;

fn line(cells: [&str; 6]) -> String {
    let [id, tag, size, date, clock, icount] = cells;
    format!("{id:<7} {tag:<16} {size:>8} {date:>19} {clock:>15} {icount:>10}")
}

/// The table's lines, its title first.
pub fn lines(snapshots: &[SnapshotInfo]) -> Vec<String> {
    let title = line(["ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"]);
    std::iter::once(title).chain(snapshots.iter().map(one)).collect()
}

fn one(snapshot: &SnapshotInfo) -> String {
    let taken = local_time(i64::from(snapshot.seconds));
    let date = format!(
        "{:04}-{:02}-{:02} {:02}:{:02}:{:02}",
        taken.year, taken.month, taken.day, taken.hour, taken.minute, taken.second
    );
    let milliseconds = snapshot.clock / 1_000_000;
    let seconds = milliseconds / 1000;
    let clock = format!(
        "{:04}:{:02}:{:02}.{:03}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60,
        milliseconds % 1000
    );
    let icount = snapshot.icount.map_or("--".to_owned(), |icount| icount.to_string());
    line([&snapshot.id, &snapshot.name, &human(snapshot.vm_state_size), &date, &clock, &icount])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The lines are the reference's.
    #[test]
    fn columns() {
        let first = SnapshotInfo {
            id: "1".into(),
            name: "first".into(),
            vm_state_size: 8 << 30,
            clock: 0xfedc_ba98_7654_3210,
            icount: Some(0),
            ..SnapshotInfo::default()
        };
        let second = SnapshotInfo {
            name: "a name that is longer".into(),
            icount: None,
            clock: 3_723_004_005_006,
            ..first.clone()
        };
        let lines = lines(&[first, second]);
        assert_eq!(
            lines[0],
            "ID      TAG               VM_SIZE                DATE        VM_CLOCK     ICOUNT"
        );
        assert!(lines[1].starts_with("1       first               8 GiB "), "{}", lines[1]);
        assert!(lines[1].ends_with(" 5101321:49:04.493          0"), "{}", lines[1]);
        assert!(lines[2].starts_with("1       a name that is longer    8 GiB "), "{}", lines[2]);
        assert!(lines[2].ends_with("  0001:02:03.004         --"), "{}", lines[2]);
    }
}
