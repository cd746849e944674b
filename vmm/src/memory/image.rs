//! Files whose bytes become guest memory: kernel and initrd.
//!
//! By default they are copied. Instead, whole pages of a file can be mapped privately over guest memory, so that
//! machines share through the page cache what their guests never write to. That is little, and it is not free: Linux
//! patches most pages of its code when it boots and reuses those of the initrd, and a mapped page takes a fault to read,
//! one to write, and keeps 2 MiB around it from being mapped at once (the README has the figures).
//!
//! A mapping lives as long as the machine. A page past the end of a file that was cut short meanwhile cannot be read any
//! more: in the guest that ends the machine, in a device it is a SIGBUS. Lengths are checked against the file's size
//! before anything is mapped, so a file that is already too short is an error; a kernel or initrd that machines have
//! mapped must be replaced by renaming a new file over it, as package managers do, never rewritten in place.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress, GuestMemory as _, GuestMemoryError, GuestMemoryRegion};

use devices::GuestMemory;

use super::PAGE_SIZE;

/// How a file's bytes come into guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// Read into it.
    Copied,
    /// Whole pages mapped over it where file and memory are aligned alike, the rest read.
    Mapped,
}

/// Shorter pieces are copied: a mapping costs more than a few pages do.
const LEAST_MAPPED: u64 = 16 * PAGE_SIZE;

/// Why a file cannot become guest memory.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file cannot be opened.
    #[error("Cannot open {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A directory, device or pipe.
    #[error("{} is not a regular file", path.display())]
    NotRegular {
        /// The file.
        path: PathBuf,
    },
    /// Nothing in it.
    #[error("{} is empty", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A read failed or came to the end too early.
    #[error("Cannot read {length} bytes at {offset:#x} of {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Where in the file.
        offset: u64,
        /// How much.
        length: u64,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The machine's memory is too small for it.
    #[error("{} needs {length} bytes of memory at {address:#x}, which the machine does not have", path.display())]
    NoRoom {
        /// The file.
        path: PathBuf,
        /// Guest physical address.
        address: u64,
        /// How much.
        length: u64,
    },
    /// A mapping failed.
    #[error("Cannot map {} over guest memory", path.display())]
    Map {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Guest memory could not be written.
    #[error("Cannot copy {} to guest memory", path.display())]
    Copy {
        /// The file.
        path: PathBuf,
        /// What guest memory said.
        #[source]
        source: GuestMemoryError,
    },
}

/// An open file and the size that everything about it is checked against.
#[derive(Debug)]
pub struct ImageFile {
    path: PathBuf,
    file: File,
    size: u64,
}

