//! The guest's physical memory: anonymous, private, touched as little as possible.
//!
//! Kernel and initrd are copied into it or mapped over it, see [`image`].

mod align;
pub mod image;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::mmap::{GuestRegionMmap, MmapRegionError};
use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryRegion, GuestRegionCollectionError};

use devices::GuestMemory;

use crate::arch::x86_64::layout;
use crate::config::MemoryConfig;

/// Size of a page of the host, and of the guest: both are x86-64.
pub const PAGE_SIZE: u64 = 4096;

/// Why a machine has no memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Too small, too large, or no multiple of the page size.
    #[error(
        "A memory of {size} bytes is not possible: it must be whole pages from {} to {} bytes",
        layout::MIN_MEMORY,
        layout::MAX_MEMORY
    )]
    Size {
        /// What was asked for.
        size: u64,
    },
    /// The address space could not be reserved.
    #[error("Cannot reserve {size} bytes of address space for guest memory")]
    Reserve {
        /// What was asked for.
        size: u64,
        /// What the system said.
        #[source]
        source: MmapRegionError,
    },
    /// The pieces do not make a guest memory.
    #[error("Guest memory cannot be put together")]
    Assemble(#[source] GuestRegionCollectionError),
    /// `KVM_SET_USER_MEMORY_REGION` failed.
    #[error("Cannot give the memory at {address:#x} to the machine")]
    Slot {
        /// Guest physical address.
        address: u64,
        /// What KVM said.
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// Reserves the memory of a machine. No page of it exists until it is touched.
pub fn reserve(config: &MemoryConfig) -> Result<GuestMemory, MemoryError> {
    let size = config.size;
    if !size.is_multiple_of(PAGE_SIZE) || !(layout::MIN_MEMORY..=layout::MAX_MEMORY).contains(&size) {
        return Err(MemoryError::Size { size });
    }
    let regions = layout::memory_ranges(size)
        .into_iter()
        .map(|(start, length)| reserve_region(start, length))
        .collect::<Result<_, _>>()?;
    GuestMemory::from_regions(regions).map_err(MemoryError::Assemble)
}

fn reserve_region(start: u64, length: u64) -> Result<GuestRegionMmap<()>, MemoryError> {
    // A 64-bit host; and a region below the top of the address space has an end.
    let size = usize::try_from(length).map_err(|_| MemoryError::Size { size: length })?;
    let mapping = align::map(size).map_err(|source| MemoryError::Reserve { size: length, source })?;
    GuestRegionMmap::new(mapping, GuestAddress(start)).ok_or(MemoryError::Size { size: length })
}

/// Makes `memory` the guest's physical memory, one KVM slot for each region, and keeps it out of
/// core dumps: it is the guest's, and large.
pub fn attach(vm: &VmFd, memory: &GuestMemory) -> Result<(), MemoryError> {
    for (slot, region) in (0..).zip(memory.iter()) {
        let address = region.start_addr().0;
        let failed = |source| MemoryError::Slot { address, source };
        let host = region
            .get_host_address(vm_memory::MemoryRegionAddress(0))
            .map_err(|_| failed(kvm_ioctls::Error::new(libc::EFAULT)))?;
        let length = usize::try_from(region.len()).map_err(|_| failed(kvm_ioctls::Error::new(libc::EINVAL)))?;
        // SAFETY: the region is a mapping of that length; the advice changes nothing that is in it.
        if unsafe { libc::madvise(host.cast(), length, libc::MADV_DONTDUMP) } != 0 {
            return Err(failed(kvm_ioctls::Error::last()));
        }
        let slot = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: address,
            memory_size: region.len(),
            userspace_addr: host as u64,
        };
        // SAFETY: the region is a mapping of that length, and the machine keeps `memory` for as
        // long as its VM exists.
        unsafe { vm.set_user_memory_region(slot) }.map_err(failed)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_checked_at_their_limits() {
        let reserve = |size| reserve(&MemoryConfig { size });
        reserve(layout::MIN_MEMORY).expect("the least memory");
        for size in [0, layout::MIN_MEMORY - PAGE_SIZE, layout::MIN_MEMORY + 1, u64::MAX] {
            assert!(matches!(reserve(size), Err(MemoryError::Size { .. })), "{size}");
        }
        let past = reserve(layout::MAX_MEMORY + PAGE_SIZE);
        assert!(matches!(past, Err(MemoryError::Size { .. })));
    }

    #[test]
    fn memory_past_the_gap_is_a_second_region() {
        let memory = reserve(&MemoryConfig { size: 4 << 30 }).expect("reserve");
        assert_eq!(memory.num_regions(), 2);
        assert_eq!(memory.last_addr().0, (1 << 32) + (4 << 30) - layout::MMIO_GAP_START - 1);
    }
}
