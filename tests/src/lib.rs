//! End-to-end tests of Inlay, and the rooms they run in: see this directory's README.

pub mod cache;
pub mod harness;
pub mod images;
pub mod nested;
pub mod packages;
