//! Guests on a chain of images, while the chain is backed up: whole, its top, or only what is overwritten; to images of
//! all kinds, on disks that lose power, fill up and fail. The guest always reads what it wrote. A backup that the job
//! says is done is what the disk was like when the job was started, and stays so after a power cut; and so is what the
//! target of a job that only keeps what is overwritten shows together with the disk, as long as the job lasts.

use std::sync::Arc;
use std::time::Duration;

use underlay_drivers::filter::copy_before_write::{CbwOptions, CopyBeforeWrite, OnCbwError};
use underlay_drivers::filter::snapshot_access::SnapshotAccess;
use underlay_graph::plan::NodeOptions;
use underlay_graph::{ByteRange, NewNode, NodeId, NodeName, Perms, Plan, Role, Root, Wiring};
use underlay_jobs::{BackupArgs, BackupSync, BackupTarget, Job, Jobs, OnError, Settings, Status};
use underlay_sim::{Model, Power, Rng, SECTOR, run_seeds};
use underlay_sys::{Iov, rt};

use crate::guests::Guests;
use crate::lab::{Layer, Setup, add_node, add_user, build};
use crate::target::{Ground, Record, TargetImage, check_copy, meddle, policy};

/// Bytes of a disk: what is copied as a whole has at least 64 KiB, and there shall be some of these.
const LARGE: u64 = 12 * (64 << 10);

#[derive(Debug)]
struct Case {
    sync: BackupSync,
    /// The client loses patience.
    cancel: bool,
    copy: TargetImage,
    how: CbwOptions,
    cut: bool,
    /// Whose disk fails: a layer's, or behind them the target's.
    broken: Option<usize>,
}

impl Case {
    fn new(rng: &mut Rng, setup: &Setup, faults: bool) -> Self {
        let length = setup.layers.len();
        let sync = rng.pick(&[BackupSync::Full, BackupSync::Top, BackupSync::None]);
        let ground = match sync {
            BackupSync::Top if length > 1 => Ground::Layer(length - 2),
            // What the layer does not have it leaves as it is.
            BackupSync::Top => Ground::Nothing,
            BackupSync::Full | BackupSync::Bitmap => rng.pick(&[Ground::Nothing, Ground::Rubbish]),
            // Together with the disk it shows the disk as it was.
            BackupSync::None => rng.pick(&[Ground::Copy, Ground::Layer(length - 1)]),
        };
        let copy = TargetImage::new(rng, setup, ground);
        let how = CbwOptions {
            on_error: on_error(rng),
            min_cluster: rng.pick(&[0, 0, 128 << 10]),
            max_chunk: rng.pick(&[0, 0, 128 << 10]),
            compress: !copy.raw && rng.one_in(3),
            ..CbwOptions::default()
        };
        let broken = faults.then(|| if rng.one_in(2) { length } else { rng.index(length) });
        let cancel = sync == BackupSync::None || rng.one_in(4);
        Self { sync, cancel, copy, how, cut: !faults && rng.one_in(2), broken }
    }

    /// Something may go wrong.
    fn is_troubled(&self) -> bool {
        self.cut || self.broken.is_some()
    }

    /// Something may go wrong for the guest: not if only the target fails, and gives way.
    fn troubles_guests(&self, setup: &Setup) -> bool {
        let gives_way =
            self.broken == Some(setup.layers.len()) && self.how.on_error == OnCbwError::BreakSnapshot;
        self.is_troubled() && !gives_way
    }

    /// The target shows the disk as it was all the time.
    fn shows_moment(&self, setup: &Setup) -> bool {
        let may_be_lost = self.is_troubled() && self.how.on_error == OnCbwError::BreakSnapshot;
        self.copy.ground == Ground::Layer(setup.layers.len() - 2) && !may_be_lost
    }

    fn arguments(&self, source: NodeId, target: BackupTarget, rng: &mut Rng) -> BackupArgs {
        BackupArgs {
            settings: settings(rng),
            source,
            target,
            sync: self.sync,
            bitmap: None,
            how: self.how,
            most_in_flight: rng.pick(&[1, 4, 64]),
            filter_node_name: rng.one_in(2).then(|| "filter".into()),
        }
    }
}

fn on_error(rng: &mut Rng) -> OnCbwError {
    rng.pick(&[OnCbwError::BreakGuestWrite, OnCbwError::BreakSnapshot])
}

pub fn settings(rng: &mut Rng) -> Settings {
    Settings {
        id: Some("j".into()),
        speed: rng.pick(&[0, 0, 1 << 20, 64 << 20]),
        auto_finalize: !rng.one_in(4),
        on_error: policy(rng),
        on_target_error: Some(policy(rng)),
        ..Settings::default()
    }
}

