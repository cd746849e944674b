//! Kernel images and initrds: from a file's bytes to guest memory and an entry point.
//!
//! | image | how it is known | entry |
//! | --- | --- | --- |
//! | ELF with a PVH note (`vmlinux`) | ELF magic, `XEN_ELFNOTE_PHYS32_ENTRY` | PVH, 32 bits |
//! | ELF without | ELF magic | Linux 64-bit boot protocol at `e_entry` |
//! | bzImage | `HdrS` at 0x202 | Linux 64-bit boot protocol, 32-bit for old kernels |
//! | flat (`objcopy -O binary vmlinux`) | none of the others | Linux 64-bit boot protocol at its first byte, 16 MiB |

mod bzimage;
mod elf;
mod flat;
mod initrd;

use std::path::{Path, PathBuf};

use linux_loader::bootparam::setup_header;
use vm_memory::GuestAddress;

use devices::GuestMemory;

use crate::arch::x86_64::regs::Entry;
use crate::memory::image::{ImageError, ImageFile, Placement};

pub use initrd::load as load_initrd;

/// Why a kernel or initrd cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The file cannot be read or placed.
    #[error("The kernel image cannot be loaded")]
    Image(#[source] ImageError),
    /// The file is not what it should be.
    #[error("The kernel image {} cannot be booted", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: FormatError,
    },
    /// The initrd cannot be read or placed.
    #[error("The initrd cannot be loaded")]
    Initrd(#[source] ImageError),
    /// The initrd does not fit between the kernel and the end of low memory.
    #[error(
        "The initrd {} of {size} bytes does not fit into the {room} bytes of memory above the kernel",
        path.display()
    )]
    InitrdTooLarge {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// What is left for it.
        room: u64,
    },
}

/// What is wrong with a kernel image.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// It is something else that is well known.
    #[error("It is {0}, not a kernel")]
    NotAKernel(&'static str),
    /// An ELF file for another machine, or not an executable.
    #[error("It is not a 64-bit little-endian x86-64 ELF executable")]
    ForeignElf,
    /// A header or segment is outside the file.
    #[error("Its {what} ends at byte {end} but the file has only {size}")]
    Truncated {
        /// The part.
        what: &'static str,
        /// Where the part ends.
        end: u64,
        /// The file's size.
        size: u64,
    },
    /// A count or size is out of all proportion.
    #[error("Its {what} of {value} is more than {limit}, the most for a kernel")]
    TooMany {
        /// What is counted.
        what: &'static str,
        /// The count.
        value: u64,
        /// The most.
        limit: u64,
    },
    /// A segment contradicts itself, or lies where boot structures go.
    #[error("Its segment at {address:#x} is not possible")]
    Segment {
        /// Physical address.
        address: u64,
    },
    /// Nothing is loaded where it starts.
    #[error("Its entry point {0:#x} is not in a loaded segment")]
    Entry(u64),
    /// What linux-loader found.
    #[error("Its bzImage header is not valid")]
    BzImage(#[source] linux_loader::loader::Error),
    /// A file of another kind of trouble, with its path in the source.
    #[error("It cannot be placed in memory")]
    Image(#[from] ImageError),
}

/// A kernel in guest memory.
#[derive(Debug, Clone, Copy)]
pub struct LoadedKernel {
    /// How to enter it.
    pub entry: Entry,
    /// End of what it occupies before it manages memory itself.
    pub end: u64,
    /// The setup header that a bzImage carries.
    pub header: Option<setup_header>,
}

/// An initrd in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Initrd {
    /// Where.
    pub address: GuestAddress,
    /// Bytes.
    pub size: u64,
}

/// What a boot protocol tells the kernel besides the memory map.
#[derive(Debug, Clone, Copy)]
pub struct BootImages {
    /// Length of the command line without its NUL.
    pub cmdline_length: usize,
    /// The initrd.
    pub initrd: Option<Initrd>,
}

/// Loads the kernel at `path`.
pub fn load(memory: &GuestMemory, path: &Path, placement: Placement) -> Result<LoadedKernel, KernelError> {
    let image = ImageFile::open(path).map_err(KernelError::Image)?;
    let loaded = if elf::is_elf(&image) {
        elf::load(memory, &image, placement)
    } else if bzimage::is_bzimage(&image) {
        bzimage::load(memory, &image)
    } else {
        flat::load(memory, &image, placement)
    };
    loaded.map_err(|source| match source {
        FormatError::Image(source) => KernelError::Image(source),
        source => KernelError::Format { path: path.to_owned(), source },
    })
}

/// The first bytes of `image`, as many as there are.
fn first_bytes<const N: usize>(image: &ImageFile) -> [u8; N] {
    let mut bytes = [0; N];
    let length = usize::try_from(image.size()).unwrap_or(N).min(N);
    if let Some(start) = bytes.get_mut(..length)
        && image.read_at(start, 0).is_err()
    {
        // Unreadable: found again, and reported, by whoever loads it.
        return [0; N];
    }
    bytes
}

#[cfg(test)]
mod tests;
