//! What a block device's requests are answered from.
//!
//! The format of an image is what the configuration says. Its bytes are never looked at to find
//! it out: the guest writes them, and could make a raw image look like one that names other files.

mod qcow2;
mod raw;

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

pub use self::qcow2::Qcow2Error;
use self::qcow2::Qcow2Image;
use self::raw::RawImage;
use super::config::{ImageFormat, SECTOR_SIZE};
use super::operation::Operation;
use super::transfer::{Direction, Transfer};
use crate::virtio::queue::HeldBuffers;

/// An image, and what the guest may do with it.
pub(super) struct Disk {
    image: Image,
    sectors: AtomicU64,
    read_only: bool,
}

enum Image {
    Raw(RawImage),
    Qcow2(Qcow2Image),
}

/// Why an image cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The size of the file or device cannot be read.
    #[error("The size of the image cannot be told")]
    Size(#[source] io::Error),
    /// The file system cannot read or write past the page cache.
    #[error("The image's file system has no direct I/O")]
    Direct(#[source] io::Error),
    /// It is not the qcow2 image that the configuration says.
    #[error(transparent)]
    Qcow2(#[from] Qcow2Error),
}

impl Disk {
    /// Opens `file` as an image of `format`. `direct` is past the host's page cache.
    pub fn open(file: File, format: ImageFormat, read_only: bool, direct: bool) -> Result<Self, ImageError> {
        let image = match format {
            ImageFormat::Raw => Image::Raw(RawImage::open(file, direct).map_err(ImageError::Direct)?),
            ImageFormat::Qcow2 { backing } => {
                Image::Qcow2(Qcow2Image::open(file, backing.map(|backing| *backing), read_only, direct)?)
            }
        };
        let disk = Self { image, sectors: AtomicU64::new(0), read_only };
        disk.refresh().map_err(ImageError::Size)?;
        Ok(disk)
    }

    /// Capacity in sectors.
    pub fn sectors(&self) -> u64 {
        self.sectors.load(Ordering::Acquire)
    }

    /// Reads the size of the image again; a last part that is not a whole sector is not shown.
    pub fn refresh(&self) -> io::Result<u64> {
        let bytes = match &self.image {
            Image::Raw(image) => image.size()?,
            Image::Qcow2(image) => image.size(),
        };
        let sectors = bytes.div_euclid(u64::from(SECTOR_SIZE));
        self.sectors.store(sectors, Ordering::Release);
        Ok(sectors)
    }

    /// Whether what would change the image is refused.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// What positions and lengths must be multiples of, in bytes: a sector, or the block of a
    /// disk that is accessed directly.
    pub fn granularity(&self) -> u32 {
        match &self.image {
            Image::Raw(image) => image.granularity(),
            Image::Qcow2(_) => SECTOR_SIZE,
        }
    }

    /// Byte position of `len` bytes from `sector`, or `None` when they are not whole blocks
    /// within the capacity.
    pub fn position(&self, sector: u64, len: u64) -> Option<u64> {
        if !len.is_multiple_of(SECTOR_SIZE.into()) {
            return None;
        }
        let end = sector.checked_add(len.div_euclid(SECTOR_SIZE.into()))?;
        if end > self.sectors() {
            return None;
        }
        let position = sector.checked_mul(SECTOR_SIZE.into())?;
        let granularity = u64::from(self.granularity());
        (position.is_multiple_of(granularity) && len.is_multiple_of(granularity)).then_some(position)
    }

    /// A transfer of `len` bytes, which is the length of `buffers`.
    pub fn transfer(&self, direction: Direction, position: u64, len: u32, buffers: HeldBuffers) -> Transfer {
        match &self.image {
            Image::Raw(image) => image.transfer(direction, position, len, buffers),
            Image::Qcow2(_) => Transfer::bounced(direction, position, len, buffers, 1),
        }
    }

    /// Does all of `operation` in this thread.
    pub fn run(&self, operation: Operation) -> io::Result<()> {
        match &self.image {
            Image::Raw(image) => image.run(operation),
            Image::Qcow2(image) => image.run(operation),
        }
    }

    /// The file that an [`Operation`]'s steps apply to; `None` when the format needs more than
    /// steps.
    pub fn file(&self) -> Option<&File> {
        match &self.image {
            Image::Raw(image) => Some(image.file()),
            Image::Qcow2(_) => None,
        }
    }
}
