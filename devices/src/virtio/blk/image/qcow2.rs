//! A qcow2 image, read and written through `imago`.
//!
//! Every byte is copied between guest memory and a piece of this process's own, so that no
//! reference to memory that a guest can change is ever made.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{PoisonError, RwLock, RwLockWriteGuard};

use imago::file::File as ImageFile;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, StorageOpenOptions};

use super::super::aligned::{ALIGNMENT, AlignedMemory};
use super::super::config::{BackingImage, ImageFormat};
use super::super::operation::{Erase, Erasure, Operation, Work};
use super::super::transfer::{Direction, Transfer};
use super::raw::set_direct;

/// Largest cluster, as a power of two: 64 KiB, what `qemu-img` makes. Each image keeps up to 160
/// tables of one cluster in memory, so this is a limit of 10 MiB.
const MAX_CLUSTER_BITS: u32 = 16;

/// Images behind an image, each of which has its own tables in memory.
const MAX_BACKING_DEPTH: usize = 4;

/// How every qcow2 image begins.
const MAGIC: [u8; 4] = *b"QFI\xfb";

/// Largest refcount table in bytes: enough for 8 TiB of clusters of the smallest size, and bounds
/// the work of checking it.
const MAX_REFCOUNT_TABLE: u64 = 8 << 20;

