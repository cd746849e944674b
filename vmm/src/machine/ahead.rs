//! Pages of a mapped template that a guest writes to soon, copied before it does.
//!
//! The first write to a page of a private mapping is a fault in which the host copies the page, and the second exit for
//! the guest where it has read the page before: KVM maps what is the file's without the right to write. A page that was
//! copied ahead costs one exit, whatever the guest does with it first, and the copy is made by another processor.

use std::io;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use vm_memory::{GuestMemory as _, GuestMemoryRegion, MemoryRegionAddress};

use devices::GuestMemory;

use super::{Machine, RunState};
use crate::memory::working_set::WorkingSet;
use crate::snapshot::written_pages;

impl Machine {
    /// The pages of a restored machine that is [mapped](crate::config::RestoreMemory::Mapped) which were written since, by the
    /// guest, a device, or [`copy_ahead`](Self::copy_ahead).
    pub fn written_memory(&self) -> io::Result<WorkingSet> {
        written_pages(&self.guest_memory().map_err(io::Error::other)?)
    }

    /// Copies the pages that the guest is expected to write to, in their order, and returns how many bytes that were; none
    /// the second time. It may be called at any time, also while the guest runs; the machine's own threads do not wait for it,
    /// and when the machine ends it leaves the rest.
    ///
    /// Fails where the host's kernel cannot do it (`MADV_POPULATE_WRITE`, Linux 5.14): the guest does not see that.
    pub fn copy_ahead(&self) -> io::Result<u64> {
        let (memory, written) = {
            let mut hardware = self.hardware.lock().unwrap_or_else(PoisonError::into_inner);
            // Stopped, or nothing is expected.
            let Some(hardware) = hardware.as_mut() else { return Ok(0) };
            let Some(written) = hardware.written.take() else { return Ok(0) };
            (hardware.memory.clone(), written)
        };
        for range in written.ranges() {
            if self.state() == RunState::Ended {
                break;
            }
            populate(&memory, range.start, range.end)?;
            self.copied_ahead.fetch_add(range.end - range.start, Ordering::Relaxed);
        }
        Ok(self.copied_ahead())
    }

    /// How many bytes [`copy_ahead`](Self::copy_ahead) has copied so far.
    pub fn copied_ahead(&self) -> u64 {
        self.copied_ahead.load(Ordering::Relaxed)
    }
}

/// Makes pages from one place of the memory to another this process's own.
fn populate(memory: &GuestMemory, start: u64, end: u64) -> io::Result<()> {
    let mut first = 0;
    for region in memory.iter() {
        let (from, to) = (start.max(first), end.min(first + region.len()));
        if from < to {
            let length = usize::try_from(to - from).map_err(io::Error::other)?;
            let slice = region.get_slice(MemoryRegionAddress(from - first), length).map_err(io::Error::other)?;
            let address = slice.ptr_guard_mut().as_ptr().cast();
            // SAFETY: whole pages of guest memory, whose contents stay what they are.
            if unsafe { libc::madvise(address, length, libc::MADV_POPULATE_WRITE) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        first += region.len();
    }
    Ok(())
}
