//! The active half: requests to make durable what was written, one system call for all that are there.

use std::fs::File;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use tracing::error;
use virtio_queue::Queue;

use crate::ActiveHalf;
use crate::virtio::Interrupt;
use crate::virtio::complaints::STOPS;
use crate::virtio::queue::{CHAINS_PER_WAKE_UP, Chain, QueueError, VirtQueue};

/// The one request there is (section 5.19.6).
const FLUSH: u32 = 0;

/// Answers: done, or not.
const OK: u32 = 0;
const FAILED: u32 = 1;

/// Bytes of an answer.
const ANSWER_SIZE: u32 = 4;

/// Serves requests.
pub struct Engine {
    queue: VirtQueue,
    file: Option<Arc<File>>,
    interrupt: Interrupt,
}

impl Engine {
    /// Takes over the queue.
    pub fn new(queue: VirtQueue, file: Option<Arc<File>>, interrupt: Interrupt) -> Self {
        Self { queue, file, interrupt }
    }

    /// Takes what is there, then makes durable what was written before, then answers.
    fn serve(&mut self) -> Result<bool, QueueError> {
        self.queue.acknowledge_kick();
        let mut requests: Vec<(Chain, u32)> = Vec::new();
        for _ in 0..CHAINS_PER_WAKE_UP {
            match self.queue.pop()? {
                Some(chain) => {
                    let request = self.read(&chain)?;
                    requests.push((chain, request));
                }
                None if self.queue.enable_notification()? => {}
                None => break,
            }
        }
        if requests.len() >= CHAINS_PER_WAKE_UP as usize {
            self.queue.kick_again();
        }
        let flush = requests.iter().any(|(_, request)| *request == FLUSH);
        let flushed = if flush { self.flush() } else { OK };
        for (chain, request) in requests {
            let answer = if request == FLUSH { flushed } else { FAILED };
            let written = chain.writable().write(self.queue.memory(), &answer.to_le_bytes())?;
            self.queue.add_used(chain, u32::try_from(written).unwrap_or(ANSWER_SIZE))?;
        }
        self.queue.needs_notification()
    }

    fn read(&self, chain: &Chain) -> Result<u32, QueueError> {
        if chain.writable().len() < ANSWER_SIZE {
            return Err(chain.malformed());
        }
        let request = chain.readable().read_obj::<u32>(self.queue.memory())?;
        request.map(u32::from_le).ok_or_else(|| chain.malformed())
    }

    fn flush(&self) -> u32 {
        match self.file.as_ref().map(|file| file.sync_data()) {
            None | Some(Ok(())) => OK,
            Some(Err(error)) => {
                self.interrupt.complaints().tell("pmem", &error, "What the guest wrote is not durable");
                FAILED
            }
        }
    }

    fn serve_or_stop(&mut self, ops: &mut EventOps) {
        match self.serve() {
            Ok(true) => self.interrupt.used_buffers(),
            Ok(false) => {}
            Err(reason) => {
                self.interrupt.complaints().tell("pmem", &reason, STOPS);
                let _ = ops.remove(Events::empty(self.queue.kick()));
                self.interrupt.needs_reset();
            }
        }
    }
}

impl ActiveHalf for Engine {
    /// Nothing is in flight between two events.
    fn park(self: Box<Self>) -> Vec<Option<Queue>> {
        vec![Some(self.queue.park(0))]
    }
}

impl MutEventSubscriber for Engine {
    fn init(&mut self, ops: &mut EventOps) {
        match ops.add(Events::new(self.queue.kick(), EventSet::IN)) {
            Ok(()) => self.serve_or_stop(ops),
            Err(reason) => {
                error!(device = "pmem", %reason, "The event loop cannot watch the queue");
                self.interrupt.needs_reset();
            }
        }
    }

    fn process(&mut self, _events: Events, ops: &mut EventOps) {
        self.serve_or_stop(ops);
    }
}
