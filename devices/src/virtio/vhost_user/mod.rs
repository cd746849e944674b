//! vhost-user: devices whose queues another process serves, which maps guest memory for it.
//!
//! The backend takes notifications from the ioeventfds and gives interrupts to the irqfd itself: no data and no event
//! passes through this process. What is here is the other half, the frontend: it finds out what the backend can do
//! ([`session`]), tells it where memory and rings are ([`rings`]), and when the backend dies it waits for another and
//! resumes the rings where they were ([`engine`]).
//!
//! A backend is a program of the host that sees all of the guest's memory, so it may do to the guest what it likes. It
//! may not harm this process: every wait for it has a deadline and is made by a thread of the device's own
//! ([`caller`]), and what it says is checked before it is used. What it leaves in the guest's rings is looked at only
//! to find out where to resume.
//!
//! Without `VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD` a backend that died tells nothing of what it had begun. Rings are then
//! resumed at the used index, which is right when nothing was left to do or requests were completed in order; where the
//! rings show otherwise, the device asks for a reset instead of doing some twice and some never ([`resume`]).

mod backoff;
mod caller;
mod device;
mod engine;
mod kind;
mod resume;
mod rings;
mod session;
#[cfg(test)]
pub(in crate::virtio) mod tests;

use std::path::PathBuf;
use std::time::Duration;

pub use device::{VhostUser, VhostUserError};
pub use kind::VhostUserKind;
pub use session::SessionError;

/// Most queues of a device: its ring addresses and notifications are all set up in one go, against one deadline.
pub const MAX_QUEUES: u16 = 64;

/// Size of each queue.
const QUEUE_SIZES: std::ops::RangeInclusive<u16> = 2..=1024;

/// A device that another process serves.
#[derive(Clone, Debug)]
pub struct VhostUserConfig {
    /// Its name, for messages.
    pub id: String,
    /// The Unix socket that the backend listens on.
    pub socket: PathBuf,
    /// What it is to the guest.
    pub kind: VhostUserKind,
    /// Request queues of a disk or a file system; an interface has its two. With what else the kind has, up to
    /// [`MAX_QUEUES`].
    pub num_queues: u16,
    /// Size of each queue, a power of two from 2 to 1024.
    pub queue_size: u16,
    /// How long to wait for what.
    pub patience: Patience,
}

/// How long a device waits for its backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// For all answers that one set-up, or one stop, needs.
    pub answers: Duration,
    /// Before the first attempt to reconnect; doubled with each that fails.
    pub first_retry: Duration,
    /// Before any attempt to reconnect.
    pub longest_retry: Duration,
    /// For a backend to come back; then the device asks its driver for a reset, which begins anew.
    pub absence: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            answers: Duration::from_secs(10),
            first_retry: Duration::from_millis(10),
            longest_retry: Duration::from_secs(1),
            absence: Duration::from_secs(60),
        }
    }
}
