//! Filters: nodes with the content of their one child that do something on the way.

pub mod copies;
pub mod copy_before_write;
pub mod copy_on_read;
pub mod snapshot_access;
#[cfg(test)]
mod tests;
pub mod throttle;
