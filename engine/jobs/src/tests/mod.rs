//! Jobs on disks in memory, under a seeded executor, beside guests that write and check every byte.
#![allow(clippy::cast_possible_truncation)] // numbers by lot, below what they index

mod backup;
mod backup_bitmaps;
mod commit_now;
mod disk;
mod frame;
mod group;
mod lab;
mod mirror;
mod random;
mod world;
