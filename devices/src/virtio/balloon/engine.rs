//! The active half: queues, the timer for statistics, and what is done when.

use std::sync::Arc;
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use tracing::{error, warn};
use virtio_queue::Queue;
use vmm_sys_util::timerfd::TimerFd;

use super::handle::Shared;
use super::inflate::Inflate;
use super::layout::{DEFLATE, INFLATE, Layout, QUEUES};
use super::reclaim::discard;
use super::stats::{GuestStats, MAX_STATS, STAT_SIZE};
use crate::ActiveHalf;
use crate::virtio::complaints::STOPS;
use crate::virtio::queue::{Chain, QueueError, VirtQueue};
use crate::virtio::{ActivateError, Activation, Interrupt};

/// Chains of one queue that a wake-up serves. Fewer than other devices': with the limit of pages
/// for each it is how many system calls a guest can make the loop do in a row, some ten
/// milliseconds of them.
const CHAINS_PER_WAKE_UP: u32 = 16;

/// What an event is about. The queues' own numbers are the driver's choice.
const INFLATE_KICK: u32 = 0;
const DEFLATE_KICK: u32 = 1;
const STATS_KICK: u32 = 2;
const REPORTS_KICK: u32 = 4;
const TIMER: u32 = 5;
const INTERVAL_CHANGED: u32 = 6;

/// The active half of a balloon.
pub struct Engine {
    layout: Layout,
    inflate: VirtQueue,
    inflater: Inflate,
    deflate: VirtQueue,
    stats: Option<VirtQueue>,
    /// The guest's last report: to give it back is to ask for the next one.
    report: Option<Chain>,
    reports: Option<VirtQueue>,
    timer: TimerFd,
    interrupt: Interrupt,
    shared: Arc<Shared>,
}

impl Engine {
    /// Takes over the queues.
    pub fn new(activation: Activation, shared: Arc<Shared>) -> Result<Self, ActivateError> {
        let Activation { memory, mut queues, acked_features, interrupt } = activation;
        let layout = Layout::new(acked_features, &Layout::enabled(&queues));
        let mut take = |index: usize| {
            let active = queues.get_mut(index).and_then(Option::take).ok_or(ActivateError::QueueMissing(index))?;
            Ok(VirtQueue::new(active, &memory, acked_features))
        };
        Ok(Self {
            inflate: take(INFLATE)?,
            inflater: Inflate::default(),
            deflate: take(DEFLATE)?,
            stats: layout.stats.map(&mut take).transpose()?,
            report: None,
            reports: layout.reports.map(&mut take).transpose()?,
            layout,
            timer: TimerFd::new().map_err(|error| ActivateError::Setup(error.into()))?,
            interrupt,
            shared,
        })
    }

    fn watch_all(&self, ops: &mut EventOps) -> event_manager::Result<()> {
        for (queue, token) in self.queues() {
            ops.add(Events::with_data(queue.kick(), token, EventSet::IN))?;
        }
        ops.add(Events::with_data(&self.timer, TIMER, EventSet::IN))?;
        ops.add(Events::with_data(self.shared.interval_changed(), INTERVAL_CHANGED, EventSet::IN))
    }

    fn queues(&self) -> impl Iterator<Item = (&VirtQueue, u32)> {
        let optional = [(&self.stats, STATS_KICK), (&self.reports, REPORTS_KICK)];
        let optional = optional.into_iter().filter_map(|(queue, token)| Some((queue.as_ref()?, token)));
        [(&self.inflate, INFLATE_KICK), (&self.deflate, DEFLATE_KICK)].into_iter().chain(optional)
    }

    /// Does what an event asks for; true when the driver wants an interrupt.
    fn serve(&mut self, token: u32) -> Result<bool, QueueError> {
        match token {
            INFLATE_KICK => self
                .inflate
                .serve_at_most(CHAINS_PER_WAKE_UP, |memory, chain| self.inflater.serve(memory, chain).map(|_| 0)),
            // The pages come back when the guest touches them.
            DEFLATE_KICK => self.deflate.serve(|_, _| Ok(0)),
            STATS_KICK => self.take_report(),
            REPORTS_KICK => self.take_free_pages(),
            TIMER => {
                self.set_timer();
                self.ask_for_report()
            }
            _ => {
                // Nothing to read is an old event.
                let _ = self.shared.interval_changed().read();
                self.set_timer();
                Ok(false)
            }
        }
    }

