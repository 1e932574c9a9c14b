//! Changes of the graph and the images that have to follow them.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use async_trait::async_trait;
use underlay_sys::Iov;
use underlay_sys::thread::block_on;

use crate::bitmaps::{BitmapStore, NewBitmap, PlanBitmap, Purpose, Release};
use crate::plan::{NodeOptions, Wiring};
use crate::view::Role;
use crate::{
    ByteRange, Cx, Graph, GraphError, IoError, Kind, NewNode, Node, NodeId, NodeName, Result, WriteFlags,
};

/// An image that keeps bitmaps, as long as its disk has room.
#[derive(Debug, Default)]
struct Keeper {
    full: AtomicBool,
    /// Bitmaps in the image.
    kept: AtomicUsize,
    /// Nothing can be flushed.
    fails: AtomicBool,
    /// Nor will it ever be.
    lost: AtomicBool,
}

#[async_trait]
impl Node for Keeper {
    fn driver(&self) -> &'static str {
        "keeper"
    }
    fn kind(&self) -> Kind {
        Kind::Protocol
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn as_bitmap_store(&self) -> Option<&dyn BitmapStore> {
        Some(self)
    }
    fn length(&self, _cx: &Cx<'_>) -> u64 {
        1 << 20
    }
    fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }
    async fn flush(&self, _cx: &Cx<'_>) -> Result<()> {
        if self.fails.load(Ordering::Relaxed) { Err(IoError::EIO) } else { Ok(()) }
    }
    async fn read(&self, _cx: &Cx<'_>, _range: ByteRange, into: Iov) -> Result<()> {
        into.fill(0);
        Ok(())
    }
    async fn write(&self, _cx: &Cx<'_>, _range: ByteRange, _from: Iov, _flags: WriteFlags) -> Result<()> {
        Ok(())
    }
}

#[async_trait]
impl BitmapStore for Keeper {
    fn loaded(&self) -> Vec<PlanBitmap> {
        Vec::new()
    }
    fn check_new(
        &self,
        _cx: &Cx<'_>,
        _others: &[PlanBitmap],
        _name: &str,
        _granularity: u64,
    ) -> std::result::Result<(), GraphError> {
        Ok(())
    }
    async fn begin(&self, _cx: &Cx<'_>) -> Result<()> {
        Ok(())
    }
    async fn store(&self, _cx: &Cx<'_>, _bitmaps: &[PlanBitmap]) -> Result<()> {
        Ok(())
    }
    fn is_stored(&self) -> bool {
        true
    }
    fn has(&self, _name: &str) -> bool {
        self.kept.load(Ordering::Relaxed) > 0
    }
    async fn remove(&self, _cx: &Cx<'_>, _name: &str) -> Result<()> {
        Ok(())
    }
    async fn refresh(&self, _cx: &Cx<'_>, bitmaps: &[PlanBitmap]) -> Result<()> {
        if self.full.load(Ordering::Relaxed) {
            return Err(IoError::ENOSPC);
        }
        self.kept.store(bitmaps.len(), Ordering::Relaxed);
        Ok(())
    }
}

/// A graph whose bitmaps last, with one such image in it.
async fn with_keeper() -> (Arc<Graph>, Arc<Keeper>, NodeId) {
    let (graph, keeper) = (Graph::new(), Arc::<Keeper>::default());
    graph.let_bitmaps_last();
    let new = NewNode {
        name: NodeName::new("k"),
        node: keeper.clone(),
        read_only: false,
        options: NodeOptions::default(),
        children: Vec::new(),
    };
    let add = graph.change(|plan| {
        let id = plan.add(new)?;
        plan.node_mut(id).monitor_owned = true;
        Ok(id)
    });
    let id = add.await.expect("added");
    (graph, keeper, id)
}

fn persistent(name: &str) -> NewBitmap<'_> {
    NewBitmap { name, granularity: Some(4096), persistent: true, enabled: true }
}

#[test]
fn a_bitmap_that_cannot_be_kept_is_not_added() {
    block_on(async {
        let (graph, keeper, id) = with_keeper().await;
        graph.change(|plan| plan.add_bitmap(id, &persistent("a"))).await.expect("there is room");
        assert_eq!(keeper.kept.load(Ordering::Relaxed), 1);
        keeper.full.store(true, Ordering::Relaxed);
        graph.change(|plan| plan.add_bitmap(id, &persistent("b"))).await.expect_err("there is none");
        let plan = graph.plan();
        assert!(plan.bitmap(id, "a").is_ok() && plan.bitmap(id, "b").is_err());
    });
}

