//! virtio-fs (virtio 1.2 section 5.11): a directory of the host, served in this process.
//!
//! `share` is what the requests do to the host, `engine` takes them from the queues, and `pool` has the threads for those
//! that take long, with the rules on what may overtake what. There is no window for mapping files (DAX).

mod engine;
mod pool;
mod share;
#[cfg(test)]
mod tests;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fuse_backend_rs::api::server::Server;
use seccomp::{Confinement, Post};
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;

use self::engine::{Engine, Serve};
use self::pool::Pool;
use self::share::{Share, Switches};
use crate::Subscriber;
use crate::virtio::queue::RING_FEATURES;
use crate::virtio::{ActivateError, Activation, DeviceState, RestoreError, SaveError, VirtioDevice, config_space};

/// Longest tag in bytes (section 5.11.4).
pub const MAX_TAG: usize = 36;

/// Most request queues.
pub const MAX_REQUEST_QUEUES: u16 = 8;

/// Most threads for requests that wait for a disk.
pub const MAX_WORKERS: u16 = 16;

/// Sizes of a queue. Linux makes its requests as large as the queue has room for, and 1024 lets
/// it move the most that FUSE can, 1 MiB, at once.
const QUEUE_SIZES: std::ops::RangeInclusive<u16> = 16..=1024;

/// How much the guest may keep of what it read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CachePolicy {
    /// Nothing: every access asks the host.
    Never,
    /// Data until the file is opened again, names and attributes for a second.
    #[default]
    Auto,
    /// Everything, as if nobody else could change the directory.
    Always,
}

/// How a file system device is made.
#[derive(Clone, Debug)]
pub struct FsConfig {
    /// Name by which the guest mounts it, 1 to [`MAX_TAG`] bytes.
    pub tag: String,
    /// The directory that is shared. Nothing outside it can be reached by the guest.
    pub shared_dir: PathBuf,
    /// What the guest may cache.
    pub cache: CachePolicy,
    /// Number of request queues, 1 to [`MAX_REQUEST_QUEUES`].
    pub num_request_queues: u16,
    /// Size of each queue, a power of two from 16 to 1024.
    pub queue_size: u16,
    /// Lets the guest collect writes in its page cache. Only with [`CachePolicy::Always`] or
    /// [`CachePolicy::Auto`], and only for directories that nobody else writes to.
    pub writeback: bool,
    /// Threads for requests that wait for a disk, up to [`MAX_WORKERS`]. Without any, such a request holds up all
    /// others.
    pub workers: u16,
    /// Whether there are extended attributes.
    pub xattr: bool,
    /// Whether POSIX locks of the guest count on the host. A process that would have to wait for one gets EOPNOTSUPP.
    pub posix_locks: bool,
}

/// Why a file system device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The tag is empty, too long or has a zero byte.
    #[error("The tag {0:?} must have 1 to 36 bytes, none of them zero")]
    Tag(String),
    /// The number of request queues is 0 or too large.
    #[error("{0} request queues: there must be 1 to 8")]
    RequestQueues(u16),
    /// The queue size is not a power of two, too small or too large.
    #[error("Queue size {0} must be a power of two from 16 to 1024")]
    QueueSize(u16),
    /// Too many threads.
    #[error("{0} worker threads: there may be up to 16")]
    Workers(u16),
    /// A thread cannot be started.
    #[error("Cannot start the threads of a shared directory")]
    Spawn(#[source] io::Error),
    /// The directory cannot be opened.
    #[error("Cannot share the directory {path}")]
    SharedDir {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The configuration half of a file system device.
pub struct Fs {
    tag: String,
    config_space: Vec<u8>,
    queue_sizes: Vec<u16>,
    share: Arc<Share>,
    serve: Serve,
    pool: Arc<Pool>,
}

impl Fs {
    /// Makes the device and opens the directory.
    pub fn new(config: FsConfig, confinement: Confinement) -> Result<Self, FsError> {
        let mut tag = config.tag.clone().into_bytes();
        if tag.is_empty() || tag.len() > MAX_TAG || tag.contains(&0) {
            return Err(FsError::Tag(config.tag));
        }
        if !(1..=MAX_REQUEST_QUEUES).contains(&config.num_request_queues) {
            return Err(FsError::RequestQueues(config.num_request_queues));
        }
        if !QUEUE_SIZES.contains(&config.queue_size) || !config.queue_size.is_power_of_two() {
            return Err(FsError::QueueSize(config.queue_size));
        }
        if config.workers > MAX_WORKERS {
            return Err(FsError::Workers(config.workers));
        }
        let FsConfig { cache, writeback, xattr, posix_locks, .. } = config;
        let share = Share::new(&config.shared_dir, Switches { cache, writeback, xattr, posix_locks })
            .map_err(|source| FsError::SharedDir { path: config.shared_dir, source })?;
        let share = Arc::new(share);
        let serve = engine::serve_with(Server::new(Arc::clone(&share)), posix_locks);
        let pool = Arc::new(Pool::new(config.workers, &serve, confinement).map_err(FsError::Spawn)?);
        tag.resize(MAX_TAG, 0);
        tag.extend(u32::from(config.num_request_queues).to_le_bytes());
        let queues = usize::from(config.num_request_queues).saturating_add(1);
        Ok(Self {
            tag: config.tag,
            config_space: tag,
            queue_sizes: vec![config.queue_size; queues],
            serve,
            pool,
            share,
        })
    }

    /// What its event loop's thread is for: it needs the shared directory, and no other.
    pub fn post(&self) -> Result<Post, FsError> {
        self.share.root().map(Post::serving).map_err(FsError::Spawn)
    }

    /// A handle on the shared directory that outlives giving the device to its transport.
    pub fn control(&self) -> ShareControl {
        ShareControl { share: Arc::clone(&self.share) }
    }
}

/// What the host does with a shared directory while a guest has it. Usable from any thread.
#[derive(Clone)]
pub struct ShareControl {
    share: Arc<Share>,
}

impl ShareControl {
    /// Lets go of everything that the guest knows on the mount whose root is the directory or file `path`.
    ///
    /// A guest remembers names for as long as it has memory for them, and each of them keeps the
    /// mount busy and removed files on the disk. So this goes before unmounting what the guest
    /// was told to use no more; what it still has open there is gone for it (EBADF). Fails for
    /// the mount that the shared directory itself is on.
    pub fn release_mount(&self, path: &Path) -> io::Result<()> {
        self.share.release_mount(path)
    }
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        config_space::read(&self.config_space, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<Subscriber, ActivateError> {
        Ok(Box::new(Engine::new(activation, Arc::clone(&self.serve), Arc::clone(&self.pool))))
    }

    fn reset(&mut self) {
        self.share.reset();
    }

    /// What the guest knows of the directory are descriptors of this process: it must have
    /// forgotten all but the root.
    fn save(&self) -> Result<DeviceState, SaveError> {
        if !self.share.only_root_known() {
            let device = format!("shared directory {}", self.tag);
            return Err(SaveError::Busy { device, reason: "the guest knows files of it" });
        }
        DeviceState::encode(VIRTIO_ID_FS, &self.share.writes_back())
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        self.share.set_writes_back(state.decode(VIRTIO_ID_FS)?);
        Ok(())
    }
}
