//! The guest's physical address map.
//!
//! ```text
//! 0x0000_0500  GDT, IDT (empty)                     boot structures, read once
//! 0x0000_6000  PVH start info, 0x6040 module list
//! 0x0000_7000  zero page (Linux boot) or PVH memory map
//! 0x0000_9000  page tables: PML4, PDPT, PD
//! 0x0002_0000  kernel command line
//! 0x0009_fc00  end of conventional memory
//! 0x000f_0000  MP table
//! 0x0010_0000  high memory: kernel from 16 MiB, initrd at the top
//! 0xd000_0000  MMIO gap: virtio windows, one page each
//! 0xfec0_0000  I/O APIC            0xfee0_0000  local APIC
//! 0xfffb_c000  identity map page and TSS that KVM needs on some Intel hosts
//! 0x1_0000_0000  the rest of memory
//! ```

use vm_memory::GuestAddress;

/// Where the boot GDT goes.
pub const GDT: GuestAddress = GuestAddress(0x500);
/// Where the boot IDT (one empty entry) goes.
pub const IDT: GuestAddress = GuestAddress(0x520);
/// Where the PVH `hvm_start_info` goes.
pub const PVH_START_INFO: GuestAddress = GuestAddress(0x6000);
/// Where the PVH module list (the initrd) goes.
pub const PVH_MODULES: GuestAddress = GuestAddress(0x6040);
/// Where the PVH memory map goes. PVH and the Linux boot protocol are never used together.
pub const PVH_MEMORY_MAP: GuestAddress = GuestAddress(0x7000);
/// Where the zero page (`struct boot_params`) goes.
pub const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// Top of the stack at entry.
pub const BOOT_STACK: GuestAddress = GuestAddress(0x8ff0);
/// Page map level 4 of the boot page tables.
pub const PML4: GuestAddress = GuestAddress(0x9000);
/// Page directory pointer table of the boot page tables.
pub const PDPT: GuestAddress = GuestAddress(0xa000);
/// Page directory of the boot page tables.
pub const PD: GuestAddress = GuestAddress(0xb000);
/// Where the kernel command line goes.
pub const CMDLINE: GuestAddress = GuestAddress(0x2_0000);
/// Longest command line with its NUL: `COMMAND_LINE_SIZE` of Linux on x86.
pub const CMDLINE_MAX: usize = 2048;
/// End of conventional memory, where a PC's extended BIOS data would start.
pub const LOW_MEMORY_END: u64 = 0x9_fc00;
/// Where the MP table goes: Linux searches the 64 KiB below 1 MiB (MP 1.4 section 4).
pub const MP_TABLE: GuestAddress = GuestAddress(0xf_0000);
/// Start of memory above the legacy hole.
pub const HIGH_MEMORY: u64 = 0x10_0000;
/// Where a flat kernel image was linked to run: `CONFIG_PHYSICAL_START`.
pub const FLAT_KERNEL: GuestAddress = GuestAddress(0x100_0000);

/// Start of the hole in memory that is left to devices.
pub const MMIO_GAP_START: u64 = 0xd000_0000;
/// End of the hole: memory goes on at 4 GiB.
pub const MMIO_GAP_END: u64 = 1 << 32;
/// Size of a virtio-MMIO window and distance to the next.
pub const MMIO_WINDOW: u64 = 0x1000;
/// Physical address of the I/O APIC that KVM emulates.
pub const IO_APIC: u32 = 0xfec0_0000;
/// Physical address of the local APICs.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages below the last 256 KiB that KVM uses for real mode on Intel (`KVM_SET_TSS_ADDR`).
pub const KVM_TSS: usize = 0xfffb_d000;

/// Most vCPUs: an xAPIC identifier is 8 bits, 255 means broadcast and the I/O APIC has one.
pub const MAX_VCPUS: u8 = 254;
/// Least memory: conventional memory, a small kernel at 16 MiB and room for its data.
pub const MIN_MEMORY: u64 = 32 << 20;
/// Most memory: what 40 bits of physical address can name, the least that x86-64 hosts have.
pub const MAX_MEMORY: u64 = ADDRESS_END - MMIO_GAP_END;
/// End of the physical addresses that are used.
pub const ADDRESS_END: u64 = 1 << 40;
/// The initrd stays below this: old boot loaders' `initrd_addr_max`, true for any Linux.
pub const INITRD_MAX: u64 = 0x7fff_ffff;

/// Cuts a memory of `size` bytes around the MMIO gap: (address, length) of each piece.
pub fn memory_ranges(size: u64) -> Vec<(u64, u64)> {
    match size.checked_sub(MMIO_GAP_START) {
        None | Some(0) => vec![(0, size)],
        Some(rest) => vec![(0, MMIO_GAP_START), (MMIO_GAP_END, rest)],
    }
}

/// The memory that the guest may use: `memory_ranges` without the legacy hole below 1 MiB.
pub fn usable_ranges(size: u64) -> Vec<(u64, u64)> {
    let mut usable = vec![(0, LOW_MEMORY_END)];
    for (start, length) in memory_ranges(size) {
        match start {
            0 => usable.push((HIGH_MEMORY, length.saturating_sub(HIGH_MEMORY))),
            _ => usable.push((start, length)),
        }
    }
    usable
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_goes_round_the_gap() {
        assert_eq!(memory_ranges(128 << 20), [(0, 128 << 20)]);
        assert_eq!(memory_ranges(MMIO_GAP_START), [(0, MMIO_GAP_START)]);
        assert_eq!(memory_ranges(MMIO_GAP_START + 0x1000), [(0, MMIO_GAP_START), (MMIO_GAP_END, 0x1000)]);
    }

    #[test]
    fn the_legacy_hole_is_not_usable() {
        assert_eq!(
            usable_ranges(4 << 30),
            [
                (0, LOW_MEMORY_END),
                (HIGH_MEMORY, MMIO_GAP_START - HIGH_MEMORY),
                (MMIO_GAP_END, (4 << 30) - MMIO_GAP_START)
            ]
        );
    }
}
