//! Guests on a chain of images, while the chain is mirrored: with every sync and copy mode, to images of all kinds, to
//! a switch, to a copy of one moment, or to nothing; on disks that lose power, fill up and fail. The guest always reads
//! what it wrote, before the switch and behind it; a copy is what the disk was like at one moment, and is durable when
//! the job says that it is done; after a power cut every flushed write is in the image that the guest's disk was on.

use std::sync::Arc;
use std::time::Duration;

use underlay_graph::{NodeId, Perms};
use underlay_jobs::{Job, Jobs, MirrorArgs, Settings, Status, SyncMode, Target};
use underlay_sim::{Rng, run_seeds};
use underlay_sys::rt;

use crate::guests::{Guests, Running};
use crate::lab::{Layer, SMALL, Setup, add_node, add_user, build};
use crate::target::{Ground, Record, TargetImage, check_copy, meddle, policy};

/// How the client ends it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Complete,
    /// When it is ready.
    Cancel,
    /// At any time.
    Force,
}

#[derive(Debug)]
struct Case {
    sync: SyncMode,
    end: End,
    copy: TargetImage,
    write_blocking: bool,
    change_mode: bool,
    /// Somebody else writes to the source past the job's filter.
    past_filter: bool,
    cut: bool,
    faults: bool,
}

impl Case {
    fn new(rng: &mut Rng, setup: &Setup, faults: bool) -> Self {
        let length = setup.layers.len();
        let sync = rng.pick(&[SyncMode::Full, SyncMode::Top, SyncMode::None]);
        let whole = [Ground::Nothing, Ground::Rubbish];
        let on = |at| [Ground::Layer(at), Ground::LayerLater(at)];
        let ground = match sync {
            SyncMode::Top if length > 1 => rng.pick(&on(length - 2)),
            SyncMode::Full | SyncMode::Top => rng.pick(&whole),
            // The source itself can be below the target only later: it would not be a root.
            SyncMode::None => rng.pick(&[Ground::Copy, Ground::LayerLater(length - 1)]),
        };
        let mut case = Self {
            sync,
            end: rng.pick(&[End::Complete, End::Complete, End::Cancel, End::Force]),
            past_filter: false,
            copy: TargetImage::new(rng, setup, ground),
            write_blocking: rng.one_in(2),
            change_mode: rng.one_in(3),
            cut: !faults && rng.one_in(2),
            faults,
        };
        // Who is not switched over would go on with a disk of his own.
        case.past_filter = case.end != End::Complete && !case.shows_source() && rng.one_in(2);
        case
    }

    /// Something may go wrong.
    fn is_troubled(&self) -> bool {
        self.cut || self.faults
    }

    /// The copy shows what the guest writes to its own disk.
    fn shows_source(&self) -> bool {
        self.sync == SyncMode::None && self.copy.ground.backing().is_some()
    }
}

fn arguments(source: NodeId, case: &Case, target: Target, rng: &mut Rng) -> MirrorArgs {
    MirrorArgs {
        settings: Settings {
            id: Some("j".into()),
            speed: rng.pick(&[0, 0, 1 << 20, 64 << 20]),
            auto_finalize: !rng.one_in(4),
            on_error: policy(rng),
            on_target_error: Some(policy(rng)),
            ..Settings::default()
        },
        source,
        target,
        replaces: rng.one_in(4).then_some(source),
        sync: case.sync,
        granularity: rng.pick(&[None, Some(512), Some(4096), Some(1 << 20)]),
        buf_size: None,
        write_blocking: case.write_blocking,
        target_is_zero: case.copy.ground == Ground::Nothing && rng.one_in(2),
        target_is_new: case.copy.ground == Ground::Nothing && rng.one_in(2),
        unmap: rng.one_in(2),
        filter_node_name: rng.one_in(2).then(|| "filter".into()),
    }
}

/// A client of a mirror. It does all that clients do, most of it refused as the job is not in the state for it, and
/// ends the job one day.
async fn attend(setup: &Setup, case: &Case, job: &Job, running: &mut Running, rng: &mut Rng) {
    let mut patience = rng.below(30);
    while !matches!(job.status(), Status::Concluded | Status::Null) {
        rt::sleep(Duration::from_micros(1 + rng.below(2000))).await;
        patience = patience.saturating_sub(1);
        if case.change_mode && rng.one_in(8) {
            let _ = job.change_copy_mode(true);
        }
        // A job that ignores errors would try for ever on disks without power.
        if setup.power.is_cut() {
            let _ = job.cancel();
        }
        meddle(job, rng).await;
        match case.end {
            End::Complete if patience == 0 => drop(job.complete()),
            End::Cancel if patience == 0 => cancel(setup, case, job, running).await,
            End::Force if patience == 0 => drop(job.cancel()),
            _ => {}
        }
    }
}

