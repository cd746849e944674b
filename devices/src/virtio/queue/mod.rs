//! A split virtqueue (virtio 1.2 section 2.7) as an active half uses it: every mistake of the
//! driver comes back as a [`QueueError`], no wake-up works without end, and a chain is completed
//! at most once because completing it consumes it.

mod buffers;
mod chain;
#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;

use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_AVAIL_F_NO_INTERRUPT};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use vmm_sys_util::eventfd::EventFd;

pub use buffers::{GuestBuffers, HeldBuffers};
use chain::Segment;
pub use chain::{Chain, Segments};

use crate::GuestMemory;
use crate::virtio::{ActiveQueue, WriteLog};

/// Ring feature bits that [`VirtQueue`] implements; a device offers them beside its own.
pub const RING_FEATURES: u64 = 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// Chains that one wake-up of a queue may serve. The rest waits until the other devices of the
/// loop had their turn.
pub const CHAINS_PER_WAKE_UP: u32 = 64;

/// Byte offsets in the rings (section 2.7.6 and 2.7.8).
const AVAIL_RING: u64 = 4;
const USED_IDX: u64 = 2;
const USED_RING: u64 = 4;
const USED_ELEMENT_SIZE: u64 = 8;
/// Of the field behind the used ring by which the device asks for notifications.
const AVAIL_EVENT_SIZE: u64 = 2;

/// What a driver did wrong with a queue. The device cannot go on with it: see
/// [`Interrupt::needs_reset`](crate::virtio::Interrupt::needs_reset).
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// `avail.idx` ran further ahead than the queue is long, or the ring cannot be read.
    #[error("The available ring is inconsistent")]
    AvailRing(#[source] virtio_queue::Error),
    /// A descriptor index is not below the queue size.
    #[error("Descriptor index {0} is out of range")]
    DescriptorIndex(u16),
    /// A chain is longer than the queue: it has a loop.
    #[error("The chain that starts at descriptor {0} does not end")]
    Endless(u16),
    /// A descriptor for the device to read follows one for it to write (section 2.7.4.2).
    #[error("Descriptor {0} is readable but follows a writable one")]
    Order(u16),
    /// An indirect table although the feature was not negotiated (section 2.7.5.3.1).
    #[error("Descriptor {0} is indirect, which was not negotiated")]
    Indirect(u16),
    /// An indirect table of another size than the specification says, or one that refers to another.
    #[error("The indirect table of descriptor {0} is malformed")]
    IndirectTable(u16),
    /// The buffers of a chain add up to more than 32 bits can count (section 2.7.5.2).
    #[error("The chain that starts at descriptor {0} has 4 GiB or more")]
    TooLong(u16),
    /// A ring or a buffer is not in guest memory.
    #[error("Guest address {addr:#x} with {len} bytes is not guest memory")]
    Memory {
        /// First guest physical address.
        addr: u64,
        /// Length in bytes.
        len: u64,
        /// Why.
        #[source]
        source: GuestMemoryError,
    },
    /// A request has no place for its answer or is too short to be one.
    #[error("The request in the chain that starts at descriptor {0} is malformed")]
    Request(u16),
}

/// One queue of an active device.
pub struct VirtQueue {
    queue: Queue,
    kick: EventFd,
    memory: GuestMemory,
    /// Whether chains may refer to indirect tables.
    indirect: bool,
    /// `used.idx` when the driver was last told.
    signalled: Wrapping<u16>,
    /// The segment list of a completed chain, for the next one to be read into.
    spare: Vec<Segment>,
    writes: WriteLog,
}

