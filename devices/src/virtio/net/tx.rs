//! Frames from the guest to the host (virtio 1.2 section 5.1.6.2).

use std::os::fd::AsFd;
use std::sync::Arc;

use tracing::trace;
use virtio_queue::Queue;

use super::shared::{Mac, Shared};
use super::tap::Tap;
use super::{FRAMES_PER_WAKE_UP, HEADER_SIZE, MAX_OFFLOADED_FRAME, admit};
use crate::GuestMemory;
use crate::virtio::queue::{Chain, QueueError, Segments, VirtQueue};
use crate::virtio::rate_limiter::RateLimiter;

/// The header and what every frame begins with: two addresses and a type.
const MIN_FRAME: u32 = HEADER_SIZE + 14;
const HEAD_SIZE: usize = MIN_FRAME as usize;

/// Where the source address is in the head.
const SOURCE: std::ops::Range<usize> = HEADER_SIZE as usize + 6..HEADER_SIZE as usize + 12;

/// A transmit queue.
pub struct Transmitter {
    queue: VirtQueue,
    tap: Arc<Tap>,
    shared: Arc<Shared>,
    /// The only source address that frames may have, if it matters.
    only_source: Option<Mac>,
    /// A frame that was taken from the queue and has to wait for the rate limit.
    held: Option<Chain>,
}

impl Transmitter {
    /// A transmitter that has not looked at its queue.
    pub fn new(queue: VirtQueue, tap: Arc<Tap>, shared: Arc<Shared>, only_source: Option<Mac>) -> Self {
        Self { queue, tap, shared, only_source, held: None }
    }

    /// The queue's notifications and interrupts.
    pub fn queue(&mut self) -> &mut VirtQueue {
        &mut self.queue
    }

    /// Gives the queue back, with a frame that waits for the rate limit.
    pub fn park(self) -> Queue {
        self.queue.park(self.held.is_some().into())
    }

    /// Sends frames until there is none, the limit is reached (the limiter's timer then tells when
    /// to go on) or other devices should have their turn (the queue then kicks itself).
    pub fn transmit(&mut self, limiter: &mut Option<RateLimiter>) -> Result<(), QueueError> {
        self.queue.disable_notification()?;
        for _ in 0..FRAMES_PER_WAKE_UP {
            let Some(chain) = self.next()? else {
                if self.queue.enable_notification()? {
                    self.queue.disable_notification()?;
                    continue;
                }
                return Ok(());
            };
            if !admit(limiter, chain.readable().len()) {
                self.held = Some(chain);
                return Ok(());
            }
            self.send(&chain)?;
            self.queue.add_used(chain, 0)?;
        }
        self.queue.kick_again();
        Ok(())
    }

    fn next(&mut self) -> Result<Option<Chain>, QueueError> {
        match self.held.take() {
            Some(chain) => Ok(Some(chain)),
            None => self.queue.pop(),
        }
    }

    /// Sends one frame. A frame that is no frame, or that the host does not take, is lost, as on
    /// any network.
    fn send(&self, chain: &Chain) -> Result<(), QueueError> {
        let (frame, counters) = (chain.readable(), &self.shared.counters);
        let counter = if !(MIN_FRAME..=MAX_OFFLOADED_FRAME).contains(&frame.len()) || !self.shared.link_up() {
            &counters.send_dropped
        } else {
            match self.pass(self.queue.memory(), frame)? {
                Outcome::Sent => &counters.sent,
                Outcome::Spoofed => &counters.spoofed,
                Outcome::Refused => &counters.send_dropped,
            }
        };
        counter.add_one();
        Ok(())
    }

    fn pass(&self, memory: &GuestMemory, frame: Segments<'_>) -> Result<Outcome, QueueError> {
        let sent = match (self.only_source, frame.split_at(MIN_FRAME)) {
            (Some(mac), Some((head, rest))) => {
                // What was checked is what is sent: the guest may change the original meanwhile.
                let mut copy = [0; HEAD_SIZE];
                head.read(memory, &mut copy)?;
                if copy.get(SOURCE) != Some(mac.as_slice()) {
                    return Ok(Outcome::Spoofed);
                }
                rest.buffers(memory)?.write_behind(&copy, self.tap.as_fd())
            }
            _ => frame.buffers(memory)?.write_to(self.tap.as_fd()),
        };
        Ok(match sent {
            Ok(_) => Outcome::Sent,
            Err(error) => {
                trace!(%error, "The host does not take a frame");
                Outcome::Refused
            }
        })
    }
}

enum Outcome {
    Sent,
    Spoofed,
    Refused,
}
