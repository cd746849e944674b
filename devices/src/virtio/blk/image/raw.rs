//! A file or a host block device whose bytes are the disk's.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use super::super::aligned::AlignedMemory;
use super::super::config::{MAX_BLOCK_SIZE, SECTOR_SIZE};
use super::super::operation::{Operation, Step};
use super::super::transfer::{Call, Direction, Transfer};
use crate::virtio::queue::HeldBuffers;

/// Room for the largest block at a place that is not aligned to it.
const PROBE_SIZE: usize = 2 * MAX_BLOCK_SIZE as usize;

pub(super) struct RawImage {
    file: File,
    direct: Option<Alignment>,
}

/// What direct I/O asks for, in bytes.
struct Alignment {
    /// Of positions and lengths in the file.
    file: u32,
    /// Of addresses and lengths in memory.
    memory: usize,
}

/// Takes `file` past the page cache from now on.
pub(super) fn set_direct(file: &File) -> io::Result<()> {
    let fd = file.as_raw_fd();
    // SAFETY: reads the status flags of a descriptor that is open.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: sets the status flags of a descriptor that is open.
    match unsafe { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_DIRECT) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

impl RawImage {
    pub fn open(file: File, direct: bool) -> io::Result<Self> {
        if !direct {
            return Ok(Self { file, direct: None });
        }
        set_direct(&file)?;
        let direct = Some(Alignment::find(&file)?);
        Ok(Self { file, direct })
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    pub fn granularity(&self) -> u32 {
        self.direct.as_ref().map_or(SECTOR_SIZE, |alignment| alignment.file)
    }

    pub fn size(&self) -> io::Result<u64> {
        // The end of a block device is where its size says; metadata has no size for it. Nothing
        // else uses the file's offset.
        (&self.file).seek(SeekFrom::End(0))
    }

    pub fn transfer(&self, direction: Direction, position: u64, len: u32, buffers: HeldBuffers) -> Transfer {
        match &self.direct {
            Some(alignment) if !buffers.is_aligned(alignment.memory) => {
                Transfer::bounced(direction, position, len, buffers, alignment.file as usize)
            }
            _ => Transfer::straight(direction, position, len, buffers),
        }
    }

    pub fn run(&self, mut operation: Operation) -> io::Result<()> {
        while let Some(step) = operation.step() {
            let result = self.take(step);
            operation.finish(result)?;
        }
        Ok(())
    }

    fn take(&self, step: Step) -> io::Result<usize> {
        let fd = self.file.as_raw_fd();
        let offset = |Call { position, .. }| offset(position);
        let result = match step {
            Step::Read(call) => {
                // SAFETY: `call` describes memory that its operation holds until the result is
                // told, and `count` is not above the number of vectors.
                unsafe { libc::preadv64(fd, call.vectors, call.count, offset(call)?) }
            }
            Step::Write(call) => {
                // SAFETY: as for reading.
                unsafe { libc::pwritev64(fd, call.vectors, call.count, offset(call)?) }
            }
            Step::Allocate { mode, range } => {
                let (from, len) = (self::offset(range.position)?, self::offset(range.len)?);
                // SAFETY: numbers only.
                let result = unsafe { libc::fallocate64(fd, mode, from, len) };
                isize::try_from(result).unwrap_or(-1)
            }
            Step::Sync => return self.file.sync_data().map(|()| 0),
        };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }
}

fn offset(bytes: u64) -> io::Result<libc::off64_t> {
    libc::off64_t::try_from(bytes).map_err(|_| io::ErrorKind::InvalidInput.into())
}

impl Alignment {
    /// Tries what the smallest read is that the file takes: nothing else tells it on every kernel.
    fn find(file: &File) -> io::Result<Self> {
        let mut memory = AlignedMemory::new(PROBE_SIZE);
        let mut read = |start: usize, len: usize| {
            let target = memory.bytes_mut().get_mut(start..start.saturating_add(len)).unwrap_or_default();
            file.read_at(target, 0)
        };
        let mut len = SECTOR_SIZE;
        let block = loop {
            match read(0, len as usize) {
                Ok(_) => break len,
                Err(error) if len >= MAX_BLOCK_SIZE => return Err(error),
                Err(_) => len = len.saturating_mul(2),
            }
        };
        // A sector is what a guest aligns its buffers to at least.
        let (sector, page) = (SECTOR_SIZE as usize, MAX_BLOCK_SIZE as usize);
        let memory = if read(sector, block as usize).is_ok() { sector } else { page };
        Ok(Self { file: block, memory })
    }
}
