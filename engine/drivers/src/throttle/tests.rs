//! Everything in virtual time: what is read and written in so many seconds is exact.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use underlay_graph::plan::NewRoot;
use underlay_graph::{ByteRange, Graph, NewNode, Perms, Role, Wiring, WriteFlags};
use underlay_sim::World;
use underlay_sys::{Iov, rt};

use super::bucket::{Bucket, ONE};
use super::limits::{LimitsError, Rate};
use super::{Direction, Group, Limits, Member};
use crate::filter::throttle::Throttle;
use crate::options::NullSpec;
use crate::protocol::null::NullNode;

const SECOND: Duration = Duration::from_secs(1);

fn limits(numbers: &[(&str, u64)]) -> Limits {
    let mut limits = Limits::default();
    for (name, value) in numbers {
        *limits.number_mut(name).expect("a name") = *value;
    }
    assert_eq!(limits.check(), Ok(()));
    limits
}

/// Requests of one byte that a bucket lets through in `time` when there is always one waiting.
fn through(rate: Rate, time: Duration) -> u64 {
    let (mut bucket, mut now, mut count) = (Bucket::default(), Duration::ZERO, 0);
    loop {
        bucket.leak(&rate, now);
        now += bucket.wait(&rate);
        if now >= time {
            return count;
        }
        bucket.leak(&rate, now);
        bucket.pour(&rate, ONE);
        count += 1;
    }
}

#[test]
fn a_bucket_keeps_its_rate() {
    let rate = |average, max, length| Rate { average, max, length };
    // A tenth of a second's worth at once, one above the brim, then the rate.
    assert_eq!(through(rate(100, 0, 1), SECOND), 110);
    assert_eq!(through(rate(100, 0, 1), 10 * SECOND), 1010);
    assert_eq!(through(rate(1, 0, 1), 10 * SECOND), 11);
    // A second's worth of `max` at once.
    assert_eq!(through(rate(100, 1000, 1), SECOND), 1100);
    // In five seconds five times `max`: the burst has its own speed, and takes a little longer, as it leaks meanwhile.
    let in_burst = through(rate(100, 1000, 5), 3 * SECOND);
    assert!((3000..=3101).contains(&in_burst), "{in_burst}");
    let after = through(rate(100, 1000, 5), 20 * SECOND);
    assert!((7000 - 1..=7000 + 1).contains(&after), "{after}");
}

#[test]
fn a_large_request_goes_at_once_and_is_paid_for_later() {
    let (rate, mut bucket) = (Rate { average: 10, max: 0, length: 1 }, Bucket::default());
    assert_eq!(bucket.wait(&rate), Duration::ZERO);
    bucket.pour(&rate, 1001 * ONE);
    assert_eq!(bucket.wait(&rate), 100 * SECOND);
    bucket.leak(&rate, 100 * SECOND);
    assert_eq!(bucket.wait(&rate), Duration::ZERO);
    // The largest numbers there are.
    let rate = Rate { average: 1, max: 1_000_000_000_000_000, length: 1 };
    bucket.pour(&rate, u128::MAX);
    assert_eq!(bucket.wait(&rate), Duration::from_nanos(u64::MAX));
}

#[test]
fn limits_that_make_no_sense() {
    let mut odd = Limits::default();
    *odd.number_mut("iops-total").expect("a name") = 1;
    *odd.number_mut("iops-read-max-length").expect("a name") = 2;
    assert_eq!(odd.check(), Err(LimitsError::LengthWithoutMax));
    *odd.number_mut("iops-write").expect("a name") = 1;
    assert_eq!(odd.check(), Err(LimitsError::TotalAndDirection));
    assert_eq!(odd.number("iops-totals"), None);
    assert_eq!(Limits::names().count(), 19);
    assert!(Limits::names().all(|name| odd.number(&name).is_some()));
}

