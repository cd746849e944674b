//! A KVM machine as a library: no containerd, no async runtime, no environment variables.
//!
//! ```no_run
//! use vmm::{BootConfig, Machine, MachineConfig, MemoryConfig, SerialConfig};
//!
//! let boot = BootConfig {
//!     kernel: "/path/to/vmlinux".into(),
//!     initrd: None,
//!     cmdline: vmm::BASE_CMDLINE.into(),
//! };
//! let mut config = MachineConfig::new("example", MemoryConfig::from_mib(128), boot);
//! config.serial = SerialConfig::Stdout;
//! let machine = Machine::build(config)?;
//! machine.start()?;
//! println!("{}", machine.wait());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! A machine is built from a [`MachineConfig`], lives as its [`Machine`] does and ends with an
//! [`ExitReason`]. The README walks through the rooms of this crate.

// A panic of a processor's thread would leave a machine that neither runs nor ends.
#![cfg_attr(
    not(test),
    deny(clippy::expect_used, clippy::indexing_slicing, clippy::panic, clippy::unwrap_used, clippy::unreachable)
)]

pub mod arch;
pub mod bus;
pub mod config;
pub mod event;
pub mod hotplug;
pub mod irq;
pub mod kernel;
pub mod machine;
pub mod memory;
pub mod observe;
pub mod snapshot;
pub mod stratovirt;
pub mod vcpu;

pub use config::{
    BASE_CMDLINE, BalloonConfig, BlkConfig, BootConfig, Confinement, ConsoleConfig, FsConfig, MachineConfig, MemConfig,
    MemoryBacking, MemoryConfig, NetConfig, Placement, PmemConfig, PortConfig, PortEnd, RestoreMemory, RngConfig,
    SerialConfig, VhostUserConfig, VsockConfig,
};
pub use devices::virtio::balloon::{BalloonError, BalloonHandle, GuestStats};
pub use devices::virtio::mem::{MemError, MemHandle};
pub use devices::virtio::vsock::{ConnectError, Connector, HostEnd};
pub use machine::{BuildError, Copied, ExitReason, LiveSnapshot, Machine, RestoreError, StateError};
pub use memory::lazy::{Fill, LazyConfig, LazyError, LazyHandle, LazyMetrics};
pub use memory::working_set::{WorkingSet, WorkingSetError};
pub use observe::TracePoints;
pub use snapshot::SnapshotError;
