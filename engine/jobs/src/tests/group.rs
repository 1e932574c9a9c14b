//! Three backups that finish together, cancelled, finalized and failing at random: all end, and all well or none. Their
//! dirty bitmaps are cleared with all or with none.

use std::sync::Arc;
use std::time::Duration;

use underlay_drivers::filter::copy_before_write::CbwOptions;
use underlay_graph::bitmaps::NewBitmap;
use underlay_graph::plan::NodeOptions;
use underlay_graph::{ByteRange, NewNode, NodeName, Plan};
use underlay_sys::rt;

use super::disk::{Faults, Image};
use super::lab::{Guests, Lab, SIZE};
use super::world::{Lot, run};
use crate::backup::start_all;
use crate::{BackupArgs, BackupBitmap, BackupDraft, BackupSync, BackupTarget, BitmapMode, Settings, Status};

/// What was dirty when the backups began.
fn dirty() -> ByteRange {
    ByteRange::between(SIZE / 3, SIZE / 2)
}

fn draft(lab: &Lab, plan: &mut Plan, lot: &mut Lot, number: usize) -> (Arc<Image>, BackupDraft) {
    let image = Arc::new(Image::new(SIZE, None, lot.below(u64::MAX)));
    if lot.one_in(6) {
        image.state().faults = Faults { writes: 1, ..Faults::default() };
    }
    let options = NodeOptions { discard: true, ..NodeOptions::default() };
    let name = NodeName::new(&format!("T{number}"));
    let target = NewNode { name, node: image.clone(), read_only: false, options, children: Vec::new() };
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
        sync: [BackupSync::Full, BackupSync::Bitmap][lot.below(2) as usize],
        bitmap: Some(BackupBitmap { name: "b".into(), mode: BitmapMode::OnSuccess }),
        how: CbwOptions::default(),
        most_in_flight: 64,
        filter_node_name: None,
    };
    let draft = lab.jobs.draft_backup(&lab.graph, plan, args).unwrap();
    draft.enlist().unwrap();
    (image, draft)
}

async fn add_bitmaps(lab: &Lab) {
    let new = NewBitmap { name: "b", granularity: None, persistent: false, enabled: true };
    let change =
        lab.graph.change(|plan| lab.nodes[1..].iter().try_for_each(|node| plan.add_bitmap(*node, &new)));
    change.await.unwrap();
    let plan = lab.graph.plan();
    lab.nodes[1..].iter().for_each(|node| plan.bitmap(*node, "b").unwrap().bits.set(dirty()));
}

/// Guests write to the topmost disk only.
fn check_bitmaps(lab: &Lab, good: bool, events: &str) {
    let plan = lab.graph.plan();
    for node in &lab.nodes[1..] {
        let bitmap = plan.bitmap(*node, "b").unwrap();
        assert!(!bitmap.busy && bitmap.successor.is_none(), "{events}");
        let is_top = Some(node) == lab.nodes.last();
        if good && !is_top {
            assert!(bitmap.bits.is_clean(), "{events}");
        }
        if !good {
            let (is_dirty, len) = bitmap.bits.run_at(dirty());
            assert!(is_dirty && len == dirty().len(), "{events}");
        }
    }
}

async fn play(seed: u64) {
    let mut lot = Lot::new(seed);
    let lab = Lab::new(seed, &[SIZE; 4]).await;
    let mut guests = Guests::start(&lab, seed, true).await;
    add_bitmaps(&lab).await;
    let mut moment = lab.graph.draft().await;
    let (images, drafts): (Vec<_>, Vec<_>) =
        (0..3).map(|number| draft(&lab, &mut moment.plan, &mut lot, number)).unzip();
    // A target may fail when all have done their work.
    let mut fails_late = lot.one_in(3);
    moment.put_in_force(None).await.unwrap();
    let started = start_all(drafts, true);
    let jobs: Vec<_> = started.iter().map(|started| started.job.clone()).collect();
    let tasks: Vec<_> = started.into_iter().map(|started| rt::spawn(started.task)).collect();
    let cancel = lot.one_in(2).then(|| lot.below(20));
    for step in 0_u64.. {
        if jobs.iter().all(|job| job.status() == Status::Null) {
            break;
        }
        rt::sleep(Duration::from_micros(lot.below(20_000))).await;
        let at = lot.below(3) as usize;
        let job = &jobs[at];
        if job.status() == Status::Pending && std::mem::take(&mut fails_late) {
            images[at].state().faults.flushes = 1;
        }
        if cancel == Some(step) {
            let _ = job.cancel();
        } else if lot.one_in(3) && job.status() == Status::Pending {
            let job = job.clone();
            drop(rt::spawn(async move { drop(job.finalize().await) }));
        }
        assert!(step < 10_000, "they do not end: {}", lab.record.take());
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
    check_bitmaps(&lab, good == 3, &events);
}

#[test]
fn grouped_jobs_end_together() {
    let count = std::env::var("UNDERLAY_SEEDS").ok().and_then(|n| n.parse().ok()).unwrap_or(200);
    let fails = |seed: &u64| std::panic::catch_unwind(|| run(*seed, play(*seed))).is_err();
    let failed: Vec<_> = (0..count).filter(fails).take(10).collect();
    assert!(failed.is_empty(), "seeds {failed:?}");
}
