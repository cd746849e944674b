//! Memory above the guest's own that devices bring: a region in which blocks are plugged, files as persistent memory.
//!
//! Such a region has a KVM slot of its own, which outlives nothing but the VM: its mappings are kept beside it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::{GuestMemory as _, GuestMemoryRegion};

use devices::GuestMemory;
use devices::virtio::mem::PluggableMemory;
use devices::virtio::pmem::PmemConfig;

use super::backing::Source;
use super::{MemoryError, reserve_region};
use crate::arch::x86_64::layout;
use crate::config::{MemoryBacking, MemoryConfig};

/// Distance between regions: what Linux takes for a block of memory on large machines.
const ALIGNMENT: u64 = 1 << 30;

/// Persistent memory is whole pieces of this; Linux cannot use others. What the file does not fill is zero.
const PERSISTENT_UNIT: u64 = 2 << 20;

/// The regions of a machine. Dropped after its VM.
pub struct Above {
    next_address: u64,
    next_slot: u32,
    views: Vec<Arc<View>>,
}

/// A region for blocks: its address, what the guest sees of it, and the memory that devices know with it.
pub struct PluggableRegion {
    /// Guest physical address.
    pub address: u64,
    /// How blocks come and go.
    pub blocks: PluggableBlocks,
    /// The guest's own memory and the region.
    pub memory: GuestMemory,
}

impl Above {
    /// Nothing above `memory`, which has its slots already.
    pub fn new(memory: &GuestMemory) -> Self {
        let end = memory.last_addr().0 + 1;
        let slots = u32::try_from(memory.num_regions()).unwrap_or(u32::MAX);
        Self { next_address: end.max(layout::MMIO_GAP_END), next_slot: slots, views: Vec::new() }
    }

    /// Adds a region of `size` bytes of which nothing is plugged.
    ///
    /// It is a file that is mapped twice: devices reach all of it, so that no address that a guest makes up is a fault of
    /// this process; the guest's processors reach the blocks that are plugged, by a mapping without any rights to the others.
    pub fn pluggable(&mut self, vm: &VmFd, memory: &GuestMemory, size: u64) -> Result<PluggableRegion, MemoryError> {
        let address = self.place(size)?;
        let config = MemoryConfig { backing: MemoryBacking::Shared, ..MemoryConfig::from_size(size) };
        let region = reserve_region(&Source::of(&config)?, 0, address, size)?;
        let failed = |source| MemoryError::Map { size, source };
        let file = region
            .file_offset()
            .map(|file| Arc::clone(file.arc()))
            .ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
        let view = View::reserve(size).map_err(failed)?;
        view.map_file(&file, size, libc::PROT_NONE).map_err(failed)?;
        let view = self.give(vm, address, size, view, 0)?;
        let memory = memory.insert_region(Arc::new(region)).map_err(MemoryError::Assemble)?;
        Ok(PluggableRegion { address, blocks: PluggableBlocks { file, view }, memory })
    }

    /// Maps a file as persistent memory; returns its address and size. Where it is read-only, neither the guest nor this
    /// process can write it, whatever a driver believes.
    pub fn persistent(&mut self, vm: &VmFd, config: &PmemConfig) -> Result<(u64, u64), MemoryError> {
        let length = config.file.metadata().map_err(|source| MemoryError::Map { size: 0, source })?.len();
        let size = length.checked_next_multiple_of(PERSISTENT_UNIT).filter(|size| *size > 0);
        let size = size.ok_or_else(|| MemoryError::Persistent { id: config.id.clone(), length })?;
        let address = self.place(size)?;
        let failed = |source| MemoryError::Map { size, source };
        let (rights, flags) = if config.read_only {
            (libc::PROT_READ, KVM_MEM_READONLY)
        } else {
            (libc::PROT_READ | libc::PROT_WRITE, 0)
        };
        let view = View::reserve(size).map_err(failed)?;
        view.protect(0, size, rights).map_err(failed)?;
        view.map_file(&config.file, length, rights).map_err(failed)?;
        self.give(vm, address, size, view, flags)?;
        Ok((address, size))
    }

    /// The next address with room for `size` bytes.
    fn place(&mut self, size: u64) -> Result<u64, MemoryError> {
        let address = self.next_address.next_multiple_of(ALIGNMENT);
        let end = address.checked_add(size).filter(|end| *end <= layout::ADDRESS_END);
        self.next_address = end.ok_or(MemoryError::Space { size })?;
        Ok(address)
    }

