//! Network device (virtio 1.2 section 5.1) on a tap interface.
//!
//! The tap carries the virtio-net header itself, so a frame goes between the kernel and the guest's
//! buffers without being copied or looked at here.

mod config;
mod engine;
mod rx;
mod tap;
#[cfg(test)]
mod tests;
mod tx;

pub use config::{Net, NetConfig};
pub use tap::{Tap, TapError};

/// Bytes of the header before each frame: `virtio_net_hdr` with `num_buffers`, which a modern
/// device always has (section 5.1.6).
const HEADER_SIZE: u32 = 12;