impl VirtQueue {
    /// Takes over a queue at activation.
    pub fn new(active: ActiveQueue, memory: &GuestMemory, acked_features: u64) -> Self {
        let ActiveQueue { mut queue, kick, writes } = active;
        queue.set_event_idx(acked_features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        let signalled = Wrapping(queue.next_used());
        writes.mark(GuestAddress(queue.used_ring()), used_ring_len(queue.size()));
        let indirect = acked_features & (1 << VIRTIO_RING_F_INDIRECT_DESC) != 0;
        Self { queue, kick, memory: memory.clone(), indirect, signalled, spare: Vec::new(), writes }
    }

    /// Readable when the driver notified the queue, or when [`serve`](Self::serve) left work.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// The memory that the queue and its buffers are in.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Makes the kick descriptor not readable until the next notification.
    pub fn acknowledge_kick(&self) {
        // Nothing to read means that somebody else acknowledged: the same outcome.
        let _ = self.kick.read();
    }

    /// `avail.idx`: how many chains the driver has made available so far, modulo 65536.
    pub fn avail_idx(&self) -> Result<u16, QueueError> {
        let idx = self.queue.avail_idx(&self.memory, Ordering::Acquire).map_err(QueueError::AvailRing)?;
        Ok(idx.0)
    }

    /// Asks for a notification of the next chain that the driver makes available, beside those that are there already.
    /// Returns `avail.idx`; of a chain that it counts there may have been none.
    pub fn notify_of_next(&mut self) -> Result<u16, QueueError> {
        self.enable_notification()?;
        if self.queue.event_idx_enabled() {
            let offset = u64::from(self.queue.size()).saturating_mul(USED_ELEMENT_SIZE);
            let addr = ring_address(self.queue.used_ring(), USED_RING.saturating_add(offset));
            let idx = self.avail_idx()?;
            let source = |source| QueueError::Memory { addr: addr.0, len: AVAIL_EVENT_SIZE, source };
            self.memory.store(idx.to_le(), addr, Ordering::Relaxed).map_err(source)?;
            // The driver must see it before the device looks whether it has gone on already.
            fence(Ordering::SeqCst);
        }
        self.avail_idx()
    }

    /// Takes the next available chain, checked: see [`Chain`].
    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        let Some(head) = self.queue.iter(&self.memory).map_err(QueueError::AvailRing)?.next() else {
            return Ok(None);
        };
        let head = head.head_index();
        let spare = std::mem::take(&mut self.spare);
        let chain = Chain::parse(&self.memory, &self.queue, self.indirect, head, spare)?;
        self.note(&chain);
        Ok(Some(chain))
    }

    /// Like [`pop`](Self::pop), for crates that want rust-vmm's own view of a chain. The chain was
    /// checked, but what is read through it is read a second time and may have changed: take
    /// nothing for granted. Complete it with [`add_used_head`](Self::add_used_head). It holds on to `memory`, which must be
    /// the queue's, and so may go to another thread.
    pub fn pop_descriptor_chain(
        &mut self,
        memory: &Arc<GuestMemory>,
    ) -> Result<Option<DescriptorChain<Arc<GuestMemory>>>, QueueError> {
        let next = self.queue.iter(Arc::clone(memory)).map_err(QueueError::AvailRing)?.next();
        if let Some(chain) = &next {
            let spare = std::mem::take(&mut self.spare);
            let checked = Chain::parse(&self.memory, &self.queue, self.indirect, chain.head_index(), spare)?;
            self.note(&checked);
            self.spare = checked.into_storage();
        }
        Ok(next)
    }

