//! What the measurements have in common: running a program and reading off what it cost.

pub mod guest;
pub mod peer;
pub mod process;
pub mod table;
