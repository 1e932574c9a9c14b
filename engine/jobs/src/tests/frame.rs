//! The frame's verbs and events, against what QEMU 10.0.2 answers to the same commands.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::Semaphore;
use underlay_graph::{ByteRange, IoError};
use underlay_sys::rt;

use super::lab::{Lab, names};
use super::world::run;
use crate::copy::{self, Copier, Fault, Ignored, Step};
use crate::settings::{Kind, OnError};
use crate::{CommitArgs, JobError, Settings, Started, Status, StreamArgs, StreamEnd};

const MIB: u64 = 1 << 20;

fn settings() -> Settings {
    Settings { id: Some("j".into()), ..Settings::default() }
}

fn stream_args(lab: &Lab, top: usize, end: StreamEnd, settings: Settings) -> StreamArgs {
    StreamArgs {
        settings,
        top: lab.nodes[top],
        end,
        backing_file: None,
        backing_mask_protocol: false,
        filter_node_name: None,
        names: names(),
    }
}

fn commit_args(lab: &Lab, top: Option<usize>, base: Option<usize>, settings: Settings) -> CommitArgs {
    CommitArgs {
        settings,
        device: lab.nodes[3],
        top: top.map(|at| lab.nodes[at]),
        base: base.map(|at| lab.nodes[at]),
        backing_file: None,
        backing_mask_protocol: false,
        filter_node_name: None,
        names: names(),
    }
}

async fn lab() -> Lab {
    Lab::new(1, &[4 * MIB; 4]).await
}

fn spawn(started: Started) -> Arc<crate::Job> {
    drop(rt::spawn(started.task));
    started.job
}

#[test]
fn a_stream_tells_what_qemus_tells() {
    run(1, async {
        let lab = lab().await;
        let args = stream_args(&lab, 3, StreamEnd::Above(lab.nodes[0]), settings());
        let job = spawn(lab.jobs.stream(&lab.graph, args).await.unwrap());
        assert_eq!(lab.record.take(), "created running");
        job.concluded().await;
        assert_eq!(lab.record.take(), "waiting pending COMPLETED concluded null");
        assert_eq!((job.info().current, job.info().total), (4 * MIB, 4 * MIB));
        assert_eq!(lab.chain(), "DA");
        assert!(lab.jobs.query().is_empty());
        // Nothing is left to do: over at once, and with no length.
        let args = stream_args(&lab, 3, StreamEnd::Above(lab.nodes[0]), settings());
        let job = lab.jobs.stream(&lab.graph, args).await.unwrap().job;
        assert_eq!(lab.record.take(), "created running waiting pending COMPLETED concluded null");
        assert_eq!(job.info().total, 0);
        lab.assert_tidy();
    });
}

/// A chain does not come to rely on copies that may be gone.
#[test]
fn what_was_copied_may_have_been_forgotten() {
    run(1, async {
        let slow = || Settings { speed: 1, ..settings() };
        let whole = async |lab: &Lab| {
            let args = stream_args(lab, 3, StreamEnd::Whole, slow());
            (lab.jobs.stream(&lab.graph, args).await.unwrap(), 3)
        };
        let commit = async |lab: &Lab, top| {
            let args = commit_args(lab, top, Some(1), slow());
            (lab.jobs.commit(&lab.graph, args).await.unwrap(), 1)
        };
        for what in 0..3 {
            let lab = lab().await;
            let (started, written) = match what {
                0 => whole(&lab).await,
                1 => commit(&lab, Some(2)).await,
                _ => commit(&lab, None).await,
            };
            let job = spawn(started);
            lab.images[written].state().doubts = 1;
            job.set_speed(0).unwrap();
            job.concluded().await;
            let events = lab.record.take();
            assert!(!events.contains("ready"), "{what}: {events}");
            assert!(events.contains("COMPLETED(Input/output error)"), "{what}: {events}");
            assert_eq!(lab.chain(), "DCBA");
            assert_eq!(lab.chain_on_disk().len(), 4);
            lab.assert_tidy();
        }
    });
}

