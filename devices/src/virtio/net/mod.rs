//! Network device (virtio 1.2 section 5.1) on a tap interface.
//!
//! The tap carries the virtio-net header itself, so a frame goes between the kernel and the guest's
//! buffers without being copied or looked at here.
//!
//! | file | what |
//! | --- | --- |
//! | `config` | the configuration half |
//! | `shared` | link, address and counters: what both halves and the owner share |
//! | `tap` | a queue of a tap interface |
//! | `rx`, `tx` | a queue each, for frames to and from the guest: no events |
//! | `control` | answers to the control queue's commands: no events |
//! | `engine` | the active half: which event means what |
//! | `kernel` | the active half when the frames go through the host's vhost-net instead |

mod config;
mod control;
mod engine;
mod kernel;
mod rx;
mod shared;
mod tap;
#[cfg(test)]
mod tests;
mod tx;

pub use config::{MAX_MTU, MAX_QUEUE_PAIRS, MIN_MTU, Net, NetConfig, NetError};
pub use shared::{NetControl, NetCounters};
pub use tap::{Tap, TapError};

use super::rate_limiter::RateLimiter;

/// Bytes of the header before each frame: `virtio_net_hdr` with `num_buffers`, which a modern
/// device always has (section 5.1.6).
const HEADER_SIZE: u32 = 12;

/// An Ethernet header with a VLAN tag.
const ETHERNET_SIZE: u32 = 18;

/// The largest segment that is cut up behind the guest's or the host's back, with its headers.
const MAX_OFFLOADED_FRAME: u32 = HEADER_SIZE + ETHERNET_SIZE + 65535;

/// Frames that one wake-up may move in one direction; the rest waits until other devices had their
/// turn.
const FRAMES_PER_WAKE_UP: u32 = 64;

/// Whether a frame of `len` bytes, header included, may pass now.
fn admit(limiter: &mut Option<RateLimiter>, len: u32) -> bool {
    limiter.as_mut().is_none_or(|limiter| limiter.admit(len.saturating_sub(HEADER_SIZE).into()))
}
