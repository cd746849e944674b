//! Why a processor could not go on.

use std::fmt;

use kvm_bindings::{KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION};

/// What KVM said when it could not run a processor any further.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VcpuFault {
    /// `KVM_RUN` failed.
    Run(kvm_ioctls::Error),
    /// The processor refused to enter the guest (`KVM_EXIT_FAIL_ENTRY`).
    EntryRefused {
        /// The processor's own reason code.
        reason: u64,
    },
    /// KVM gave up (`KVM_EXIT_INTERNAL_ERROR`).
    Internal {
        /// KVM's reason code.
        suberror: u32,
        /// The guest's instruction pointer.
        rip: u64,
        /// KVM's details, the instruction's bytes among them where it has them.
        data: Vec<u64>,
    },
    /// The guest touched memory that cannot be provided (`KVM_EXIT_MEMORY_FAULT`).
    Memory {
        /// Guest physical address.
        address: u64,
    },
    /// An exit that this machine never asked KVM for.
    Unexpected(String),
}

impl fmt::Display for VcpuFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Run(error) => write!(f, "KVM cannot run it: {error}"),
            Self::EntryRefused { reason } => {
                write!(f, "the host's processor refused to enter it, reason {reason:#x}")
            }
            Self::Internal { suberror, rip, data } => {
                let what = match *suberror {
                    KVM_INTERNAL_ERROR_EMULATION => "KVM cannot emulate an instruction",
                    KVM_INTERNAL_ERROR_DELIVERY_EV => "KVM cannot deliver an event",
                    _ => "KVM gave up",
                };
                write!(f, "{what} at {rip:#x}, suberror {suberror}, details {data:x?}")
            }
            Self::Memory { address } => write!(f, "its memory at {address:#x} cannot be provided"),
            Self::Unexpected(exit) => write!(f, "KVM made an exit that was not asked for: {exit}"),
        }
    }
}
