//! The engine in the simulated world. `UNDERLAY_SEEDS=n` runs n seeds of each test, `UNDERLAY_SEED=s` just that one.

#![allow(clippy::unwrap_used)]

mod backup;
mod bitmaps;
mod chain;
mod copies;
mod crowd;
mod depth;
mod guests;
mod home;
mod incremental;
mod internal;
mod lab;
mod mirror;
mod target;
