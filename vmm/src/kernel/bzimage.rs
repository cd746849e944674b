//! Compressed kernels, loaded by linux-loader.

use linux_loader::loader::{KernelLoader, bzimage::BzImage};
use vm_memory::GuestAddress;

use devices::GuestMemory;

use super::{FormatError, LoadedKernel};
use crate::arch::x86_64::layout;
use crate::arch::x86_64::regs::Entry;
use crate::memory::image::ImageFile;

/// `HdrS` at 0x202 (boot.rst, "header").
const MAGIC_OFFSET: usize = 0x202;
const MAGIC: &[u8] = b"HdrS";
/// `XLF_KERNEL_64`: there is a 64-bit entry point 0x200 behind the 32-bit one.
const XLOADFLAGS_64: u16 = 1;
const ENTRY_64_OFFSET: u64 = 0x200;
/// Protocol 2.12 brought `xloadflags`, 2.10 `pref_address` and `init_size`.
const VERSION_XLOADFLAGS: u16 = 0x20c;
const VERSION_INIT_SIZE: u16 = 0x20a;

/// Whether the file has a setup header.
pub fn is_bzimage(image: &ImageFile) -> bool {
    let start = super::first_bytes::<{ MAGIC_OFFSET + 4 }>(image);
    start.get(MAGIC_OFFSET..) == Some(MAGIC)
}

/// Loads the protected-mode part and finds the entry point.
pub fn load(memory: &GuestMemory, image: &ImageFile) -> Result<LoadedKernel, FormatError> {
    // The loader compares only with what it finds in the file: an image larger than memory
    // would be read until memory ends.
    image.check_room(memory, GuestAddress(layout::HIGH_MEMORY), image.size())?;
    let result = BzImage::load(memory, None, &mut image.file(), Some(GuestAddress(layout::HIGH_MEMORY)))
        .map_err(FormatError::BzImage)?;
    let header = result.setup_header.unwrap_or_default();

    let start = result.kernel_load.0;
    let has_64 = header.version >= VERSION_XLOADFLAGS && header.xloadflags & XLOADFLAGS_64 != 0;
    let entry = match u32::try_from(start) {
        _ if has_64 => Entry::Linux64(start + ENTRY_64_OFFSET),
        Ok(start) => Entry::Linux32(start),
        Err(_) => return Err(FormatError::Entry(start)),
    };
    let unpacked = if header.version >= VERSION_INIT_SIZE {
        { header.pref_address }.saturating_add(u64::from(header.init_size))
    } else {
        0
    };
    let end = result.kernel_end.max(unpacked);
    image.check_room(memory, result.kernel_load, end.saturating_sub(start))?;
    Ok(LoadedKernel { entry, end, header: Some(header) })
}
