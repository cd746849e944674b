//! The active half of a network device: which event means what.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use tracing::{error, warn};
use virtio_queue::Queue;

use super::control::Control;
use super::rx::{Received, Receiver};
use super::shared::Shared;
use super::tap::Tap;
use super::tx::Transmitter;
use crate::ActiveHalf;
use crate::virtio::Interrupt;
use crate::virtio::complaints::STOPS;
use crate::virtio::queue::{QueueError, VirtQueue};
use crate::virtio::rate_limiter::RateLimiter;

/// What a descriptor of a queue pair is, in the low bits of its token; above is the pair's number.
const RX_KICK: u32 = 0;
const TX_KICK: u32 = 1;
const TAP: u32 = 2;
const KINDS: u32 = 4;

/// Tokens of the other descriptors, above those of the pairs.
const CONTROL_KICK: u32 = 1 << 16;
const WAKE: u32 = CONTROL_KICK + 1;
const RX_TIMER: u32 = CONTROL_KICK + 2;
const TX_TIMER: u32 = CONTROL_KICK + 3;

/// A receive and a transmit queue, and the tap queue behind them.
pub struct Pair {
    rx: Receiver,
    tx: Transmitter,
    tap: Arc<Tap>,
    /// Whether the loop watches the tap. It does not while the guest has no buffers: frames that
    /// nobody can take would wake it without end.
    tap_watched: bool,
}

impl Pair {
    /// A pair that has not looked at its queues.
    pub fn new(rx: Receiver, tx: Transmitter, tap: Arc<Tap>) -> Self {
        Self { rx, tx, tap, tap_watched: false }
    }

    fn watch_tap(&mut self, watch: bool, index: usize, ops: &mut EventOps) {
        if watch == self.tap_watched {
            return;
        }
        let result = if watch {
            ops.add(Events::with_data(&*self.tap, token(index, TAP), EventSet::IN))
        } else {
            ops.remove(Events::empty(&*self.tap))
        };
        match result {
            Ok(()) => self.tap_watched = watch,
            Err(reason) => error!(%reason, "The event loop cannot watch the tap interface"),
        }
    }
}

/// The control queue and what it answers.
pub struct ControlQueue {
    /// The queue.
    pub queue: VirtQueue,
    /// The answers.
    pub commands: Control,
}

impl ControlQueue {
    /// Serves commands. Returns whether the driver wants an interrupt.
    pub fn serve(&mut self, shared: &Shared) -> Result<bool, QueueError> {
        let Self { queue, commands } = self;
        queue.serve(|memory, chain| commands.handle(memory, chain, shared))
    }
}

/// One limiter for all pairs in each direction.
pub struct Limiters {
    /// To the guest.
    pub rx: Option<RateLimiter>,
    /// From the guest.
    pub tx: Option<RateLimiter>,
}

/// Moves frames between a tap interface and the guest's queues.
pub struct Engine {
    /// Every queue of the interface, those included that the guest does not use.
    taps: Vec<Arc<Tap>>,
    pairs: Vec<Pair>,
    control: Option<ControlQueue>,
    shared: Arc<Shared>,
    limiters: Limiters,
    interrupt: Interrupt,
}

impl Engine {
    /// An engine that has not looked at its queues.
    pub fn new(
        taps: Vec<Arc<Tap>>,
        pairs: Vec<Pair>,
        control: Option<ControlQueue>,
        shared: Arc<Shared>,
        limiters: Limiters,
        interrupt: Interrupt,
    ) -> Self {
        Self { taps, pairs, control, shared, limiters, interrupt }
    }

    /// The pair at `index`, if the guest uses it.
    fn pair(&mut self, index: usize) -> Option<&mut Pair> {
        let used = usize::from(self.shared.pairs());
        self.pairs.get_mut(..used)?.get_mut(index)
    }

    fn receive(&mut self, index: usize, ops: &mut EventOps) -> Result<(), QueueError> {
        let used = index < usize::from(self.shared.pairs());
        let Some(pair) = self.pairs.get_mut(index) else { return Ok(()) };
        let watch = used
            && self.shared.link_up()
            && match pair.rx.receive(&mut self.limiters.rx)? {
                Received::Drained | Received::BudgetSpent => true,
                Received::NoBuffers | Received::Broken | Received::Limited => false,
            };
        pair.watch_tap(watch, index, ops);
        if pair.rx.queue().needs_notification()? {
            self.interrupt.used_buffers();
        }
        Ok(())
    }

    fn transmit(&mut self, index: usize) -> Result<(), QueueError> {
        if self.pair(index).is_none() {
            return Ok(());
        }
        let Some(pair) = self.pairs.get_mut(index) else { return Ok(()) };
        pair.tx.transmit(&mut self.limiters.tx)?;
        if pair.tx.queue().needs_notification()? {
            self.interrupt.used_buffers();
        }
        Ok(())
    }

    /// Looks at every queue: when the device begins, and when the link or the number of pairs
    /// that are used has changed.
    fn look_at_all(&mut self, ops: &mut EventOps) -> Result<(), QueueError> {
        spread(&self.taps, self.shared.pairs());
        for index in 0..self.pairs.len() {
            self.receive(index, ops)?;
            self.transmit(index)?;
        }
        Ok(())
    }