    /// Leaves the chain that was popped last to the next [`pop`](Self::pop): it was not used.
    pub fn put_back(&mut self, chain: Chain) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(1));
        self.spare = chain.into_storage();
    }

    /// Gives a chain back to the driver with `len` bytes written to it.
    pub fn add_used(&mut self, chain: Chain, len: u32) -> Result<(), QueueError> {
        let head = chain.head();
        self.spare = chain.into_storage();
        self.add_used_head(head, len)
    }

    /// Gives the chain that starts at `head` back to the driver with `len` bytes written to it.
    pub fn add_used_head(&mut self, head: u16, len: u32) -> Result<(), QueueError> {
        self.write_used(Wrapping(self.queue.next_used()), head, len)?;
        self.publish_used(1)
    }

    /// Gives several chains back at once: the driver sees all of them or none, as a frame that
    /// spans several buffers needs (section 5.1.6.4).
    pub fn add_used_together(&mut self, chains: Vec<(Chain, u32)>) -> Result<(), QueueError> {
        let mut added: u16 = 0;
        for (chain, len) in chains {
            let at = Wrapping(self.queue.next_used()) + Wrapping(added);
            self.write_used(at, chain.head(), len)?;
            added = added.wrapping_add(1);
        }
        self.publish_used(added)
    }

    /// Whether the driver wants an interrupt for what was added since the last call
    /// (section 2.7.7 and 2.7.10).
    pub fn needs_notification(&mut self) -> Result<bool, QueueError> {
        let used = Wrapping(self.queue.next_used());
        let added = used - self.signalled;
        if added.0 == 0 {
            return Ok(false);
        }
        self.signalled = used;
        // The driver must see what was added before the device looks whether it wants to know.
        fence(Ordering::SeqCst);
        if self.queue.event_idx_enabled() {
            let offset = AVAIL_RING.wrapping_add(u64::from(self.queue.size()).wrapping_mul(2));
            let used_event = Wrapping(self.load(self.queue.avail_ring(), offset)?);
            return Ok(used - used_event - Wrapping(1) < added);
        }
        let flags = self.load(self.queue.avail_ring(), 0)?;
        Ok(u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }

    /// Asks the driver not to notify while the device looks at the queue anyway.
    pub fn disable_notification(&mut self) -> Result<(), QueueError> {
        self.queue.disable_notification(&self.memory).map_err(QueueError::AvailRing)
    }

    /// Asks for notifications again. True when chains arrived that may not be notified any more.
    pub fn enable_notification(&mut self) -> Result<bool, QueueError> {
        self.queue.enable_notification(&self.memory).map_err(QueueError::AvailRing)
    }

    /// Serves available chains with `handle`, which returns the bytes it wrote, until none is
    /// left or [`CHAINS_PER_WAKE_UP`] were served; then the queue kicks itself.
    ///
    /// Returns whether the driver wants an interrupt.
    pub fn serve(
        &mut self,
        handle: impl FnMut(&GuestMemory, &Chain) -> Result<u32, QueueError>,
    ) -> Result<bool, QueueError> {
        self.serve_at_most(CHAINS_PER_WAKE_UP, handle)
    }

    /// Like [`serve`](Self::serve), for chains that cost more than others: `budget` of them.
    pub fn serve_at_most(
        &mut self,
        mut budget: u32,
        mut handle: impl FnMut(&GuestMemory, &Chain) -> Result<u32, QueueError>,
    ) -> Result<bool, QueueError> {
        self.acknowledge_kick();
        loop {
            self.disable_notification()?;
            while budget > 0 {
                let Some(chain) = self.pop()? else { break };
                let len = handle(&self.memory, &chain)?;
                self.add_used(chain, len)?;
                budget = budget.saturating_sub(1);
            }
            if budget == 0 {
                self.kick_again();
                break;
            }
            if !self.enable_notification()? {
                break;
            }
        }
        self.needs_notification()
    }

    /// Makes the loop come back to this queue after the other devices.
    pub fn kick_again(&self) {
        // A full counter is readable already.
        let _ = self.kick.write(1);
    }

    /// Gives the queue back. The last `unserved` chains that were taken from it and not completed
    /// are as if they had never been taken: their places in the available ring are still theirs.
    pub fn park(mut self, unserved: u16) -> Queue {
        let next_avail = Wrapping(self.queue.next_avail()) - Wrapping(unserved);
        self.queue.set_next_avail(next_avail.0);
        self.queue
    }

    /// Before the device writes to the chain.
    fn note(&self, chain: &Chain) {
        for (address, len) in chain.writable().ranges() {
            self.writes.mark(address, len.into());
        }
    }

    fn write_used(&self, at: Wrapping<u16>, head: u16, len: u32) -> Result<(), QueueError> {
        // The size was checked to be a power of two when the queue was set up.
        let slot = at.0 & self.queue.size().wrapping_sub(1);
        let offset = USED_RING.wrapping_add(u64::from(slot).wrapping_mul(USED_ELEMENT_SIZE));
        let addr = ring_address(self.queue.used_ring(), offset);
        // Two 32-bit fields, little-endian: id, then len.
        let element = u64::from(len) << 32 | u64::from(head);
        self.memory.write_obj(element.to_le(), addr).map_err(|source| QueueError::Memory {
            addr: addr.0,
            len: USED_ELEMENT_SIZE,
            source,
        })
    }

    fn publish_used(&mut self, added: u16) -> Result<(), QueueError> {
        let used = self.queue.next_used().wrapping_add(added);
        self.queue.set_next_used(used);
        let addr = ring_address(self.queue.used_ring(), USED_IDX);
        self.memory.store(used.to_le(), addr, Ordering::Release).map_err(|source| QueueError::Memory {
            addr: addr.0,
            len: 2,
            source,
        })
    }

    fn load(&self, ring: u64, offset: u64) -> Result<u16, QueueError> {
        let addr = ring_address(ring, offset);
        self.memory.load(addr, Ordering::Relaxed).map(u16::from_le).map_err(|source| QueueError::Memory {
            addr: addr.0,
            len: 2,
            source,
        })
    }
}

/// Bytes of the used ring of a queue of `size` entries, all of which a device writes.
fn used_ring_len(size: u16) -> u64 {
    USED_RING.saturating_add(u64::from(size).saturating_mul(USED_ELEMENT_SIZE)).saturating_add(AVAIL_EVENT_SIZE)
}

/// Rings were checked to be in guest memory as a whole, so the sum does not wrap; if it did, the
/// access that follows is refused.
fn ring_address(ring: u64, offset: u64) -> GuestAddress {
    GuestAddress(ring.wrapping_add(offset))
}
