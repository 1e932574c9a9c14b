//! The commit that is no job, beside guests: they wait, and nothing is lost.

use underlay_graph::plan::NewRoot;
use underlay_graph::{GraphError, Perms, Plan};
use underlay_sys::rt::{self, StopSign};

use super::disk::{Cluster, Faults};
use super::lab::{Guests, Lab, SIZE, learn};
use super::world::{Lot, run};
use crate::commit_now::{Refusal, commit_now};
use underlay_graph::ByteRange;

async fn play(seed: u64) {
    let mut lot = Lot::new(seed);
    let base_size = [SIZE, SIZE / 3, 2 * SIZE][lot.below(3) as usize];
    let lab = Lab::new(seed, &[base_size, SIZE]).await;
    let (base, top) = (lab.nodes[0], lab.nodes[1]);
    let mut guests = Guests::start(&lab, seed, false).await;
    for round in 0..4 {
        for _ in 0..lot.below(60) {
            rt::yield_now().await;
        }
        let fails = round < 3 && lot.one_in(2);
        if fails {
            let which = lot.below(3);
            let one = |at| u32::from(which == at);
            lab.images[0].state().faults = Faults { writes: one(0), flushes: one(1), ..Faults::default() };
            lab.images[1].state().faults = Faults { headers: one(2), ..Faults::default() };
        }
        let done = commit_now(&lab.graph, top, &StopSign::default()).await;
        assert!(done.is_ok() || fails, "{done:?}");
        lab.images.iter().for_each(|image| image.state().faults = Faults::default());
        lab.assert_tidy();
        let plan = lab.graph.plan();
        assert_eq!(plan.backing(top), Some(base));
        assert!(plan.node(base).read_only || done.is_err());
    }
    guests.rest().await;
    let cut = lab.after_power_cut(SIZE);
    for model in &guests.models {
        let now = learn(&lab.guest, model.part).await;
        assert!(now.bytes == model.bytes, "the guest's disk has changed");
        for (at, _) in model.settled.iter().enumerate().filter(|(_, settled)| **settled) {
            let from = model.part.buffer_len() * usize::from(model.part.start() > 0) + at * 4096;
            let same = cut[from..from + 4096] == model.bytes[at * 4096..(at + 1) * 4096];
            assert!(same, "a power cut loses flushed data at {from:#x}");
        }
    }
    let before = learn(&lab.guest, ByteRange::between(0, SIZE)).await.bytes;
    assert_eq!(commit_now(&lab.graph, top, &StopSign::default()).await, Ok(()));
    assert!(lab.images[1].state().clusters.iter().all(|cluster| *cluster == Cluster::Below));
    assert!(learn(&lab.guest, ByteRange::between(0, SIZE)).await.bytes == before);
    assert!(lab.graph.plan().node(base).read_only);
}

#[test]
fn nothing_is_lost_beside_guests() {
    let fails = |seed: &u64| std::panic::catch_unwind(|| run(*seed, play(*seed))).is_err();
    let failed: Vec<_> = (0..60).filter(fails).take(10).collect();
    assert!(failed.is_empty(), "seeds {failed:?}");
}

#[test]
fn refusals() {
    run(1, async {
        let lab = Lab::new(1, &[SIZE, SIZE, SIZE]).await;
        let (base, middle, top) = (lab.nodes[0], lab.nodes[1], lab.nodes[2]);
        let go = StopSign::default();
        assert_eq!(commit_now(&lab.graph, base, &go).await, Err(Refusal::NotSupported));
        assert_eq!(commit_now(&lab.graph, middle, &go).await, Err(Refusal::Graph(GraphError::ReadOnly)));
        let edit = |busy| {
            move |plan: &mut Plan| {
                plan.node_mut(middle).busy = busy;
                Ok(())
            }
        };
        lab.graph.change(edit(Some("stream"))).await.unwrap();
        assert_eq!(commit_now(&lab.graph, top, &go).await, Err(Refusal::Busy));
        lab.graph.change(edit(None)).await.unwrap();
        // Somebody else looks at what would be written to.
        let (user, shared) = ("reader".to_owned(), Perms::CONSISTENT_READ);
        let required = Perms::CONSISTENT_READ;
        let reader =
            NewRoot { user, role: "root", node: middle, required, shared, pinned: false, drained: None };
        let reader = lab.graph.change(|plan| Ok(plan.add_root(reader))).await.unwrap();
        let refused = commit_now(&lab.graph, top, &go).await;
        assert!(matches!(refused, Err(Refusal::Graph(GraphError::Conflict(_)))), "{refused:?}");
        let gone = lab.graph.change(|plan| {
            plan.remove_root(reader);
            Ok(())
        });
        gone.await.unwrap();
        // Told to stop, it has emptied nothing.
        let data = lab.images[2].state().clusters.clone();
        let stop = StopSign::default();
        stop.raise();
        assert!(commit_now(&lab.graph, top, &stop).await.is_err());
        assert!(lab.images[2].state().clusters == data);
        lab.assert_tidy();
        assert_eq!(commit_now(&lab.graph, top, &go).await, Ok(()));
        assert!(lab.images[2].state().clusters != data);
    });
}