/// Members that have so many requests waiting all the time, each of so many bytes; what each got through.
fn share(seed: u64, group: &Arc<Group>, members: &[(Direction, u64, u64)], time: Duration) -> Vec<u64> {
    World::new(seed).run(async {
        let counts: Vec<_> = members.iter().map(|_| Arc::new(AtomicU64::new(0))).collect();
        for (&(direction, depth, bytes), count) in members.iter().zip(&counts) {
            let member = Arc::new(Member::new(group.clone()));
            for _ in 0..depth {
                let (member, count) = (member.clone(), count.clone());
                rt::spawn(async move {
                    loop {
                        member.pass(direction, bytes).await;
                        if rt::now() >= time {
                            return;
                        }
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
        }
        rt::sleep_until(time).await;
        counts.iter().map(|count| count.load(Ordering::Relaxed)).collect()
    })
}

#[test]
fn members_share_alike_whatever_they_have_waiting() {
    use Direction::{Read, Write};
    for seed in 0..50 {
        let group = Group::new("g", limits(&[("iops-total", 100)]));
        let got = share(
            seed,
            &group,
            &[(Read, 32, 512), (Read, 1, 512), (Write, 4, 65536), (Write, 4, 1)],
            10 * SECOND,
        );
        assert_eq!(got.iter().sum::<u64>(), 1010, "seed {seed}: {got:?}");
        // Nobody is always in the queue again when its turn comes.
        assert!(got.iter().all(|count| count.abs_diff(1010 / 4) <= 20), "seed {seed}: {got:?}");
    }
}

#[test]
fn a_direction_does_not_wait_for_the_other_ones_limit() {
    use Direction::{Read, Write};
    for seed in 0..20 {
        let group = Group::new("g", limits(&[("bps-write", 10_000), ("iops-read", 50), ("iops-size", 4096)]));
        // Reads of 8192 bytes count as two.
        let got = share(seed, &group, &[(Write, 8, 1000), (Read, 8, 8192)], 10 * SECOND);
        assert_eq!(got, [101, 253], "seed {seed}");
    }
}

#[test]
fn no_limit_is_no_wait_and_other_limits_hold_at_once() {
    World::new(1).run(async {
        let group = Group::new("g", limits(&[]));
        let member = Arc::new(Member::new(group.clone()));
        for _ in 0..1000 {
            member.pass(Direction::Write, 1 << 40).await;
        }
        assert_eq!(rt::now(), Duration::ZERO);
        group.set_limits(limits(&[("bps-total", 1)]));
        member.pass(Direction::Write, 1 << 40).await;
        let waiting = rt::spawn({
            let member = member.clone();
            async move { member.pass(Direction::Read, 1).await }
        });
        rt::sleep(SECOND).await;
        // It would wait for 30,000 years.
        group.set_limits(limits(&[("bps-total", 100)]));
        waiting.await;
        assert_eq!(rt::now(), SECOND);
        group.set_limits(limits(&[]));
        member.pass(Direction::Read, 1).await;
        assert_eq!(rt::now(), SECOND);
    });
}

fn null() -> Arc<NullNode> {
    Arc::new(NullNode::new(&NullSpec {
        driver: "null-co",
        size: 1 << 20,
        latency_ns: 0,
        read_zeroes: true,
        given: Vec::new(),
    }))
}

/// A change of the graph has not to wait for what is held back, also not behind another member's request.
#[test]
fn a_change_of_the_graph_lets_requests_go() {
    for seed in 0..50 {
        World::new(seed).run(async {
            let group = Group::new("g", limits(&[("iops-total", 1)]));
            let other = Arc::new(Member::new(group.clone()));
            let others = (0..4).map(|_| {
                let other = other.clone();
                rt::spawn(async move { other.pass(Direction::Write, 1).await })
            });
            let others: Vec<_> = others.collect();
            rt::sleep(Duration::from_millis(10)).await;
            let throttle = Arc::new(Throttle::new(Member::new(group.clone())));
            let graph = Graph::new();
            let edit = |plan: &mut underlay_graph::Plan| {
                let new = |node, children| NewNode {
                    name: None,
                    node,
                    read_only: false,
                    options: Default::default(),
                    children,
                };
                let below = Wiring::New(Box::new(new(null(), Vec::new())));
                let top = plan.add(new(throttle, vec![(Role::File, below)]))?;
                let root = plan.add_root(NewRoot {
                    user: "a guest".to_owned(),
                    role: "root",
                    node: top,
                    required: Perms::WRITE,
                    shared: Perms::ALL,
                    pinned: false,
                    drained: None,
                });
                Ok((top, root))
            };
            let (top, root) = graph.change(edit).await.expect("sound");
            let root = graph.root(root).expect("there");
            let writes = (0..16).map(|_| {
                let root = root.clone();
                rt::spawn(async move {
                    root.write(ByteRange::between(0, 512), Iov::zeroed(512), WriteFlags::default()).await
                })
            });
            let writes: Vec<_> = writes.collect();
            rt::sleep(Duration::from_millis(10)).await;
            let before = rt::now();
            let touch = |plan: &mut underlay_graph::Plan| {
                plan.touch(top);
                Ok(())
            };
            graph.change(touch).await.expect("sound");
            assert_eq!(rt::now(), before, "seed {seed}");
            for write in writes {
                write.await.expect("written");
            }
            // What went in a hurry counts: 16 writes, and those before them, at one in a second.
            root.write(ByteRange::between(0, 512), Iov::zeroed(512), WriteFlags::default())
                .await
                .expect("written");
            assert!(rt::now() > 16 * SECOND, "seed {seed}: {:?}", rt::now());
            for other in others {
                other.await;
            }
        });
    }
}