/// A client of a backup.
pub async fn attend(power: &Power, job: &Job, cancel: bool, rng: &mut Rng) {
    let mut patience = if cancel { rng.below(30) } else { u64::MAX };
    while !matches!(job.status(), Status::Concluded | Status::Null) {
        rt::sleep(Duration::from_micros(1 + rng.below(2000))).await;
        patience = patience.saturating_sub(1);
        // A job that ignores errors would try for ever on disks without power.
        if patience == 0 || power.is_cut() {
            let _ = if rng.one_in(2) { job.block_cancel(false) } else { job.cancel() };
        }
        meddle(job, rng).await;
    }
}

/// Reads the disk as it was at `moment`, as long as the job is there.
fn read_along(
    setup: &Setup,
    root: Root,
    moment: &Model,
    job: &Arc<Job>,
    may_fail: bool,
) -> rt::JoinHandle<()> {
    let (moment, job, sectors) = (moment.clone(), job.clone(), setup.sectors);
    rt::spawn(async move {
        let mut rng = Rng::new(sectors);
        loop {
            let first = rng.below(sectors);
            let count = (1 + rng.below(200)).min(sectors - first);
            let range = ByteRange::between(first * SECTOR, (first + count) * SECTOR);
            let into = Iov::filled(range.buffer_len(), 0xee);
            let result = root.read(range, into.clone()).await;
            if matches!(job.status(), Status::Aborting | Status::Concluded | Status::Null) {
                return;
            }
            match result {
                Ok(()) => moment.check_part(first, &into.to_vec()).unwrap(),
                Err(error) => assert!(may_fail, "{error}"),
            }
            rt::sleep(Duration::from_micros(rng.below(500))).await;
        }
    })
}

async fn play(seed: u64, faults: bool) {
    let mut rng = Rng::new(seed);
    let length = 1 + rng.index(4);
    let mut setup = build(&mut rng, length, LARGE).await;
    let case = Case::new(&mut rng, &setup, faults);
    println!("seed {seed}: {case:?}");
    let source = setup.layers[length - 1].node;
    let guests = Guests::new(&setup, case.troubles_guests(&setup));
    let disk = case.copy.make(&setup, &mut rng).await;
    // What is written before the job must be in a copy of before already.
    let is_early = case.copy.ground != Ground::Copy;
    let mut running = guests.start(&mut rng, if is_early { 2 } else { 0 }, 200);
    rt::sleep(Duration::from_micros(rng.below(5000))).await;
    let new = case.copy.open(&setup, &disk, &mut rng).await;
    let target = match rng.one_in(3) {
        true => BackupTarget::New(Box::new(new)),
        false => BackupTarget::Existing(add_node(&setup.graph, new).await),
    };
    setup.layers.push(Layer { name: "T", disk, node: NodeId::DETACHED, raw: case.copy.raw, home: None });
    let mut mending = None;
    if let Some(broken) = case.broken {
        setup.break_disk(&setup.layers[broken].disk, &mut rng);
        mending = Some(setup.mend_after(Duration::from_micros(rng.below(60_000))));
    }
    if case.cut {
        setup.cut_after(Duration::from_micros(rng.below(60_000)), &guests);
    }
    let record = Arc::new(Record::default());
    let arguments = case.arguments(source, target, &mut rng);
    guests.model().remember();
    let started = Jobs::new(record.clone()).backup(&setup.graph, arguments).await;
    let moment = guests.model().moment_over();
    match started {
        Ok(started) => {
            setup.layers[length].node = setup.graph.plan().find("T").unwrap();
            drop(rt::spawn(started.task));
            if !is_early {
                running = guests.start(&mut rng, 2, 200);
            }
            let (job, mut reader) = (started.job, None);
            if case.shows_moment(&setup) {
                let root = add_user(&setup.graph, setup.layers[length].node, Perms::CONSISTENT_READ).await;
                reader = Some(read_along(&setup, root, &moment, &job, case.is_troubled()));
            }
            attend(&setup.power, &job, case.cancel, &mut rng).await;
            if let Some(reader) = reader {
                reader.await;
            }
        }
        Err(error) => assert!(case.is_troubled(), "{error}"),
    }
    let is_well = record.is_well();
    assert!(is_well || case.is_troubled() || case.cancel, "{:?}", record.0);
    assert!(!is_well || case.sync != BackupSync::None);
    setup.check_no_job_is_left();
    assert_eq!(setup.graph.plan().root(setup.guest.id()).unwrap().node, source);
    if let Some(mending) = mending {
        mending.await;
    }
    if is_well {
        check_copy(&setup, &moment, seed).await;
    }
    running.stop().await;
    setup.live_on(&guests, &mut rng).await;
    if is_well {
        check_copy(&setup, &moment, !seed).await;
    }
    setup.cut_and_compare(&guests, seed).await;
}

