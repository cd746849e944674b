//! The registers of the first processor at the kernel's first instruction.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::Bytes;

use devices::GuestMemory;

use super::gdt::{CODE_32, CODE_64, DATA, Descriptor, TASK};
use super::{ArchError, layout, page_tables};

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always set (Intel SDM volume 1, section 3.4.3).
const RFLAGS_RESERVED: u64 = 2;

/// How a kernel wants to be entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// PVH: 32-bit protected mode, paging off, RBX points at `hvm_start_info`.
    Pvh(u32),
    /// Linux 64-bit boot protocol: long mode, identity map, RSI points at the zero page.
    Linux64(u64),
    /// Linux 32-bit boot protocol: protected mode, paging off, RSI points at the zero page.
    Linux32(u32),
}

impl Entry {
    fn code_segment(self) -> Descriptor {
        match self {
            Self::Linux64(_) => CODE_64,
            Self::Pvh(_) | Self::Linux32(_) => CODE_32,
        }
    }

    fn regs(self) -> kvm_regs {
        let base = kvm_regs {
            rflags: RFLAGS_RESERVED,
            rsp: layout::BOOT_STACK.0,
            rbp: layout::BOOT_STACK.0,
            ..Default::default()
        };
        match self {
            Self::Pvh(rip) => kvm_regs { rip: rip.into(), rbx: layout::PVH_START_INFO.0, ..base },
            Self::Linux64(rip) => kvm_regs { rip, rsi: layout::ZERO_PAGE.0, ..base },
            Self::Linux32(rip) => kvm_regs { rip: rip.into(), rsi: layout::ZERO_PAGE.0, ..base },
        }
    }
}

/// Writes the tables in guest memory that the registers of [`set_boot_processor`] point at.
pub fn write_tables(memory: &GuestMemory, entry: Entry) -> Result<(), ArchError> {
    let table = [0, entry.code_segment().table_entry(), DATA.table_entry(), TASK.table_entry()];
    let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    memory.write_slice(&bytes, layout::GDT).map_err(ArchError::guest_memory("GDT"))?;
    match entry {
        Entry::Linux64(_) => page_tables::write(memory),
        Entry::Pvh(_) | Entry::Linux32(_) => Ok(()),
    }
}

/// Puts vCPU 0 at the kernel's entry. The other processors wait for INIT and SIPI.
pub fn set_boot_processor(vcpu: &VcpuFd, entry: Entry) -> Result<(), ArchError> {
    let mut sregs = vcpu.get_sregs().map_err(ArchError::vcpu(0, "KVM_GET_SREGS"))?;
    enter_mode(&mut sregs, entry);
    vcpu.set_sregs(&sregs).map_err(ArchError::vcpu(0, "KVM_SET_SREGS"))?;
    vcpu.set_regs(&entry.regs()).map_err(ArchError::vcpu(0, "KVM_SET_REGS"))
}

fn enter_mode(sregs: &mut kvm_sregs, entry: Entry) {
    sregs.cs = entry.code_segment().segment(1);
    let data = DATA.segment(2);
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    sregs.tr = TASK.segment(3);
    sregs.gdt = kvm_dtable { base: layout::GDT.0, limit: 4 * 8 - 1, ..Default::default() };
    // No interrupt may come before the kernel loads its own table: a fault here is a triple fault.
    sregs.idt = kvm_dtable { base: layout::IDT.0, limit: 0, ..Default::default() };
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    if let Entry::Linux64(_) = entry {
        sregs.cr3 = layout::PML4.0;
        sregs.cr4 = CR4_PAE;
        sregs.cr0 |= CR0_PG;
        sregs.efer |= EFER_LME | EFER_LMA;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_64_bit_entry_is_in_long_mode_with_paging() {
        let mut sregs = kvm_sregs::default();
        enter_mode(&mut sregs, Entry::Linux64(0x100_0000));
        assert_eq!(sregs.cr0, CR0_PE | CR0_ET | CR0_PG);
        assert_eq!(sregs.cr3, 0x9000);
        assert_eq!(sregs.efer, EFER_LME | EFER_LMA);
        assert_eq!((sregs.cs.l, sregs.cs.db), (1, 0));
        let regs = Entry::Linux64(0x100_0000).regs();
        assert_eq!((regs.rip, regs.rsi, regs.rflags), (0x100_0000, 0x7000, 2));
    }

    #[test]
    fn a_pvh_entry_is_in_protected_mode_without_paging() {
        let mut sregs = kvm_sregs::default();
        enter_mode(&mut sregs, Entry::Pvh(0x100_0400));
        assert_eq!(sregs.cr0, CR0_PE | CR0_ET);
        assert_eq!((sregs.cr3, sregs.cr4, sregs.efer), (0, 0, 0));
        assert_eq!((sregs.cs.l, sregs.cs.db), (0, 1));
        let regs = Entry::Pvh(0x100_0400).regs();
        assert_eq!((regs.rip, regs.rbx), (0x100_0400, 0x6000));
    }
}
