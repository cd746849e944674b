//! What the guest's processors have written, by KVM's log.

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::{GuestMemory as _, GuestMemoryRegion, MemoryRegionAddress};

use devices::GuestMemory;
use devices::virtio::WriteLog;

use super::SnapshotError;

/// Makes KVM note what is written to `memory`, which it has in slots by the order of its regions. What was written before
/// is not noted.
pub(crate) fn begin(vm: &VmFd, memory: &GuestMemory) -> Result<(), SnapshotError> {
    for (slot, region) in (0..).zip(memory.iter()) {
        let failed = |source| SnapshotError::Kvm { call: "KVM_SET_USER_MEMORY_REGION", source };
        let host = region
            .get_host_address(MemoryRegionAddress(0))
            .map_err(|_| failed(kvm_ioctls::Error::new(libc::EFAULT)))?;
        let slot = kvm_userspace_memory_region {
            slot,
            flags: KVM_MEM_LOG_DIRTY_PAGES,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: host as u64,
        };
        // SAFETY: the slot is there already, with the same memory, which the machine keeps for as long as its VM exists.
        unsafe { vm.set_user_memory_region(slot) }.map_err(failed)?;
    }
    Ok(())
}

/// Moves what KVM has noted to `log`: KVM forgets it when it tells, so that it must be kept until it is written.
pub(crate) fn collect(vm: &VmFd, memory: &GuestMemory, log: &WriteLog) -> Result<(), SnapshotError> {
    for (slot, region) in memory.iter().enumerate() {
        let failed = |source| SnapshotError::Kvm { call: "KVM_GET_DIRTY_LOG", source };
        let too_large = |_| failed(kvm_ioctls::Error::new(libc::E2BIG));
        let length = usize::try_from(region.len()).map_err(too_large)?;
        let number = u32::try_from(slot).map_err(too_large)?;
        log.add(slot, &vm.get_dirty_log(number, length).map_err(failed)?);
    }
    Ok(())
}