/// Above the source a filter that keeps what is overwritten in `temporary`, and a node that shows the two as the disk
/// was.
async fn fleece(setup: &Setup, temporary: NodeId, how: CbwOptions) -> NodeId {
    let (graph, source) = (&setup.graph, setup.layers[0].node);
    let wires = graph.wires();
    let filter = CopyBeforeWrite::new(&wires.view(source), &wires.view(temporary), how).unwrap();
    let options = NodeOptions { discard: true, ..NodeOptions::default() };
    let node = |name, node, children| NewNode {
        name: NodeName::new(name),
        node,
        read_only: false,
        options,
        children,
    };
    let children = [(Role::File, source), (Role::Target, temporary)];
    let children = children.map(|(role, id)| (role, Wiring::Existing(id))).into();
    let edit = |plan: &mut Plan| {
        let of_target = plan.reachable(temporary);
        let filter = plan.add(node("filter", filter, children))?;
        plan.node_mut(filter).monitor_owned = true;
        plan.replace(source, filter, |parent| parent == filter || of_target.contains(&parent))?;
        let below = vec![(Role::File, Wiring::Existing(filter))];
        let access = plan.add(node("access", Arc::new(SnapshotAccess), below))?;
        plan.node_mut(access).monitor_owned = true;
        Ok(access)
    };
    graph.change(edit).await.unwrap()
}

/// A backup, while the guest goes on, of what the disk was like when a filter came; the job may give up what it has
/// read.
async fn play_fleecing(seed: u64) {
    let mut rng = Rng::new(seed);
    let mut setup = build(&mut rng, 1, LARGE).await;
    let how = CbwOptions {
        on_error: on_error(&mut rng),
        timeout: Duration::from_micros(rng.pick(&[0, 0, 3000])),
        ..CbwOptions::default()
    };
    let (fault, cut) = (rng.one_in(3), rng.one_in(3));
    let is_troubled = fault || cut || !how.timeout.is_zero();
    let breaks_guest = cut || is_troubled && how.on_error == OnCbwError::BreakGuestWrite;
    let guests = Guests::new(&setup, breaks_guest);
    let mut images = Vec::new();
    for (name, ground) in [("F", Ground::Layer(0)), ("T", Ground::Rubbish)] {
        let image = TargetImage::new(&mut rng, &setup, ground);
        let disk = image.make(&setup, &mut rng).await;
        let new = NewNode { name: NodeName::new(name), ..image.open(&setup, &disk, &mut rng).await };
        let node = add_node(&setup.graph, new).await;
        images.push(Layer { name, disk, node, raw: image.raw, home: None });
    }
    setup.layers.extend(images);
    let mut running = guests.start(&mut rng, 2, 150);
    rt::sleep(Duration::from_micros(rng.below(5000))).await;
    guests.model().remember();
    let access = fleece(&setup, setup.layers[1].node, how).await;
    let moment = guests.model().moment_over();
    if fault {
        setup.break_disk(&setup.layers[1].disk, &mut rng);
    }
    if cut {
        setup.cut_after(Duration::from_micros(rng.below(60_000)), &guests);
    }
    let arguments = BackupArgs {
        settings: Settings { on_error: OnError::Report, on_target_error: None, ..settings(&mut rng) },
        source: access,
        target: BackupTarget::Existing(setup.layers[2].node),
        sync: BackupSync::Full,
        bitmap: None,
        how: CbwOptions { discard_source: rng.one_in(2), ..CbwOptions::default() },
        most_in_flight: 4,
        filter_node_name: None,
    };
    let gives_up = arguments.how.discard_source;
    let record = Arc::new(Record::default());
    match Jobs::new(record.clone()).backup(&setup.graph, arguments).await {
        Ok(started) => {
            drop(rt::spawn(started.task));
            let root = add_user(&setup.graph, access, Perms::CONSISTENT_READ).await;
            let reader = read_along(&setup, root, &moment, &started.job, is_troubled || gives_up);
            attend(&setup.power, &started.job, false, &mut rng).await;
            reader.await;
        }
        Err(error) => assert!(cut, "{error}"),
    }
    running.stop().await;
    assert!(record.is_well() || is_troubled, "{:?}", record.0);
    setup.mend_after(Duration::ZERO).await;
    let without = |plan: &mut Plan| {
        let filter = plan.find("filter").unwrap();
        plan.node_mut(filter).monitor_owned = false;
        plan.replace(filter, setup.layers[0].node, |_| false)
    };
    setup.graph.change(without).await.unwrap();
    setup.live_on(&guests, &mut rng).await;
    if record.is_well() {
        check_copy(&setup, &moment, seed).await;
    }
    setup.cut_and_compare(&guests, seed).await;
}

#[test]
fn backups_are_of_the_moment() {
    run_seeds(300, |seed| play(seed, false));
}

#[test]
fn backups_on_failing_disks_are_of_the_moment() {
    run_seeds(300, |seed| play(seed, true));
}

#[test]
fn backups_of_what_a_filter_keeps_are_of_the_moment() {
    run_seeds(150, play_fleecing);
}
