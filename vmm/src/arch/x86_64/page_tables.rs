//! The page tables of a 64-bit entry: the first GiB mapped onto itself with 2 MiB pages, as the
//! Linux 64-bit boot protocol asks (Documentation/arch/x86/boot.rst).

use vm_memory::{Bytes, GuestAddress};

use devices::GuestMemory;

use super::{ArchError, layout};

/// Present and writable.
const TABLE: u64 = 0b11;
/// Present, writable, and a page instead of a table.
const LARGE_PAGE: u64 = 0b1000_0011;
const LARGE_PAGE_SHIFT: u32 = 21;
const ENTRIES: usize = 512;

/// Writes the tables to `layout::{PML4, PDPT, PD}`.
pub fn write(memory: &GuestMemory) -> Result<(), ArchError> {
    let error = || ArchError::guest_memory("boot page tables");
    let put = |value: u64, at: GuestAddress| memory.write_obj(value, at).map_err(error());
    put(layout::PDPT.0 | TABLE, layout::PML4)?;
    put(layout::PD.0 | TABLE, layout::PDPT)?;

    let mut directory = Vec::with_capacity(ENTRIES * size_of::<u64>());
    for index in 0..ENTRIES as u64 {
        directory.extend_from_slice(&(index << LARGE_PAGE_SHIFT | LARGE_PAGE).to_le_bytes());
    }
    memory.write_slice(&directory, layout::PD).map_err(error())
}
