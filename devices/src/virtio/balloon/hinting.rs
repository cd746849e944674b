//! The pure half of free page hinting (section 5.5.6.5): the host starts a run with a number, the
//! guest answers with that number, then with free pages, then with "stop".

use tracing::debug;

use super::reclaim::discard;
use crate::GuestMemory;
use crate::virtio::queue::{Chain, QueueError};

/// Number that ends the guest's part of a run.
pub const STOP: u32 = 0;
/// Number by which the host says that the guest can have its pages back.
pub const DONE: u32 = 1;
/// The first number of a run.
const FIRST: u32 = 2;

/// The number of the run after `run`.
pub fn next_run(run: u32) -> u32 {
    run.checked_add(1).unwrap_or(FIRST).max(FIRST)
}

/// What the guest says about where it is.
#[derive(Debug)]
pub struct Hints {
    /// The number that the guest sent last.
    guest: u32,
}

/// What a chain led to.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Hinted {
    /// Bytes that went back to the host.
    pub discarded: u64,
    /// The guest has sent all that it has for the run.
    pub complete: bool,
}

impl Hints {
    /// Before the guest's first word.
    pub fn new() -> Self {
        Self { guest: STOP }
    }

    /// Serves one chain while the host's number is `host`. Pages that come under another number are
    /// in use again and stay.
    pub fn serve(&mut self, memory: &GuestMemory, chain: &Chain, host: u32) -> Result<Hinted, QueueError> {
        let mut hinted = Hinted::default();
        if let Some(number) = chain.readable().read_obj::<u32>(memory)?.map(u32::from_le) {
            hinted.complete = number == STOP && self.guest == host && host >= FIRST;
            self.guest = number;
        }
        if self.guest == host && host >= FIRST {
            for (start, len) in chain.writable().ranges() {
                let bytes = discard(memory, start.0..start.0.saturating_add(len.into()));
                hinted.discarded = hinted.discarded.saturating_add(bytes);
            }
        } else if !chain.writable().is_empty() {
            debug!(device = "balloon", guest = self.guest, host, "A hint is too late");
        }
        Ok(hinted)
    }
}
