//! Frames from the guest to the host (virtio 1.2 section 5.1.6.2).

use std::os::fd::AsFd;

use tracing::trace;

use super::HEADER_SIZE;
use super::tap::Tap;
use crate::GuestMemory;
use crate::virtio::queue::{Chain, QueueError};

/// An Ethernet header: what a frame has at least.
const MIN_FRAME: u32 = HEADER_SIZE + 14;

/// The largest segment for the host to cut up, with header, Ethernet header and VLAN tag.
const MAX_FRAME: u32 = HEADER_SIZE + 18 + 65535;

/// Sends one frame. A frame that is no frame, or that the host does not take, is lost, as on any
/// network.
pub fn send(tap: &Tap, memory: &GuestMemory, chain: &Chain) -> Result<(), QueueError> {
    let frame = chain.readable();
    if !(MIN_FRAME..=MAX_FRAME).contains(&frame.len()) {
        trace!(len = frame.len(), "A frame of an impossible length is dropped");
        return Ok(());
    }
    if let Err(error) = frame.buffers(memory)?.write_to(tap.as_fd()) {
        trace!(%error, "The host does not take a frame");
    }
    Ok(())
}
