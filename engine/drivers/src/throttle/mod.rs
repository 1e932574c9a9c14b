//! Limits on how much is read and written in a second: what they are ([`limits`]), how they are kept ([`bucket`]), and
//! how several disks share them ([`group`]).
//!
//! Nothing here knows nodes: a filter ([`crate::filter::throttle`]) or a device asks its [`group::Member`] before every
//! request.

pub mod bucket;
pub mod group;
pub mod limits;
#[cfg(test)]
mod tests;

pub use group::{Direction, Group, Groups, Member};
pub use limits::{Limits, LimitsError};
