//! The host's ends of devices: files, interfaces and streams.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::RawFd;
use std::path::PathBuf;

use serde::Deserialize;

use super::values::Place;

/// `-drive`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Drive {
    /// Its name.
    pub id: String,
    /// A raw image or a block device.
    pub file: PathBuf,
    /// Whether the guest may only read.
    #[serde(default)]
    pub readonly: bool,
    /// Whether the host's page cache is left out. It is where that is not said, and the file system can.
    pub direct: Option<bool>,
    /// How requests are carried out; see [`Drive::engine`] where it is missing.
    pub aio: Option<Aio>,
    /// Operations of a second.
    #[serde(rename = "throttling.iops-total")]
    pub iops: Option<u64>,
    /// Bytes of a second.
    #[serde(rename = "throttling.bps-total")]
    pub bps: Option<u64>,
}

/// The ways of carrying out requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Aio {
    /// On the event loop, one after the other.
    Off,
    /// Asynchronously, past the page cache.
    Native,
    /// By io_uring.
    IoUring,
    /// By threads.
    Threads,
}

impl Drive {
    /// Whether the host's page cache is to be left out.
    pub fn is_direct(&self) -> bool {
        self.direct.unwrap_or(true)
    }

    /// How requests are carried out: as asked for, else asynchronously where the page cache is left out.
    pub fn engine(&self) -> Aio {
        self.aio.unwrap_or(if self.is_direct() { Aio::Native } else { Aio::Off })
    }
}

/// `-netdev`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Netdev {
    /// A tap interface.
    Tap(TapNetdev),
    /// Another process.
    VhostUser(VhostUserNetdev),
}

impl Netdev {
    /// Its name.
    pub fn id(&self) -> &str {
        match self {
            Self::Tap(tap) => &tap.id,
            Self::VhostUser(socket) => &socket.id,
        }
    }
}

/// `-netdev tap`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TapNetdev {
    /// Its name.
    pub id: String,
    /// The interface's name.
    pub ifname: Option<String>,
    /// An open descriptor of the interface.
    pub fd: Option<RawFd>,
    /// Open descriptors, one for each pair of queues.
    pub fds: Option<Vec<RawFd>>,
    /// Whether the host's kernel carries the frames.
    #[serde(default)]
    pub vhost: bool,
    /// An open descriptor of `/dev/vhost-net`.
    pub vhostfd: Option<RawFd>,
    /// Open descriptors of `/dev/vhost-net`.
    pub vhostfds: Option<Vec<RawFd>>,
    /// Pairs of queues.
    pub queues: Option<u16>,
}

impl TapNetdev {
    /// The open descriptors of the interface.
    pub fn descriptors(&self) -> Vec<RawFd> {
        self.fd.iter().chain(self.fds.iter().flatten()).copied().collect()
    }

    /// The open descriptors of `/dev/vhost-net`.
    pub fn vhost_descriptors(&self) -> Vec<RawFd> {
        self.vhostfd.iter().chain(self.vhostfds.iter().flatten()).copied().collect()
    }
}

/// `-netdev vhost-user`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VhostUserNetdev {
    /// Its name.
    pub id: String,
    /// The socket.
    pub chardev: String,
    /// Pairs of queues.
    pub queues: Option<u16>,
}

/// `-chardev`, and `-serial` without a name.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Chardev {
    /// This process's standard input and output.
    Stdio(Stream),
    /// A new pseudo-terminal, whose name is written to the log and to standard output.
    Pty(Stream),
    /// A file.
    File(FileStream),
    /// A socket.
    Socket(SocketStream),
    /// Nowhere.
    Null(Stream),
}

impl Chardev {
    /// Its name.
    pub fn id(&self) -> Option<&str> {
        match self {
            Self::Stdio(stream) | Self::Pty(stream) | Self::Null(stream) => stream.id.as_deref(),
            Self::File(file) => file.id.as_deref(),
            Self::Socket(socket) => socket.id.as_deref(),
        }
    }
}

/// What needs nothing but a name.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stream {
    /// Its name.
    pub id: Option<String>,
}

/// `-chardev file`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileStream {
    /// Its name.
    pub id: Option<String>,
    /// The file, made or emptied.
    pub path: PathBuf,
}

/// `-chardev socket`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SocketStream {
    /// Its name.
    pub id: Option<String>,
    /// A socket in the file system.
    pub path: Option<PathBuf>,
    /// An address of this host, with `port`.
    pub host: Option<IpAddr>,
    /// A port, with `host`.
    pub port: Option<u16>,
    /// Whether this end listens.
    #[serde(default)]
    pub server: bool,
    /// Whether the machine starts without a client.
    #[serde(default)]
    pub nowait: bool,
}

impl SocketStream {
    /// Where the socket is: a path, or a host and a port.
    pub fn place(&self) -> Option<Place> {
        match (&self.path, self.host, self.port) {
            (Some(path), None, None) => Some(Place::Unix(path.clone())),
            (None, Some(host), Some(port)) => Some(Place::Tcp(SocketAddr::new(host, port))),
            _ => None,
        }
    }
}

/// `-serial`
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Serial {
    /// A stream of its own.
    Own(Chardev),
    /// One of `-chardev`.
    Named(String),
}
