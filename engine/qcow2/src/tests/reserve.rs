//! Reserved places: the order is that of the reservations, and what is not used is not lost.

use underlay_graph::ByteRange;

use super::offline::{check_ours, content, shapes};
use super::{Disk, Rng, Setup, Shape, open, run};
use crate::check::Fix;
use crate::live::OpenOptions;

const PIECE: u64 = 48 << 10;

fn fresh(shape: &Shape) -> (std::sync::Arc<Disk>, Setup) {
    let disk = Disk::new(shape.image(false), 1).forget_cuts();
    let setup = open(disk.clone(), None, OpenOptions::default(), true);
    (disk, setup)
}

fn reserve(setup: &Setup, start: u64, len: u64) {
    let range = ByteRange::new(start, len).unwrap();
    run(setup.image.reserve_places(&setup.view.cx(), range)).unwrap();
}

fn piece(number: u64) -> Vec<u8> {
    vec![u8::try_from(number).unwrap() + 1; usize::try_from(PIECE).unwrap()]
}

#[test]
fn pieces_written_backwards_lie_in_order() {
    for shape in shapes() {
        let count = shape.size / PIECE;
        let (disk, setup) = fresh(&shape);
        (0..count).for_each(|number| reserve(&setup, number * PIECE, PIECE));
        for number in (0..count).rev() {
            setup.write(number * PIECE, &piece(number)).unwrap();
        }
        setup.close();
        let (in_order, setup) = fresh(&shape);
        for number in 0..count {
            setup.write(number * PIECE, &piece(number)).unwrap();
        }
        setup.close();
        assert!(disk.content() == in_order.content(), "{shape:?}");
    }
}

#[test]
fn what_is_reserved_and_not_used_is_given_back() {
    for shape in shapes() {
        let (disk, setup) = fresh(&shape);
        reserve(&setup, 0, PIECE);
        reserve(&setup, 5 * PIECE + 100, PIECE);
        setup.write(PIECE, &piece(7)).unwrap();
        setup.close();
        let (outcome, lines) = check_ours(&disk, Fix::None);
        assert_eq!((outcome.corruptions, outcome.leaks), (0, 0), "{shape:?}: {lines:?}");
    }
}

#[test]
fn writes_of_any_shape_go_with_reservations_of_any_shape() {
    for (seed, shape) in (0..).zip(shapes().into_iter().cycle().take(40)) {
        let mut rng = Rng::new(seed);
        let (disk, setup) = fresh(&shape);
        let mut model = vec![0; usize::try_from(shape.size).unwrap()];
        for number in 0..60_u64 {
            let start = rng.below(shape.size - 1);
            let len = (1 + rng.below(40_000)).min(shape.size - start);
            if rng.below(2) == 0 {
                reserve(&setup, start, len);
            }
            if rng.below(3) > 0 {
                let bytes = vec![u8::try_from(number).unwrap() + 1; usize::try_from(len).unwrap()];
                setup.write(start, &bytes).unwrap();
                let at = usize::try_from(start).unwrap();
                model[at..at + bytes.len()].copy_from_slice(&bytes);
            }
        }
        setup.close();
        let (outcome, lines) = check_ours(&disk, Fix::None);
        assert_eq!((outcome.corruptions, outcome.leaks), (0, 0), "{seed} {shape:?}: {lines:?}");
        assert!(content(disk.content()) == model, "{seed} {shape:?}");
    }
}
