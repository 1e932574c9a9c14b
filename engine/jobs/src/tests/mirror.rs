//! Mirrors beside two guests: every sync and copy mode, changes of the copy mode, pauses, errors, cancels and other
//! changes of the graph at random. After a complete the guest is on the target and sees every byte; after a cancel of a
//! mirror that was ready the target is the disk of that moment; after anything else the guest has noticed nothing.

use std::sync::Arc;
use std::time::Duration;

use underlay_graph::plan::NodeOptions;
use underlay_graph::{ByteRange, NewNode, NodeName, Role, Wiring};
use underlay_sys::rt;

use super::disk::{CLUSTER, Cluster, Faults, Image};
use super::lab::{Guests, Lab, Model, SIZE, content, learn, meddle};
use super::world::{Lot, run};
use crate::{Job, MirrorArgs, OnError, Settings, Status, SyncMode, Target};

/// How the client ends it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Complete,
    /// When it is ready, with the guests at rest.
    Cancel,
    /// At any time.
    Force,
}

#[derive(Debug)]
struct Case {
    sync: SyncMode,
    end: End,
    write_blocking: bool,
    change_mode: bool,
    faults: bool,
    meddle: bool,
    target_is_zero: bool,
    /// The target gets what is below it only when the guest is switched over.
    attach: bool,
    granularity: Option<u32>,
    settings: Settings,
}

fn case(lot: &mut Lot) -> Case {
    let sync = [SyncMode::Full, SyncMode::Full, SyncMode::Top, SyncMode::None][lot.below(4) as usize];
    let policies = [OnError::Report, OnError::Ignore, OnError::Enospc, OnError::Stop];
    let mut policy = || policies[lot.below(4) as usize];
    let (on_error, on_target_error) = (policy(), Some(policy()));
    let settings = Settings {
        id: Some("j".into()),
        speed: if lot.one_in(4) { 8 << 20 } else { 0 },
        auto_finalize: !lot.one_in(4),
        on_error,
        on_target_error,
        ..Settings::default()
    };
    Case {
        sync,
        end: [End::Complete, End::Complete, End::Cancel, End::Force][lot.below(4) as usize],
        write_blocking: lot.one_in(2),
        change_mode: lot.one_in(3),
        faults: lot.one_in(4),
        meddle: lot.one_in(2),
        target_is_zero: lot.one_in(4),
        attach: sync != SyncMode::Full && lot.one_in(2),
        granularity: [None, Some(512), Some(4096), Some(1 << 20)][lot.below(4) as usize],
        settings,
    }
}

/// The target: for a whole copy full of something else (or empty), for that of the top an overlay of what it leaves
/// out, and for one of later writes only what was there before.
async fn target(lab: &Lab, case: &Case, lot: &mut Lot) -> (Arc<Image>, Target) {
    let below = match case.sync {
        SyncMode::Top => Some(2_usize),
        SyncMode::None if case.attach => Some(3),
        _ => None,
    };
    let file = below.map(|at| format!("{}.img", ["A", "B", "C", "D"][at]));
    let image = Arc::new(Image::new(SIZE, file.as_deref(), lot.below(u64::MAX)));
    if case.sync == SyncMode::Full && !case.target_is_zero {
        for cluster in &mut image.state().clusters {
            *cluster = match lot.below(3) {
                0 => Cluster::Data(vec![0xbb; CLUSTER as usize]),
                1 => Cluster::Zero,
                _ => Cluster::Below,
            };
        }
    }
    if case.sync == SyncMode::None && !case.attach {
        let disk = learn(&lab.guest, ByteRange::between(0, SIZE)).await.bytes;
        let clusters = disk.chunks(CLUSTER as usize).map(|bytes| Cluster::Data(bytes.to_vec()));
        image.state().clusters = clusters.collect();
    }
    let backing = below.map(|at| lab.nodes[at]);
    let wired = backing.filter(|_| !case.attach).map(|id| (Role::Backing, Wiring::Existing(id)));
    let options = NodeOptions { discard: true, ..NodeOptions::default() };
    let name = NodeName::new("T");
    let children = wired.into_iter().collect();
    let new = NewNode { name, node: image.clone(), read_only: false, options, children };
    if case.attach {
        return (image, Target::New { node: Box::new(new), backing });
    }
    let add = lab.graph.change(|plan| {
        let id = plan.add(new)?;
        plan.node_mut(id).monitor_owned = true;
        Ok(id)
    });
    (image, Target::Existing(add.await.unwrap()))
}

