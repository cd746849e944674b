//! A drive's end on the host, opened: for a `-device` of the command line, or for a `device_add` that comes later.

use std::fs::{File, OpenOptions};
use std::io;
use std::num::NonZeroU64;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use devices::virtio::blk::{BlkConfig, BlkMetrics, EngineKind};
use devices::virtio::rate_limiter::{BucketConfig, RateLimits};

use super::command_line::backend::{Aio, Drive};

/// Why a drive cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DriveError {
    /// Its properties exclude each other.
    #[error("Drive {id} with direct={} cannot be: {why}", if *direct { "on" } else { "off" })]
    Conflict {
        /// Its name.
        id: String,
        /// Whether it is past the page cache.
        direct: bool,
        /// What excludes what.
        why: &'static str,
    },
    /// Its file cannot be opened.
    #[error("Cannot open {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is no descriptor left for another use of it.
    #[error("Cannot duplicate the descriptor of drive {id}")]
    Duplicate {
        /// Its name.
        id: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// An open drive, and what it was asked to be.
#[derive(Debug)]
pub struct HostDrive {
    drive: Drive,
    file: File,
    direct: bool,
    engine: EngineKind,
    metrics: BlkMetrics,
}

impl HostDrive {
    /// Opens what `drive` names, past the page cache unless it says otherwise. A file system that has no direct I/O serves from
    /// the cache where nobody has asked for one or the other.
    pub fn open(drive: Drive) -> Result<Self, DriveError> {
        let mut direct = drive.is_direct();
        let engine = engine(&drive)?;
        let file = match open(&drive.file, drive.readonly, direct) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) && drive.direct.is_none() => {
                direct = false;
                open(&drive.file, drive.readonly, direct)
            }
            opened => opened,
        };
        let file = file.map_err(|source| DriveError::Open { path: drive.file.clone(), source })?;
        Ok(Self { drive, file, direct, engine, metrics: BlkMetrics::default() })
    }

    /// Its name.
    pub fn id(&self) -> &str {
        &self.drive.id
    }

    /// Its file.
    pub fn path(&self) -> &Path {
        &self.drive.file
    }

    /// Whether the guest may only read.
    pub fn is_read_only(&self) -> bool {
        self.drive.readonly
    }

    /// Whether the host's page cache is left out.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Operations and bytes of a second; 0 is no limit.
    pub fn rates(&self) -> (u64, u64) {
        (self.drive.iops.unwrap_or_default(), self.drive.bps.unwrap_or_default())
    }

    /// What its guest has done with it.
    pub fn metrics(&self) -> &BlkMetrics {
        &self.metrics
    }

    /// Its size in bytes as it is now; `None` where the host does not say.
    pub fn size(&self) -> Option<u64> {
        use std::io::{Seek, SeekFrom};
        // A block device has no length among its metadata. Positions of reads and writes are all given with them.
        (&self.file).seek(SeekFrom::End(0)).ok()
    }

    /// A device `id` on top of it. The file stays open here.
    pub fn device(&self, id: String, serial: Option<String>) -> Result<BlkConfig, DriveError> {
        let file =
            self.file.try_clone().map_err(|source| DriveError::Duplicate { id: self.drive.id.clone(), source })?;
        // A limit of 0 is none, as for QEMU.
        let limit = |rate: Option<u64>| rate.and_then(NonZeroU64::new).map(BucketConfig::per_second);
        Ok(BlkConfig {
            read_only: self.drive.readonly,
            serial: serial.unwrap_or_default(),
            engine: self.engine,
            direct: self.direct,
            limits: RateLimits { ops: limit(self.drive.iops), bytes: limit(self.drive.bps) },
            metrics: self.metrics.clone(),
            ..BlkConfig::new(id, file)
        })
    }
}

/// Who does the work, if that goes together.
fn engine(drive: &Drive) -> Result<EngineKind, DriveError> {
    let conflict = |why| DriveError::Conflict { id: drive.id.clone(), direct: drive.is_direct(), why };
    match (drive.is_direct(), drive.engine()) {
        (true, Aio::Off) => Err(conflict("past the page cache there is no aio=off")),
        (false, Aio::Native) => Err(conflict("aio=native needs direct=on")),
        (false, Aio::Off) => Ok(EngineKind::Inline),
        (_, Aio::IoUring) => Ok(EngineKind::IoUring),
        (_, Aio::Native | Aio::Threads) => Ok(EngineKind::Threads),
    }
}

fn open(path: &Path, read_only: bool, direct: bool) -> io::Result<File> {
    let flags = if direct { libc::O_DIRECT } else { 0 };
    OpenOptions::new().read(true).write(!read_only).custom_flags(flags).open(path)
}
