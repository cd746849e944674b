//! What a drive is made of, and how its configuration space tells it (virtio 1.2 section 5.2.4).

use std::fs::File;
use std::io;

use vm_memory::{ByteValued, Le16, Le32, Le64};

use super::image::ImageError;
use super::metrics::BlkMetrics;
use crate::virtio::rate_limiter::RateLimits;

/// Bytes of a sector, the unit of every position and length on the wire (section 5.2.4).
pub(super) const SECTOR_SIZE: u32 = 512;

/// Largest block of a disk in bytes: a page, more than which Linux takes from no device.
pub(super) const MAX_BLOCK_SIZE: u32 = 4096;

/// Most request queues: each costs the host a descriptor, and more than one per processor is
/// never used.
pub const MAX_QUEUES: u16 = 32;

/// Sizes of a queue: header, data and status must fit, and a chain of 1024 is the most that one
/// call to the host's kernel takes.
pub const QUEUE_SIZES: std::ops::RangeInclusive<u16> = 4..=1024;

/// Ranges of one discard: a page of the driver has 256 of 16 bytes.
pub(super) const MAX_DISCARD_SEGMENTS: u32 = 256;

/// Sectors of one discarded range: 2 GiB. The host only changes its maps.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 22;

/// Sectors of the one range of a write of zeroes: 32 MiB, because a host whose file system cannot
/// allocate zeroes has to write them.
pub(super) const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 16;

/// Ranges of one write of zeroes.
pub(super) const MAX_WRITE_ZEROES_SEGMENTS: u32 = 1;

/// How an image keeps a disk.
#[derive(Debug, Default)]
pub enum ImageFormat {
    /// Its bytes are the disk's.
    #[default]
    Raw,
    /// QEMU's format, with up to 64 KiB per cluster.
    Qcow2 {
        /// What is behind the image. It must be named when the image asks for one; the name in the image is never
        /// opened.
        backing: Option<Box<BackingImage>>,
    },
}

/// An image behind another one, which is only read.
#[derive(Debug)]
pub struct BackingImage {
    /// Open for reading.
    pub file: File,
    /// Its format.
    pub format: ImageFormat,
}

/// Who does the work on an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineKind {
    /// The event loop itself, which waits meanwhile, and all its devices with it.
    Inline,
    /// A pool of threads: a slow disk holds up nobody else.
    #[default]
    Threads,
    /// The kernel, through an I/O ring. Raw images only, and only where the host allows rings.
    IoUring,
}

/// A drive for the guest.
#[derive(Debug)]
pub struct BlkConfig {
    /// The drive's name, for messages.
    pub id: String,
    /// An image or a block device, open for reading, and for writing unless `read_only`.
    pub file: File,
    /// The format of `file`, which is never found out from its bytes.
    pub format: ImageFormat,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// What the guest reads as the drive's serial number; cut to 20 bytes.
    pub serial: String,
    /// Who does the work.
    pub engine: EngineKind,
    /// Past the host's page cache. Changes the mode of `file` for all who share it.
    pub direct: bool,
    /// Number of request queues, 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// Size of each queue, a power of two in [`QUEUE_SIZES`].
    pub queue_size: u16,
    /// The disk's block in bytes: a power of two from 512 to 4096, or `None` for what the image asks for.
    pub logical_block_size: Option<u32>,
    /// How much the guest may do.
    pub limits: RateLimits,
    /// Where it is counted what the guest does.
    pub metrics: BlkMetrics,
}

impl BlkConfig {
    /// A raw image that the guest may write, on one queue of 256, without a serial number or a limit.
    pub fn new(id: impl Into<String>, file: File) -> Self {
        Self {
            id: id.into(),
            file,
            format: ImageFormat::Raw,
            read_only: false,
            serial: String::new(),
            engine: EngineKind::default(),
            direct: false,
            queues: 1,
            queue_size: 256,
            logical_block_size: None,
            limits: RateLimits::default(),
            metrics: BlkMetrics::default(),
        }
    }

    pub(super) fn check(&self) -> Result<(), BlkErrorKind> {
        if !(1..=MAX_QUEUES).contains(&self.queues) {
            return Err(BlkErrorKind::Queues(self.queues));
        }
        if !QUEUE_SIZES.contains(&self.queue_size) || !self.queue_size.is_power_of_two() {
            return Err(BlkErrorKind::QueueSize(self.queue_size));
        }
        match self.logical_block_size {
            Some(size) if !(SECTOR_SIZE..=MAX_BLOCK_SIZE).contains(&size) || !size.is_power_of_two() => {
                Err(BlkErrorKind::BlockSize(size))
            }
            _ => Ok(()),
        }
    }
}

/// Why a drive cannot be made.
#[derive(Debug, thiserror::Error)]
#[error("Drive {id} cannot be made")]
pub struct BlkError {
    /// The drive's name.
    pub id: String,
    /// Why.
    #[source]
    pub kind: BlkErrorKind,
}

/// What is wrong with a drive.
#[derive(Debug, thiserror::Error)]
pub enum BlkErrorKind {
    /// The number of queues is 0 or too large.
    #[error("{0} request queues: there must be 1 to 32")]
    Queues(u16),
    /// The queue size is not a power of two, too small or too large.
    #[error("Queue size {0} must be a power of two from 4 to 1024")]
    QueueSize(u16),
    /// The block size is not a power of two, too small or too large.
    #[error("Block size {0} must be a power of two from 512 to 4096")]
    BlockSize(u32),
    /// Direct I/O needs blocks of another size than the configuration says.
    #[error("Block size {wanted} is smaller than the {needed} bytes that direct I/O needs here")]
    DirectBlockSize {
        /// What the configuration says.
        wanted: u32,
        /// What the image's file system asks for.
        needed: u32,
    },
    /// There is not one whole block.
    #[error("The image is smaller than a block of {0} bytes")]
    Empty(u32),
    /// The image cannot be opened.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The kernel's I/O ring works on a file, and a qcow2 image is more than that.
    #[error("The io_uring engine serves raw images only")]
    EngineFormat,
    /// There are no threads, or no ring.
    #[error("The {0:?} engine cannot be made")]
    Engine(EngineKind, #[source] io::Error),
}

/// The configuration space (section 5.2.4), as far as features of this device fill it.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct ConfigSpace {
    pub capacity: Le64,
    pub size_max: Le32,
    pub seg_max: Le32,
    pub geometry: Le32,
    pub blk_size: Le32,
    pub physical_block_exp: u8,
    pub alignment_offset: u8,
    pub min_io_size: Le16,
    pub opt_io_size: Le32,
    pub writeback: u8,
    pub unused0: u8,
    pub num_queues: Le16,
    pub max_discard_sectors: Le32,
    pub max_discard_seg: Le32,
    pub discard_sector_alignment: Le32,
    pub max_write_zeroes_sectors: Le32,
    pub max_write_zeroes_seg: Le32,
    pub write_zeroes_may_unmap: u8,
    pub unused1: [u8; 3],
    /// Of secure erase, which is not offered.
    pub max_secure_erase_sectors: Le32,
}

/// Offset of `writeback`, the one field that a driver can write.
pub(super) const WRITEBACK_OFFSET: u64 = 32;

const _: () = assert!(size_of::<ConfigSpace>() == 64);

// SAFETY: integers without padding between or after them, which the assertion above shows; any
// bytes are valid.
unsafe impl ByteValued for ConfigSpace {}
