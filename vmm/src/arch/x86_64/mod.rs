//! x86-64: the physical address map, what a kernel expects to find in it and in its registers.
//!
//! There is no firmware, no ACPI and no PCI in this machine: processors and interrupt lines are
//! described by an MP table, everything else by the boot protocol and the kernel command line.

pub mod boot_params;
pub mod cpuid;
pub mod gdt;
pub mod lapic;
pub mod layout;
pub mod mptable;
pub mod msr;
pub mod page_tables;
pub mod pvh;
pub mod regs;

use vm_memory::GuestMemoryError;

/// Why the boot structures could not be put into guest memory or into a processor.
#[derive(Debug, thiserror::Error)]
pub enum ArchError {
    /// A boot structure does not fit where it belongs.
    #[error("Cannot write the {what} to guest memory")]
    GuestMemory {
        /// The structure.
        what: &'static str,
        /// What guest memory said.
        #[source]
        source: GuestMemoryError,
    },
    /// More processors than APIC identifiers.
    #[error("{0} vCPUs are more than the {max} that an MP table can name", max = layout::MAX_VCPUS)]
    TooManyVcpus(u8),
    /// A KVM call on a vCPU failed.
    #[error("Cannot set up vCPU {vcpu}: {call} failed")]
    Vcpu {
        /// Index of the vCPU.
        vcpu: u8,
        /// The ioctl.
        call: &'static str,
        /// What KVM said.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The processor identification is larger than KVM takes.
    #[error("The host has more CPUID leaves than KVM takes")]
    CpuidTooLarge,
}

impl ArchError {
    /// For `map_err` on a write of `what` to guest memory.
    pub(crate) fn guest_memory(what: &'static str) -> impl FnOnce(GuestMemoryError) -> Self {
        move |source| Self::GuestMemory { what, source }
    }

    /// For `map_err` on the ioctl `call` of a vCPU.
    pub(crate) fn vcpu(vcpu: u8, call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Vcpu { vcpu, call, source }
    }
}
