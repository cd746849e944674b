//! virtio-vsock (virtio 1.2 section 5.10): stream sockets between the guest and this process.
//!
//! Connections end in descriptors of this process: no vhost module, no helper. Whoever embeds
//! the device makes and takes them through a [`Connector`]; other programs through a Unix socket
//! in the way that Firecracker and cloud-hypervisor have made usual: a client writes
//! `CONNECT <port>\n` and reads `OK <host port>\n`, and the guest's connections to the host's
//! `<port>` go to the Unix socket `<path>_<port>`.
//!
//! | file | what |
//! | --- | --- |
//! | `packet` | the header on the wire |
//! | `credit`, `connection` | the protocol of one connection: pure state |
//! | `stream` | the host end: a descriptor and a bounded buffer |
//! | `link` | one connection with its host end |
//! | `muxer` | all of them; knows no queue |
//! | `uds` | the Unix socket and the words spoken on it |
//! | `engine` | queues and events: the active half |
//! | `kernel` | another device in place of all this: connections of the host's vhost-vsock |
//!
//! Bytes go between guest memory and descriptor without a copy in this process. The one buffer
//! is for what the guest sent faster than its receiver reads; credit bounds it. Towards the
//! guest there is none: a descriptor is read when the guest has credit and buffers for it.

mod connection;
mod connector;
mod credit;
mod engine;
mod kernel;
mod link;
mod muxer;
mod packet;
mod stream;
#[cfg(test)]
mod tests;
mod uds;

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

pub use self::connector::{ConnectError, Connector};
pub use self::kernel::{KernelVsock, KernelVsockConfig};
pub use self::stream::HostEnd;

use self::connector::{Shared, lock};
use self::engine::Engine;
use self::muxer::Muxer;
use self::uds::UdsServer;
use crate::Subscriber;
use crate::virtio::kernel_vhost::VhostError;
use crate::virtio::queue::RING_FEATURES;
use crate::virtio::{ActivateError, Activation, DeviceState, RestoreError, SaveError, VirtioDevice, config_space};

/// Most connections at a time, those being made included. Each takes a descriptor of the process.
pub const MAX_CONNECTIONS: usize = 1023;

/// Receive, transmit and event queue. Linux fills the receive queue with 4 KiB buffers of two
/// descriptors each and keeps them: 128 descriptors are 256 KiB of the guest's memory, which is
/// also its default credit for one connection.
const QUEUE_SIZES: [u16; 3] = [128, 128, 16];

/// Context ids from here on belong to guests (section 5.10.4); the last one is "any".
const FIRST_GUEST_CID: u64 = 3;
const LAST_GUEST_CID: u64 = u32::MAX as u64 - 1;

/// How a vsock device is made.
#[derive(Clone, Debug)]
pub struct VsockConfig {
    /// The guest's context id, 3 to 2^32 - 2.
    pub guest_cid: u64,
    /// Where the Unix socket is made for other programs, if one is wanted.
    pub uds_path: Option<PathBuf>,
}

/// Why a vsock device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The context id is reserved or too large.
    #[error("Context id {0} cannot be a guest's: it must be from 3 to 4294967294")]
    GuestCid(u64),
    /// The Unix socket could not be made.
    #[error("Cannot listen on the Unix socket {path}")]
    Listen {
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The host's vhost-vsock does not do it.
    #[error(transparent)]
    Vhost(#[from] VhostError),
    /// The event descriptor could not be made.
    #[error("Cannot make an event descriptor")]
    EventFd(#[source] io::Error),
}

/// The configuration half of a vsock device.
pub struct Vsock {
    guest_cid: u64,
    shared: Arc<Shared>,
    parking: Arc<Parking>,
    uds: Option<Arc<UdsServer>>,
}

impl Vsock {
    /// Makes the device, and listens on its Unix socket if it has one.
    pub fn new(config: VsockConfig) -> Result<(Vsock, Connector), VsockError> {
        let VsockConfig { guest_cid, uds_path } = config;
        if !(FIRST_GUEST_CID..=LAST_GUEST_CID).contains(&guest_cid) {
            return Err(VsockError::GuestCid(guest_cid));
        }
        let shared = Arc::new(Shared::new().map_err(VsockError::EventFd)?);
        let uds = match uds_path {
            Some(path) => {
                let server = UdsServer::bind(path.clone()).map_err(|source| VsockError::Listen { path, source })?;
                Some(Arc::new(server))
            }
            None => None,
        };
        let connector = Connector::new(Arc::clone(&shared));
        Ok((Self { guest_cid, shared, parking: Arc::default(), uds }, connector))
    }
}

/// What an active half leaves for the next one when it is parked.
#[derive(Default)]
struct Parking {
    /// The connections.
    muxer: Mutex<Option<Muxer>>,
    reset: Mutex<TransportReset>,
}

/// How far the driver is with the news that all its connections are gone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum TransportReset {
    /// There is none, or the driver has acted on it.
    #[default]
    Done,
    /// It is still to be told.
    Owed,
    /// It was told when `avail.idx` of the event queue was this. Until it gives a buffer back no connection is begun: a
    /// driver that has not come to the event yet, as Linux may not for it looks at the receive queue first, would take
    /// it for one of the old ones.
    Told(u16),
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// No bit for streams: without any type's bit, streams are what is supported (section
    /// 5.10.3.2), and drivers from before that bit existed do not know it.
    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        config_space::read(&self.guest_cid.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<Subscriber, ActivateError> {
        let parked = lock(&self.parking.muxer).take();
        let muxer = parked.unwrap_or_else(|| Muxer::new(self.guest_cid, Arc::clone(&self.shared), self.uds.clone()));
        let (shared, parking) = (Arc::clone(&self.shared), Arc::clone(&self.parking));
        Ok(Box::new(Engine::new(activation, muxer, shared, parking, self.uds.clone())?))
    }

    fn reset(&mut self) {
        drop(lock(&self.parking.muxer).take());
        *lock(&self.parking.reset) = TransportReset::Done;
    }

    /// Connections do not survive: their host ends are this process's.
    fn save(&self) -> Result<DeviceState, SaveError> {
        DeviceState::encode(VIRTIO_ID_VSOCK, &self.shared.upcoming_port())
    }

    /// The guest is told that its connections are gone (section 5.10.6.7), and asks for its context
    /// id again, which may be another one. Host ports go on in turn, so that none is one of theirs.
    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        // The first version of the state knew no port.
        if state.expect_nothing(VIRTIO_ID_VSOCK).is_err() {
            self.shared.set_upcoming_port(state.decode(VIRTIO_ID_VSOCK)?);
        }
        *lock(&self.parking.reset) = TransportReset::Owed;
        Ok(())
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        self.shared.close();
        if let Some(uds) = &self.uds {
            uds.unlink();
        }
    }
}
