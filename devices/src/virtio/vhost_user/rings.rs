//! Where memory and rings are, as a backend is told.

use std::io;

use libc::MAP_SHARED;
use vhost::{VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::session::SessionError;
use crate::GuestMemory;
use crate::virtio::ActiveQueue;

/// The rings of an active device.
pub struct Rings {
    /// Guest memory, which must be of files that the backend can map.
    pub memory: GuestMemory,
    /// What the driver chose, as far as it concerns the backend.
    pub features: u64,
    /// The queues that the driver enabled.
    pub list: Vec<Ring>,
    /// Written to by the backend when it used buffers.
    pub call: EventFd,
    /// Size of the largest queue, which the memory for requests in flight is made for.
    pub max_size: u16,
}

/// One ring.
pub struct Ring {
    /// Index of its queue.
    pub index: usize,
    /// Its addresses in this process, and its size.
    pub place: VringConfigData,
    /// Written to by the guest when it made buffers available.
    pub kick: EventFd,
}

impl Ring {
    /// The ring of a queue that was checked against `memory`.
    pub fn new(memory: &GuestMemory, index: usize, active: &ActiveQueue) -> Result<Self, SessionError> {
        let queue = &active.queue;
        let place = VringConfigData {
            queue_max_size: queue.max_size(),
            queue_size: queue.size(),
            desc_table_addr: host_address(memory, queue.desc_table())?,
            avail_ring_addr: host_address(memory, queue.avail_ring())?,
            used_ring_addr: host_address(memory, queue.used_ring())?,
            ..VringConfigData::default()
        };
        let kick = active.kick.try_clone().map_err(SessionError::Descriptor)?;
        Ok(Self { index, place, kick })
    }
}

fn host_address(memory: &GuestMemory, address: u64) -> Result<u64, SessionError> {
    let host = memory.get_host_address(GuestAddress(address));
    host.map(|host| host as u64).map_err(|source| SessionError::Memory { address, source })
}

/// The regions of `memory` with the files that they are of.
pub fn memory_table(memory: &GuestMemory) -> Result<Vec<VhostUserMemoryRegionInfo>, SessionError> {
    let regions = memory.iter().map(|region| {
        let private = SessionError::PrivateMemory { address: region.start_addr().0 };
        // A private mapping of a file is not what others see of the file.
        if region.flags() & MAP_SHARED == 0 {
            return Err(private);
        }
        VhostUserMemoryRegionInfo::from_guest_region(region).map_err(|_| private)
    });
    regions.collect()
}

/// Makes a queue stand where a backend left it: `next_avail` is what it says is next, which counts only if it can be.
pub fn settle(memory: &GuestMemory, queue: &mut Queue, next_avail: Option<u16>) -> io::Result<()> {
    let used = super::resume::used_index(memory, queue)?;
    let begun = next_avail.map(|next| next.wrapping_sub(used)).filter(|begun| *begun <= queue.size());
    queue.set_next_used(used);
    queue.set_next_avail(used.wrapping_add(begun.unwrap_or_default()));
    Ok(())
}
