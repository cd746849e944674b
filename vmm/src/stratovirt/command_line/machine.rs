//! Options that say what the machine itself is.

use std::path::PathBuf;

use serde::Deserialize;

use super::values::{Place, Size};

/// `-machine`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct MachineOption {
    /// Whether guest memory goes into a core dump of this process.
    pub dump_guest_core: bool,
    /// Whether other processes may map guest memory.
    pub mem_share: bool,
}

impl Default for MachineOption {
    fn default() -> Self {
        Self { dump_guest_core: true, mem_share: false }
    }
}

/// `-smp`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Smp {
    /// Processors.
    pub cpus: u8,
    /// Processors that there may be; as many as there are where it is missing.
    pub maxcpus: Option<u8>,
    /// Sockets of the board.
    pub sockets: Option<u8>,
    /// Dies of a socket.
    pub dies: Option<u8>,
    /// Clusters of a die.
    pub clusters: Option<u8>,
    /// Cores of a cluster.
    pub cores: Option<u8>,
    /// Threads of a core.
    pub threads: Option<u8>,
}

impl Smp {
    /// Whether the product of what is given can be the number of processors.
    pub fn is_consistent(&self) -> bool {
        let most = u64::from(self.maxcpus.unwrap_or(self.cpus));
        let parts = [self.sockets, self.dies, self.clusters, self.cores, self.threads];
        let product: u64 = parts.into_iter().map(|part| u64::from(part.unwrap_or(1))).product();
        let complete = [self.sockets, self.cores, self.threads].iter().all(Option::is_some);
        let divides = product > 0 && if complete { product == most } else { most.is_multiple_of(product) };
        most >= u64::from(self.cpus) && divides
    }
}

/// `-m`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// How much.
    pub size: Size,
}

/// `-incoming`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Incoming {
    /// Where the snapshot is.
    pub from: Place,
}

/// `-qmp`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Qmp {
    /// Where clients come.
    pub address: Place,
    /// Whether this end listens.
    #[serde(default)]
    pub server: bool,
    /// Whether the machine starts without a client.
    #[serde(default)]
    pub nowait: bool,
}

/// `-mon`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mon {
    /// The character device that is the monitor's socket.
    pub chardev: String,
}

/// `-numa`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Numa {
    /// A node.
    Node(NumaNode),
}

/// `-numa node`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NumaNode {
    /// The memory backend that is the node's memory.
    pub memdev: Option<String>,
}

/// `-object`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Object {
    /// Pages of this process.
    MemoryBackendRam(MemoryBackend),
    /// Pages of a memfd.
    MemoryBackendMemfd(MemoryBackend),
    /// Pages of a file.
    MemoryBackendFile(FileMemoryBackend),
    /// A source of entropy.
    RngRandom(RngRandom),
    /// A thread for devices.
    Iothread(Iothread),
}

impl Object {
    /// Its name.
    pub fn id(&self) -> &str {
        match self {
            Self::MemoryBackendRam(backend) | Self::MemoryBackendMemfd(backend) => &backend.id,
            Self::MemoryBackendFile(backend) => &backend.id,
            Self::RngRandom(rng) => &rng.id,
            Self::Iothread(thread) => &thread.id,
        }
    }
}

/// `-object memory-backend-ram` and `-object memory-backend-memfd`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct MemoryBackend {
    /// Its name.
    pub id: String,
    /// How much.
    pub size: Size,
    /// Whether other processes may map it.
    #[serde(default)]
    pub share: bool,
    /// Whether it is made before the guest runs.
    #[serde(default)]
    pub prealloc: bool,
    /// Whether it goes into a core dump.
    pub dump: Option<bool>,
}

/// `-object memory-backend-file`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct FileMemoryBackend {
    /// Its name.
    pub id: String,
    /// How much.
    pub size: Size,
    /// The file, or the directory for a file without a name.
    pub mem_path: PathBuf,
    /// Whether other processes may map it.
    #[serde(default)]
    pub share: bool,
    /// Whether it is made before the guest runs.
    #[serde(default)]
    pub prealloc: bool,
    /// Whether it goes into a core dump.
    pub dump: Option<bool>,
}

/// `-object rng-random`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RngRandom {
    /// Its name.
    pub id: String,
    /// The file that gives random bytes.
    pub filename: PathBuf,
}

/// `-object iothread`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Iothread {
    /// Its name.
    pub id: String,
}
