//! What a block device's requests are answered from.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;

use super::config::SECTOR_SIZE;
use crate::virtio::queue::GuestBuffers;

/// A raw image file or a host block device.
pub struct Disk {
    file: File,
    sectors: u64,
    read_only: bool,
}

impl Disk {
    /// Takes the size from the file; a last part that is not a whole sector is not shown.
    pub fn new(mut file: File, read_only: bool) -> io::Result<Self> {
        // The end of a block device is where its size says; metadata has no size for it.
        let sectors = file.seek(SeekFrom::End(0))?.div_euclid(u64::from(SECTOR_SIZE));
        Ok(Self { file, sectors, read_only })
    }

    /// A disk on a file that has no size of its own.
    #[cfg(test)]
    pub fn of_size(file: File, sectors: u64) -> Self {
        Self { file, sectors, read_only: false }
    }

    /// Capacity in sectors.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Whether writes are refused.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Byte position of `len` bytes from `sector`, or `None` when they are not whole sectors
    /// within the capacity.
    pub fn position(&self, sector: u64, len: u32) -> Option<u64> {
        if !len.is_multiple_of(SECTOR_SIZE) {
            return None;
        }
        let end = sector.checked_add(u64::from(len / SECTOR_SIZE))?;
        if end > self.sectors {
            return None;
        }
        sector.checked_mul(SECTOR_SIZE.into())
    }

    /// Fills `buffers` from byte `position`.
    pub fn read(&self, buffers: GuestBuffers<'_>, position: u64) -> io::Result<()> {
        buffers.read_exact_at(self.file.as_fd(), position)
    }

    /// Writes `buffers` at byte `position`.
    pub fn write(&self, buffers: GuestBuffers<'_>, position: u64) -> io::Result<()> {
        buffers.write_all_at(self.file.as_fd(), position)
    }

    /// Makes completed writes stable.
    pub fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}
