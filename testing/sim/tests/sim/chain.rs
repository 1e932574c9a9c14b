//! A guest on a chain of images, while the chain is streamed and committed: on disks that lose power, fill up
//! and fail. The guest always reads what it wrote; after a power cut the images are sound, the chain opens by the
//! names in its headers, every flushed write is there, and no byte that was never written.

use std::sync::Arc;
use std::time::Duration;

use underlay_graph::{IoError, View};
use underlay_jobs::{
    CommitArgs, EventSink, Job, JobEvent, Jobs, Settings, Started, Status, StreamArgs, StreamEnd,
};
use underlay_sim::{Fault, Power, Rng, SECTOR, run_seeds};
use underlay_sys::rt;

use crate::guests::Guests;
use crate::lab::{SMALL, Setup, build};
use crate::target::{meddle, policy};

struct Quiet;

impl EventSink for Quiet {
    fn emit(&self, _event: JobEvent) {}
}

fn job_settings(rng: &mut Rng, id: &str) -> Settings {
    Settings {
        id: Some(id.into()),
        speed: rng.pick(&[0, 0, 1 << 20, 64 << 20]),
        auto_finalize: !rng.one_in(4),
        on_error: policy(rng),
        ..Settings::default()
    }
}

async fn stream_or_commit(setup: &Setup, jobs: &Arc<Jobs>, rng: &mut Rng, id: &str) -> Option<Started> {
    let names: underlay_jobs::BackingNames = Arc::new(|_: &View, base: &View| base.name().to_string());
    let settings = job_settings(rng, id);
    let node = |at: usize| setup.layers[at].node;
    // What a client calls the base: the same file, in other words than the graph's own.
    let called = |rng: &mut Rng, at: usize| rng.one_in(3).then(|| format!("./{}", setup.layers[at].name));
    if rng.one_in(2) {
        let top = 1 + rng.index(3);
        let (end, backing_file) = match rng.index(top + 1) {
            0 => (StreamEnd::Whole, None),
            at if rng.one_in(2) => (StreamEnd::Bottom(node(at)), called(rng, at - 1)),
            at => (StreamEnd::Above(node(at - 1)), called(rng, at - 1)),
        };
        let args = StreamArgs {
            settings,
            top: node(top),
            end,
            backing_file,
            backing_mask_protocol: false,
            filter_node_name: None,
            names,
        };
        return jobs.stream(&setup.graph, args).await.ok();
    }
    let top = 1 + rng.index(3);
    let base = rng.index(top);
    let args = CommitArgs {
        settings,
        device: node(3),
        top: Some(node(top)),
        base: Some(node(base)),
        // An active commit rewrites no header and refuses it.
        backing_file: if top < 3 { called(rng, base) } else { None },
        backing_mask_protocol: false,
        filter_node_name: None,
        names,
    };
    jobs.commit(&setup.graph, args).await.ok()
}

/// A client of a job: it waits, meddles, completes, and may lose patience.
async fn attend(job: &Arc<Job>, power: &Power, rng: &mut Rng) {
    let mut patience = if rng.one_in(4) { rng.below(20) } else { u64::MAX };
    while !matches!(job.status(), Status::Concluded | Status::Null) {
        rt::sleep(Duration::from_micros(1 + rng.below(2000))).await;
        patience = patience.saturating_sub(1);
        if patience == 0 {
            let _ = if rng.one_in(2) { job.block_cancel(false) } else { job.cancel() };
        }
        // A job that ignores errors would try for ever on disks without power.
        if power.is_cut() {
            let _ = job.cancel();
        }
        meddle(job, rng).await;
        let _ = job.complete();
    }
}

async fn power(seed: u64) {
    let mut rng = Rng::new(seed);
    let length = 1 + rng.index(3);
    let setup = build(&mut rng, length, SMALL).await;
    let guests = Guests::new(&setup, true);
    let count = 1 + rng.below(4);
    let mut running = guests.start(&mut rng, count, 25);
    rt::sleep(Duration::from_micros(rng.below(40_000))).await;
    setup.power.cut();
    running.done().await;
    setup.cut_and_compare(&guests, seed).await;
}

