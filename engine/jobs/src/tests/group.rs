//! Three backups that finish together, cancelled, finalized and failing at random: all end, and all well or none.

use std::sync::Arc;
use std::time::Duration;

use underlay_drivers::filter::copy_before_write::CbwOptions;
use underlay_graph::plan::NodeOptions;
use underlay_graph::{NewNode, NodeName};
use underlay_sys::rt;

use super::disk::{Faults, Image};
use super::lab::{Guests, Lab, SIZE};
use super::world::{Lot, run};
use crate::backup::start_all;
use crate::{BackupArgs, BackupDraft, BackupSync, BackupTarget, Settings, Status};

fn draft(lab: &Lab, lot: &mut Lot, number: usize) -> BackupDraft {
    let image = Arc::new(Image::new(SIZE, None, lot.below(u64::MAX)));
    if lot.one_in(6) {
        image.state().faults = Faults { writes: 1, ..Faults::default() };
    }
    let options = NodeOptions { discard: true, ..NodeOptions::default() };
    let name = NodeName::new(&format!("T{number}"));
    let target = NewNode { name, node: image, read_only: false, options, children: Vec::new() };
    let settings = Settings {
        id: Some(format!("j{number}")),
        speed: [0, 4 << 20][lot.below(2) as usize],
        auto_finalize: lot.one_in(2),
        ..Settings::default()
    };
    let args = BackupArgs {
        settings,
        source: lab.nodes[3 - number],
        target: BackupTarget::New(Box::new(target)),
        sync: BackupSync::Full,
        how: CbwOptions::default(),
        most_in_flight: 64,
        filter_node_name: None,
    };
    let draft = lab.jobs.draft_backup(&lab.graph, args, &[]).unwrap();
    draft.enlist().unwrap();
    draft
}

async fn play(seed: u64) {
    let mut lot = Lot::new(seed);
    let lab = Lab::new(seed, &[SIZE; 4]).await;
    let mut guests = Guests::start(&lab, seed, true).await;
    let mut drafts: Vec<_> = (0..3).map(|number| draft(&lab, &mut lot, number)).collect();
    lab.graph.change(|plan| drafts.iter_mut().try_for_each(|draft| draft.wire(plan))).await.unwrap();
    let started = start_all(drafts, true);
    let jobs: Vec<_> = started.iter().map(|started| started.job.clone()).collect();
    let tasks: Vec<_> = started.into_iter().map(|started| rt::spawn(started.task)).collect();
    let cancel = lot.one_in(2).then(|| lot.below(20));
    for step in 0_u64.. {
        if jobs.iter().all(|job| job.status() == Status::Null) {
            break;
        }
        rt::sleep(Duration::from_micros(lot.below(20_000))).await;
        let job = &jobs[lot.below(3) as usize];
        if cancel == Some(step) {
            let _ = job.cancel();
        } else if lot.one_in(3) && job.status() == Status::Pending {
            let job = job.clone();
            drop(rt::spawn(async move { drop(job.finalize().await) }));
        }
        assert!(step < 100_000, "they do not end");
    }
    for task in tasks {
        task.await;
    }
    guests.rest().await;
    let events = lab.record.take();
    let good = events.matches(" COMPLETED ").count();
    assert!(good == 0 || good == 3, "{events}");
    assert_eq!(events.matches("concluded null").count(), 3, "{events}");
    lab.assert_tidy();
}

#[test]
fn grouped_jobs_end_together() {
    let count = std::env::var("UNDERLAY_SEEDS").ok().and_then(|n| n.parse().ok()).unwrap_or(200);
    let fails = |seed: &u64| std::panic::catch_unwind(|| run(*seed, play(*seed))).is_err();
    let failed: Vec<_> = (0..count).filter(fails).take(10).collect();
    assert!(failed.is_empty(), "seeds {failed:?}");
}
