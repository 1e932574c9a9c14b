//! Formats other than qcow2.

pub mod raw;