/// Ends a mirror that is ready with a copy of this moment, or of a later one.
async fn cancel(setup: &Setup, case: &Case, job: &Job, running: &mut Running) {
    let is_ready = || job.status() == Status::Ready;
    if is_ready() && case.shows_source() {
        // It is a copy only as long as the source stays as it is.
        running.stop().await;
        while running.guests.root.flush().await.is_err() && !setup.power.is_cut() {
            rt::sleep(Duration::from_millis(1)).await;
        }
    }
    // If it is paused by now the cancel is refused, and before it is ready it would be something else.
    if is_ready() {
        running.guests.model().remember();
        let _ = job.block_cancel(false);
    }
}

/// Nothing of the job is left in the graph, and the guest is where it belongs.
fn check_graph(setup: &Setup, source: NodeId, is_switched: bool) {
    let plan = setup.graph.plan();
    setup.check_no_job_is_left();
    assert_eq!(plan.root(setup.guest.id()).unwrap().node == source, !is_switched);
    assert_eq!(setup.top().name == "T", is_switched);
}

async fn play(seed: u64, faults: bool) {
    let mut rng = Rng::new(seed);
    let length = 1 + rng.index(4);
    let mut setup = build(&mut rng, length, SMALL).await;
    let case = Case::new(&mut rng, &setup, faults);
    println!("seed {seed}: {case:?}");
    let source = setup.layers[length - 1].node;
    let mut guests = Guests::new(&setup, case.is_troubled());
    guests.compress &= !case.copy.raw && setup.cluster % case.copy.cluster == 0;
    let disk = case.copy.make(&setup, &mut rng).await;
    // What is written before the job must be in a copy of before already.
    let is_early = case.copy.ground != Ground::Copy;
    let mut running = guests.start(&mut rng, if is_early { 2 } else { 0 }, 200);
    rt::sleep(Duration::from_micros(rng.below(5000))).await;
    let new = case.copy.open(&setup, &disk, &mut rng).await;
    let target = match case.copy.ground {
        Ground::LayerLater(at) => Target::New { node: Box::new(new), backing: Some(setup.layers[at].node) },
        Ground::Nothing | Ground::Rubbish if rng.one_in(3) => {
            Target::New { node: Box::new(new), backing: None }
        }
        _ => Target::Existing(add_node(&setup.graph, new).await),
    };
    setup.layers.push(Layer { name: "T", disk, node: NodeId::DETACHED, raw: case.copy.raw, home: None });
    let mut beside = guests.start(&mut rng, 0, 0);
    let mut mending = None;
    if case.faults {
        let broken = if rng.one_in(2) { length } else { rng.index(length) };
        setup.break_disk(&setup.layers[broken].disk, &mut rng);
        mending = Some(setup.mend_after(Duration::from_micros(rng.below(60_000))));
    }
    if case.cut {
        setup.cut_after(Duration::from_micros(rng.below(60_000)), &guests);
    }
    let record = Arc::new(Record::default());
    let arguments = arguments(source, &case, target, &mut rng);
    match Jobs::new(record.clone()).mirror(&setup.graph, arguments).await {
        Ok(started) => {
            setup.layers[length].node = setup.graph.plan().find("T").unwrap();
            drop(rt::spawn(started.task));
            if !is_early {
                running = guests.start(&mut rng, 2, 200);
            }
            if case.past_filter {
                let root = add_user(&setup.graph, source, Perms::CONSISTENT_READ | Perms::WRITE).await;
                beside = guests.through(root).start(&mut rng, 1, 200);
            }
            attend(&setup, &case, &started.job, &mut running, &mut rng).await;
        }
        Err(error) => assert!(case.is_troubled(), "{error}"),
    }
    let is_well = record.is_well();
    if case.end == End::Force {
        assert!(!is_well);
    } else {
        assert!(is_well || case.is_troubled(), "{:?}", record.0);
    }
    check_graph(&setup, source, is_well && case.end == End::Complete);
    if let Some(mending) = mending {
        mending.await;
    }
    if is_well && case.end == End::Cancel {
        let model = guests.model().clone();
        check_copy(&setup, &model, seed).await;
    }
    running.stop().await;
    beside.done().await;
    setup.live_on(&guests, &mut rng).await;
    setup.cut_and_compare(&guests, seed).await;
}

#[test]
fn mirrors_lose_nothing() {
    run_seeds(800, |seed| play(seed, false));
}

#[test]
fn mirrors_on_failing_disks_lose_nothing() {
    run_seeds(800, |seed| play(seed, true));
}
