//! Model-specific registers whose state after KVM's reset is not what a kernel expects of a PC.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::ArchError;

const IA32_MISC_ENABLE: u32 = 0x1a0;
/// Fast string operations: Linux gives up `rep movsb` without this bit.
const MISC_ENABLE_FAST_STRINGS: u64 = 1;

const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, default type write-back. Off, Linux gives up PAT too.
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// Sets the registers of vCPU `index`.
pub fn set(vcpu: &VcpuFd, index: u8) -> Result<(), ArchError> {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let entries =
        [entry(IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRINGS), entry(IA32_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK)];
    let failed = || ArchError::vcpu(index, "KVM_SET_MSRS");
    let msrs = Msrs::from_entries(&entries).map_err(|_| failed()(kvm_ioctls::Error::new(libc::E2BIG)))?;
    match vcpu.set_msrs(&msrs).map_err(failed())? {
        set if set == entries.len() => Ok(()),
        // KVM stops at the first register that it does not take and returns how many it did.
        _ => Err(failed()(kvm_ioctls::Error::new(libc::EINVAL))),
    }
}
