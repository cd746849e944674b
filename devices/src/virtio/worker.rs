//! The active half of a device whose only input is its queue.

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use tracing::error;
use virtio_queue::Queue;

use crate::virtio::Interrupt;
use crate::virtio::complaints::STOPS;
use crate::virtio::queue::{Chain, QueueError, VirtQueue};
use crate::{ActiveHalf, GuestMemory};

/// The pure half of a device: a chain in, bytes written out. It knows no events.
pub trait ChainHandler: Send {
    /// Serves one chain and returns how many bytes it wrote to it. An error is the driver's
    /// fault and ends the work on the queue; what goes wrong on the host is told to the driver in
    /// the chain, as the device's protocol has it.
    fn handle(&mut self, memory: &GuestMemory, chain: &Chain) -> Result<u32, QueueError>;
}

/// Runs a [`ChainHandler`] on a queue.
pub struct QueueWorker<H> {
    name: &'static str,
    queue: VirtQueue,
    handler: H,
    interrupt: Interrupt,
}

impl<H: ChainHandler> QueueWorker<H> {
    /// A worker that logs as `name`.
    pub fn new(name: &'static str, queue: VirtQueue, handler: H, interrupt: Interrupt) -> Self {
        Self { name, queue, handler, interrupt }
    }

    fn serve(&mut self, ops: &mut EventOps) {
        match self.queue.serve(|memory, chain| self.handler.handle(memory, chain)) {
            Ok(true) => self.interrupt.used_buffers(),
            Ok(false) => {}
            Err(reason) => {
                self.interrupt.complaints().tell(self.name, &reason, STOPS);
                // Not looked at again: the queue is in a state that nobody can explain.
                let _ = ops.remove(Events::empty(self.queue.kick()));
                self.interrupt.needs_reset();
            }
        }
    }
}

impl<H: ChainHandler> MutEventSubscriber for QueueWorker<H> {
    fn init(&mut self, ops: &mut EventOps) {
        match ops.add(Events::new(self.queue.kick(), EventSet::IN)) {
            Ok(()) => self.serve(ops),
            Err(reason) => {
                error!(device = self.name, %reason, "The event loop cannot watch the queue");
                self.interrupt.needs_reset();
            }
        }
    }

    fn process(&mut self, _events: Events, ops: &mut EventOps) {
        self.serve(ops);
    }
}

impl<H: ChainHandler> ActiveHalf for QueueWorker<H> {
    /// Nothing is in flight between two events.
    fn park(self: Box<Self>) -> Vec<Option<Queue>> {
        vec![Some(self.queue.park(0))]
    }
}