impl ImageFile {
    /// Opens a regular file that is not empty.
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        let path = path.to_owned();
        // Without O_NONBLOCK, opening a pipe that nobody writes to would wait for ever.
        let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path);
        let (file, metadata) = match opened.and_then(|file| Ok((file.metadata()?, file))) {
            Ok((metadata, file)) => (file, metadata),
            Err(source) => return Err(ImageError::Open { path, source }),
        };
        match (metadata.is_file(), metadata.len()) {
            (false, _) => Err(ImageError::NotRegular { path }),
            (true, 0) => Err(ImageError::Empty { path }),
            (true, size) => Ok(Self { path, file, size }),
        }
    }

    /// Its path, for errors.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Its size in bytes when it was opened.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Fills `buffer` from `offset` of the file.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), ImageError> {
        self.file.read_exact_at(buffer, offset).map_err(|source| ImageError::Read {
            path: self.path.clone(),
            offset,
            length: buffer.len() as u64,
            source,
        })
    }

    /// Makes `length` bytes from `offset` of the file stand at `address` of `memory`, which the
    /// guest has not touched yet.
    pub fn place(
        &self,
        memory: &GuestMemory,
        offset: u64,
        address: GuestAddress,
        length: u64,
        placement: Placement,
    ) -> Result<(), ImageError> {
        let past_end = offset.checked_add(length).is_none_or(|end| end > self.size);
        if past_end {
            let source = io::ErrorKind::UnexpectedEof.into();
            let path = self.path.clone();
            return Err(ImageError::Read { path, offset, length, source });
        }
        self.check_room(memory, address, length)?;

        let aligned = offset % PAGE_SIZE == address.0 % PAGE_SIZE;
        if !aligned || length < LEAST_MAPPED || placement == Placement::Copied {
            return self.copy(memory, offset, address, length);
        }
        // The pages at the two ends may belong to something else as well: copied.
        let head = offset.next_multiple_of(PAGE_SIZE) - offset;
        let tail = (offset + length) % PAGE_SIZE;
        let whole = length - head - tail;
        self.copy(memory, offset, address, head)?;
        self.map(memory, offset + head, GuestAddress(address.0 + head), whole)?;
        self.copy(memory, offset + head + whole, GuestAddress(address.0 + head + whole), tail)
    }

    /// That one region of `memory` has `length` bytes at `address`.
    pub fn check_room(&self, memory: &GuestMemory, address: GuestAddress, length: u64) -> Result<(), ImageError> {
        let room = memory.find_region(address).map_or(0, |region| region.len() - (address.0 - region.start_addr().0));
        if length <= room {
            return Ok(());
        }
        Err(ImageError::NoRoom { path: self.path.clone(), address: address.0, length })
    }

    fn copy(&self, memory: &GuestMemory, offset: u64, address: GuestAddress, length: u64) -> Result<(), ImageError> {
        let read = |source: io::Error| ImageError::Read { path: self.path.clone(), offset, length, source };
        let length_here = usize::try_from(length).map_err(|_| read(io::ErrorKind::InvalidInput.into()))?;
        let mut file = &self.file;
        file.seek(SeekFrom::Start(offset)).map_err(read)?;
        // Straight from the page cache into guest memory.
        memory
            .read_exact_volatile_from(address, &mut file, length_here)
            .map_err(|source| ImageError::Copy { path: self.path.clone(), source })
    }

    /// Maps whole pages. The caller has checked that they are in the file and in one region.
    fn map(&self, memory: &GuestMemory, offset: u64, address: GuestAddress, length: u64) -> Result<(), ImageError> {
        let failed = |source| ImageError::Map { path: self.path.clone(), source };
        let invalid = |_| failed(io::ErrorKind::InvalidInput.into());
        let host =
            memory.get_host_address(address).map_err(|source| ImageError::Copy { path: self.path.clone(), source })?;
        let size = usize::try_from(length).map_err(invalid)?;
        let offset = libc::off_t::try_from(offset).map_err(invalid)?;
        // SAFETY: the pages at `host` are inside one mapping that `memory` owns, and nobody holds
        // a reference into guest memory. Replacing them leaves the mapping as long as it was, so
        // its owner's munmap takes these pages down too.
        let mapped = unsafe {
            libc::mmap(
                host.cast(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
                self.file.as_raw_fd(),
                offset,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(failed(io::Error::last_os_error()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const MEMORY: u64 = 4 << 20;

    fn memory() -> GuestMemory {
        let size = usize::try_from(MEMORY).expect("small");
        GuestMemory::from_ranges(&[(GuestAddress(0), size)]).expect("memory")
    }

    fn image(size: usize) -> (tempfile::NamedTempFile, ImageFile, Vec<u8>) {
        let bytes: Vec<u8> = (0..=250).cycle().take(size).collect();
        let mut file = tempfile::NamedTempFile::new().expect("file");
        file.write_all(&bytes).expect("write");
        let image = ImageFile::open(file.path()).expect("open");
        (file, image, bytes)
    }

    #[test]
    fn bytes_arrive_whatever_the_alignment() {
        let (_file, image, bytes) = image(300_001);
        let places = [(0, 0x10_0000), (1, 0x10_0001), (4095, 0x10_0fff), (7, 0x10_0000)];
        let both = places.into_iter().flat_map(|place| [(place, Placement::Copied), (place, Placement::Mapped)]);
        for ((offset, address), placement) in both {
            let memory = memory();
            let length = image.size() - offset;
            image.place(&memory, offset, GuestAddress(address), length, placement).expect("place");
            let mut placed = vec![0; bytes.len() + 2];
            memory.read_slice(&mut placed, GuestAddress(address - 1)).expect("read");
            let end = usize::try_from(length).expect("small") + 1;
            let start = usize::try_from(offset).expect("small");
            assert!(placed[1..end] == bytes[start..], "{offset} {address:#x}");
            assert!(placed[0] == 0 && placed[end..].iter().all(|byte| *byte == 0));
        }
    }

    #[test]
    fn the_guests_writes_do_not_reach_the_file() {
        let (file, image, bytes) = image(300_000);
        let memory = memory();
        image.place(&memory, 0, GuestAddress(0), image.size(), Placement::Mapped).expect("place");
        memory.write_slice(&[0xee; 300_000], GuestAddress(0)).expect("write");
        assert!(std::fs::read(file.path()).expect("read") == bytes);
    }

    #[test]
    fn a_file_that_is_too_short_is_an_error_before_it_is_mapped() {
        let (_file, image, _) = image(100_000);
        let placed = image.place(&memory(), 0, GuestAddress(0), 100_001, Placement::Mapped);
        assert!(matches!(placed, Err(ImageError::Read { length: 100_001, .. })));
        let placed = image.place(&memory(), u64::MAX, GuestAddress(0), 2, Placement::Mapped);
        assert!(matches!(placed, Err(ImageError::Read { .. })));
    }

    #[test]
    fn a_file_that_is_too_large_is_an_error() {
        let (_file, image, _) = image(100_000);
        image.place(&memory(), 0, GuestAddress(MEMORY - 100_000), 100_000, Placement::Mapped).expect("just fits");
        let placed = image.place(&memory(), 0, GuestAddress(MEMORY - 99_999), 100_000, Placement::Mapped);
        assert!(matches!(placed, Err(ImageError::NoRoom { .. })));
        let placed = image.place(&memory(), 0, GuestAddress(u64::MAX), 100_000, Placement::Mapped);
        assert!(matches!(placed, Err(ImageError::NoRoom { .. })));
    }

    #[test]
    fn only_regular_files_with_content_are_opened() {
        let open = |path: &Path| ImageFile::open(path).expect_err("refused");
        assert!(matches!(open(Path::new("/nonexistent")), ImageError::Open { .. }));
        assert!(matches!(open(Path::new("/")), ImageError::NotRegular { .. }));
        assert!(matches!(open(Path::new("/dev/null")), ImageError::NotRegular { .. }));
        let file = tempfile::NamedTempFile::new().expect("file");
        assert!(matches!(open(file.path()), ImageError::Empty { .. }));
    }
}
