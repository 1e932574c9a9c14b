//! What was measured, for people or as JSON.

use std::time::Duration;

use serde::Serialize;
use underlay_nbd::blocking::{Client, Server};

use crate::guest::{self, Mix, Until, random};
use crate::measure::{Outcome, Samples, Summary};
use crate::null_server;
use crate::rows::{Bench, Part, Row, Target};
use crate::side::{self, Side};

/// Prints rows as they come.
pub struct Report {
    json: bool,
    missed: usize,
    rows: usize,
}

/// One line.
#[derive(Serialize)]
struct Line<'a> {
    row: &'a str,
    part: &'a str,
    unit: &'a str,
    qemu: Summary,
    underlay: Summary,
    /// QEMU's median by ours.
    ratio: f64,
    target: String,
    met: Option<bool>,
    /// What the kernel alone needs for the same bytes.
    limit: Option<f64>,
}

impl Report {
    /// The head: the machine, and what the client can do at best.
    pub fn begin(bench: &Bench, rounds: usize, json: bool) -> Outcome<Self> {
        let report = Self { json, missed: 0, rows: 0 };
        if json {
            return Ok(report);
        }
        let processors = std::thread::available_parallelism().map_or(0, usize::from);
        println!(
            "{}; {processors} processors; {rounds} rounds; {}",
            side::qemu_version()?,
            bench.folder.display()
        );
        println!("the client alone, against a server that does nothing, 4 KiB reads:");
        let socket = bench.path("null.sock");
        null_server::start(&socket, 1 << 30)?;
        let time = Duration::from_secs_f64(bench.seconds);
        for (depth, count) in [(32, 1), (32, 4), (1, 1)] {
            let connect = |_| Client::connect(&Server::unix(&socket), "disk", &[]);
            let clients = (0..count).map(connect).collect::<std::io::Result<Vec<_>>>()?;
            let served = match count {
                1 => guest::run(
                    clients.into_iter().next().ok_or("no client")?,
                    random(Mix::Read, depth),
                    Until::Time(time),
                    1,
                )?,
                _ => guest::run_all(clients, random(Mix::Read, depth), time)?,
            };
            println!("  depth {depth}, connections {count}: {:.2} us/op", served.time);
        }
        println!(
            "\n{:<34} {:>8} {:>26} {:>26} {:>13} {:>11} {:>7} {:>7}",
            "work",
            "unit",
            "QEMU median (min..max)",
            "ours median (min..max)",
            "CPU s Q/o",
            "MiB Q/o",
            "ratio",
            "target"
        );
        Ok(report)
    }

    /// One row.
    pub fn row(&mut self, row: &Row, samples: &Samples) {
        for (index, part) in row.parts.iter().enumerate() {
            let (qemu, underlay) = (samples.of(Side::Qemu, index), samples.of(Side::Underlay, index));
            let (ratio, limit) = (qemu.median / underlay.median, samples.limit());
            let (target, met) = judge(part, ratio, underlay.median);
            self.rows += 1;
            self.missed += usize::from(met == Some(false));
            let line = Line {
                row: row.name,
                part: part.name,
                unit: part.unit,
                qemu,
                underlay,
                ratio,
                target,
                met,
                limit,
            };
            if self.json {
                // Numbers and strings only: this cannot fail.
                println!("{}", serde_json::to_string(&line).unwrap_or_default());
            } else {
                line.print();
            }
        }
    }

    /// A row that cannot be measured in this folder.
    pub fn skip(&self, row: &Row) {
        if !self.json {
            println!("{:<34} not in this folder; see --folder", row.name);
        }
    }

    /// The end.
    pub fn end(&self) {
        if !self.json {
            println!("\n{} values, {} targets missed", self.rows, self.missed);
        }
    }
}

fn judge(part: &Part, ratio: f64, ours: f64) -> (String, Option<bool>) {
    match part.target {
        Target::Ratio(least) => (format!(">={least:.1}"), Some(ratio >= least)),
        Target::Value(most) => (format!("<={most:.2}"), Some(ours <= most)),
        Target::None => (String::new(), None),
    }
}

impl Line<'_> {
    fn print(&self) {
        let name =
            if self.part.is_empty() { self.row.to_owned() } else { format!("{}, {}", self.row, self.part) };
        let values = |s: Summary| format!("{} ({}..{})", Short(s.median), Short(s.minimum), Short(s.maximum));
        let (q, o) = (self.qemu, self.underlay);
        println!(
            "{name:<34} {:>8} {:>26} {:>26} {:>13} {:>11} {:>7.2} {:>7} {}",
            self.unit,
            values(q),
            values(o),
            format!("{:.2}/{:.2}", q.cpu, o.cpu),
            format!("{:.0}/{:.0}", q.peak, o.peak),
            self.ratio,
            self.target,
            match self.met {
                Some(true) => "met",
                Some(false) => "MISSED",
                None => "",
            }
        );
        if let Some(limit) = self.limit {
            println!(
                "{:<34} {:>8} {:>26} {:>26}",
                "  the kernel alone",
                self.unit,
                format!("{} = {:.2} of QEMU's", Short(limit), limit / q.median),
                format!("{:.2} of ours", limit / o.median),
            );
        }
    }
}

/// A number with three digits that count.
struct Short(f64);

impl std::fmt::Display for Short {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let digits = match self.0.abs() {
            size if size >= 100.0 => 0,
            size if size >= 10.0 => 1,
            size if size >= 1.0 => 2,
            _ => 3,
        };
        write!(f, "{:.digits$}", self.0)
    }
}
