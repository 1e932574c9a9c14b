//! Nodes that get their bytes from outside the graph.

pub mod file;
mod locks;
pub mod nbd;
pub mod null;
mod syncs;

#[cfg(test)]
mod tests;
