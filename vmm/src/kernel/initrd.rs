//! The initrd goes to the top of low memory, page by page where it lies in its file.

use std::path::Path;

use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryRegion};

use devices::GuestMemory;

use super::{Initrd, KernelError, LoadedKernel};
use crate::arch::x86_64::layout;
use crate::memory::PAGE_SIZE;
use crate::memory::image::{ImageFile, Placement};

/// Loads the initrd at `path` above `kernel`.
pub fn load(
    memory: &GuestMemory,
    path: &Path,
    kernel: &LoadedKernel,
    placement: Placement,
) -> Result<Initrd, KernelError> {
    let image = ImageFile::open(path).map_err(KernelError::Initrd)?;
    let size = image.size();
    let low_memory = memory.iter().next().map_or(0, GuestMemoryRegion::len);
    let limit = kernel.header.map_or(layout::INITRD_MAX, |header| {
        // Zero before protocol 2.03, which no 64-bit kernel is.
        match header.initrd_addr_max {
            0 => layout::INITRD_MAX,
            max => u64::from(max).min(layout::INITRD_MAX),
        }
    });
    let top = low_memory.min(limit + 1);
    let room = top.saturating_sub(kernel.end.next_multiple_of(PAGE_SIZE));
    let address = top
        .checked_sub(size)
        .map(|address| address - address % PAGE_SIZE)
        .filter(|address| *address >= kernel.end)
        .ok_or_else(|| KernelError::InitrdTooLarge { path: path.to_owned(), size, room })?;
    let address = GuestAddress(address);
    image.place(memory, 0, address, size, placement).map_err(KernelError::Initrd)?;
    Ok(Initrd { address, size })
}