async fn client(lab: &Lab, case: &Case, job: &Arc<Job>, lot: &mut Lot, guests: &mut Guests) {
    let mut patience = lot.below(30);
    while !matches!(job.status(), Status::Concluded | Status::Null) {
        for _ in 0..lot.below(40) {
            rt::yield_now().await;
        }
        rt::sleep(Duration::from_millis(1)).await;
        patience = patience.saturating_sub(1);
        if case.change_mode && patience == 5 {
            let _ = job.change_copy_mode(true);
        }
        if case.meddle {
            meddle(lab, job, lot).await;
        }
        let _ = job.resume();
        let ready = matches!(job.status(), Status::Ready | Status::Standby);
        match case.end {
            End::Complete if patience == 0 => drop(job.complete()),
            End::Cancel if patience == 0 && ready => {
                guests.rest().await;
                let _ = job.block_cancel(false);
            }
            End::Force if patience == 0 => drop(job.cancel()),
            _ => {}
        }
        if job.status() == Status::Pending && !case.settings.auto_finalize {
            let _ = job.finalize().await;
        }
    }
}

async fn play(seed: u64) {
    let mut lot = Lot::new(seed);
    let case = case(&mut lot);
    println!("seed {seed}: {case:?}");
    let lab = Lab::new(seed, &[SIZE; 4]).await;
    let (image, target) = target(&lab, &case, &mut lot).await;
    if case.faults {
        let mut count = || if lot.one_in(2) { lot.below(4) as u32 } else { 0 };
        image.state().faults = Faults { writes: count(), flushes: count() / 3, ..Faults::default() };
    }
    // Only with sync=none the target must have what was written before.
    let early = match case.sync {
        SyncMode::None => None,
        _ => Some(Guests::start(&lab, seed, false).await),
    };
    let args = MirrorArgs {
        settings: case.settings.clone(),
        source: lab.nodes[3],
        target,
        replaces: None,
        sync: case.sync,
        granularity: case.granularity,
        buf_size: None,
        write_blocking: case.write_blocking,
        target_is_zero: case.target_is_zero,
        // The nodes here do not say that this makes them zero.
        target_is_new: lot.one_in(2),
        unmap: lot.one_in(2),
        filter_node_name: lot.one_in(2).then(|| "filter".to_owned()),
    };
    let started = lab.jobs.mirror(&lab.graph, args).await.unwrap();
    let job = started.job.clone();
    drop(rt::spawn(started.task));
    let mut guests = match early {
        Some(guests) => guests,
        None => Guests::start(&lab, seed, false).await,
    };
    client(&lab, &case, &job, &mut lot, &mut guests).await;
    guests.rest().await;
    check(&lab, &case, &guests.models).await;
}

async fn check(lab: &Lab, case: &Case, models: &[Model]) {
    lab.assert_tidy();
    let events = lab.record.take();
    assert!(events.ends_with("concluded null"), "{events}");
    for model in models {
        let now = learn(&lab.guest, model.part).await;
        assert!(now.bytes == model.bytes, "the guest's disk has changed: {events}");
    }
    let disk: Vec<u8> = models.iter().flat_map(|model| model.bytes.clone()).collect();
    match (events.contains("COMPLETED "), case.end) {
        (true, End::Complete) => {
            let below = match (case.sync, case.attach) {
                (SyncMode::Top, _) => "CBA",
                (SyncMode::None, true) => "DCBA",
                _ => "",
            };
            assert_eq!(lab.chain(), format!("T{below}"), "{events}");
        }
        (true, End::Cancel) => {
            assert_eq!(lab.chain(), "DCBA", "{events}");
            if !case.attach {
                let node = lab.graph.plan().find("T").unwrap();
                assert!(content(lab, node).await == disk, "not the disk of the cancel: {events}");
            }
        }
        _ => {
            assert_eq!(lab.chain(), "DCBA", "{events}");
            assert!(case.faults || case.end == End::Force, "{events}");
        }
    }
}

#[test]
fn mirrors_beside_guests_lose_nothing() {
    let count = std::env::var("UNDERLAY_SEEDS").ok().and_then(|n| n.parse().ok()).unwrap_or(200);
    let first = std::env::var("UNDERLAY_FIRST_SEED").ok().and_then(|n| n.parse().ok()).unwrap_or(0);
    let fails = |seed: &u64| std::panic::catch_unwind(|| run(*seed, play(*seed))).is_err();
    let failed: Vec<_> = (first..first + count).filter(fails).take(10).collect();
    assert!(failed.is_empty(), "seeds {failed:?}; UNDERLAY_FIRST_SEED=n UNDERLAY_SEEDS=1 shows one");
}
