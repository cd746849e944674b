//! The device as its transport sees it.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use seccomp::Confinement;

use super::caller::Caller;
use super::engine::Engine;
use super::rings::memory_table;
use super::session::{Offer, Session, SessionError, connect};
use super::{MAX_QUEUES, Patience, QUEUE_SIZES, VhostUserConfig, VhostUserKind};
use crate::virtio::state::{DeviceState, SaveError};
use crate::virtio::{ActivateError, Activation, VirtioDevice, config_space};
use crate::{GuestMemory, Subscriber};

/// Why a device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum VhostUserError {
    /// No queue, or too many.
    #[error("Device {id} cannot have {queues} request queues: all queues together are 1 to {MAX_QUEUES}")]
    Queues {
        /// The device's name.
        id: String,
        /// What was asked for.
        queues: u16,
    },
    /// Not a power of two, too small or too large.
    #[error("Device {id} cannot have queues of {size}: their size is a power of two from 2 to 1024")]
    QueueSize {
        /// The device's name.
        id: String,
        /// What was asked for.
        size: u16,
    },
    /// Empty, too long, or with a zero byte.
    #[error("Device {id} needs a tag of 1 to 36 bytes, none of them zero")]
    Tag {
        /// The device's name.
        id: String,
    },
    /// No thread to wait for the backend with.
    #[error("Device {id} has nobody to wait for its backend")]
    Caller {
        /// The device's name.
        id: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The backend is not there, or of no use.
    #[error("Device {id} cannot be served by a vhost-user backend")]
    Backend {
        /// The device's name.
        id: String,
        /// Why.
        #[source]
        source: SessionError,
    },
}

/// What both halves know.
pub struct Shared {
    /// The device's name.
    pub id: String,
    /// Where the backend listens.
    pub socket: PathBuf,
    /// What the device is.
    pub kind: VhostUserKind,
    /// Request queues.
    pub requests: u16,
    /// All queues.
    pub queues: u16,
    /// How long to wait for what.
    pub patience: Patience,
    /// Waits for the backend.
    pub caller: Caller,
    /// The configuration space, as the backend told it last.
    config: Mutex<Vec<u8>>,
    /// A connection whose rings are stopped. It is kept, as some backends end with their first connection.
    idle: Mutex<Option<Session>>,
}

impl Shared {
    /// The configuration space.
    pub fn config(&self) -> MutexGuard<'_, Vec<u8>> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection that nobody uses.
    pub fn idle(&self) -> MutexGuard<'_, Option<Session>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The configuration half of a device that another process serves.
pub struct VhostUser {
    shared: Arc<Shared>,
    features: u64,
    queue_sizes: Vec<u16>,
}

impl VhostUser {
    /// Connects to the backend and asks it what it can do. Returns within [`Patience::answers`]. `memory` is what the
    /// backend will see, and must be of files that it can map. `confinement` is for the thread that waits for it.
    pub fn new(
        config: VhostUserConfig,
        memory: &GuestMemory,
        confinement: Confinement,
    ) -> Result<Self, VhostUserError> {
        let VhostUserConfig { id, socket, kind, num_queues: requests, queue_size, patience } = config;
        let Some(queues) = kind.queues(requests) else {
            return Err(VhostUserError::Queues { id, queues: requests });
        };
        if !QUEUE_SIZES.contains(&queue_size) || !queue_size.is_power_of_two() {
            return Err(VhostUserError::QueueSize { id, size: queue_size });
        }
        if !kind.tag_is_possible() {
            return Err(VhostUserError::Tag { id });
        }
        if let Err(source) = memory_table(memory) {
            return Err(VhostUserError::Backend { id, source });
        }
        let caller = match Caller::new(confinement) {
            Ok(caller) => caller,
            Err(source) => return Err(VhostUserError::Caller { id, source }),
        };
        let stream = match connect(&socket) {
            Ok(stream) => stream,
            Err(source) => return Err(VhostUserError::Backend { id, source }),
        };
        let negotiated = stream.try_clone().map_err(SessionError::Descriptor).and_then(|ours| {
            let kind = kind.clone();
            let call = move || Session::negotiate(stream, &kind, requests, queues);
            caller.begin(ours, None, call).wait(patience.answers).unwrap_or(Err(SessionError::NoCaller))
        });
        let (session, Offer { features, config }) = match negotiated {
            Ok(negotiated) => negotiated,
            Err(source) => return Err(VhostUserError::Backend { id, source }),
        };
        let (config, idle) = (Mutex::new(config), Mutex::new(Some(session)));
        let shared = Shared { id, socket, kind, requests, queues, patience, caller, config, idle };
        Ok(Self { shared: Arc::new(shared), features, queue_sizes: vec![queue_size; usize::from(queues)] })
    }

    /// The device's name.
    pub fn id(&self) -> &str {
        &self.shared.id
    }

    #[cfg(test)]
    pub(super) fn lose_patience(&mut self, patience: Patience) {
        Arc::get_mut(&mut self.shared).unwrap().patience = patience;
    }
}

impl VirtioDevice for VhostUser {
    fn device_type(&self) -> u32 {
        self.shared.kind.device_type()
    }

    fn writes_are_known(&self) -> bool {
        false
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        config_space::read(&self.shared.config(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<Subscriber, ActivateError> {
        Ok(Box::new(Engine::new(activation, Arc::clone(&self.shared))?))
    }

    /// What the backend knows is not told to a frontend.
    fn save(&self) -> Result<DeviceState, SaveError> {
        let device = format!("vhost-user device {}", self.shared.id);
        Err(SaveError::Busy { device, reason: "another process serves it" })
    }
}