#[test]
fn pending_waits_for_finalize_and_concluded_for_dismiss() {
    run(2, async {
        let lab = lab().await;
        let manual = Settings { auto_finalize: false, auto_dismiss: false, ..settings() };
        let args = stream_args(&lab, 3, StreamEnd::Above(lab.nodes[0]), manual.clone());
        let job = spawn(lab.jobs.stream(&lab.graph, args).await.unwrap());
        rt::sleep(Duration::from_secs(1)).await;
        assert_eq!(lab.record.take(), "created running waiting pending PENDING");
        assert_eq!(lab.chain(), "DCBA");
        let refused = job.pause().unwrap_err();
        assert_eq!(refused.to_string(), "Job 'j' in state 'pending' cannot accept command verb 'pause'");
        job.finalize().await.unwrap();
        assert_eq!(lab.record.take(), "COMPLETED concluded");
        assert_eq!(lab.chain(), "DA");
        assert_eq!(lab.jobs.query()[0].status, Status::Concluded);
        assert!(matches!(job.cancel(), Err(JobError::WrongState { .. })));
        // Until then its images count as in use.
        let plan = lab.graph.plan();
        let busy: String =
            plan.nodes().filter(|(_, node)| node.busy.is_some()).map(|(_, n)| n.name.to_string()).collect();
        assert_eq!(busy, "BCD");
        drop(plan);
        lab.jobs.dismiss(&job).await.unwrap();
        assert_eq!(lab.record.take(), "null");
        lab.assert_tidy();
        // Cancelled while pending: nothing happens to the chain.
        let args = stream_args(&lab, 3, StreamEnd::Whole, manual);
        let job = spawn(lab.jobs.stream(&lab.graph, args).await.unwrap());
        rt::sleep(Duration::from_secs(1)).await;
        job.cancel().unwrap();
        job.concluded().await;
        assert_eq!(lab.record.take(), "created running waiting pending PENDING aborting CANCELLED concluded");
        assert_eq!(job.info().error.as_deref(), Some("Operation canceled"));
        assert_eq!(lab.chain(), "DA");
        lab.jobs.dismiss(&job).await.unwrap();
        lab.assert_tidy();
    });
}

#[test]
fn a_slow_job_shows_its_first_chunk_and_can_be_paused_and_cancelled() {
    run(3, async {
        let lab = lab().await;
        for image in &lab.images[1..] {
            image.state().clusters.fill(super::disk::Cluster::Below);
        }
        lab.images[1].state().clusters[32..].fill(super::disk::Cluster::Data(vec![7; 32768]));
        let slow = Settings { speed: 65536, ..settings() };
        let args = stream_args(&lab, 3, StreamEnd::Above(lab.nodes[0]), slow.clone());
        let job = spawn(lab.jobs.stream(&lab.graph, args).await.unwrap());
        rt::sleep(Duration::from_secs(1)).await;
        let info = job.info();
        assert_eq!((info.current, info.total, info.busy), (MIB + MIB / 2, 4 * MIB, false));
        for (other, top) in [("D", 3), ("B", 1)] {
            let args =
                stream_args(&lab, top, StreamEnd::Whole, Settings { id: Some("k".into()), ..settings() });
            let refused = lab.jobs.stream(&lab.graph, args).await.unwrap_err();
            let text = format!("Node '{other}' is busy: block device is in use by block job: stream");
            assert_eq!(refused.to_string(), text);
        }
        let args = stream_args(&lab, 0, StreamEnd::Whole, settings());
        let refused = lab.jobs.stream(&lab.graph, args).await.unwrap_err();
        assert_eq!(refused.to_string(), "Job ID 'j' already in use");
        assert_eq!(job.resume().unwrap_err(), JobError::NotPaused);
        assert_eq!(job.set_speed(-1).unwrap_err(), JobError::NegativeSpeed);
        lab.record.take();
        job.pause().unwrap();
        assert_eq!(job.pause().unwrap_err(), JobError::AlreadyPaused);
        assert_eq!(
            job.block_cancel(false).unwrap_err().to_string(),
            "The block job for device 'j' is currently paused"
        );
        // A change of the graph that touches the job's chain shows only when the job is not paused anyway.
        let touch = |id| {
            lab.graph.change(move |plan| {
                plan.touch(id);
                Ok(())
            })
        };
        touch(lab.nodes[0]).await.unwrap();
        assert_eq!(lab.record.take(), "paused");
        job.resume().unwrap();
        touch(lab.nodes[0]).await.unwrap();
        assert_eq!(lab.record.take(), "running paused running");
        job.pause().unwrap();
        job.block_cancel(true).unwrap();
        job.concluded().await;
        assert_eq!(lab.record.take(), "paused running aborting CANCELLED concluded null");
        let unknown = lab.jobs.block_job("j").unwrap_err();
        assert_eq!(unknown.to_string(), "Block job 'j' not found");
        lab.assert_tidy();
        let negative = Settings { speed: -1, ..settings() };
        let args = commit_args(&lab, Some(2), Some(0), negative);
        assert_eq!(lab.jobs.commit(&lab.graph, args).await.unwrap_err(), JobError::NegativeSpeed);
        assert_eq!(lab.record.take(), "created null");
        lab.assert_tidy();
        // All of a daemon's jobs at its end.
        let args = commit_args(&lab, Some(2), Some(0), slow);
        spawn(lab.jobs.commit(&lab.graph, args).await.unwrap());
        lab.jobs.cancel_all().await;
        assert_eq!(lab.record.take(), "created running paused running aborting CANCELLED concluded null");
        lab.assert_tidy();
    });
}

