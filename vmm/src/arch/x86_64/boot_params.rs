//! The zero page of the Linux boot protocol (Documentation/arch/x86/boot.rst and zero-page.rst).

use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::Bytes;

use devices::GuestMemory;

use super::{ArchError, layout};
use crate::kernel::BootImages;

const E820_RAM: u32 = 1;
/// "Undefined" boot loader: no identifier was assigned to us.
const LOADER_UNDEFINED: u8 = 0xff;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// Kernels are relocated in steps of this where they relocate themselves.
const KERNEL_ALIGNMENT: u32 = 0x100_0000;

/// Writes the zero page. `header` is the one that a bzImage carries.
pub fn write(
    memory: &GuestMemory,
    memory_size: u64,
    images: &BootImages,
    header: Option<&setup_header>,
) -> Result<(), ArchError> {
    let mut params = boot_params {
        hdr: header.copied().unwrap_or(setup_header {
            boot_flag: BOOT_FLAG,
            header: HEADER_MAGIC,
            kernel_alignment: KERNEL_ALIGNMENT,
            ..Default::default()
        }),
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = low_32(layout::CMDLINE.0);
    params.hdr.cmdline_size = low_32(images.cmdline_length as u64);
    if let Some(initrd) = images.initrd {
        params.hdr.ramdisk_image = low_32(initrd.address.0);
        params.hdr.ramdisk_size = low_32(initrd.size);
    }
    for (entry, (addr, size)) in params.e820_table.iter_mut().zip(layout::usable_ranges(memory_size)) {
        *entry = boot_e820_entry { addr, size, type_: E820_RAM };
        params.e820_entries += 1;
    }
    memory.write_obj(params, layout::ZERO_PAGE).map_err(ArchError::guest_memory("zero page"))
}

/// Everything that these fields point at is below 4 GiB by the layout.
fn low_32(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::Initrd;
    use vm_memory::GuestAddress;

    #[test]
    fn the_zero_page_tells_memory_command_line_and_initrd() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("memory");
        let images =
            BootImages { cmdline_length: 11, initrd: Some(Initrd { address: GuestAddress(0x700_0000), size: 4097 }) };
        write(&memory, 128 << 20, &images, None).expect("write");
        let params: boot_params = memory.read_obj(layout::ZERO_PAGE).expect("read");
        let header = params.hdr;
        assert_eq!({ header.header }, HEADER_MAGIC);
        assert_eq!({ header.cmd_line_ptr }, 0x2_0000);
        assert_eq!({ header.cmdline_size }, 11);
        assert_eq!(({ header.ramdisk_image }, { header.ramdisk_size }), (0x700_0000, 4097));
        assert_eq!(params.e820_entries, 2);
        let [low, high] = [params.e820_table[0], params.e820_table[1]];
        assert_eq!(({ low.addr }, { low.size }, { low.type_ }), (0, 0x9_fc00, 1));
        assert_eq!(({ high.addr }, { high.size }), (0x10_0000, 127 << 20));
    }
}
