//! Guest memory back to the host.

use std::ops::Range;

use tracing::debug;
use vm_memory::{GuestMemory as _, GuestMemoryRegion, MemoryRegionAddress};

use super::PAGE_SIZE;
use crate::GuestMemory;

/// Gives the pages that lie as a whole in `range` (guest physical addresses) back to the host, as
/// far as they are memory at all. Returns how many bytes that were.
pub fn discard(memory: &GuestMemory, range: Range<u64>) -> u64 {
    let Some(start) = range.start.checked_next_multiple_of(PAGE_SIZE) else { return 0 };
    let end = range.end & !PAGE_SIZE.wrapping_sub(1);
    let mut discarded: u64 = 0;
    for region in memory.iter() {
        let base = region.start_addr().0;
        let from = start.max(base);
        let to = end.min(base.saturating_add(region.len()));
        let Some(len) = to.checked_sub(from).filter(|len| *len > 0) else { continue };
        // What is shared lives in a file, and to be gone from this mapping is not enough.
        let advice = if region.flags() & libc::MAP_SHARED != 0 { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
        if advise(region, from.saturating_sub(base), len, advice) {
            discarded = discarded.saturating_add(len);
        }
    }
    discarded
}

fn advise(region: &impl GuestMemoryRegion, offset: u64, len: u64, advice: libc::c_int) -> bool {
    let (Ok(host), Ok(len)) = (region.get_host_address(MemoryRegionAddress(offset)), usize::try_from(len)) else {
        return false;
    };
    // SAFETY: `offset` and `len` were cut to the region, so the range is mapped guest memory, of
    // which nobody in this process holds a reference: its contents may change at any time.
    if unsafe { libc::madvise(host.cast(), len, advice) } == 0 {
        return true;
    }
    // Pages that are locked or larger than the range: they stay.
    debug!(offset, len, error = %std::io::Error::last_os_error(), "Memory cannot be given back");
    false
}
