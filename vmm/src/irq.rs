//! Interrupt lines: which device gets which pin of the I/O APIC.

use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

/// Pins of the I/O APIC that KVM emulates.
pub const IO_APIC_PINS: u8 = 24;

/// The line of the first serial port, as on any PC.
pub const SERIAL_LINE: u32 = 4;

/// Lines for virtio devices. Left out are those that a kernel takes for a legacy device without
/// asking: 0 timer, 1 and 12 keyboard controller, 2 cascade, 3 and 4 serial, 8 clock, 13 FPU.
const DEVICE_LINES: [u32; 16] = [5, 6, 7, 9, 10, 11, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23];

/// Why a device has no interrupt.
#[derive(Debug, thiserror::Error)]
pub enum IrqError {
    /// All lines are taken.
    #[error("There are more devices than the {} interrupt lines for them", DEVICE_LINES.len())]
    NoLineLeft,
    /// `KVM_IRQFD` failed.
    #[error("Cannot wire interrupt line {line} to its event descriptor")]
    Wire {
        /// The line, a GSI.
        line: u32,
        /// What KVM said.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// No event descriptor could be made.
    #[error("Cannot make an event descriptor for interrupt line {line}")]
    EventFd {
        /// The line, a GSI.
        line: u32,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
}

/// Hands out the lines in order.
#[derive(Debug, Default)]
pub struct IrqAllocator {
    taken: usize,
}

impl IrqAllocator {
    /// The next free line.
    pub fn allocate(&mut self) -> Result<u32, IrqError> {
        let line = DEVICE_LINES.get(self.taken).copied().ok_or(IrqError::NoLineLeft)?;
        self.taken += 1;
        Ok(line)
    }
}

/// Makes an event descriptor that raises `line` when it is written.
pub fn wire(vm: &VmFd, line: u32) -> Result<EventFd, IrqError> {
    let event =
        EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(|source| IrqError::EventFd { line, source })?;
    vm.register_irqfd(&event, line).map_err(|source| IrqError::Wire { line, source })?;
    Ok(event)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_line_is_given_once_and_then_no_more() {
        let mut allocator = IrqAllocator::default();
        let lines: Vec<u32> = (0..DEVICE_LINES.len()).map(|_| allocator.allocate().expect("free")).collect();
        assert_eq!(lines, DEVICE_LINES);
        assert!(matches!(allocator.allocate(), Err(IrqError::NoLineLeft)));
    }
}
