//! Physical memory.

use std::fs::File;
use std::io;

use crate::memory::lazy::LazyConfig;
use crate::memory::working_set::WorkingSet;

/// The guest's memory.
#[derive(Debug)]
pub struct MemoryConfig {
    /// Bytes, whole pages.
    pub size: u64,
    /// What it is made of.
    pub backing: MemoryBacking,
    /// Whether all of it is made before the guest runs, rather than each page when it is first touched.
    pub prealloc: bool,
    /// Whether it goes into a core dump of this process.
    pub core_dump: bool,
}

/// What guest memory is made of.
#[derive(Debug)]
pub enum MemoryBacking {
    /// Pages of this process alone.
    Private,
    /// A memfd, which processes that serve vhost-user devices can map too.
    Shared,
    /// A file, as on hugetlbfs. Its length is set to the size of the memory where it is shorter.
    File {
        /// Open for reading and writing.
        file: File,
        /// Whether the guest's writes go to the file; else they stay in this process.
        shared: bool,
    },
}

/// How the memory of a snapshot comes into a machine that is restored from it.
#[derive(Debug)]
pub enum RestoreMemory {
    /// A private mapping of the memory file: what no machine writes to is shared by all, in the page cache.
    Mapped {
        /// Pages that the guest is expected to write to soon, for [`Machine::copy_ahead`](crate::Machine::copy_ahead).
        written: Option<WorkingSet>,
    },
    /// Pages that come when they are asked for, into memory of the backing that is asked for.
    Lazy(LazyConfig),
}

impl MemoryConfig {
    /// A private memory of `mib` MiB.
    pub fn from_mib(mib: u32) -> Self {
        Self::from_size(u64::from(mib) << 20)
    }

    /// A private memory of `size` bytes.
    pub fn from_size(size: u64) -> Self {
        Self { size, backing: MemoryBacking::Private, prealloc: false, core_dump: false }
    }
}

impl MemoryBacking {
    /// The same, by another descriptor where it has one.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Private => Self::Private,
            Self::Shared => Self::Shared,
            Self::File { file, shared } => Self::File { file: file.try_clone()?, shared: *shared },
        })
    }

    /// Whether no other process can see the memory.
    pub fn is_private(&self) -> bool {
        match self {
            Self::Private => true,
            Self::Shared => false,
            Self::File { shared, .. } => !shared,
        }
    }
}
