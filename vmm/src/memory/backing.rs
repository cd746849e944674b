//! Where the pages of guest memory come from.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;

use vm_memory::FileOffset;

use super::MemoryError;
use crate::config::{MemoryBacking, MemoryConfig};

/// What one mapping is made of.
#[derive(Debug, Clone)]
pub enum Backing {
    /// Pages of this process.
    Anonymous,
    /// Pages of a file from an offset on.
    File {
        /// Which, and from where.
        file: FileOffset,
        /// Whether writes go to the file.
        shared: bool,
    },
}

/// What the mappings of a whole memory are made of.
pub struct Source(Option<(Arc<File>, bool)>);

impl Source {
    /// The file of `config`, as long as the memory; or none.
    pub fn of(config: &MemoryConfig) -> Result<Self, MemoryError> {
        let size = config.size;
        let failed = |source| MemoryError::File { size, source };
        let (file, shared) = match &config.backing {
            MemoryBacking::Private => return Ok(Self(None)),
            MemoryBacking::Shared => (memfd().map_err(failed)?, true),
            MemoryBacking::File { file, shared } => (file.try_clone().map_err(failed)?, *shared),
        };
        let page = page_size(&file).map_err(failed)?;
        if !size.is_multiple_of(page) {
            return Err(MemoryError::FilePages { size, page });
        }
        if file.metadata().map_err(failed)?.len() < size {
            file.set_len(size).map_err(failed)?;
        }
        Ok(Self(Some((Arc::new(file), shared))))
    }

    /// What the mapping is made of that starts `offset` bytes into the memory.
    pub fn backing(&self, offset: u64) -> Backing {
        match &self.0 {
            None => Backing::Anonymous,
            Some((file, shared)) => {
                Backing::File { file: FileOffset::from_arc(Arc::clone(file), offset), shared: *shared }
            }
        }
    }
}

fn memfd() -> io::Result<File> {
    // SAFETY: the name is a C string; the call returns a new descriptor or an error.
    let fd = unsafe { libc::memfd_create(c"guest-memory".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor and nobody else owns it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Bytes of a page of a file: more than the host's where it lies on hugetlbfs.
pub fn page_size(file: &File) -> io::Result<u64> {
    let mut status = MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: the kernel fills in the one structure that it is given.
    if unsafe { libc::fstatfs(file.as_raw_fd(), status.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: fstatfs has succeeded, so it is filled in.
    let status = unsafe { status.assume_init() };
    let on_hugetlbfs = status.f_type == libc::HUGETLBFS_MAGIC;
    let size = if on_hugetlbfs { u64::try_from(status.f_bsize).ok() } else { None };
    Ok(size.filter(|size| *size > 0).unwrap_or(super::PAGE_SIZE))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use vm_memory::{Bytes, GuestAddress, GuestMemory as _, GuestMemoryRegion};

    use super::*;
    use crate::memory::reserve;

    const SIZE: u64 = 32 << 20;

    fn config(backing: MemoryBacking) -> MemoryConfig {
        MemoryConfig { backing, ..MemoryConfig::from_size(SIZE) }
    }

    #[test]
    fn writes_reach_a_shared_file_and_not_a_private_one() {
        for shared in [true, false] {
            let file = tempfile::tempfile().expect("file");
            let backing = MemoryBacking::File { file: file.try_clone().expect("clone"), shared };
            let memory = reserve(&config(backing)).expect("reserve");
            memory.write_obj(0x4711_u32, GuestAddress(0x1000)).expect("write");
            assert_eq!(file.metadata().expect("metadata").len(), SIZE);
            let mut bytes = [0; 4];
            file.read_exact_at(&mut bytes, 0x1000).expect("read");
            assert_eq!(u32::from_le_bytes(bytes), if shared { 0x4711 } else { 0 });
        }
    }

    #[test]
    fn shared_memory_has_a_descriptor_for_other_processes() {
        let memory = reserve(&config(MemoryBacking::Shared)).expect("reserve");
        memory.write_obj(7_u8, GuestAddress(1)).expect("write");
        let region = memory.iter().next().expect("a region");
        let mut byte = [0];
        region.file_offset().expect("a file").file().read_exact_at(&mut byte, 1).expect("read");
        assert_eq!(byte, [7]);
        let private = reserve(&config(MemoryBacking::Private)).expect("reserve");
        assert!(private.iter().all(|region| region.file_offset().is_none()));
    }

    #[test]
    fn the_second_region_goes_on_where_the_first_ends_in_the_file() {
        let memory = MemoryConfig { backing: MemoryBacking::Shared, ..MemoryConfig::from_size(4 << 30) };
        let memory = reserve(&memory).expect("reserve");
        let offsets: Vec<_> = memory.iter().map(|region| region.file_offset().expect("a file").start()).collect();
        assert_eq!(offsets, [0, crate::arch::x86_64::layout::MMIO_GAP_START]);
    }

    #[test]
    fn all_pages_exist_where_that_is_asked_for() {
        for prealloc in [false, true] {
            let backing = MemoryBacking::File { file: tempfile::tempfile().expect("file"), shared: true };
            let memory = reserve(&MemoryConfig { prealloc, ..config(backing) }).expect("reserve");
            let host = memory.get_host_address(GuestAddress(0)).expect("address");
            let mut resident = vec![0_u8; 8192];
            // SAFETY: the region has 8192 pages, one byte of the vector for each.
            let result = unsafe { libc::mincore(host.cast(), 32 << 20, resident.as_mut_ptr()) };
            assert_eq!(result, 0);
            assert_eq!(resident.iter().all(|page| page & 1 == 1), prealloc);
        }
    }

    #[test]
    fn a_file_that_cannot_be_written_is_refused() {
        let file = File::open("/dev/null").expect("open");
        let refused = reserve(&config(MemoryBacking::File { file, shared: true }));
        assert!(matches!(refused, Err(MemoryError::File { .. })), "{refused:?}");
    }
}