#[test]
fn an_active_commit_gets_ready_and_waits() {
    run(4, async {
        let lab = lab().await;
        let job =
            spawn(lab.jobs.commit(&lab.graph, commit_args(&lab, None, None, settings())).await.unwrap());
        assert!(matches!(job.complete(), Err(JobError::WrongState { .. })));
        rt::sleep(Duration::from_secs(1)).await;
        assert_eq!(lab.record.take(), "created running ready READY");
        job.pause().unwrap();
        job.complete().unwrap();
        assert_eq!(lab.record.take(), "standby");
        job.resume().unwrap();
        job.concluded().await;
        assert_eq!(lab.record.take(), "ready waiting pending COMPLETED concluded null");
        assert_eq!(lab.chain(), "A");
        lab.assert_tidy();
    });
    run(5, async {
        let lab = lab().await;
        for (force, end) in
            [(false, "waiting pending COMPLETED concluded null"), (true, "aborting CANCELLED concluded null")]
        {
            let args = commit_args(&lab, None, Some(1), settings());
            let job = spawn(lab.jobs.commit(&lab.graph, args).await.unwrap());
            rt::sleep(Duration::from_secs(1)).await;
            lab.record.take();
            job.block_cancel(force).unwrap();
            job.concluded().await;
            assert_eq!(lab.record.take(), end);
            assert_eq!(lab.chain(), "DCBA");
            lab.assert_tidy();
        }
    });
}

#[test]
fn chains_are_checked_in_qemus_words() {
    run(6, async {
        let lab = lab().await;
        let stream = async |top, end, file: Option<&str>| {
            let args =
                StreamArgs { backing_file: file.map(Into::into), ..stream_args(&lab, top, end, settings()) };
            lab.jobs.stream(&lab.graph, args).await.unwrap_err().to_string()
        };
        let n = &lab.nodes;
        assert_eq!(stream(3, StreamEnd::Above(n[3]), None).await, "Node 'D' is not a backing image of 'D'");
        assert_eq!(stream(1, StreamEnd::Above(n[2]), None).await, "Node 'C' is not a backing image of 'B'");
        assert_eq!(
            stream(1, StreamEnd::Bottom(n[2]), None).await,
            "Node 'C' is not in a chain starting from 'B'"
        );
        assert_eq!(
            stream(3, StreamEnd::Whole, Some("x")).await,
            "backing file specified, but streaming the entire chain"
        );
        let commit = async |device: usize, top: Option<usize>, base: Option<usize>, file: Option<&str>| {
            let args = CommitArgs {
                device: lab.nodes[device],
                backing_file: file.map(Into::into),
                ..commit_args(&lab, top, base, settings())
            };
            lab.jobs.commit(&lab.graph, args).await.unwrap_err().to_string()
        };
        assert_eq!(commit(3, Some(0), Some(0), None).await, "cannot commit an image into itself");
        assert_eq!(commit(3, Some(0), None, None).await, "cannot commit an image into itself");
        assert_eq!(commit(3, Some(0), Some(1), None).await, "'B' is not in this backing file chain");
        assert_eq!(commit(2, None, None, None).await, "Need a root block node");
        assert_eq!(
            commit(3, None, None, Some("x")).await,
            "'backing-file' specified, but 'top' is the active layer"
        );
        assert_eq!(lab.record.take(), "");
        let bad = |id: Option<&str>| Settings { id: id.map(Into::into), ..Settings::default() };
        for (id, text) in [(Some("1x"), "Invalid job ID '1x'"), (None, "An explicit job ID is required")] {
            let args = stream_args(&lab, 3, StreamEnd::Whole, bad(id));
            assert_eq!(lab.jobs.stream(&lab.graph, args).await.unwrap_err().to_string(), text);
        }
        lab.assert_tidy();
    });
}