    /// Starts the time to the next report, which also makes the timer not readable. It is not
    /// read: that would block when somebody set it meanwhile.
    fn set_timer(&mut self) {
        let result = match self.shared.interval() {
            Some(seconds) => self.timer.reset(Duration::from_secs(seconds.get().into()), None),
            None => self.timer.clear(),
        };
        if let Err(error) = result {
            warn!(device = "balloon", %error, "No statistics: the timer cannot be set");
        }
    }

    /// Keeps the last report; a driver that sends more than it was asked for gets the others back.
    fn take_report(&mut self) -> Result<bool, QueueError> {
        let Some(queue) = &mut self.stats else { return Ok(false) };
        queue.acknowledge_kick();
        for _ in 0..CHAINS_PER_WAKE_UP {
            let Some(chain) = queue.pop()? else { return queue.needs_notification() };
            let mut report = vec![0; MAX_STATS.saturating_mul(STAT_SIZE)];
            let len = chain.readable().read(queue.memory(), &mut report)?;
            self.shared.set_stats(GuestStats::parse(report.get(..len).unwrap_or_default()));
            if let Some(previous) = self.report.replace(chain) {
                queue.add_used(previous, 0)?;
            }
        }
        queue.kick_again();
        queue.needs_notification()
    }

    fn ask_for_report(&mut self) -> Result<bool, QueueError> {
        let (Some(queue), Some(report)) = (&mut self.stats, self.report.take()) else { return Ok(false) };
        queue.add_used(report, 0)?;
        queue.needs_notification()
    }

    fn take_free_pages(&mut self) -> Result<bool, QueueError> {
        let Some(queue) = &mut self.reports else { return Ok(false) };
        queue.serve_at_most(CHAINS_PER_WAKE_UP, |memory, chain| {
            for (start, len) in chain.writable().ranges() {
                discard(memory, start.0..start.0.saturating_add(len.into()));
            }
            Ok(0)
        })
    }

    /// The queues are in a state that nobody can explain: they are not looked at again.
    fn stop(&mut self, ops: &mut EventOps) {
        for (queue, _) in self.queues() {
            let _ = ops.remove(Events::empty(queue.kick()));
        }
        let _ = ops.remove(Events::empty(&self.timer));
        let _ = ops.remove(Events::empty(self.shared.interval_changed()));
        self.interrupt.needs_reset();
    }

    fn serve_or_stop(&mut self, token: u32, ops: &mut EventOps) {
        match self.serve(token) {
            Ok(true) => self.interrupt.used_buffers(),
            Ok(false) => {}
            Err(reason) => {
                self.interrupt.complaints().tell("balloon", &reason, STOPS);
                self.stop(ops);
            }
        }
    }
}

impl ActiveHalf for Engine {
    /// The report that the device holds is the driver's again, to be read once more.
    fn park(self: Box<Self>) -> Vec<Option<Queue>> {
        let mut queues: Vec<Option<Queue>> = (0..QUEUES).map(|_| None).collect();
        let mut put = |index: Option<usize>, queue: Option<VirtQueue>, unserved: u16| {
            if let (Some(place), Some(queue)) = (index.and_then(|index| queues.get_mut(index)), queue) {
                *place = Some(queue.park(unserved));
            }
        };
        put(Some(INFLATE), Some(self.inflate), 0);
        put(Some(DEFLATE), Some(self.deflate), 0);
        put(self.layout.stats, self.stats, u16::from(self.report.is_some()));
        put(self.layout.reports, self.reports, 0);
        queues
    }
}

impl MutEventSubscriber for Engine {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(reason) = self.watch_all(ops) {
            error!(device = "balloon", %reason, "The event loop cannot watch the device");
            self.stop(ops);
            return;
        }
        self.set_timer();
        // The driver may have filled its queues before: one look each.
        for (queue, _) in self.queues() {
            queue.kick_again();
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        self.serve_or_stop(events.data(), ops);
    }
}
