//! Block device (virtio 1.2 section 5.2).
//!
//! | room | what is in it |
//! | --- | --- |
//! | `config` | what a drive is made of, and the layout of the configuration space |
//! | `device` | the half that the transport talks to |
//! | `request` | reads a request and answers it: pure, no engine and no events |
//! | `operation`, `transfer` | what a request asks of an image, as steps that any engine takes |
//! | `image` | what it is answered from: raw files and devices, qcow2 |
//! | `engine` | who does the work: the event loop, threads, an I/O ring |
//! | `metrics` | counters of what was done |
//! | `state` | what a drive remembers in a snapshot |
//! | `worker` | the active half: queues, limits, what is under way |

mod aligned;
mod config;
mod device;
mod engine;
mod image;
mod metrics;
mod operation;
mod request;
mod state;
#[cfg(test)]
mod tests;
mod transfer;
mod worker;

pub use config::{BackingImage, BlkConfig, BlkError, BlkErrorKind, EngineKind, ImageFormat, MAX_QUEUES, QUEUE_SIZES};
pub use device::{Blk, BlkControl};
pub use image::{ImageError, Qcow2Error};
pub use metrics::{BlkMetrics, RequestCount, RequestKind};
