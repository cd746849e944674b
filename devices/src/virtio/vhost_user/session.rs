//! A connection with a backend: what it can do, and the set-up of rings.
//!
//! Every call here may wait for the backend and is made through [`Caller`](super::caller::Caller).

use std::fs::File;
use std::io;
use std::mem::{offset_of, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vhost::VhostBackend;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use vm_memory::GuestMemoryError;

use super::VhostUserKind;
use super::rings::{Rings, memory_table};

/// Why there is no use in a backend, at least for now.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// Nobody listens, or nobody takes connections.
    #[error("Cannot connect to the vhost-user backend at {path}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The connection broke, the backend refused, or its answer made no sense.
    #[error("The vhost-user backend does not do {call}")]
    Call {
        /// The message of the protocol.
        call: &'static str,
        /// Why.
        #[source]
        source: vhost::Error,
    },
    /// The thread that waits for the backend is gone.
    #[error("Nobody waits for the vhost-user backend")]
    NoCaller,
    /// A device of before virtio 1.0, or a backend of before protocol features.
    #[error(
        "The vhost-user backend lacks what is needed: its features are {features:#x}, its protocol's {protocol:#x}"
    )]
    Lacking {
        /// Virtio features.
        features: u64,
        /// Protocol features.
        protocol: u64,
    },
    /// Too few queues.
    #[error("The vhost-user backend has {has} queues, and {needed} are needed")]
    Queues {
        /// What it has.
        has: u64,
        /// What the device needs.
        needed: u64,
    },
    /// Another backend than the one that the driver agreed with.
    #[error("The vhost-user backend has withdrawn the features {missing:#x}")]
    Withdrawn {
        /// What the driver uses and the backend has not.
        missing: u64,
    },
    /// It hung up, or spoke without being asked.
    #[error("The vhost-user backend has left")]
    Lost,
    /// Nobody knows what a backend that died had begun.
    #[error("The vhost-user backend that died did not work in order, and the new one does not know what is left to do")]
    Disorder,
    /// The backend could not map it.
    #[error("Guest memory at {address:#x} is not shared: a vhost-user backend cannot see it")]
    PrivateMemory {
        /// Guest physical address of the region.
        address: u64,
    },
    /// A ring is not in guest memory.
    #[error("Guest address {address:#x} is not guest memory")]
    Memory {
        /// Guest physical address.
        address: u64,
        /// Why.
        #[source]
        source: GuestMemoryError,
    },
    /// A descriptor could not be made.
    #[error("Cannot make a descriptor for a vhost-user backend")]
    Descriptor(#[source] io::Error),
}

/// What a backend offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Virtio features, as the driver may see them.
    pub features: u64,
    /// The device configuration space.
    pub config: Vec<u8>,
}

/// Memory in which a backend notes the requests that it has begun. It outlives the backend, whose successor learns from
/// it what to do again.
pub struct Inflight {
    shape: VhostUserInflight,
    file: File,
}

/// A connection with a backend that has told what it can do.
pub struct Session {
    frontend: Frontend,
    socket: UnixStream,
    protocol: VhostUserProtocolFeatures,
    backend_features: u64,
}

/// Names the message that failed.
fn failed(call: &'static str) -> impl FnOnce(vhost::Error) -> SessionError {
    move |source| SessionError::Call { call, source }
}

impl Session {
    /// Asks a backend at the other end of `socket` what it can do.
    pub fn negotiate(
        socket: UnixStream,
        kind: &VhostUserKind,
        requests: u16,
        queues: u16,
    ) -> Result<(Self, Offer), SessionError> {
        use VhostUserProtocolFeatures as Protocol;
        let theirs = socket.try_clone().map_err(SessionError::Descriptor)?;
        let mut frontend = Frontend::from_stream(theirs, queues.into());
        frontend.set_owner().map_err(failed("SET_OWNER"))?;
        let features = frontend.get_features().map_err(failed("GET_FEATURES"))?;
        let needed = (1 << VIRTIO_F_VERSION_1) | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        if features & needed != needed {
            return Err(SessionError::Lacking { features, protocol: 0 });
        }
        let offered = frontend.get_protocol_features().map_err(failed("GET_PROTOCOL_FEATURES"))?;
        let protocol = offered & kind.protocol();
        let config_size = kind.backend_config_size();
        if config_size.is_some() && !protocol.contains(Protocol::CONFIG) {
            return Err(SessionError::Lacking { features, protocol: offered.bits() });
        }
        frontend.set_protocol_features(protocol).map_err(failed("SET_PROTOCOL_FEATURES"))?;
        if protocol.contains(Protocol::REPLY_ACK) {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        // Without the extension there is no way to ask; a backend that has too few then refuses their set-up.
        if protocol.contains(Protocol::MQ) {
            let has = frontend.get_queue_num().map_err(failed("GET_QUEUE_NUM"))?;
            if has < queues.into() {
                return Err(SessionError::Queues { has, needed: queues.into() });
            }
        }
        let mut told = Vec::new();
        if let Some(size) = config_size {
            told = get_config(&mut frontend, size)?;
        }
        let offer = Offer { features: kind.features(features, &told), config: kind.config(told, requests) };
        Ok((Self { frontend, socket, protocol, backend_features: features }, offer))
    }

    /// For telling when the backend is gone.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Whether the backend notes what it has begun.
    pub fn tracks_inflight(&self) -> bool {
        self.protocol.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    }

    /// Tells the backend of memory and rings and lets it begin. `bases` are the indices of the available rings to begin
    /// at. A backend that notes what it begins does so in `inflight`, or in memory that it makes.
    pub fn set_up(
        &mut self,
        rings: &Rings,
        bases: &[u16],
        inflight: Option<Arc<Inflight>>,
    ) -> Result<Option<Arc<Inflight>>, SessionError> {
        let missing = rings.features & !self.backend_features;
        if missing != 0 {
            return Err(SessionError::Withdrawn { missing });
        }
        let frontend = &mut self.frontend;
        let features = rings.features | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        frontend.set_features(features).map_err(failed("SET_FEATURES"))?;
        let inflight = if self.protocol.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD) {
            Some(share_inflight(frontend, rings, inflight)?)
        } else {
            None
        };
        frontend.set_mem_table(&memory_table(&rings.memory)?).map_err(failed("SET_MEM_TABLE"))?;
        for (ring, base) in rings.list.iter().zip(bases) {
            let index = ring.index;
            frontend.set_vring_num(index, ring.place.queue_size).map_err(failed("SET_VRING_NUM"))?;
            frontend.set_vring_base(index, *base).map_err(failed("SET_VRING_BASE"))?;
            frontend.set_vring_addr(index, &ring.place).map_err(failed("SET_VRING_ADDR"))?;
            frontend.set_vring_call(index, &rings.call).map_err(failed("SET_VRING_CALL"))?;
            frontend.set_vring_kick(index, &ring.kick).map_err(failed("SET_VRING_KICK"))?;
            frontend.set_vring_enable(index, true).map_err(failed("SET_VRING_ENABLE"))?;
        }
        Ok(inflight)
    }

