//! The local interrupt pins of each local APIC.

use kvm_bindings::kvm_lapic_state;
use kvm_ioctls::VcpuFd;

use super::ArchError;

/// Offsets in the register page (Intel SDM volume 3, section 11.4.1).
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
/// Delivery modes, bits 8 to 10 of an LVT register.
const MODE_NMI: u32 = 0b100 << 8;
const MODE_EXT_INT: u32 = 0b111 << 8;

/// Wires the pins of vCPU `index` as the MP table says: LINT0 to the legacy interrupt controller,
/// LINT1 to NMI.
pub fn set(vcpu: &VcpuFd, index: u8) -> Result<(), ArchError> {
    let mut lapic = vcpu.get_lapic().map_err(ArchError::vcpu(index, "KVM_GET_LAPIC"))?;
    write(&mut lapic, LVT_LINT0, MODE_EXT_INT);
    write(&mut lapic, LVT_LINT1, MODE_NMI);
    vcpu.set_lapic(&lapic).map_err(ArchError::vcpu(index, "KVM_SET_LAPIC"))
}

fn write(lapic: &mut kvm_lapic_state, offset: usize, value: u32) {
    for (register, byte) in lapic.regs.iter_mut().skip(offset).zip(value.to_le_bytes()) {
        *register = i8::from_ne_bytes([byte]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_register_is_four_bytes_little_endian() {
        let mut lapic = kvm_lapic_state::default();
        write(&mut lapic, LVT_LINT0, MODE_EXT_INT);
        assert_eq!(lapic.regs[LVT_LINT0..LVT_LINT0 + 4], [0, 7, 0, 0]);
        assert_eq!(lapic.regs[LVT_LINT1], 0);
    }
}
