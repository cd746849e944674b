//! The active half: requests within the limits of the device.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use tracing::{debug, error};
use virtio_queue::Queue;

use super::MAX_REQUEST;
use crate::virtio::Interrupt;
use crate::virtio::complaints::STOPS;
use crate::virtio::queue::{CHAINS_PER_WAKE_UP, Chain, QueueError, VirtQueue};
use crate::virtio::rate_limiter::RateLimiter;
use crate::{ActiveHalf, GuestMemory};

const KICK: u32 = 0;
const TIMER: u32 = 1;

/// Serves requests.
pub struct Engine {
    queue: VirtQueue,
    source: Arc<File>,
    limiter: RateLimiter,
    interrupt: Interrupt,
}

impl Engine {
    /// Takes over the queue.
    pub fn new(queue: VirtQueue, source: Arc<File>, limiter: RateLimiter, interrupt: Interrupt) -> Self {
        Self { queue, source, limiter, interrupt }
    }

    /// Serves what is there until the limits or the budget of a wake-up are reached.
    fn serve(&mut self) -> Result<bool, QueueError> {
        for _ in 0..CHAINS_PER_WAKE_UP {
            let Some(chain) = self.queue.pop()? else {
                if self.queue.enable_notification()? {
                    continue;
                }
                return self.queue.needs_notification();
            };
            let len = chain.writable().len().min(MAX_REQUEST);
            if !self.limiter.admit(len.into()) {
                // It is the first one when the timer is due.
                self.queue.put_back(chain);
                return self.queue.needs_notification();
            }
            let filled = fill(self.queue.memory(), &self.source, &chain, len)?;
            self.queue.add_used(chain, filled)?;
        }
        self.queue.kick_again();
        self.queue.needs_notification()
    }

    fn serve_or_stop(&mut self, ops: &mut EventOps) {
        match self.serve() {
            Ok(true) => self.interrupt.used_buffers(),
            Ok(false) => {}
            Err(reason) => {
                self.interrupt.complaints().tell("rng", &reason, STOPS);
                let _ = ops.remove(Events::empty(self.queue.kick()));
                let _ = ops.remove(Events::empty(&self.limiter));
                self.interrupt.needs_reset();
            }
        }
    }
}

/// The pure half: fills the first `len` writable bytes of a chain; returns how many it filled.
fn fill(memory: &GuestMemory, source: &File, chain: &Chain, len: u32) -> Result<u32, QueueError> {
    let (part, _) = chain.writable().split_at(len).ok_or_else(|| chain.malformed())?;
    let filled = part.buffers(memory)?.read_from(source.as_fd()).unwrap_or_else(|error| {
        debug!(%error, "No entropy can be read");
        0
    });
    Ok(u32::try_from(filled).unwrap_or(len))
}

impl ActiveHalf for Engine {
    /// Nothing is in flight between two events: what the limits hold back is still in the queue.
    fn park(self: Box<Self>) -> Vec<Option<Queue>> {
        vec![Some(self.queue.park(0))]
    }
}

impl MutEventSubscriber for Engine {
    fn init(&mut self, ops: &mut EventOps) {
        let watched = ops
            .add(Events::with_data(self.queue.kick(), KICK, EventSet::IN))
            .and_then(|()| ops.add(Events::with_data(&self.limiter, TIMER, EventSet::IN)));
        match watched {
            Ok(()) => self.serve_or_stop(ops),
            Err(reason) => {
                error!(device = "rng", %reason, "The event loop cannot watch the device");
                self.interrupt.needs_reset();
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            TIMER => self.limiter.acknowledge_timer(),
            _ => self.queue.acknowledge_kick(),
        }
        self.serve_or_stop(ops);
    }
}