    /// Makes the backend leave the rings alone, and returns for each the index of the available ring that it would have
    /// looked at next.
    pub fn stop(&mut self, rings: &Rings) -> Result<Vec<u16>, SessionError> {
        let mut bases = Vec::with_capacity(rings.list.len());
        for ring in &rings.list {
            let base = self.frontend.get_vring_base(ring.index).map_err(failed("GET_VRING_BASE"))?;
            // Indices have 16 bits; what is above is no part of it (the packed ring's wrap counters).
            bases.push(u16::try_from(base & u32::from(u16::MAX)).unwrap_or_default());
        }
        Ok(bases)
    }
}

fn get_config(frontend: &mut Frontend, size: usize) -> Result<Vec<u8>, SessionError> {
    let room = vec![0; size];
    let length = u32::try_from(size).unwrap_or(u32::MAX);
    let (_, mut config) =
        frontend.get_config(0, length, VhostUserConfigFlags::empty(), &room).map_err(failed("GET_CONFIG"))?;
    config.resize(size, 0);
    Ok(config)
}

fn share_inflight(
    frontend: &mut Frontend,
    rings: &Rings,
    kept: Option<Arc<Inflight>>,
) -> Result<Arc<Inflight>, SessionError> {
    let inflight = match kept {
        Some(inflight) => inflight,
        None => {
            let queues = rings.list.iter().map(|ring| ring.index).max().unwrap_or_default().saturating_add(1);
            let num_queues = u16::try_from(queues).unwrap_or(u16::MAX);
            let wanted = VhostUserInflight { mmap_size: 0, mmap_offset: 0, num_queues, queue_size: rings.max_size };
            let (mut shape, file) = frontend.get_inflight_fd(&wanted).map_err(failed("GET_INFLIGHT_FD"))?;
            // What is passed on is what was asked for; how large the memory is is between one backend and the next.
            (shape.num_queues, shape.queue_size) = (num_queues, rings.max_size);
            Arc::new(Inflight { shape, file })
        }
    };
    frontend.set_inflight_fd(&inflight.shape, inflight.file.as_raw_fd()).map_err(failed("SET_INFLIGHT_FD"))?;
    Ok(inflight)
}

/// Connects without waiting: a backend that takes no connections is away.
pub fn connect(path: &Path) -> Result<UnixStream, SessionError> {
    connect_now(path).map_err(|source| SessionError::Connect { path: path.to_owned(), source })
}

fn connect_now(path: &Path) -> io::Result<UnixStream> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no memory is involved; the result is checked.
    let fd = unsafe { libc::socket(libc::AF_UNIX, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a system call just returned it as a new descriptor.
    let socket = UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
    let bytes = path.as_os_str().as_bytes();
    // SAFETY: all zeroes is a value of this structure of integers.
    let mut address: libc::sockaddr_un = unsafe { zeroed() };
    // The last byte stays zero.
    if bytes.len() >= address.sun_path.len() || bytes.contains(&0) {
        return Err(io::ErrorKind::InvalidFilename.into());
    }
    address.sun_family = libc::sa_family_t::try_from(libc::AF_UNIX).unwrap_or_default();
    for (target, source) in address.sun_path.iter_mut().zip(bytes) {
        *target = source.cast_signed();
    }
    let length = offset_of!(libc::sockaddr_un, sun_path).saturating_add(bytes.len()).saturating_add(1);
    let length = libc::socklen_t::try_from(length).unwrap_or_default();
    // SAFETY: `address` has at least `length` bytes.
    if unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length) } < 0 {
        return Err(io::Error::last_os_error());
    }
    socket.set_nonblocking(false)?;
    Ok(socket)
}
