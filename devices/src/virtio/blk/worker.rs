//! The active half of a block device: from the queues to the engine and back.

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use tracing::{debug, error};
use virtio_queue::Queue;

use super::engine::{Completion, MAX_IN_FLIGHT, SharedEngine, lock};
use super::metrics::{BlkMetrics, RequestKind};
use super::request::{Action, Requests, Status, answer};
use crate::ActiveHalf;
use crate::virtio::complaints::STOPS;
use crate::virtio::queue::{CHAINS_PER_WAKE_UP, Chain, QueueError, VirtQueue};
use crate::virtio::rate_limiter::RateLimiter;
use crate::virtio::{Activation, ActiveQueue, Interrupt};

/// Event data besides the indices of queues.
const ENGINE: u32 = u32::MAX;
const TIMER: u32 = u32::MAX - 1;

/// Serves the queues of a drive.
///
/// ```text
///   kick ──▶ pop ──▶ read ──▶ admitted? ──▶ engine ──▶ completion ──▶ status, used ring, interrupt
///                               │ no                       ▲
///                               └▶ put back, wait for the limiter's timer
/// ```
pub(super) struct Worker {
    queues: Vec<DriveQueue>,
    requests: Requests,
    engine: SharedEngine,
    metrics: BlkMetrics,
    limiter: Option<RateLimiter>,
    interrupt: Interrupt,
    /// By token.
    in_flight: Vec<Option<InFlight>>,
    free: Vec<u16>,
    completions: Vec<Completion>,
}

struct DriveQueue {
    /// `None` when the driver did not enable it.
    queue: Option<VirtQueue>,
    /// It has chains that wait for the limiter or for others to be done.
    waiting: bool,
}

struct InFlight {
    queue: usize,
    chain: Chain,
    /// Bytes written to the chain when it succeeds.
    written: u32,
    kind: RequestKind,
    /// Bytes of its data, for the books.
    bytes: u32,
}

impl Worker {
    /// For an engine that is idle.
    pub fn new(
        activation: Activation,
        requests: Requests,
        engine: SharedEngine,
        metrics: BlkMetrics,
        limiter: Option<RateLimiter>,
    ) -> Self {
        let Activation { memory, queues, acked_features, interrupt } = activation;
        let queue = |active: Option<ActiveQueue>| DriveQueue {
            queue: active.map(|active| VirtQueue::new(active, &memory, acked_features)),
            waiting: false,
        };
        Self {
            queues: queues.into_iter().map(queue).collect(),
            requests,
            engine,
            metrics,
            limiter,
            interrupt,
            in_flight: (0..MAX_IN_FLIGHT).map(|_| None).collect(),
            free: (0..MAX_IN_FLIGHT).rev().collect(),
            completions: Vec::new(),
        }
    }

    /// Starts what queue `index` has, as far as budget, limiter and engine allow.
    fn serve(&mut self, index: usize) -> Result<(), QueueError> {
        let Some(DriveQueue { queue: Some(queue), waiting }) = self.queues.get_mut(index) else { return Ok(()) };
        queue.acknowledge_kick();
        *waiting = false;
        let mut budget = CHAINS_PER_WAKE_UP;
        loop {
            queue.disable_notification()?;
            while budget > 0 {
                let Some(chain) = queue.pop()? else { break };
                let request = self.requests.read(queue.memory(), &chain)?;
                let Some(token) = self.free.pop() else {
                    queue.put_back(chain);
                    *waiting = true;
                    return Ok(());
                };
                if self.limiter.as_mut().is_some_and(|limiter| !limiter.admit(request.bytes.into())) {
                    self.free.push(token);
                    queue.put_back(chain);
                    *waiting = true;
                    return Ok(());
                }
                budget = budget.saturating_sub(1);
                let (written, status) = match request.action {
                    Action::Run { kind, operation, written } => {
                        if let Some(slot) = self.in_flight.get_mut(usize::from(token)) {
                            *slot = Some(InFlight { queue: index, chain, written, kind, bytes: request.bytes });
                        }
                        lock(&self.engine).start(token, operation);
                        continue;
                    }
                    Action::Identify => self.requests.identify(queue.memory(), &chain)?,
                    Action::Refuse(status) => (0, status),
                };
                self.free.push(token);
                let len = answer(queue.memory(), &chain, status, written)?;
                queue.add_used(chain, len)?;
            }
            if budget == 0 {
                queue.kick_again();
                return Ok(());
            }
            if !queue.enable_notification()? {
                return Ok(());
            }
        }
    }