    fn command(&mut self, ops: &mut EventOps) -> Result<(), QueueError> {
        let Some(control) = &mut self.control else { return Ok(()) };
        let before = self.shared.pairs();
        if control.serve(&self.shared)? {
            self.interrupt.used_buffers();
        }
        if self.shared.pairs() != before { self.look_at_all(ops) } else { Ok(()) }
    }

    fn watch_all(&mut self, ops: &mut EventOps) -> event_manager::Result<()> {
        for (index, pair) in self.pairs.iter_mut().enumerate() {
            ops.add(Events::with_data(pair.rx.queue().kick(), token(index, RX_KICK), EventSet::IN))?;
            ops.add(Events::with_data(pair.tx.queue().kick(), token(index, TX_KICK), EventSet::IN))?;
        }
        if let Some(control) = &self.control {
            ops.add(Events::with_data(control.queue.kick(), CONTROL_KICK, EventSet::IN))?;
        }
        for (limiter, token) in [(&self.limiters.rx, RX_TIMER), (&self.limiters.tx, TX_TIMER)] {
            if let Some(limiter) = limiter {
                ops.add(Events::with_data(limiter, token, EventSet::IN))?;
            }
        }
        ops.add(Events::with_data(self.shared.wake(), WAKE, EventSet::IN))
    }

    /// Ends the work on all queues after a mistake of the driver.
    fn stop(&mut self, ops: &mut EventOps) {
        for (index, pair) in self.pairs.iter_mut().enumerate() {
            pair.watch_tap(false, index, ops);
            for queue in [pair.rx.queue(), pair.tx.queue()] {
                let _ = ops.remove(Events::empty(queue.kick()));
            }
        }
        if let Some(control) = &self.control {
            let _ = ops.remove(Events::empty(control.queue.kick()));
        }
        for limiter in [&self.limiters.rx, &self.limiters.tx].into_iter().flatten() {
            let _ = ops.remove(Events::empty(limiter));
        }
        let _ = ops.remove(Events::empty(self.shared.wake()));
        self.interrupt.needs_reset();
    }

    fn handle(&mut self, token: u32, ops: &mut EventOps) -> Result<(), QueueError> {
        match token {
            CONTROL_KICK => self.command(ops),
            WAKE => {
                // Nothing to read means that the link was looked at since.
                let _ = self.shared.wake().read();
                self.look_at_all(ops)
            }
            RX_TIMER => {
                self.limiters.rx.as_mut().map(RateLimiter::acknowledge_timer);
                (0..self.pairs.len()).try_for_each(|index| self.receive(index, ops))
            }
            TX_TIMER => {
                self.limiters.tx.as_mut().map(RateLimiter::acknowledge_timer);
                (0..self.pairs.len()).try_for_each(|index| self.transmit(index))
            }
            _ => self.handle_pair(token, ops),
        }
    }

    fn handle_pair(&mut self, token: u32, ops: &mut EventOps) -> Result<(), QueueError> {
        let index = usize::try_from(token / KINDS).unwrap_or(usize::MAX);
        let Some(pair) = self.pairs.get_mut(index) else { return Ok(()) };
        match token % KINDS {
            TX_KICK => {
                pair.tx.queue().acknowledge_kick();
                self.transmit(index)
            }
            // The tap has frames, or the guest has new buffers for them.
            kind => {
                if kind == RX_KICK {
                    pair.rx.queue().acknowledge_kick();
                }
                self.receive(index, ops)
            }
        }
    }

    fn settle(&mut self, result: Result<(), QueueError>, ops: &mut EventOps) {
        let Err(reason) = result else { return };
        self.interrupt.complaints().tell("net", &reason, STOPS);
        self.stop(ops);
    }
}

impl MutEventSubscriber for Engine {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(reason) = self.watch_all(ops) {
            error!(device = "net", %reason, "The event loop cannot watch the device");
            self.stop(ops);
            return;
        }
        let result = self.command(ops).and_then(|()| self.look_at_all(ops));
        self.settle(result, ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let result = self.handle(events.data(), ops);
        self.settle(result, ops);
    }
}

impl ActiveHalf for Engine {
    /// Buffers that wait for frames and frames that wait for a limit are the driver's again; what
    /// the host sends meanwhile waits in the tap.
    fn park(mut self: Box<Self>) -> Vec<Option<Queue>> {
        let mut queues = Vec::new();
        for mut pair in self.pairs.drain(..) {
            // A broken ring is the next active half's to find.
            if let Ok(true) = pair.rx.finish() {
                self.interrupt.used_buffers();
            }
            queues.extend([Some(pair.rx.park()), Some(pair.tx.park())]);
        }
        queues.push(self.control.map(|control| control.queue.park(0)));
        queues
    }
}

/// Lets the host spread its frames over the first `pairs` queues.
pub fn spread(taps: &[Arc<Tap>], pairs: u16) {
    for (index, tap) in taps.iter().enumerate() {
        if let Err(error) = tap.set_attached(index < usize::from(pairs)) {
            // Its frames are lost until the guest changes the number again.
            warn!(descriptor = tap.as_raw_fd(), %error, "A queue of the tap interface cannot be switched");
        }
    }
}

fn token(pair: usize, kind: u32) -> u32 {
    u32::try_from(pair).unwrap_or_default().saturating_mul(KINDS).saturating_add(kind)
}
