//! Block device (virtio 1.2 section 5.2): raw files and host block devices.
//!
//! `config` is the half that the transport talks to, `request` reads a request and answers it,
//! `disk` is what it is answered from.

mod config;
mod disk;
mod request;
#[cfg(test)]
mod tests;

pub use config::{Blk, BlkConfig, BlkError};
