//! The simulated world: a seeded executor ([`World`]), disks that lose and tear what was not flushed ([`Disk`]),
//! and a model of what a guest may read, now and after a power cut ([`Model`]).
#![forbid(unsafe_code)]

pub mod disk;
pub mod model;
pub mod rng;
pub mod seeds;
pub mod world;

pub use disk::{Disk, Fault, Power};
pub use model::Model;
pub use rng::Rng;
pub use seeds::run_seeds;
pub use world::World;

/// Bytes that a disk writes whole or not at all.
pub const SECTOR: u64 = 512;
