//! What a processor knows, and giving it to another one.

use kvm_bindings::{
    CpuId, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use crate::arch::x86_64::ArchError;

/// Registers that are set after all others: the deadline is lost when the time is set after it, and when the local APIC
/// is not in deadline mode yet.
const IA32_TSC_DEADLINE: u32 = 0x6e0;

/// How far the rates of two hosts' time stamp counters may be apart, in parts of a million: what Linux, like an NTP
/// daemon, takes for the error of one crystal.
const TSC_TOLERANCE: u64 = 250;

/// A processor.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    cpuid: Vec<kvm_cpuid_entry2>,
    /// 0 where the host does not know.
    tsc_khz: u32,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debugregs: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

/// Why a processor does not take a saved state.
#[derive(Debug, thiserror::Error)]
pub enum VcpuRestoreError {
    /// A KVM call failed.
    #[error(transparent)]
    Kvm(#[from] ArchError),
    /// A model-specific register.
    #[error("vCPU {vcpu} does not take {value:#x} in MSR {msr:#x}: another processor, or another version of KVM")]
    Msr {
        /// Index of the vCPU.
        vcpu: u8,
        /// The register.
        msr: u32,
        /// What it had.
        value: u64,
    },
    /// Another clock rate, and no scaling.
    #[error(
        "The guest's time stamp counter runs at {saved} kHz, this host's at {present} kHz, and it cannot be scaled"
    )]
    Tsc {
        /// In the snapshot.
        saved: u32,
        /// Here.
        present: u32,
    },
    /// More than KVM takes at a time.
    #[error("vCPU {vcpu} has {count} {what}, which is more than KVM takes")]
    TooMany {
        /// Index of the vCPU.
        vcpu: u8,
        /// How many.
        count: usize,
        /// Of what.
        what: &'static str,
    },
}

impl VcpuState {
    /// Saves a processor that is not running and was given `cpuid`: what KVM says that it has changes with the guest's own
    /// settings. Of `msrs` those are kept that it has.
    ///
    /// The order matters: reading the state of multiprocessing makes KVM carry out what INIT and SIPI have left to do.
    pub fn save(vcpu: &VcpuFd, index: u8, cpuid: &[kvm_cpuid_entry2], msrs: &[u32]) -> Result<Self, ArchError> {
        let failed = |call| ArchError::vcpu(index, call);
        let mp_state = vcpu.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?;
        let regs = vcpu.get_regs().map_err(failed("KVM_GET_REGS"))?;
        let sregs = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
        let xsave = vcpu.get_xsave().map_err(failed("KVM_GET_XSAVE"))?;
        let xcrs = vcpu.get_xcrs().map_err(failed("KVM_GET_XCRS"))?;
        let debugregs = vcpu.get_debug_regs().map_err(failed("KVM_GET_DEBUGREGS"))?;
        let lapic = vcpu.get_lapic().map_err(failed("KVM_GET_LAPIC"))?;
        let msrs = get_msrs(vcpu, msrs).map_err(failed("KVM_GET_MSRS"))?;
        let events = vcpu.get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"))?;
        let cpuid = cpuid.to_vec();
        let tsc_khz = vcpu.get_tsc_khz().unwrap_or_default();
        Ok(Self { cpuid, tsc_khz, mp_state, regs, sregs, xsave, xcrs, debugregs, lapic, msrs, events })
    }

    /// What the guest was told about its processor.
    pub fn cpuid(&self) -> &[kvm_cpuid_entry2] {
        &self.cpuid
    }

    /// Makes a fresh processor this one. The interrupt controllers are restored already.
    pub fn restore(&self, vcpu: &VcpuFd, index: u8) -> Result<(), VcpuRestoreError> {
        let failed = |call| ArchError::vcpu(index, call);
        let count = self.cpuid.len();
        let cpuid = CpuId::from_entries(&self.cpuid).map_err(|_| VcpuRestoreError::TooMany {
            vcpu: index,
            count,
            what: "CPUID leaves",
        })?;
        vcpu.set_cpuid2(&cpuid).map_err(failed("KVM_SET_CPUID2"))?;
        self.set_tsc_rate(vcpu)?;
        vcpu.set_mp_state(self.mp_state).map_err(failed("KVM_SET_MP_STATE"))?;
        vcpu.set_regs(&self.regs).map_err(failed("KVM_SET_REGS"))?;
        vcpu.set_sregs(&self.sregs).map_err(failed("KVM_SET_SREGS"))?;
        // A host without XSAVE has none, and refuses to be told so.
        if self.xcrs.nr_xcrs > 0 {
            vcpu.set_xcrs(&self.xcrs).map_err(failed("KVM_SET_XCRS"))?;
        }
        // SAFETY: the structure has the 4 KiB that the call reads where no feature with more state was asked for by
        // arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM), which nobody does here.
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(failed("KVM_SET_XSAVE"))?;
        vcpu.set_debug_regs(&self.debugregs).map_err(failed("KVM_SET_DEBUGREGS"))?;
        vcpu.set_lapic(&self.lapic).map_err(failed("KVM_SET_LAPIC"))?;
        self.set_msrs(vcpu, index)?;
        vcpu.set_vcpu_events(&self.events).map_err(failed("KVM_SET_VCPU_EVENTS"))?;
        // Else the guest's watchdog takes the time in between for a processor that hangs. Fails where the guest does
        // not use kvmclock.
        let _ = vcpu.kvmclock_ctrl();
        Ok(())
    }

    fn set_tsc_rate(&self, vcpu: &VcpuFd) -> Result<(), VcpuRestoreError> {
        let Ok(present) = vcpu.get_tsc_khz() else { return Ok(()) };
        let saved = self.tsc_khz;
        let apart = u64::from(saved.abs_diff(present)) * 1_000_000;
        if saved == 0 || apart <= u64::from(saved) * TSC_TOLERANCE {
            return Ok(());
        }
        vcpu.set_tsc_khz(saved).map_err(|_| VcpuRestoreError::Tsc { saved, present })
    }

    fn set_msrs(&self, vcpu: &VcpuFd, index: u8) -> Result<(), VcpuRestoreError> {
        let (last, first): (Vec<_>, Vec<_>) = self.msrs.iter().partition(|entry| entry.index == IA32_TSC_DEADLINE);
        let ordered: Vec<kvm_msr_entry> = first.into_iter().chain(last).copied().collect();
        let count = ordered.len();
        let msrs =
            Msrs::from_entries(&ordered).map_err(|_| VcpuRestoreError::TooMany { vcpu: index, count, what: "MSRs" })?;
        let set = vcpu.set_msrs(&msrs).map_err(ArchError::vcpu(index, "KVM_SET_MSRS"))?;
        // KVM stops at the first that it does not take.
        match ordered.get(set) {
            None => Ok(()),
            Some(entry) => Err(VcpuRestoreError::Msr { vcpu: index, msr: entry.index, value: entry.data }),
        }
    }
}

/// Reads the registers that are there: KVM lists some that this processor does not have, and stops at each.
fn get_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, kvm_ioctls::Error> {
    let mut values = Vec::with_capacity(indices.len());
    let mut left = indices;
    while !left.is_empty() {
        let entries: Vec<_> = left.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
        let mut msrs = Msrs::from_entries(&entries).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))?;
        let count = vcpu.get_msrs(&mut msrs)?;
        values.extend(msrs.as_slice().iter().take(count));
        left = left.get(count + 1..).unwrap_or_default();
    }
    Ok(values)
}