    /// Gives completed chains back to the driver.
    fn complete(&mut self) -> Result<(), QueueError> {
        for Completion { token, result } in std::mem::take(&mut self.completions) {
            let Some(done) = self.in_flight.get_mut(usize::from(token)).and_then(Option::take) else { continue };
            self.free.push(token);
            let Some(DriveQueue { queue: Some(queue), .. }) = self.queues.get_mut(done.queue) else { continue };
            let (status, written) = match result {
                Ok(()) => {
                    self.metrics.done(done.kind, done.bytes);
                    (Status::Ok, done.written)
                }
                Err(error) => {
                    self.metrics.failed(done.kind);
                    debug!(%error, "A disk request fails");
                    (Status::IoError, 0)
                }
            };
            let len = answer(queue.memory(), &done.chain, status, written)?;
            queue.add_used(done.chain, len)?;
        }
        Ok(())
    }

    /// Takes what the engine has done, and starts what waited for it, until both are quiet.
    fn settle(&mut self) -> Result<(), QueueError> {
        let mut engine = lock(&self.engine);
        engine.submit();
        engine.reap(&mut self.completions);
        drop(engine);
        let freed = !self.completions.is_empty();
        self.complete()?;
        if freed {
            self.wake_waiting();
        }
        self.notify()
    }

    /// Makes the loop come back to the queues that wait.
    fn wake_waiting(&self) {
        for DriveQueue { queue, waiting } in &self.queues {
            if let (Some(queue), true) = (queue, waiting) {
                queue.kick_again();
            }
        }
    }

    fn notify(&mut self) -> Result<(), QueueError> {
        let mut wanted = false;
        for queue in self.queues.iter_mut().filter_map(|queue| queue.queue.as_mut()) {
            wanted |= queue.needs_notification()?;
        }
        if wanted {
            self.interrupt.used_buffers();
        }
        Ok(())
    }

    fn handle(&mut self, source: u32) -> Result<(), QueueError> {
        match source {
            ENGINE => {}
            TIMER => {
                if let Some(limiter) = &mut self.limiter {
                    limiter.acknowledge_timer();
                }
                self.wake_waiting();
            }
            index => self.serve(usize::try_from(index).unwrap_or(usize::MAX))?,
        }
        self.settle()
    }

    /// Ends the work on all queues after a mistake of the driver.
    fn end_on_error(&mut self, result: Result<(), QueueError>, ops: &mut EventOps) {
        let Err(reason) = result else { return };
        self.interrupt.complaints().tell("blk", &reason, STOPS);
        // Not looked at again: a queue is in a state that nobody can explain.
        for queue in self.queues.iter().filter_map(|queue| queue.queue.as_ref()) {
            let _ = ops.remove(Events::empty(queue.kick()));
        }
        if let Some(event) = lock(&self.engine).event() {
            let _ = ops.remove(Events::empty(event));
        }
        if let Some(limiter) = &self.limiter {
            let _ = ops.remove(Events::empty(limiter));
        }
        self.interrupt.needs_reset();
    }

    fn watch(&self, ops: &mut EventOps) -> event_manager::Result<()> {
        for (index, queue) in (0..).zip(&self.queues) {
            if let Some(queue) = &queue.queue {
                ops.add(Events::with_data(queue.kick(), index, EventSet::IN))?;
            }
        }
        if let Some(event) = lock(&self.engine).event() {
            ops.add(Events::with_data(event, ENGINE, EventSet::IN))?;
        }
        if let Some(limiter) = &self.limiter {
            ops.add(Events::with_data(limiter, TIMER, EventSet::IN))?;
        }
        Ok(())
    }
}

impl MutEventSubscriber for Worker {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(reason) = self.watch(ops) {
            error!(device = "blk", %reason, "The event loop cannot watch the device");
            self.interrupt.needs_reset();
            return;
        }
        let result = (0..self.queues.len()).try_for_each(|index| self.serve(index)).and_then(|()| self.settle());
        self.end_on_error(result, ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let result = self.handle(events.data());
        self.end_on_error(result, ops);
    }
}

impl ActiveHalf for Worker {
    /// What is under way is done and told to the driver; what waits is left where it is.
    fn park(mut self: Box<Self>) -> Vec<Option<Queue>> {
        lock(&self.engine).drain(&mut self.completions);
        if let Err(reason) = self.complete().and_then(|()| self.notify()) {
            self.interrupt.complaints().tell("blk", &reason, STOPS);
            self.interrupt.needs_reset();
        }
        std::mem::take(&mut self.queues).into_iter().map(|queue| queue.queue.map(|queue| queue.park(0))).collect()
    }
}

impl Drop for Worker {
    /// The driver takes its memory back when this returns: what is under way ends first, and
    /// nobody is told.
    fn drop(&mut self) {
        lock(&self.engine).drain(&mut self.completions);
    }
}
