//! Snapshots inside an image, taken and deleted under guests who write, on disks that lose power or fail: each is what
//! the disk was at its moment, as long as it is there, and so is the disk.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use underlay_graph::graph::LastStep;
use underlay_graph::plan::Wires;
use underlay_graph::{ByteRange, Graph, GraphError, Node, NodeId, View};
use underlay_qcow2::snapshot_changes::NewSnapshot;
use underlay_qcow2::{Fix, OpenOptions, Qcow2, check};
use underlay_sim::{Disk, Model, Power, Rng, SECTOR, run_seeds};
use underlay_sys::{Iov, rt};

use crate::guests::Guests;
use crate::lab::{SMALL, Setup, build};

fn qcow2(node: &dyn Node) -> &Qcow2 {
    node.as_any().downcast_ref().unwrap()
}

/// One more snapshot, or one less.
enum Change {
    Take(String),
    Delete(String),
}

struct Step(NodeId, Change);

#[async_trait]
impl LastStep for Step {
    async fn run(self: Box<Self>, _old: &Wires, new: &Wires) -> Result<(), GraphError> {
        let view = new.view(self.0);
        let image = qcow2(&**view.node());
        match self.1 {
            Change::Take(name) => {
                let new = NewSnapshot { name, seconds: 1, nanoseconds: 2, clock: 3, icount: None };
                image.take_snapshot(&view.cx(), &new).await?;
            }
            Change::Delete(name) => {
                let place = image.snapshots().iter().position(|snapshot| snapshot.name == name);
                image.delete_snapshot(&view.cx(), place.unwrap()).await?;
            }
        }
        Ok(())
    }
}

async fn change(graph: &Graph, node: NodeId, change: Change) -> Result<(), GraphError> {
    let edit = |plan: &mut underlay_graph::Plan| {
        plan.touch(node);
        let step: Box<dyn LastStep> = Box::new(Step(node, change));
        Ok(((), Some(step)))
    };
    graph.change_with(edit).await
}

/// The disk as it was when a snapshot was taken.
struct Known {
    name: String,
    moment: Model,
    /// Whether it was taken, or deleted, is not known: the power went meanwhile.
    doubtful: bool,
}

struct Lab {
    setup: Setup,
    guests: Guests,
    known: Vec<Known>,
    /// The disk fails now and then.
    faulty: bool,
}

impl Lab {
    fn node(&self) -> NodeId {
        self.setup.layers[0].node
    }

    /// Whether an error is one of those that were made.
    fn settle(&self, result: &Result<(), GraphError>) {
        let plan = self.setup.graph.plan();
        let narrow = qcow2(&*plan.node(self.node()).node).header().refcount_order < 3;
        let expected = self.faulty || narrow || self.setup.power.is_cut();
        assert!(result.is_ok() || expected, "{result:?}");
    }

    /// After an error that leaves open what the disk has: no power, or an image that was given up.
    fn is_over(&self) -> bool {
        self.setup.power.is_cut() || self.setup.graph.plan().node(self.node()).node.is_unusable()
    }

    async fn take(&mut self, name: String) {
        self.guests.model().remember();
        let result = change(&self.setup.graph, self.node(), Change::Take(name.clone())).await;
        let moment = self.guests.model().moment_over();
        self.settle(&result);
        let doubtful = result.is_err() && self.is_over();
        if result.is_ok() || doubtful {
            self.known.push(Known { name, moment, doubtful });
        }
    }

    async fn delete(&mut self, at: usize) {
        let name = self.known[at].name.clone();
        let result = change(&self.setup.graph, self.node(), Change::Delete(name)).await;
        self.settle(&result);
        match result {
            Ok(()) => drop(self.known.swap_remove(at)),
            Err(_) => self.known[at].doubtful |= self.is_over(),
        }
    }

    /// The image as it is in a file: sound, with the snapshots that are known.
    async fn check(&self, content: Vec<u8>, seed: u64) {
        let file = View::detached(Disk::new(content, seed, Power::until(u64::MAX)), []);
        let mut findings = Vec::new();
        let outcome = check(&file.cx(), Fix::None, &mut |finding| findings.push(finding)).await.unwrap();
        assert_eq!(outcome.corruptions + outcome.check_errors, 0, "{findings:?}");
        let names = |image: &Qcow2| -> Vec<String> {
            image.snapshots().iter().map(|snapshot| snapshot.name.clone()).collect()
        };
        let names = names(&Qcow2::open(&file.cx(), OpenOptions::default()).await.unwrap());
        for known in &self.known {
            let Some(place) = names.iter().position(|name| *name == known.name) else {
                assert!(known.doubtful, "{} is gone", known.name);
                continue;
            };
            let image = Arc::new(Qcow2::open(&file.cx(), OpenOptions::default()).await.unwrap());
            let view = View::detached(image.clone(), [(underlay_graph::Role::File, file.clone())]);
            image.show_snapshot(&view.cx(), place).await.unwrap();
            let all = Iov::scratch(usize::try_from(self.setup.sectors * SECTOR).unwrap());
            view.cx().read(ByteRange::between(0, self.setup.sectors * SECTOR), all.clone()).await.unwrap();
            known.moment.check_copy(&all.to_vec()).unwrap();
        }
        let is_known = |name: &String| self.known.iter().any(|known| known.name == *name);
        assert!(names.iter().all(is_known), "{names:?}");
    }
}

async fn play(seed: u64) {
    let mut rng = Rng::new(seed);
    let setup = build(&mut rng, 1, SMALL).await;
    if setup.layers[0].raw {
        return;
    }
    let (cut, faulty) = (rng.one_in(2), rng.one_in(3));
    let guests = Guests::new(&setup, cut || faulty);
    let mut lab = Lab { setup, guests, known: Vec::new(), faulty };
    let mut running = lab.guests.start(&mut rng, 3, 100);
    if cut {
        lab.setup.cut_after(Duration::from_micros(rng.below(80_000)), &lab.guests);
    }
    for step in 0..4 + rng.below(12) {
        rt::sleep(Duration::from_micros(rng.below(6000))).await;
        if lab.is_over() {
            break;
        }
        if faulty {
            lab.setup.mend_after(Duration::ZERO).await;
            if rng.one_in(2) {
                lab.setup.break_disk(&lab.setup.layers[0].disk, &mut rng);
            }
        }
        let count = lab.known.len();
        match rng.below(3) {
            0 if count > 0 => lab.delete(rng.index(count)).await,
            _ => lab.take(format!("s{step}")).await,
        }
    }
    running.stop().await;
    lab.setup.mend_after(Duration::ZERO).await;
    if !lab.is_over() {
        lab.guests.on_sound_disks().verify().await;
        let view = lab.setup.graph.wires().view(lab.node());
        view.cx().flush().await.unwrap();
        lab.check(lab.setup.layers[0].disk.content(), seed).await;
    }
    for round in 0..2 {
        let left = lab.setup.layers[0].disk.after_power_cut(seed + round);
        lab.check(left, seed + round).await;
    }
    lab.setup.cut_and_compare(&lab.guests, seed).await;
}

#[test]
fn snapshots_inside_are_of_their_moment() {
    run_seeds(150, play);
}
