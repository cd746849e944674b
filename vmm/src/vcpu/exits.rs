//! One entry into the guest and what came of it.

// A guest chooses the numbers.
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use std::io;
use std::sync::Arc;

use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_run};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::VcpuFault;
use crate::bus::Bus;
use crate::machine::exit::ExitReason;

/// The two ways from a processor to a device.
#[derive(Clone)]
pub struct Buses {
    /// I/O ports.
    pub port: Arc<Bus>,
    /// Memory-mapped I/O.
    pub mmio: Arc<Bus>,
}

/// What the processor's thread does next.
#[derive(Debug)]
pub enum Outcome {
    /// Enter the guest again.
    Continue,
    /// Somebody may want the thread's attention.
    Interrupted,
    /// The machine ends.
    End(ExitReason),
    /// The processor cannot go on.
    Fault(VcpuFault),
}

/// Enters the guest once and serves its exit.
pub fn run_once(vcpu: &mut VcpuFd, buses: &Buses) -> Outcome {
    let run: *const kvm_run = vcpu.get_kvm_run();
    match vcpu.run() {
        Ok(VcpuExit::IoOut(port, data)) => {
            // SAFETY: KVM said that this was port I/O, so that the union holds `io`; the data
            // that the exit borrows lies in another page of the mapping.
            let width = unsafe { (*run).__bindgen_anon_1.io.size };
            for item in data.chunks(usize::from(width).max(1)) {
                buses.port.write(port.into(), item);
            }
            Outcome::Continue
        }
        Ok(VcpuExit::IoIn(port, data)) => {
            // SAFETY: as above.
            let width = unsafe { (*run).__bindgen_anon_1.io.size };
            for item in data.chunks_mut(usize::from(width).max(1)) {
                buses.port.read(port.into(), item);
            }
            Outcome::Continue
        }
        Ok(VcpuExit::MmioRead(address, data)) => {
            buses.mmio.read(address, data);
            Outcome::Continue
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            buses.mmio.write(address, data);
            Outcome::Continue
        }
        Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) => Outcome::Interrupted,
        Ok(VcpuExit::Shutdown) => Outcome::End(ExitReason::TripleFault),
        Ok(VcpuExit::SystemEvent(kind, _)) => match kind {
            KVM_SYSTEM_EVENT_SHUTDOWN => Outcome::End(ExitReason::Shutdown),
            KVM_SYSTEM_EVENT_RESET => Outcome::End(ExitReason::Reset),
            KVM_SYSTEM_EVENT_CRASH => Outcome::End(ExitReason::Panicked(String::new())),
            other => Outcome::Fault(VcpuFault::Unexpected(format!("system event {other}"))),
        },
        Ok(VcpuExit::FailEntry(reason, _)) => Outcome::Fault(VcpuFault::EntryRefused { reason }),
        Ok(VcpuExit::InternalError) => Outcome::Fault(internal_error(vcpu)),
        Ok(VcpuExit::MemoryFault { gpa, .. }) => Outcome::Fault(VcpuFault::Memory { address: gpa }),
        // KVM halts a processor by itself, as it has the interrupt controller.
        Ok(other) => Outcome::Fault(VcpuFault::Unexpected(format!("{other:?}"))),
        Err(error) => match io::Error::from(error).kind() {
            // A kick; or, EAGAIN, a processor that was just woken by INIT and SIPI.
            io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock => Outcome::Interrupted,
            _ => Outcome::Fault(VcpuFault::Run(error)),
        },
    }
}

fn internal_error(vcpu: &mut VcpuFd) -> VcpuFault {
    let rip = vcpu.get_regs().map_or(0, |regs| regs.rip);
    // SAFETY: KVM said that this was an internal error, so that the union holds `internal`.
    let internal = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal };
    let count = usize::try_from(internal.ndata).unwrap_or(usize::MAX);
    let data = internal.data.iter().take(count).copied().collect();
    VcpuFault::Internal { suberror: internal.suberror, rip, data }
}
