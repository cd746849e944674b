//! The start information of the PVH boot protocol
//! (<https://xenbits.xen.org/docs/unstable/misc/pvh.html>).

use linux_loader::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::Bytes;

use devices::GuestMemory;

use super::{ArchError, layout};
use crate::kernel::BootImages;

const START_MAGIC: u32 = 0x336e_c578;
/// Version 1 added the memory map.
const START_VERSION: u32 = 1;
const MEMORY_MAP_RAM: u32 = 1;

/// Writes start information, memory map and module list.
pub fn write(memory: &GuestMemory, memory_size: u64, images: &BootImages) -> Result<(), ArchError> {
    let mut start = hvm_start_info {
        magic: START_MAGIC,
        version: START_VERSION,
        cmdline_paddr: layout::CMDLINE.0,
        memmap_paddr: layout::PVH_MEMORY_MAP.0,
        ..Default::default()
    };
    let mut at = layout::PVH_MEMORY_MAP;
    for (addr, size) in layout::usable_ranges(memory_size) {
        let entry = hvm_memmap_table_entry { addr, size, type_: MEMORY_MAP_RAM, ..Default::default() };
        memory.write_obj(entry, at).map_err(ArchError::guest_memory("PVH memory map"))?;
        at.0 += size_of::<hvm_memmap_table_entry>() as u64;
        start.memmap_entries += 1;
    }
    if let Some(initrd) = images.initrd {
        let module = hvm_modlist_entry { paddr: initrd.address.0, size: initrd.size, ..Default::default() };
        memory.write_obj(module, layout::PVH_MODULES).map_err(ArchError::guest_memory("PVH module list"))?;
        start.modlist_paddr = layout::PVH_MODULES.0;
        start.nr_modules = 1;
    }
    memory.write_obj(start, layout::PVH_START_INFO).map_err(ArchError::guest_memory("PVH start info"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::Initrd;
    use vm_memory::GuestAddress;

    #[test]
    fn the_start_info_tells_memory_command_line_and_initrd() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("memory");
        let images =
            BootImages { cmdline_length: 11, initrd: Some(Initrd { address: GuestAddress(0x700_0000), size: 4097 }) };
        write(&memory, 4 << 30, &images).expect("write");
        let start: hvm_start_info = memory.read_obj(layout::PVH_START_INFO).expect("read");
        assert_eq!((start.magic, start.version), (START_MAGIC, 1));
        assert_eq!((start.memmap_entries, start.nr_modules), (3, 1));
        assert_eq!(start.cmdline_paddr, 0x2_0000);
        let module: hvm_modlist_entry = memory.read_obj(GuestAddress(start.modlist_paddr)).expect("read");
        assert_eq!((module.paddr, module.size), (0x700_0000, 4097));
    }
}
