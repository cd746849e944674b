//! Devices with backends that are what a test says: friendly, dead, lying; and real ones.

mod daemons;
mod hostile;
mod lifecycle;
mod limits;
mod scripted;

use std::path::Path;
use std::time::Duration;

use seccomp::Confinement;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::*;
use crate::testkit::{Buffer, Guest, Running};
use crate::virtio::VirtioDevice;
use scripted::{Backend, Message, Reaction, Script};

/// Requests of the protocol, by number.
const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_QUEUE_NUM: u32 = 17;
const SET_VRING_ENABLE: u32 = 18;
const GET_CONFIG: u32 = 24;
const GET_INFLIGHT_FD: u32 = 31;
const SET_INFLIGHT_FD: u32 = 32;

/// Protocol features.
const REPLY_ACK: u64 = 1 << 3;
const CONFIG: u64 = 1 << 9;
const MQ: u64 = 1;
const INFLIGHT: u64 = 1 << 12;

/// `VHOST_USER_F_PROTOCOL_FEATURES`
const PROTOCOL: u64 = 1 << 30;

/// `VIRTIO_BLK_F_FLUSH`
const FLUSH: u64 = 1 << 9;

/// Status bits.
const NEEDS_RESET: u32 = 0x40;

/// For a backend that answers and comes back in its own time.
const PATIENCE: Patience = Patience {
    answers: Duration::from_secs(10),
    first_retry: Duration::from_millis(1),
    longest_retry: Duration::from_millis(20),
    absence: Duration::from_secs(60),
};

/// For a backend that is given up.
const LITTLE_PATIENCE: Patience =
    Patience { answers: Duration::from_millis(50), absence: Duration::from_millis(50), ..PATIENCE };

fn blk(socket: &Path) -> VhostUserConfig {
    VhostUserConfig {
        id: "disk".into(),
        socket: socket.into(),
        kind: VhostUserKind::Blk,
        num_queues: 1,
        queue_size: 16,
        patience: PATIENCE,
    }
}

fn make(config: VhostUserConfig) -> Result<VhostUser, VhostUserError> {
    VhostUser::new(config, &crate::testkit::memory(), Confinement::On)
}

/// Makes devices with a friendly backend.
pub fn friendly() -> impl FnMut() -> VhostUser {
    let backend = Backend::new(Script::default());
    move || make(blk(&backend.socket())).unwrap()
}

/// A device with `backend`, up and running with `FLUSH`.
fn start(backend: &Backend) -> Running {
    start_with(blk(&backend.socket()))
}

fn start_with(config: VhostUserConfig) -> Running {
    Guest::new(Box::new(make(config).unwrap())).start(FLUSH)
}

/// A device that has no patience with its backend once it has been made, and may have given up already.
fn start_impatient(config: VhostUserConfig) -> Running {
    let mut device = make(config).unwrap();
    device.lose_patience(LITTLE_PATIENCE);
    Guest::new(Box::new(device)).bring_up(FLUSH, |_, _| ())
}
