//! The guest's physical memory: private or shared, anonymous or of a file; touched as little as possible.
//!
//! Kernel and initrd are copied into it or mapped over it, see [`image`]. A restored machine's is a mapping of its
//! snapshot's, or comes page by page, see [`lazy`].

mod above;
mod align;
pub(crate) mod backing;
pub mod image;
pub mod lazy;
pub mod source;
pub mod uffd;
pub mod working_set;

use std::io;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::mmap::{GuestRegionMmap, MmapRegionError};
use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryRegion, GuestRegionCollectionError, MemoryRegionAddress};

use devices::GuestMemory;

use crate::arch::x86_64::layout;
use crate::config::MemoryConfig;

pub use above::{Above, PluggableBlocks, PluggableRegion};
use backing::Source;

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
    /// There is no file of that size to map.
    #[error("Cannot make a file of {size} bytes for guest memory")]
    File {
        /// What was asked for.
        size: u64,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A file of pages that are larger than the pieces of guest memory.
    #[error("A memory of {size} bytes is not possible: the file behind it has pages of {page} bytes")]
    FilePages {
        /// What was asked for.
        size: u64,
        /// Bytes of a page.
        page: u64,
    },
    /// The host could not make all pages at once.
    #[error("Cannot make all {size} bytes of guest memory before the start")]
    Prealloc {
        /// What was asked for.
        size: u64,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Memory could not be kept out of core dumps.
    #[error("Cannot keep guest memory out of core dumps")]
    CoreDump(#[source] io::Error),
    /// The pieces do not make a guest memory.
    #[error("Guest memory cannot be put together")]
    Assemble(#[source] GuestRegionCollectionError),
    /// No address is left for a region above guest memory.
    #[error(
        "There is no room for {size} bytes above guest memory: physical addresses end at {:#x}",
        layout::ADDRESS_END
    )]
    Space {
        /// What was asked for.
        size: u64,
    },
    /// A region above guest memory could not be mapped.
    #[error("Cannot map {size} bytes above guest memory")]
    Map {
        /// What was asked for.
        size: u64,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A file that cannot be persistent memory.
    #[error("Persistent memory {id} has a file of {length} bytes, which cannot be mapped")]
    Persistent {
        /// Its name.
        id: String,
        /// Bytes of the file.
        length: u64,
    },
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

/// Reserves the memory of a machine. No page of it exists until it is touched, unless that is asked for.
pub fn reserve(config: &MemoryConfig) -> Result<GuestMemory, MemoryError> {
    let size = config.size;
    if !size.is_multiple_of(PAGE_SIZE) || !(layout::MIN_MEMORY..=layout::MAX_MEMORY).contains(&size) {
        return Err(MemoryError::Size { size });
    }
    let source = Source::of(config)?;
    let mut offset = 0;
    let mut regions = Vec::new();
    for (start, length) in layout::memory_ranges(size) {
        regions.push(reserve_region(&source, offset, start, length)?);
        offset += length;
    }
    let memory = GuestMemory::from_regions(regions).map_err(MemoryError::Assemble)?;
    settle(config, &memory)?;
    Ok(memory)
}

/// Gives the mappings of `memory` the properties that were asked for; again where some of them were replaced.
pub(crate) fn settle(config: &MemoryConfig, memory: &GuestMemory) -> Result<(), MemoryError> {
    if config.prealloc {
        let size = config.size;
        advise(memory, libc::MADV_POPULATE_WRITE).map_err(|source| MemoryError::Prealloc { size, source })?;
    }
    if !config.core_dump {
        // It is the guest's, and large.
        advise(memory, libc::MADV_DONTDUMP).map_err(MemoryError::CoreDump)?;
    }
    Ok(())
}

fn reserve_region(source: &Source, offset: u64, start: u64, length: u64) -> Result<GuestRegionMmap<()>, MemoryError> {
    // A 64-bit host; and a region below the top of the address space has an end.
    let size = usize::try_from(length).map_err(|_| MemoryError::Size { size: length })?;
    let mapping =
        align::map(size, source.backing(offset)).map_err(|source| MemoryError::Reserve { size: length, source })?;
    GuestRegionMmap::new(mapping, GuestAddress(start)).ok_or(MemoryError::Size { size: length })
}

/// Tells the kernel something about all of `memory`: `advice` that leaves its contents as they are.
fn advise(memory: &GuestMemory, advice: libc::c_int) -> io::Result<()> {
    for region in memory.iter() {
        let host = region.get_host_address(MemoryRegionAddress(0)).map_err(io::Error::other)?;
        let length = usize::try_from(region.len()).map_err(io::Error::other)?;
        // SAFETY: the region is a mapping of that length, and the callers' advice changes nothing that is in it.
        if unsafe { libc::madvise(host.cast(), length, advice) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Makes `memory` the guest's physical memory, one KVM slot for each region.
pub fn attach(vm: &VmFd, memory: &GuestMemory) -> Result<(), MemoryError> {
    for (slot, region) in (0..).zip(memory.iter()) {
        let address = region.start_addr().0;
        let failed = |source| MemoryError::Slot { address, source };
        let host = region
            .get_host_address(MemoryRegionAddress(0))
            .map_err(|_| failed(kvm_ioctls::Error::new(libc::EFAULT)))?;
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
        let reserve = |size| reserve(&MemoryConfig::from_size(size));
        reserve(layout::MIN_MEMORY).expect("the least memory");
        for size in [0, layout::MIN_MEMORY - PAGE_SIZE, layout::MIN_MEMORY + 1, u64::MAX] {
            assert!(matches!(reserve(size), Err(MemoryError::Size { .. })), "{size}");
        }
        let past = reserve(layout::MAX_MEMORY + PAGE_SIZE);
        assert!(matches!(past, Err(MemoryError::Size { .. })));
    }

    #[test]
    fn memory_past_the_gap_is_a_second_region() {
        let memory = reserve(&MemoryConfig::from_size(4 << 30)).expect("reserve");
        assert_eq!(memory.num_regions(), 2);
        assert_eq!(memory.last_addr().0, (1 << 32) + (4 << 30) - layout::MMIO_GAP_START - 1);
    }
}
