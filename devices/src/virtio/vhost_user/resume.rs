//! Where to go on with a ring whose backend died.

use std::io;
use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::GuestMemory;

/// Offsets in both rings (virtio 1.2 section 2.7.6 and 2.7.8).
const IDX: u64 = 2;
const ENTRIES: u64 = 4;

/// `used.idx`
pub fn used_index(memory: &GuestMemory, queue: &Queue) -> io::Result<u16> {
    load(memory, queue.used_ring(), IDX)
}

/// Whether nothing in the rings speaks against resuming at the used index: either nothing is left to do, or the backend
/// completed requests in the order in which they came, so that what it had begun is what follows the used index, all
/// of it and nothing else.
///
/// Both rings have the last entries only. A request that was left behind shifts all that came after it, which is seen
/// unless a driver with always the same descriptor has filled the ring since: no proof, but the best there is without
/// the backend's notes. Whatever a guest writes here, it can only cost itself its device.
pub fn is_in_order(memory: &GuestMemory, queue: &Queue) -> io::Result<bool> {
    let used = used_index(memory, queue)?;
    let avail: u16 = load(memory, queue.avail_ring(), IDX)?;
    let waiting = avail.wrapping_sub(used);
    if waiting == 0 {
        return Ok(true);
    }
    // What is not there any more: places of the available ring that were taken again.
    let Some(known) = queue.size().checked_sub(waiting) else { return Ok(false) };
    for back in 1..=known {
        let at = used.wrapping_sub(back);
        // A place that was never used has zeroes in both.
        if available(memory, queue, at)? != completed(memory, queue, at)? {
            return Ok(false);
        }
    }
    Ok(true)
}

fn available(memory: &GuestMemory, queue: &Queue, at: u16) -> io::Result<u16> {
    load(memory, queue.avail_ring(), entry(queue, at, 2))
}

/// The low half of an entry's 32-bit id, which has the whole index.
fn completed(memory: &GuestMemory, queue: &Queue, at: u16) -> io::Result<u16> {
    load(memory, queue.used_ring(), entry(queue, at, 8))
}

fn entry(queue: &Queue, at: u16, size: u64) -> u64 {
    // The size was checked to be a power of two when the queue was set up.
    let slot = at & queue.size().wrapping_sub(1);
    ENTRIES.wrapping_add(u64::from(slot).wrapping_mul(size))
}

fn load(memory: &GuestMemory, ring: u64, offset: u64) -> io::Result<u16> {
    let address = GuestAddress(ring.wrapping_add(offset));
    memory.load(address, Ordering::Acquire).map(u16::from_le).map_err(io::Error::other)
}
