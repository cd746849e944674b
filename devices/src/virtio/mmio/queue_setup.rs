//! The registers of one queue while the driver sets it up.

use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryError};

use crate::GuestMemory;
use crate::virtio::state::QueueState;

/// A queue as the driver has described it so far. Nothing is checked before `DRIVER_OK`.
pub struct QueueSetup {
    /// QueueNumMax.
    pub max_size: u16,
    /// QueueNum.
    pub size: u32,
    /// QueueReady.
    pub ready: bool,
    /// QueueDesc, guest physical.
    pub descriptors: u64,
    /// QueueDriver, guest physical.
    pub avail: u64,
    /// QueueDevice, guest physical.
    pub used: u64,
    /// Where a parked device goes on in the available ring; 0 for a fresh one.
    pub next_avail: u16,
    /// The same in the used ring.
    pub next_used: u16,
}

/// Why a queue cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum QueueSetupError {
    /// The size is not a power of two, or above the maximum.
    #[error("Queue size {size} is not a power of two up to {max_size}")]
    Size {
        /// What the driver asked for.
        size: u32,
        /// What the device allows.
        max_size: u16,
    },
    /// A ring's address does not have the alignment of section 2.7.
    #[error("The {ring} at {addr:#x} is not aligned to {align} bytes")]
    Alignment {
        /// Which part of the queue.
        ring: &'static str,
        /// Guest physical address.
        addr: u64,
        /// Required alignment.
        align: u64,
    },
    /// The driver gave no address.
    #[error("The {ring} has no address")]
    NoAddress {
        /// Which part of the queue.
        ring: &'static str,
    },
    /// A ring is not as a whole in one region of guest memory.
    #[error("The {ring} at {addr:#x} is not in guest memory")]
    OutsideMemory {
        /// Which part of the queue.
        ring: &'static str,
        /// Guest physical address.
        addr: u64,
        /// Why.
        #[source]
        source: GuestMemoryError,
    },
    /// The queue library refuses what was checked here: a mismatch between the two.
    #[error("The queue cannot be set up")]
    Queue(#[source] virtio_queue::Error),
}

/// One of the three parts of a split virtqueue (virtio 1.2 section 2.7).
struct Part {
    name: &'static str,
    align: u64,
    fixed_size: u64,
    size_per_entry: u64,
}

const DESCRIPTORS: Part = Part { name: "descriptor table", align: 16, fixed_size: 0, size_per_entry: 16 };
const AVAIL: Part = Part { name: "available ring", align: 2, fixed_size: 6, size_per_entry: 2 };
const USED: Part = Part { name: "used ring", align: 4, fixed_size: 6, size_per_entry: 8 };

impl QueueSetup {
    /// A queue after reset.
    pub fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size.into(),
            ready: false,
            descriptors: 0,
            avail: 0,
            used: 0,
            next_avail: 0,
            next_used: 0,
        }
    }

    /// What a snapshot has of it.
    pub fn save(&self) -> QueueState {
        let Self { max_size: _, size, ready, descriptors, avail, used, next_avail, next_used } = *self;
        QueueState { size, ready, descriptors, avail, used, next_avail, next_used }
    }

    /// A queue as it was saved. Nothing is checked.
    pub fn restored(max_size: u16, state: &QueueState) -> Self {
        let QueueState { size, ready, descriptors, avail, used, next_avail, next_used } = *state;
        Self { max_size, size, ready, descriptors, avail, used, next_avail, next_used }
    }

    /// Checks the description against `memory` and makes the queue of it.
    pub fn build(&self, memory: &GuestMemory) -> Result<Queue, QueueSetupError> {
        let size = u16::try_from(self.size)
            .ok()
            .filter(|size| size.is_power_of_two() && *size <= self.max_size)
            .ok_or(QueueSetupError::Size { size: self.size, max_size: self.max_size })?;
        let descriptors = DESCRIPTORS.check(memory, self.descriptors, size)?;
        let avail = AVAIL.check(memory, self.avail, size)?;
        let used = USED.check(memory, self.used, size)?;

        let mut queue = Queue::new(self.max_size).map_err(QueueSetupError::Queue)?;
        queue.try_set_size(size).map_err(QueueSetupError::Queue)?;
        queue.try_set_desc_table_address(descriptors).map_err(QueueSetupError::Queue)?;
        queue.try_set_avail_ring_address(avail).map_err(QueueSetupError::Queue)?;
        queue.try_set_used_ring_address(used).map_err(QueueSetupError::Queue)?;
        queue.set_next_avail(self.next_avail);
        queue.set_next_used(self.next_used);
        queue.set_ready(true);
        Ok(queue)
    }
}

impl Part {
    fn check(&self, memory: &GuestMemory, addr: u64, queue_size: u16) -> Result<GuestAddress, QueueSetupError> {
        let ring = self.name;
        if addr == 0 {
            return Err(QueueSetupError::NoAddress { ring });
        }
        if addr & self.align.wrapping_sub(1) != 0 {
            return Err(QueueSetupError::Alignment { ring, addr, align: self.align });
        }
        let entries = u64::from(queue_size).saturating_mul(self.size_per_entry);
        let len = usize::try_from(self.fixed_size.saturating_add(entries)).unwrap_or(usize::MAX);
        memory.get_slice(GuestAddress(addr), len).map_err(|source| QueueSetupError::OutsideMemory {
            ring,
            addr,
            source,
        })?;
        Ok(GuestAddress(addr))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testkit::{HIGH_REGION, REGION_SIZE, memory};

    /// Addresses about the edges of the two regions, and any others.
    fn addr() -> impl Strategy<Value = u64> {
        let edge = prop::sample::select(vec![0, 0x1000, REGION_SIZE, HIGH_REGION, HIGH_REGION + REGION_SIZE, u64::MAX]);
        prop_oneof![8 => (edge, -600..600_i64).prop_map(|(edge, by)| edge.saturating_add_signed(by)), 1 => any::<u64>()]
    }

    fn fits(addr: u64, align: u64, len: u64) -> bool {
        let within = |start| addr >= start && addr.checked_add(len).is_some_and(|end| end <= start + REGION_SIZE);
        addr != 0 && addr.is_multiple_of(align) && (within(0) || within(HIGH_REGION))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(5000))]

        #[test]
        fn a_queue_is_built_of_what_the_specification_allows_and_of_nothing_else(
            size in prop_oneof![0..40_u32, any::<u32>()],
            addrs in (addr(), addr(), addr()),
            aligned in any::<bool>(),
        ) {
            thread_local!(static MEMORY: GuestMemory = memory());
            let align = |addr: u64, to: u64| if aligned { addr & !(to - 1) } else { addr };
            let (descriptors, avail, used) = (align(addrs.0, 16), align(addrs.1, 2), align(addrs.2, 4));
            let setup = QueueSetup { size, descriptors, avail, used, ..QueueSetup::new(32) };
            let built = MEMORY.with(|memory| setup.build(memory));
            // Sizes of section 2.7.
            let entries = u64::from(size);
            let expected = [1, 2, 4, 8, 16, 32].contains(&size)
                && fits(descriptors, 16, 16 * entries)
                && fits(avail, 2, 6 + 2 * entries)
                && fits(used, 4, 6 + 8 * entries);
            prop_assert_eq!(built.is_ok(), expected, "{:?}", built.err());
            if let Ok(queue) = built {
                prop_assert_eq!((queue.desc_table(), queue.avail_ring(), queue.used_ring()), (descriptors, avail, used));
            }
        }
    }
}