/// Why a qcow2 image cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum Qcow2Error {
    /// It is not a valid image.
    #[error("The image is not a valid qcow2 image")]
    Open(#[source] io::Error),
    /// Its clusters are too large.
    #[error("The image has clusters of 2^{0} bytes; more than 2^16 need too much memory")]
    ClusterSize(u32),
    /// The file system cannot read or write past the page cache.
    #[error("The image's file system has no direct I/O")]
    Direct(#[source] io::Error),
    /// Where the image counts its clusters is not as any program writes it.
    #[error("The image's refcount table is empty, has a hole or is too large, so that it cannot be written to")]
    Refcounts,
    /// The image asks for another one that the configuration does not name.
    #[error("The image wants the backing file {0:?}, and the configuration names none")]
    BackingNotNamed(String),
    /// The configuration names an image behind this one, which does not ask for any.
    #[error("The configuration names a backing file, and the image has none")]
    BackingNotWanted,
    /// The image keeps its data in another file.
    #[error("The image keeps its data in another file, which is not supported")]
    DataFile,
    /// There are too many images behind each other.
    #[error("More than 4 images are behind the image")]
    BackingDepth,
}

pub(super) struct Qcow2Image {
    /// Written to by those who move places on the disk: a discard. All others read.
    access: RwLock<FormatAccess<ImageFile>>,
}

impl Qcow2Image {
    pub fn open(file: File, backing: Option<BackingImage>, read_only: bool, direct: bool) -> Result<Self, Qcow2Error> {
        let image = open_layer(file, backing, !read_only, direct, MAX_BACKING_DEPTH)?;
        Ok(Self { access: RwLock::new(image) })
    }

    pub fn size(&self) -> u64 {
        self.with_access(|access| access.size())
    }

    pub fn run(&self, operation: Operation) -> io::Result<()> {
        let (work, sync) = operation.into_parts();
        match work {
            Work::Transfer(transfer) => self.transfer(transfer)?,
            Work::Erase(erase) => self.erase(erase)?,
            Work::Flush => {}
        }
        if sync {
            self.with_access(|access| access.flush().and_then(|()| access.sync()))?;
        }
        Ok(())
    }

    fn transfer(&self, mut transfer: Transfer) -> io::Result<()> {
        let direction = transfer.direction();
        while !transfer.is_done() {
            let (position, piece) = transfer.next_piece().ok_or(io::ErrorKind::Unsupported)?;
            let len = piece.len();
            self.with_access(|access| match direction {
                Direction::Read => access.read(&mut *piece, position),
                Direction::Write => access.write(&*piece, position),
            })?;
            transfer.moved(len)?;
        }
        Ok(())
    }

    fn erase(&self, erase: Erase) -> io::Result<()> {
        for range in &erase.ranges {
            let erased = match erase.erasure {
                Erasure::Zero => self.with_access(|access| access.write_zeroes(range.position, range.len)),
                Erasure::ZeroUnmap => self.write_access().discard_to_zero(range.position, range.len),
                Erasure::Discard => self.write_access().discard_to_any(range.position, range.len),
            };
            match (erased, erase.erasure) {
                // To keep what does not matter is as good.
                (Err(error), Erasure::Discard) if error.kind() == io::ErrorKind::Unsupported => {}
                // Version 2 of the format has no zero clusters.
                (Err(error), _) if error.kind() == io::ErrorKind::Unsupported => {
                    self.transfer(Transfer::zeroes(range.position, range.len))?;
                }
                (erased, _) => erased?,
            }
        }
        Ok(())
    }

    fn with_access<T>(&self, with: impl FnOnce(&FormatAccess<ImageFile>) -> T) -> T {
        with(&self.access.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn write_access(&self) -> RwLockWriteGuard<'_, FormatAccess<ImageFile>> {
        self.access.write().unwrap_or_else(PoisonError::into_inner)
    }
}

fn open_layer(
    file: File,
    backing: Option<BackingImage>,
    write: bool,
    direct: bool,
    depth: usize,
) -> Result<FormatAccess<ImageFile>, Qcow2Error> {
    let header = Header::read(&file).map_err(Qcow2Error::Open)?;
    if header.cluster_bits > MAX_CLUSTER_BITS {
        return Err(Qcow2Error::ClusterSize(header.cluster_bits));
    }
    if write {
        header.check_refcounts(&file)?;
    }
    if direct {
        set_direct(&file).map_err(Qcow2Error::Direct)?;
    }
    let file = storage(file, write, direct)?;
    let mut image: Qcow2<ImageFile> = Qcow2::open_image(file, write).map_err(Qcow2Error::Open)?;
    if image.requires_external_data_file() {
        return Err(Qcow2Error::DataFile);
    }
    image.set_data_file(None);
    let backing = match (backing, image.implicit_backing_file()) {
        (None, None) => None,
        (None, Some(name)) => return Err(Qcow2Error::BackingNotNamed(name.clone())),
        (Some(_), None) => return Err(Qcow2Error::BackingNotWanted),
        (Some(BackingImage { file, format }), Some(_)) => {
            let depth = depth.checked_sub(1).ok_or(Qcow2Error::BackingDepth)?;
            Some(match format {
                ImageFormat::Raw => open_raw(file)?,
                ImageFormat::Qcow2 { backing } => {
                    open_layer(file, backing.map(|backing| *backing), false, false, depth)?
                }
            })
        }
    };
    image.set_backing(backing);
    Ok(FormatAccess::new(image))
}

fn open_raw(file: File) -> Result<FormatAccess<ImageFile>, Qcow2Error> {
    let raw =
        Raw::builder(storage(file, false, false)?).open(DenyImplicitOpenGate::default()).map_err(Qcow2Error::Open)?;
    Ok(FormatAccess::new(raw))
}

fn storage(file: File, write: bool, direct: bool) -> Result<ImageFile, Qcow2Error> {
    let options = StorageOpenOptions::new().write(write).direct(direct);
    ImageFile::from_open_file(file, options).map_err(Qcow2Error::Open)
}

/// What is looked at in an image's header before the library sees it; all numbers are big-endian.
struct Header {
    cluster_bits: u32,
    refcount_table: u64,
    refcount_clusters: u32,
}

impl Header {
    fn read(file: &File) -> io::Result<Self> {
        let mut memory = AlignedMemory::new(ALIGNMENT);
        let header = read_block(file, &mut memory, 0)?;
        // The configuration says that it is one; this only tells a mistake by its name.
        if field(header, 0)? != MAGIC {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(Self {
            cluster_bits: u32::from_be_bytes(field(header, 20)?),
            refcount_table: u64::from_be_bytes(field(header, 48)?),
            refcount_clusters: u32::from_be_bytes(field(header, 56)?),
        })
    }

    /// Refuses a refcount table that does not begin with entries, or has more of them behind a
    /// hole: the library's search for a free cluster would fill the hole, for which it searches a
    /// free cluster, without end.
    fn check_refcounts(&self, file: &File) -> Result<(), Qcow2Error> {
        let len = u64::from(self.refcount_clusters).checked_shl(self.cluster_bits).unwrap_or(u64::MAX);
        if len > MAX_REFCOUNT_TABLE {
            return Err(Qcow2Error::Refcounts);
        }
        let mut memory = AlignedMemory::new(ALIGNMENT);
        let (mut any, mut ended) = (false, false);
        for offset in (0..len).step_by(ALIGNMENT) {
            let position = self.refcount_table.checked_add(offset).ok_or(Qcow2Error::Refcounts)?;
            let block = read_block(file, &mut memory, position).map_err(Qcow2Error::Open)?;
            for entry in block.as_chunks::<8>().0 {
                let used = u64::from_be_bytes(*entry) != 0;
                if used && ended {
                    return Err(Qcow2Error::Refcounts);
                }
                any |= used;
                ended |= !used;
            }
        }
        if any { Ok(()) } else { Err(Qcow2Error::Refcounts) }
    }
}

fn field<const LEN: usize>(header: &[u8], at: usize) -> io::Result<[u8; LEN]> {
    let field = header.get(at..).and_then(<[u8]>::first_chunk);
    field.copied().ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

/// Reads a block of a file that may be open for direct I/O; it may end earlier.
fn read_block<'m>(file: &File, memory: &'m mut AlignedMemory, position: u64) -> io::Result<&'m [u8]> {
    let count = file.read_at(memory.bytes_mut(), position)?;
    Ok(memory.bytes().get(..count).unwrap_or_default())
}
