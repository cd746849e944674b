//! The MP table (Intel MultiProcessor Specification 1.4): how a kernel without ACPI learns of the
//! processors, the I/O APIC and which pin each interrupt line is wired to.

use vm_memory::Bytes;

use devices::GuestMemory;

use super::{ArchError, layout};
use crate::irq;

const SPEC_REVISION: u8 = 4;
const LOCAL_APIC_VERSION: u8 = 0x14;
const IO_APIC_VERSION: u8 = 0x11;

/// Entry types, section 4.3.
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC: u8 = 2;
const INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

const PROCESSOR_ENABLED: u8 = 1;
const PROCESSOR_BOOT: u8 = 2;
const IO_APIC_ENABLED: u8 = 1;
const TYPE_INT: u8 = 0;
const TYPE_NMI: u8 = 1;
const TYPE_EXT_INT: u8 = 3;
/// The only bus. Interrupts of an ISA bus are edge-triggered, active high: what an irqfd gives.
const ISA_BUS: u8 = 0;
const ALL_LOCAL_APICS: u8 = 0xff;

const FLOATING_POINTER_SIZE: u64 = 16;
const HEADER_SIZE: usize = 44;

/// Writes the table for processors with the APIC identifiers 0 to `vcpus` - 1.
pub fn write(memory: &GuestMemory, vcpus: u8) -> Result<(), ArchError> {
    if vcpus > layout::MAX_VCPUS {
        return Err(ArchError::TooManyVcpus(vcpus));
    }
    let mut table = floating_pointer();
    table.extend(configuration(vcpus));
    memory.write_slice(&table, layout::MP_TABLE).map_err(ArchError::guest_memory("MP table"))
}

/// Section 4.1. What the kernel searches for.
fn floating_pointer() -> Vec<u8> {
    let mut pointer = b"_MP_".to_vec();
    pointer.extend(address_after_pointer().to_le_bytes());
    // Length in 16-byte units, revision, checksum to be filled, features: a table is present.
    pointer.extend([1, SPEC_REVISION, 0, 0, 0, 0, 0, 0]);
    set_checksum(&mut pointer, 10);
    pointer
}

/// Where the configuration table stands: just behind the pointer.
fn address_after_pointer() -> u32 {
    // Below 1 MiB by the layout, so nothing is cut off.
    u32::try_from(layout::MP_TABLE.0 + FLOATING_POINTER_SIZE).unwrap_or(u32::MAX)
}

/// Section 4.2: the header, then the entries ordered by type.
fn configuration(vcpus: u8) -> Vec<u8> {
    // The identifier after the last processor's.
    let io_apic_id = vcpus;
    let mut entries = Vec::new();
    let mut count: u16 = 0;
    let mut add = |entry: &[u8]| {
        entries.extend_from_slice(entry);
        count += 1;
    };

    for id in 0..vcpus {
        let flags = if id == 0 { PROCESSOR_ENABLED | PROCESSOR_BOOT } else { PROCESSOR_ENABLED };
        let mut processor = [0; 20];
        processor[..4].copy_from_slice(&[PROCESSOR, id, LOCAL_APIC_VERSION, flags]);
        // Signature and features are CPUID's business; only the presence of an APIC is told here.
        processor[9] = 1 << 1;
        add(&processor);
    }
    add(&[BUS, ISA_BUS, b'I', b'S', b'A', b' ', b' ', b' ']);
    let [a0, a1, a2, a3] = layout::IO_APIC.to_le_bytes();
    add(&[IO_APIC, io_apic_id, IO_APIC_VERSION, IO_APIC_ENABLED, a0, a1, a2, a3]);
    for line in 0..irq::IO_APIC_PINS {
        add(&[INTERRUPT, TYPE_INT, 0, 0, ISA_BUS, line, io_apic_id, line]);
    }
    add(&[LOCAL_INTERRUPT, TYPE_EXT_INT, 0, 0, ISA_BUS, 0, 0, 0]);
    add(&[LOCAL_INTERRUPT, TYPE_NMI, 0, 0, ISA_BUS, 0, ALL_LOCAL_APICS, 1]);

    let length = u16::try_from(HEADER_SIZE + entries.len()).unwrap_or(u16::MAX);
    let mut table = b"PCMP".to_vec();
    table.extend(length.to_le_bytes());
    table.extend([SPEC_REVISION, 0]);
    table.extend(b"INLAY   MICROVM     ");
    // No OEM table.
    table.extend([0; 6]);
    table.extend(count.to_le_bytes());
    table.extend(layout::LOCAL_APIC.to_le_bytes());
    // No extended table.
    table.extend([0; 4]);
    table.extend(entries);
    set_checksum(&mut table, 7);
    table
}

/// Makes the bytes of `block` add up to zero by the one at `position`, which is zero so far.
fn set_checksum(block: &mut [u8], position: usize) {
    let sum = block.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(checksum) = block.get_mut(position) {
        *checksum = sum.wrapping_neg();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestAddress;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn read_table(vcpus: u8) -> Vec<u8> {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("memory");
        write(&memory, vcpus).expect("table");
        let mut bytes = vec![0; 0x1_0000];
        memory.read_slice(&mut bytes, layout::MP_TABLE).expect("read");
        bytes
    }

    #[test]
    fn pointer_and_table_add_up_to_zero() {
        for vcpus in [1, 2, 16, layout::MAX_VCPUS] {
            let bytes = read_table(vcpus);
            assert_eq!(&bytes[..4], b"_MP_");
            assert_eq!(sum(&bytes[..16]), 0);
            assert_eq!(u32::from_le_bytes(bytes[4..8].try_into().expect("4")), 0xf_0010);
            let table = &bytes[16..];
            assert_eq!(&table[..4], b"PCMP");
            let length = usize::from(u16::from_le_bytes([table[4], table[5]]));
            assert_eq!(sum(&table[..length]), 0);
            let expected = HEADER_SIZE + usize::from(vcpus) * 20 + (1 + 1 + 24 + 2) * 8;
            assert_eq!(length, expected);
            let count = u16::from_le_bytes([table[34], table[35]]);
            assert_eq!(count, u16::from(vcpus) + 28);
        }
    }

    #[test]
    fn every_pin_of_the_io_apic_is_an_isa_line() {
        let bytes = read_table(2);
        let interrupts = &bytes[16 + HEADER_SIZE + 40 + 16..];
        for (line, entry) in interrupts.chunks(8).take(24).enumerate() {
            let line = u8::try_from(line).expect("small");
            assert_eq!(entry, [INTERRUPT, TYPE_INT, 0, 0, ISA_BUS, line, 2, line]);
        }
    }

    #[test]
    fn one_processor_too_many_is_refused() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("memory");
        assert!(matches!(write(&memory, 255), Err(ArchError::TooManyVcpus(255))));
    }
}