#[test]
fn a_full_disk_does_not_keep_a_job_from_giving_its_bitmap_back() {
    block_on(async {
        let (graph, keeper, id) = with_keeper().await;
        graph.change(|plan| plan.add_bitmap(id, &persistent("a"))).await.expect("there is room");
        let hold = graph.change(|plan| plan.hold_bitmap(id, "a", Purpose::Rely));
        let bits = hold.await.expect("held");
        bits.set(ByteRange::between(0, 4096));
        keeper.full.store(true, Ordering::Relaxed);
        let release = graph.change(|plan| {
            plan.release_bitmap(id, "a", Release::Reclaim);
            Ok(())
        });
        release.await.expect("released all the same");
        let plan = graph.plan();
        let bitmap = plan.bitmap(id, "a").expect("it is there");
        assert!(!bitmap.busy && bitmap.successor.is_none());
        assert_eq!(bitmap.bits.count(), 4096);
    });
}

#[test]
fn a_bitmap_given_back_says_what_was_written_behind_the_old_end() {
    block_on(async {
        let (graph, _, id) = with_keeper().await;
        graph.change(|plan| plan.add_bitmap(id, &persistent("a"))).await.expect("there is room");
        graph.change(|plan| plan.hold_bitmap(id, "a", Purpose::Rely)).await.expect("held");
        let since = graph.plan().bitmap(id, "a").expect("it is there").successor.clone();
        let since = since.expect("it records");
        let end = since.size();
        since.resize(end + 8192);
        since.set(ByteRange::between(end, end + 8192));
        let now = graph.plan();
        assert_eq!(now.bitmap(id, "a").expect("it is there").to_keep().count(), 8192);
        let release = graph.change(|plan| {
            plan.release_bitmap(id, "a", Release::Reclaim);
            // Before anything else makes it longer.
            let bits = plan.bitmap(id, "a").expect("it is there").bits.clone();
            plan.at_the_moment(move || assert_eq!(bits.count(), 8192));
            Ok(())
        });
        release.await.expect("released");
    });
}

/// What cannot be flushed stays, but for what is out of reach itself: that its backing node is lost is no reason.
#[test]
fn only_what_is_lost_itself_goes_without_a_flush() {
    block_on(async {
        let (graph, base, id) = with_keeper().await;
        let top = Arc::<Keeper>::default();
        let new = NewNode {
            name: NodeName::new("top"),
            node: top.clone(),
            read_only: false,
            options: NodeOptions::default(),
            children: vec![(Role::Backing, Wiring::Existing(id))],
        };
        let add = graph.change(|plan| {
            let id = plan.add(new)?;
            plan.node_mut(id).monitor_owned = true;
            Ok(id)
        });
        let id = add.await.expect("added");
        let remove = async || {
            let change = graph.change(|plan| {
                plan.node_mut(id).monitor_owned = false;
                Ok(())
            });
            change.await.is_ok()
        };
        top.fails.store(true, Ordering::Relaxed);
        base.lost.store(true, Ordering::Relaxed);
        assert!(!remove().await && graph.plan().get(id).is_some());
        top.lost.store(true, Ordering::Relaxed);
        assert!(remove().await && graph.plan().get(id).is_none());
    });
}

/// A bitmap of a node that may not be written to is nowhere when the node goes, unless the image had it before.
#[test]
fn lost_bitmaps_are_told_of() {
    for (read_only_before, lost) in [(false, 0), (true, 1)] {
        block_on(async {
            let (graph, _, id) = with_keeper().await;
            let told = Arc::<AtomicUsize>::default();
            let heard = told.clone();
            graph.on_trouble(move |text| {
                assert!(
                    text.contains("Lost persistent bitmaps") && text.contains("No write access"),
                    "{text}"
                );
                heard.fetch_add(1, Ordering::Relaxed);
            });
            let make_read_only = async || {
                let change = graph.change(|plan| {
                    plan.set_read_only(id, true);
                    Ok(())
                });
                change.await.expect("it can be");
            };
            if read_only_before {
                make_read_only().await;
            }
            graph.change(|plan| plan.add_bitmap(id, &persistent("a"))).await.expect("there is room");
            make_read_only().await;
            let remove = graph.change(|plan| {
                plan.node_mut(id).monitor_owned = false;
                Ok(())
            });
            remove.await.expect("it goes");
            assert!(graph.plan().get(id).is_none());
            assert_eq!(told.load(Ordering::Relaxed), lost);
        });
    }
}