#[test]
fn filters_are_there_while_a_job_runs() {
    run(7, async {
        let lab = lab().await;
        let slow = Settings { speed: 1, ..settings() };
        let args = StreamArgs {
            filter_node_name: Some("flt".into()),
            ..stream_args(&lab, 3, StreamEnd::Whole, slow.clone())
        };
        let job = spawn(lab.jobs.stream(&lab.graph, args).await.unwrap());
        let plan = lab.graph.plan();
        let filter = plan.node(plan.find("flt").unwrap());
        assert_eq!((filter.node.driver(), filter.implicit), ("copy-on-read", false));
        assert_eq!(plan.root(lab.guest.id()).unwrap().node, plan.find("flt").unwrap());
        lab.guest.flush().await.unwrap();
        job.cancel().unwrap();
        job.concluded().await;
        lab.assert_tidy();
        let args = CommitArgs {
            filter_node_name: Some("D".into()),
            ..commit_args(&lab, Some(2), Some(1), settings())
        };
        let refused = lab.jobs.commit(&lab.graph, args).await.unwrap_err().to_string();
        assert_eq!(refused, "Could not create node: Duplicate nodes with node-name='D'");
        lab.assert_tidy();
        // A reader of what is not consistent is refused while an intermediate commit runs.
        let job =
            spawn(lab.jobs.commit(&lab.graph, commit_args(&lab, Some(2), Some(0), slow)).await.unwrap());
        let reader = underlay_graph::plan::NewRoot {
            user: "an unnamed block device".into(),
            role: "root",
            node: lab.nodes[1],
            required: underlay_graph::Perms::CONSISTENT_READ,
            shared: underlay_graph::Perms::ALL,
            pinned: false,
            drained: None,
        };
        let refused = lab.graph.change(|plan| Ok(plan.add_root(reader))).await.unwrap_err().to_string();
        let text = "Permission conflict on node 'B': permissions 'consistent read' are both required by an unnamed \
                    block device (uses node 'B' as 'root' child) and unshared by commit job 'j' (uses node 'B' as \
                    'intermediate node' child).";
        assert_eq!(refused, text);
        job.cancel().unwrap();
        job.concluded().await;
        lab.assert_tidy();
    });
}

/// A copy whose first pieces fail, one for each permit.
struct Failing {
    begun: AtomicUsize,
    permits: Semaphore,
}

const FAILING: usize = 4;

#[async_trait]
impl Copier for Failing {
    async fn look(&self, range: ByteRange) -> Result<(Step, u64), Fault> {
        Ok((Step::Copy, range.len()))
    }

    async fn copy(&self, _: ByteRange, _: Step) -> Result<(), Fault> {
        if self.begun.fetch_add(1, Ordering::SeqCst) >= FAILING {
            return Ok(());
        }
        self.permits.acquire().await.unwrap().forget();
        Err(Fault::write(IoError::ENOSPC))
    }
}

/// A client that is faster than the other pieces that were on their way is not told of them: it has made room already.
#[test]
fn one_event_tells_of_all_pieces_that_fail_together() {
    run(1, async {
        let lab = lab().await;
        let stop = Settings { on_error: OnError::Stop, ..settings() };
        let job = lab.jobs.draft("j".into(), Kind::Commit, &stop);
        job.begin(Status::Running);
        let copier = Arc::new(Failing { begun: AtomicUsize::new(0), permits: Semaphore::new(0) });
        let (of_job, of_copier) = (job.clone(), copier.clone());
        let walking = rt::spawn(async move {
            let disk = ByteRange::between(0, 4 * MIB);
            copy::walk(&of_job, &of_copier, disk, Ignored::TryAgain).await.map(drop)
        });
        while copier.begun.load(Ordering::SeqCst) < FAILING {
            rt::yield_now().await;
        }
        copier.permits.add_permits(1);
        while job.status() != Status::Paused {
            rt::yield_now().await;
        }
        job.resume().unwrap();
        copier.permits.add_permits(FAILING - 1);
        walking.await.unwrap();
        assert_eq!(lab.record.take(), "running ERROR(write,stop) paused running");
        let pieces = usize::try_from(4 * MIB / copy::CHUNK).unwrap();
        assert_eq!(copier.begun.load(Ordering::SeqCst), pieces + FAILING);
    });
}
