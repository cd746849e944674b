//! What the state file holds.

use kvm_bindings::{kvm_clock_data, kvm_irqchip};
use serde::{Deserialize, Serialize};

use devices::legacy::SerialState;
use devices::virtio::TransportState;

use crate::vcpu::VcpuState;

/// A machine without its memory. The keyboard controller, the panic port and the debug port remember nothing, and
/// there is no PIT.
#[derive(Debug, Serialize, Deserialize)]
pub struct MachineState {
    /// Bytes of memory.
    pub memory_size: u64,
    /// Processors by index.
    pub vcpus: Vec<VcpuState>,
    /// Both PICs and the I/O APIC.
    pub irqchips: Vec<kvm_irqchip>,
    /// kvmclock.
    pub clock: kvm_clock_data,
    /// The console.
    pub serial: SerialState,
    /// Virtio devices in the order of attachment.
    pub devices: Vec<TransportState>,
}