async fn faults(seed: u64) {
    let mut rng = Rng::new(seed);
    let length = 1 + rng.index(2);
    let setup = build(&mut rng, length, SMALL).await;
    let guests = Guests::new(&setup, true);
    let top = &setup.layers[length - 1].disk;
    let fault = |rng: &mut Rng, error| Some(Fault { after: rng.below(60), error, sticky: rng.one_in(2) });
    match rng.below(4) {
        0 => top.fail_writes(fault(&mut rng, IoError::ENOSPC)),
        1 => top.fail_writes(fault(&mut rng, IoError::EIO)),
        2 => top.fail_reads(fault(&mut rng, IoError::EIO)),
        _ => top.limit(top.content().len() as u64 + rng.below(20) * setup.cluster),
    }
    guests.start(&mut rng, 3, 20).done().await;
    setup.mend_after(Duration::ZERO).await;
    guests.verify().await;
    let healthy = guests.on_sound_disks();
    healthy.start(&mut rng, 2, 10).done().await;
    healthy.verify().await;
    setup.cut_and_compare(&guests, seed).await;
}

/// Starts a job, or tries two on one chain (the second is refused where they would meet), each with a client.
async fn start_jobs(setup: &Setup, rng: &mut Rng) -> Vec<rt::JoinHandle<()>> {
    let jobs = Jobs::new(Arc::new(Quiet));
    let ids = if rng.one_in(3) { &["j", "k"][..] } else { &["j"] };
    let mut clients = Vec::new();
    for id in ids {
        let Some(started) = stream_or_commit(setup, &jobs, rng, id).await else { continue };
        drop(rt::spawn(started.task));
        let (job, power, mut rng) = (started.job, setup.power.clone(), Rng::new(rng.number()));
        clients.push(rt::spawn(async move { attend(&job, &power, &mut rng).await }));
    }
    clients
}

/// Guests of a disk that may get longer: that of the base, to which an active commit takes them. A part of a cluster can
/// only be written compressed where the disk ends.
fn above_jobs(setup: &Setup, errors: bool) -> Guests {
    let mut guests = Guests::new(setup, errors);
    guests.compress &= (setup.sectors * SECTOR).is_multiple_of(setup.cluster);
    guests
}

/// Jobs on failing disks: they fail, stop and are resumed, or go on, as their policy says; the guest loses nothing.
async fn troubled(seed: u64) {
    let mut rng = Rng::new(seed);
    let setup = build(&mut rng, 4, SMALL).await;
    let guests = above_jobs(&setup, true);
    let mut running = guests.start(&mut rng, 2, 200);
    rt::sleep(Duration::from_micros(rng.below(5000))).await;
    setup.break_disk(&setup.layers[rng.index(4)].disk, &mut rng);
    let mending = setup.mend_after(Duration::from_micros(rng.below(60_000)));
    for client in start_jobs(&setup, &mut rng).await {
        client.await;
    }
    setup.check_no_job_is_left();
    mending.await;
    running.stop().await;
    guests.verify().await;
    setup.cut_and_compare(&guests, seed).await;
}

async fn jobs(seed: u64) {
    let mut rng = Rng::new(seed);
    let setup = build(&mut rng, 4, SMALL).await;
    let cut = rng.one_in(2);
    let guests = above_jobs(&setup, cut);
    let mut running = guests.start(&mut rng, 2, 200);
    rt::sleep(Duration::from_micros(rng.below(5000))).await;
    let clients = start_jobs(&setup, &mut rng).await;
    if !clients.is_empty() {
        if cut {
            setup.cut_after(Duration::from_micros(rng.below(60_000)), &guests);
        }
        for client in clients {
            client.await;
        }
        setup.check_no_job_is_left();
    }
    running.stop().await;
    if !setup.power.is_cut() {
        guests.verify().await;
    }
    setup.cut_and_compare(&guests, seed).await;
}

#[test]
fn power_cuts_lose_nothing_flushed() {
    run_seeds(3500, power);
}

#[test]
fn failing_disks_lose_nothing() {
    run_seeds(2000, faults);
}

#[test]
fn streams_and_commits_lose_nothing() {
    run_seeds(2000, jobs);
}

#[test]
fn jobs_on_failing_disks_lose_nothing() {
    run_seeds(1000, troubled);
}
