//! `-device`: the guest's ends.

use std::os::fd::RawFd;
use std::path::PathBuf;

use serde::Deserialize;

use super::values::{Mac, Size};

/// A device that the guest sees.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Device {
    /// A drive in one of the replaceable places.
    VirtioBlkDevice(BlkDevice),
    /// A drive that another process serves.
    VhostUserBlkDevice(VhostUserBlkDevice),
    /// A network interface, in one of the replaceable places unless the host's kernel or another process serves it.
    VirtioNetDevice(NetDevice),
    /// The bus of consoles.
    VirtioSerialDevice(NamedDevice),
    /// A console.
    Virtconsole(PortDevice),
    /// A port without the manners of a console.
    Virtserialport(PortDevice),
    /// Sockets, through the host's kernel.
    VhostVsockDevice(VhostVsockDevice),
    /// A balloon.
    VirtioBalloonDevice(BalloonDevice),
    /// Memory that grows and shrinks.
    VirtioMemDevice(MemDevice),
    /// A file as memory.
    VirtioPmemDevice(PmemDevice),
    /// A source of entropy.
    VirtioRngDevice(RngDevice),
    /// A directory that another process serves.
    VhostUserFsDevice(VhostUserFsDevice),
    /// A directory that this process serves.
    VirtioFsDevice(FsDevice),
}

/// A device with nothing but a name.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NamedDevice {
    /// Its name.
    pub id: Option<String>,
}

/// `-device virtio-blk-device`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct BlkDevice {
    /// Its name.
    pub id: String,
    /// The `-drive` behind it.
    pub drive: String,
    /// What the guest reads as its serial number.
    pub serial: Option<String>,
    /// Queues.
    pub num_queues: Option<u16>,
    /// Entries of a queue.
    pub queue_size: Option<u16>,
}

/// `-device vhost-user-blk-device`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct VhostUserBlkDevice {
    /// Its name.
    pub id: String,
    /// The socket of the process that serves it.
    pub chardev: String,
    /// Queues.
    pub num_queues: Option<u16>,
    /// Entries of a queue.
    pub queue_size: Option<u16>,
}

/// `-device virtio-net-device`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct NetDevice {
    /// Its name.
    pub id: String,
    /// The `-netdev` behind it.
    pub netdev: String,
    /// The guest's address; made up from the name where it is missing.
    pub mac: Option<Mac>,
    /// Entries of a queue.
    pub queue_size: Option<u16>,
}

/// `-device virtconsole` and `-device virtserialport`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortDevice {
    /// Its name.
    pub id: String,
    /// The stream behind it.
    pub chardev: String,
}

/// `-device vhost-vsock-device`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct VhostVsockDevice {
    /// Its name.
    pub id: String,
    /// The guest's address.
    pub guest_cid: u32,
    /// An open descriptor of `/dev/vhost-vsock`.
    pub vhostfd: Option<RawFd>,
}

/// `-device virtio-balloon-device`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct BalloonDevice {
    /// Its name.
    pub id: Option<String>,
    /// Whether it gives pages back when the guest runs out of memory.
    #[serde(default)]
    pub deflate_on_oom: bool,
    /// Whether the guest tells which pages are free.
    #[serde(default)]
    pub free_page_reporting: bool,
    /// Whether the host gets back what the guest does not use.
    #[serde(default)]
    pub auto_balloon: bool,
}

/// `-device virtio-mem-device`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct MemDevice {
    /// Its name.
    pub id: String,
    /// The memory backend that says how much there may be.
    pub memdev: String,
    /// How much there is at the start.
    pub requested_size: Option<Size>,
    /// In which steps it grows.
    pub block_size: Option<Size>,
}

/// `-device virtio-pmem-device`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PmemDevice {
    /// Its name.
    pub id: String,
    /// The `-drive` whose file it is.
    pub drive: String,
}

/// `-device virtio-rng-device`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct RngDevice {
    /// Its name.
    pub id: Option<String>,
    /// The `-object rng-random` behind it.
    pub rng: String,
    /// Bytes that the guest gets in a period.
    pub max_bytes: Option<u64>,
    /// How long a period is, in milliseconds.
    pub period: Option<u64>,
}

/// `-device vhost-user-fs-device`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VhostUserFsDevice {
    /// Its name.
    pub id: String,
    /// The socket of the process that serves it.
    pub chardev: String,
    /// What the guest knows it by.
    pub tag: String,
}

/// `-device virtio-fs-device`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsDevice {
    /// Its name.
    pub id: String,
    /// What the guest knows it by.
    pub tag: String,
    /// The directory.
    pub source: PathBuf,
}

impl Device {
    /// Its name.
    pub fn id(&self) -> Option<&str> {
        match self {
            Self::VirtioBlkDevice(device) => Some(&device.id),
            Self::VhostUserBlkDevice(device) => Some(&device.id),
            Self::VirtioNetDevice(device) => Some(&device.id),
            Self::VirtioSerialDevice(device) => device.id.as_deref(),
            Self::Virtconsole(device) | Self::Virtserialport(device) => Some(&device.id),
            Self::VhostVsockDevice(device) => Some(&device.id),
            Self::VirtioBalloonDevice(device) => device.id.as_deref(),
            Self::VirtioMemDevice(device) => Some(&device.id),
            Self::VirtioPmemDevice(device) => Some(&device.id),
            Self::VirtioRngDevice(device) => device.id.as_deref(),
            Self::VhostUserFsDevice(device) => Some(&device.id),
            Self::VirtioFsDevice(device) => Some(&device.id),
        }
    }
}
