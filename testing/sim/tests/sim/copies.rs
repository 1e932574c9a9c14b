//! Guests above a copy-on-read filter: reads copy, beside writes to the same clusters and on disks that lose power or
//! fill up.

use std::sync::Arc;
use std::time::Duration;

use underlay_drivers::filter::copy_on_read::CopyOnRead;
use underlay_graph::plan::NodeOptions;
use underlay_graph::status::status;
use underlay_graph::{ByteRange, NewNode, NodeName, Plan, Role, Wiring};
use underlay_sim::{Rng, SECTOR, run_seeds};
use underlay_sys::rt;

use crate::guests::Guests;
use crate::lab::{SMALL, Setup, build};

/// Puts a copy-on-read filter between the top and the guest.
async fn copy_what_is_read(setup: &Setup, bottom: Option<usize>) {
    let top = setup.layers.last().unwrap().node;
    let bottom = bottom.and_then(|at| NodeName::new(setup.layers[at].name));
    let filter = NewNode {
        name: None,
        node: Arc::new(CopyOnRead::new(bottom)),
        read_only: false,
        options: NodeOptions { discard: true, ..NodeOptions::default() },
        children: vec![(Role::File, Wiring::Existing(top))],
    };
    let edit = |plan: &mut Plan| {
        let filter = plan.add(filter)?;
        plan.replace(top, filter, |parent| parent == filter)
    };
    setup.graph.change(edit).await.unwrap();
}

/// Whether the top still borrows anything from the images below it, as far down as `bottom`.
async fn borrows(setup: &Setup, bottom: Option<usize>) -> bool {
    let inside = setup.guest.enter().await.unwrap();
    let until = bottom.and_then(|at| at.checked_sub(1)).map(|below| setup.layers[below].node);
    let mut rest = ByteRange::between(0, setup.sectors * SECTOR);
    while !rest.is_empty() {
        let found = status(&inside.cx(), rest, until).await.unwrap();
        if found.allocated && found.depth > 0 && !found.past_end {
            return true;
        }
        rest = rest.split(found.len).1;
    }
    false
}

async fn copies(seed: u64) {
    let mut rng = Rng::new(seed);
    let length = 2 + rng.index(3);
    let setup = build(&mut rng, length, SMALL).await;
    let bottom = rng.one_in(2).then(|| rng.index(length - 1));
    copy_what_is_read(&setup, bottom).await;
    let cut = rng.one_in(3);
    let full = rng.one_in(3);
    let guests = Guests::new(&setup, cut || full);
    if cut || full {
        let top = &setup.layers[length - 1].disk;
        top.limit(top.content().len() as u64 + rng.below(20) * setup.cluster);
    }
    let mut running = guests.start(&mut rng, 4, 20);
    if cut {
        rt::sleep(Duration::from_micros(rng.below(40_000))).await;
        setup.power.cut();
    }
    running.done().await;
    if !cut {
        setup.mend_after(Duration::ZERO).await;
        guests.verify().await;
        assert!(!borrows(&setup, bottom).await);
        guests.verify().await;
    }
    setup.cut_and_compare(&guests, seed).await;
}

#[test]
fn copies_of_what_is_read_never_undo_a_write() {
    run_seeds(500, copies);
}
