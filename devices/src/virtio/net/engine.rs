//! The active half of a network device: which event means what.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use tracing::{error, warn};
use virtio_queue::Queue;

use super::rx::{Received, Receiver};
use super::tap::Tap;
use super::tx;
use crate::ActiveHalf;
use crate::virtio::Interrupt;
use crate::virtio::queue::{QueueError, VirtQueue};

/// Moves frames between a tap interface and two queues.
pub struct Engine {
    rx: Receiver,
    tx: VirtQueue,
    tap: Arc<Tap>,
    interrupt: Interrupt,
    /// Whether the loop watches the tap. It does not while the guest has no buffers: frames that
    /// nobody can take would wake it without end.
    tap_watched: bool,
}

impl Engine {
    /// An engine that has not looked at its queues.
    pub fn new(rx: Receiver, tx: VirtQueue, tap: Arc<Tap>, interrupt: Interrupt) -> Self {
        Self { rx, tx, tap, interrupt, tap_watched: false }
    }

    fn receive(&mut self, ops: &mut EventOps) -> Result<(), QueueError> {
        let watch = match self.rx.receive()? {
            Received::Drained | Received::BudgetSpent => true,
            Received::NoBuffers | Received::Broken => false,
        };
        self.watch_tap(watch, ops);
        if self.rx.queue().needs_notification()? {
            self.interrupt.used_buffers();
        }
        Ok(())
    }

    fn watch_tap(&mut self, watch: bool, ops: &mut EventOps) {
        if watch == self.tap_watched {
            return;
        }
        let result =
            if watch { ops.add(Events::new(&*self.tap, EventSet::IN)) } else { ops.remove(Events::empty(&*self.tap)) };
        match result {
            Ok(()) => self.tap_watched = watch,
            Err(reason) => error!(%reason, "The event loop cannot watch the tap interface"),
        }
    }

    fn transmit(&mut self) -> Result<(), QueueError> {
        let tap = &self.tap;
        let interrupt = self.tx.serve(|memory, chain| tx::send(tap, memory, chain).map(|()| 0))?;
        if interrupt {
            self.interrupt.used_buffers();
        }
        Ok(())
    }

    /// Ends the work on both queues after a mistake of the driver.
    fn settle(&mut self, result: Result<(), QueueError>, ops: &mut EventOps) {
        let Err(reason) = result else { return };
        let reason = &reason as &dyn std::error::Error;
        warn!(device = "net", reason, "The device stops until the driver resets it");
        self.watch_tap(false, ops);
        for queue in [self.rx.queue(), &mut self.tx] {
            let _ = ops.remove(Events::empty(queue.kick()));
        }
        self.interrupt.needs_reset();
    }
}

impl MutEventSubscriber for Engine {
    fn init(&mut self, ops: &mut EventOps) {
        for queue in [self.rx.queue(), &mut self.tx] {
            if let Err(reason) = ops.add(Events::new(queue.kick(), EventSet::IN)) {
                error!(device = "net", %reason, "The event loop cannot watch a queue");
                self.interrupt.needs_reset();
                return;
            }
        }
        let result = self.receive(ops).and_then(|()| self.transmit());
        self.settle(result, ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let result = if events.fd() == self.tx.kick().as_raw_fd() {
            self.transmit()
        } else {
            // The tap has frames, or the guest has new buffers for them.
            if events.fd() != self.tap.as_raw_fd() {
                self.rx.queue().acknowledge_kick();
            }
            self.receive(ops)
        };
        self.settle(result, ops);
    }
}

impl ActiveHalf for Engine {
    /// Buffers that wait for frames are the driver's again; what the host sends meanwhile waits in
    /// the tap.
    fn park(self: Box<Self>) -> Vec<Option<Queue>> {
        vec![Some(self.rx.park()), Some(self.tx.park(0))]
    }
}