    fn give(&mut self, vm: &VmFd, address: u64, size: u64, view: View, flags: u32) -> Result<Arc<View>, MemoryError> {
        let slot = kvm_userspace_memory_region {
            slot: self.next_slot,
            flags,
            guest_phys_addr: address,
            memory_size: size,
            userspace_addr: view.start as u64,
        };
        // SAFETY: the view is a mapping of that size, and the machine keeps it for as long as its VM exists.
        unsafe { vm.set_user_memory_region(slot) }.map_err(|source| MemoryError::Slot { address, source })?;
        self.next_slot += 1;
        let view = Arc::new(view);
        self.views.push(Arc::clone(&view));
        Ok(view)
    }
}

/// Address space of this process that a guest sees.
struct View {
    /// What was reserved.
    reserved: (usize, usize),
    /// Where the view starts: at 2 MiB, as the guest's address does, so that both can have large pages.
    start: usize,
}

impl View {
    /// Reserves `size` bytes without any rights.
    fn reserve(size: u64) -> io::Result<Self> {
        const UNIT: usize = 2 << 20;
        let length = usize::try_from(size).ok().and_then(|size| size.checked_add(UNIT));
        let length = length.ok_or(io::ErrorKind::OutOfMemory)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping that nothing refers to.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), length, libc::PROT_NONE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = start as usize;
        Ok(Self { reserved: (start, length), start: start.next_multiple_of(UNIT) })
    }

    /// Maps the first `length` bytes of `file` at the start, shared. The length is not above what was reserved.
    fn map_file(&self, file: &File, length: u64, rights: libc::c_int) -> io::Result<()> {
        let length = usize::try_from(length).map_err(io::Error::other)?;
        let flags = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE;
        // SAFETY: the range was reserved by `self`, and nothing of this process refers to what is in it.
        let mapped = unsafe { libc::mmap(self.start as *mut libc::c_void, length, rights, flags, file.as_raw_fd(), 0) };
        // SAFETY: the same range; the advice changes nothing that is in it. It is the guest's, and large.
        if mapped == libc::MAP_FAILED || unsafe { libc::madvise(mapped, length, libc::MADV_DONTDUMP) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Sets the rights of a range that was reserved.
    fn protect(&self, offset: u64, length: u64, rights: libc::c_int) -> io::Result<()> {
        let offset = usize::try_from(offset).map_err(io::Error::other)?;
        let length = usize::try_from(length).map_err(io::Error::other)?;
        let start = (self.start + offset) as *mut libc::c_void;
        // SAFETY: the callers stay in what was reserved, to which nothing of this process refers.
        if unsafe { libc::mprotect(start, length, rights) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl Drop for View {
    fn drop(&mut self) {
        let (start, length) = self.reserved;
        // SAFETY: what `reserve` mapped, and what was mapped over it; nobody refers to it any more.
        unsafe { libc::munmap(start as *mut libc::c_void, length) };
    }
}

/// The blocks of a region as its device plugs them.
pub struct PluggableBlocks {
    file: Arc<File>,
    view: Arc<View>,
}

impl PluggableBlocks {
    /// Drops what is in a range of the file.
    fn empty(&self, offset: u64, length: u64) -> io::Result<()> {
        let range = |value| libc::off_t::try_from(value).map_err(io::Error::other);
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: no pointers.
        if unsafe { libc::fallocate(self.file.as_raw_fd(), mode, range(offset)?, range(length)?) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl PluggableMemory for PluggableBlocks {
    /// What a guest made devices write there while the blocks were not plugged is gone.
    fn plug(&self, offset: u64, length: u64) -> io::Result<()> {
        self.empty(offset, length)?;
        self.view.protect(offset, length, libc::PROT_READ | libc::PROT_WRITE)
    }

    fn unplug(&self, offset: u64, length: u64) -> io::Result<()> {
        self.view.protect(offset, length, libc::PROT_NONE)?;
        if let Err(error) = self.empty(offset, length) {
            // The guest has lost it all the same, and it is emptied before it is plugged again.
            tracing::warn!(%error, "Unplugged memory stays with the host");
        }
        Ok(())
    }
}
