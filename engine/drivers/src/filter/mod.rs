//! Nodes in between: the content of the node below, and something that happens on the way.

pub mod copy_on_read;
pub mod throttle;
