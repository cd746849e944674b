//! What a machine is made of. One struct, filled once by whoever reads the outside text; nothing
//! below keeps a copy of it in another form.
//!
//! Files that devices work on come open: opening them needs privileges that a machine does not.

mod boot;
mod memory;
mod rng;
mod serial;
mod slots;

pub use devices::virtio::balloon::BalloonConfig;
pub use devices::virtio::blk::{BackingImage, BlkConfig, BlkControl, EngineKind, ImageFormat};
pub use devices::virtio::console::{ConsoleConfig, PortConfig, PortEnd};
pub use devices::virtio::fs::FsConfig;
pub use devices::virtio::kernel_vhost::{KernelVhost, VhostError, VhostKind};
pub use devices::virtio::mem::MemConfig;
pub use devices::virtio::net::NetConfig;
pub use devices::virtio::pmem::PmemConfig;
pub use devices::virtio::vhost_user::VhostUserConfig;
pub use devices::virtio::vsock::{KernelVsockConfig, VsockConfig};

pub use crate::memory::image::Placement;
pub use boot::{BASE_CMDLINE, BootConfig};
pub use memory::{MemoryBacking, MemoryConfig, RestoreMemory};
pub use rng::RngConfig;
pub use seccomp::Confinement;
pub use serial::SerialConfig;
pub use slots::SlotConfig;

/// A machine to be built.
#[derive(Debug)]
pub struct MachineConfig {
    /// Its name, for logs.
    pub name: String,
    /// Number of processors, at least 1.
    pub vcpus: u8,
    /// Physical memory.
    pub memory: MemoryConfig,
    /// Kernel, initrd and command line.
    pub boot: BootConfig,
    /// How kernel and initrd come into memory.
    pub images: Placement,
    /// Where the console's output goes, besides the tail that is always kept.
    pub serial: SerialConfig,
    /// Shared directories, known to the guest by their tags.
    pub fs: Vec<FsConfig>,
    /// Drives, in the order of their names in the guest: `vda`, `vdb`.
    pub blk: Vec<BlkConfig>,
    /// Network interfaces, in the order of their names in the guest: `eth0`, `eth1`.
    pub net: Vec<NetConfig>,
    /// Devices that other processes serve, after those of the same kind that this one serves. They need a memory that
    /// others can see: [`MemoryBacking::Shared`], or a shared file.
    pub vhost_user: Vec<VhostUserConfig>,
    /// Sockets between the guest and this process.
    pub vsock: Option<VsockConfig>,
    /// Sockets between the guest and any program of the host, in place of those of `vsock`: a guest uses one of the two.
    pub vhost_vsock: Option<KernelVsockConfig>,
    /// A source of entropy.
    pub rng: Option<RngConfig>,
    /// A balloon, by which the guest gives memory back.
    pub balloon: Option<BalloonConfig>,
    /// Memory that the guest gets and gives back in blocks, beside its own.
    pub pluggable: Option<MemConfig>,
    /// Files as persistent memory, in the order of their names in the guest: `pmem0`, `pmem1`.
    pub pmem: Vec<PmemConfig>,
    /// Ports between the guest and descriptors of this process, `hvc0` among them.
    pub console: Option<ConsoleConfig>,
    /// Whether the machine's threads are confined to their roles. The process as a whole is its program's business.
    pub confinement: Confinement,
    /// Places for drives and network interfaces that come and go while the machine runs.
    pub slots: SlotConfig,
}

impl MachineConfig {
    /// One processor, confined threads, images that are copied, a console whose output is only kept in the tail, and no virtio devices.
    pub fn new(name: impl Into<String>, memory: MemoryConfig, boot: BootConfig) -> Self {
        Self {
            name: name.into(),
            vcpus: 1,
            memory,
            boot,
            images: Placement::Copied,
            serial: SerialConfig::Null,
            fs: Vec::new(),
            blk: Vec::new(),
            net: Vec::new(),
            vhost_user: Vec::new(),
            vsock: None,
            vhost_vsock: None,
            rng: None,
            balloon: None,
            pluggable: None,
            pmem: Vec::new(),
            console: None,
            confinement: Confinement::On,
            slots: SlotConfig::default(),
        }
    }
}
