//! Frames from the host to the guest (virtio 1.2 section 5.1.6.3 and 5.1.6.4).

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use tracing::warn;
use virtio_queue::Queue;

use super::shared::Shared;
use super::tap::Tap;
use super::{FRAMES_PER_WAKE_UP, HEADER_SIZE, admit};
use crate::virtio::queue::{Chain, GuestBuffers, QueueError, VirtQueue};
use crate::virtio::rate_limiter::RateLimiter;

/// Position of `num_buffers` in the header (section 5.1.6).
const NUM_BUFFERS: u32 = 10;

/// Why a round of receiving ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// The host has no frame.
    Drained,
    /// The guest has no buffer. It was asked to notify when it has.
    NoBuffers,
    /// There may be more of both.
    BudgetSpent,
    /// The rate limit is reached; the limiter's timer tells when to go on.
    Limited,
    /// The interface does not work any more.
    Broken,
}

/// The receive queue.
pub struct Receiver {
    queue: VirtQueue,
    tap: Arc<Tap>,
    shared: Arc<Shared>,
    /// Buffers that the guest has given and no frame has filled yet, oldest first. Each has room
    /// for a header; together they are bounded by the queue's size.
    pending: VecDeque<Chain>,
    /// Bytes in `pending`.
    room: u64,
    /// Whether a frame may be spread over several buffers.
    merge: bool,
    max_frame: u32,
    /// Length of a frame that is in the buffers already and has to wait for the rate limit.
    held: Option<u32>,
}

impl Receiver {
    /// A receiver that has not looked at its queue, for frames of up to `max_frame` bytes with
    /// their headers.
    pub fn new(queue: VirtQueue, tap: Arc<Tap>, shared: Arc<Shared>, merge: bool, max_frame: u32) -> Self {
        Self { queue, tap, shared, pending: VecDeque::new(), room: 0, merge, max_frame, held: None }
    }

    /// The queue's notifications and interrupts.
    pub fn queue(&mut self) -> &mut VirtQueue {
        &mut self.queue
    }

    /// Delivers a frame that waits for the rate limit: it is not the host's any more. Returns
    /// whether the driver wants an interrupt.
    pub fn finish(&mut self) -> Result<bool, QueueError> {
        if let Some(len) = self.held.take() {
            self.deliver(len)?;
        }
        self.queue.needs_notification()
    }

    /// Gives the queue back with the buffers that no frame has filled.
    pub fn park(self) -> Queue {
        // Each takes at least one entry of a queue whose size is 16 bits.
        self.queue.park(u16::try_from(self.pending.len()).unwrap_or(u16::MAX))
    }

    /// Delivers frames while there are frames and buffers.
    pub fn receive(&mut self, limiter: &mut Option<RateLimiter>) -> Result<Received, QueueError> {
        self.queue.disable_notification()?;
        for _ in 0..FRAMES_PER_WAKE_UP {
            if self.held.is_none() {
                if !self.find_room()? {
                    return Ok(Received::NoBuffers);
                }
                let read = self.host_buffers()?.read_from(self.tap.as_fd());
                match read {
                    Ok(len) => self.held = self.whole(len),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Received::Drained),
                    Err(error) => {
                        warn!(%error, "The tap interface gives no frames any more");
                        return Ok(Received::Broken);
                    }
                }
            }
            let Some(len) = self.held else { continue };
            if !admit(limiter, len) {
                return Ok(Received::Limited);
            }
            self.held = None;
            self.deliver(len)?;
            self.shared.counters.received.add_one();
        }
        Ok(Received::BudgetSpent)
    }

    /// Takes buffers until the largest frame fits, or there are no more. False when there is none
    /// at all; the guest will notify then.
    fn find_room(&mut self) -> Result<bool, QueueError> {
        loop {
            while self.pending.is_empty() || (self.merge && self.room < u64::from(self.max_frame)) {
                let Some(chain) = self.queue.pop()? else { break };
                let len = chain.writable().len();
                if len < HEADER_SIZE {
                    self.queue.add_used(chain, 0)?;
                    continue;
                }
                self.room = self.room.saturating_add(len.into());
                self.pending.push_back(chain);
            }
            // A buffer may have come before the guest saw that it has to notify.
            if !self.pending.is_empty() || !self.queue.enable_notification()? {
                return Ok(!self.pending.is_empty());
            }
        }
    }

    /// Where the next frame goes.
    fn host_buffers(&self) -> Result<GuestBuffers<'_>, QueueError> {
        let mut buffers = GuestBuffers::default();
        let count = if self.merge { self.pending.len() } else { 1 };
        for chain in self.pending.iter().take(count) {
            chain.writable().append_to(self.queue.memory(), &mut buffers)?;
        }
        Ok(buffers)
    }

    /// The length of a frame of which `len` bytes were read, if that is all of it.
    fn whole(&self, len: usize) -> Option<u32> {
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        let offered =
            if self.merge { self.room } else { self.pending.front().map_or(0, |chain| chain.writable().len().into()) };
        // The kernel cuts a frame to what fits without a word. A frame that fills buffers which
        // are too small for the largest one is taken for cut and dropped; its buffers stay.
        let cut = u64::from(len) >= offered && offered < u64::from(self.max_frame);
        if cut || len < HEADER_SIZE {
            self.shared.counters.receive_dropped.add_one();
            return None;
        }
        Some(len)
    }

    /// Gives the buffers that a frame of `len` bytes has filled back to the guest.
    fn deliver(&mut self, len: u32) -> Result<(), QueueError> {
        let mut filled = Vec::new();
        let mut left = len;
        while left > 0 {
            let Some(chain) = self.pending.pop_front() else { break };
            let size = chain.writable().len();
            self.room = self.room.saturating_sub(size.into());
            let used = size.min(left);
            left = left.saturating_sub(used);
            filled.push((chain, used));
        }
        self.write_num_buffers(&filled)?;
        self.queue.add_used_together(filled)
    }

    /// The kernel leaves this field of the header to whoever knows how many buffers there are.
    fn write_num_buffers(&self, filled: &[(Chain, u32)]) -> Result<(), QueueError> {
        let count = u16::try_from(filled.len()).unwrap_or(u16::MAX);
        if let Some((first, _)) = filled.first()
            && let Some((_, field)) = first.writable().split_at(NUM_BUFFERS)
        {
            field.write(self.queue.memory(), &count.to_le_bytes())?;
        }
        Ok(())
    }
}
