//! Virtio 1.2 devices and their MMIO transport.
//!
//! A device is two halves. The configuration half ([`VirtioDevice`]) belongs to the transport
//! and answers register accesses. At `DRIVER_OK` it makes the active half, an
//! [`event_manager::MutEventSubscriber`] that owns the queues and runs on an event loop; at
//! reset the active half is taken out of the loop and dropped, so that no completion can touch
//! a queue after it.

pub mod balloon;
pub mod blk;
pub mod complaints;
pub mod config_space;
pub mod console;
pub mod device;
pub mod fs;
#[cfg(test)]
mod hostile;
pub mod interrupt;
pub mod kernel_vhost;
pub mod mem;
pub mod mmio;
#[cfg(test)]
mod moving;
pub mod net;
pub mod pmem;
pub mod queue;
#[cfg(test)]
mod random;
pub mod rate_limiter;
pub mod rng;
pub mod state;
pub mod vacant;
pub mod vhost_user;
pub mod vsock;
pub mod worker;
pub mod write_log;

pub use device::{ActivateError, Activation, ActiveQueue, VirtioDevice};
pub use interrupt::Interrupt;
pub use mmio::{MmioTransport, ReplaceError};
pub use state::{DeviceState, RestoreError, SaveError, TransportState};
pub use vacant::Vacant;
pub use write_log::WriteLog;
