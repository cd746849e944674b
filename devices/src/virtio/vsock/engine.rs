//! The active half: queues and events around the [`Muxer`].

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use tracing::{debug, error, warn};
use virtio_queue::Queue;

use super::connector::{Shared, lock};
use super::link::RxBuffer;
use super::muxer::{MAX_TOKEN, Muxer, Watch};
use super::packet::{HEADER_LEN, HEADER_SIZE, Header};
use super::uds::UdsServer;
use super::{Parking, TransportReset};
use crate::virtio::complaints::STOPS;
use crate::virtio::queue::{Chain, QueueError, VirtQueue};
use crate::virtio::{ActivateError, Activation, Interrupt};
use crate::{ActiveHalf, GuestMemory};

/// Queue numbers (virtio 1.2 section 5.10.2).
const RX_QUEUE: usize = 0;
const TX_QUEUE: usize = 1;
const EVENT_QUEUE: usize = 2;

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`, the only event there is, and its length (section 5.10.6.7).
const TRANSPORT_RESET: u32 = 0;
const EVENT_LEN: u32 = 4;

/// Packets of the guest that one wake-up takes; the rest waits until the other devices of the
/// loop had their turn. 64 of Linux's largest packets are 4 MiB.
const PACKETS_PER_WAKE_UP: u32 = 64;

/// Receive buffers that one wake-up fills: twice Linux's queue.
const BUFFERS_PER_WAKE_UP: u32 = 128;

/// Receive buffers that one read from the host may fill: 64 KiB of Linux's, what a pipe holds.
const BUFFERS_PER_READ: usize = 16;

/// Tokens of the engine's own descriptors, above those of the muxer.
const RX_KICK: u32 = MAX_TOKEN + 1;
const TX_KICK: u32 = MAX_TOKEN + 2;
const EVENT_KICK: u32 = MAX_TOKEN + 3;
const WAKE: u32 = MAX_TOKEN + 4;
const CLIENT: u32 = MAX_TOKEN + 5;

/// The active half of a vsock device.
pub struct Engine {
    memory: GuestMemory,
    rx: VirtQueue,
    tx: VirtQueue,
    /// Says that all connections are gone, in a machine that was restored, and nothing else.
    events: Option<VirtQueue>,
    interrupt: Interrupt,
    muxer: Muxer,
    shared: Arc<Shared>,
    parking: Arc<Parking>,
    uds: Option<Arc<UdsServer>>,
    /// Receive buffers taken from the queue and not used yet, in order.
    buffers: Vec<RxBuffer>,
    /// Lengths of the packets in the first of `buffers`. Empty but while they are filled.
    used: Vec<u32>,
}

impl Engine {
    /// Takes over the queues.
    pub fn new(
        activation: Activation,
        muxer: Muxer,
        shared: Arc<Shared>,
        parking: Arc<Parking>,
        uds: Option<Arc<UdsServer>>,
    ) -> Result<Self, ActivateError> {
        let Activation { memory, queues, acked_features, interrupt } = activation;
        let mut queues = queues.into_iter();
        let mut take = |index| {
            let active = queues.next().flatten().ok_or(ActivateError::QueueMissing(index))?;
            Ok(VirtQueue::new(active, &memory, acked_features))
        };
        let rx = take(RX_QUEUE)?;
        let tx = take(TX_QUEUE)?;
        let events = queues.nth(EVENT_QUEUE.saturating_sub(TX_QUEUE).saturating_sub(1)).flatten();
        Ok(Self {
            rx,
            tx,
            events: events.map(|active| VirtQueue::new(active, &memory, acked_features)),
            memory,
            interrupt,
            muxer,
            shared,
            parking,
            uds,
            buffers: Vec::new(),
            used: Vec::new(),
        })
    }

    fn watch_all(&mut self, ops: &mut EventOps) -> event_manager::Result<()> {
        ops.add(Events::with_data(self.rx.kick(), RX_KICK, EventSet::IN))?;
        ops.add(Events::with_data(self.tx.kick(), TX_KICK, EventSet::IN))?;
        if let Some(events) = &self.events {
            ops.add(Events::with_data(events.kick(), EVENT_KICK, EventSet::IN))?;
        }
        ops.add(Events::with_data(self.shared.wake(), WAKE, EventSet::IN))?;
        if let Some(uds) = &self.uds {
            // Edge-triggered: a client that cannot be accepted for lack of descriptors waits
            // for the next one, instead of keeping the loop busy.
            let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
            ops.add(Events::with_data(uds.listener(), CLIENT, events))?;
        }
        Ok(())
    }

    fn begin_waiting_connections(&mut self, ops: &mut EventOps) {
        // Nothing to read when the connections came before the device was active.
        let _ = self.shared.wake().read();
        if self.is_resetting() {
            return;
        }
        for connect in self.shared.take_waiting() {
            self.muxer.connect(connect, &mut Registrar(ops));
        }
    }

    fn accept_clients(&mut self, ops: &mut EventOps) {
        let Some(uds) = self.uds.as_ref().filter(|_| !self.is_resetting()) else { return };
        loop {
            match uds.accept() {
                Ok(client) => self.muxer.client_arrived(client, &mut Registrar(ops)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    warn!(%error, "A vsock client cannot be accepted");
                    break;
                }
            }
        }
    }

    /// Moves packets both ways until nothing can move or the budget is used up.
    fn pump(&mut self, ops: &mut EventOps) {
        if let Err(reason) = self.end_reset(ops).and_then(|()| self.try_pump(&mut Registrar(ops))) {
            self.interrupt.complaints().tell("vsock", &reason, STOPS);
            self.stop(ops);
        }
    }

    fn try_pump(&mut self, watch: &mut dyn Watch) -> Result<(), QueueError> {
        self.tell_reset()?;
        let transmit_again = self.transmit(watch)?;
        let fill_again = self.fill(watch)?;
        // Filling may have made the room that transmitting lacked.
        if fill_again || (transmit_again && self.muxer.can_receive()) {
            self.shared.wake_up();
        }
        if self.tx.needs_notification()? | self.rx.needs_notification()? {
            self.interrupt.used_buffers();
        }
        Ok(())
    }

    /// Tells the driver, once it has given a buffer for it, that its connections are gone.
    fn tell_reset(&mut self) -> Result<(), QueueError> {
        let Some(events) = &mut self.events else { return Ok(()) };
        let mut reset = lock(&self.parking.reset);
        if *reset != TransportReset::Owed {
            return Ok(());
        }
        let Some(chain) = events.pop()? else { return Ok(()) };
        let told = events.avail_idx()?;
        let event = TRANSPORT_RESET.to_le_bytes();
        let (target, _) = chain.writable().split_at(EVENT_LEN).ok_or_else(|| chain.malformed())?;
        target.write(&self.memory, &event)?;
        events.add_used(chain, EVENT_LEN)?;
        *reset = TransportReset::Told(told);
        drop(reset);
        if events.notify_of_next()? != told {
            events.kick_again();
        }
        if events.needs_notification()? {
            self.interrupt.used_buffers();
        }
        Ok(())
    }

    /// Whether connections wait until the driver has acted on the news that the old ones are gone. One that has no event
    /// queue is not waited for.
    fn is_resetting(&self) -> bool {
        self.events.is_some() && *lock(&self.parking.reset) != TransportReset::Done
    }

    /// The driver may have given the event's buffer back, which it does when it has acted on the event.
    fn end_reset(&mut self, ops: &mut EventOps) -> Result<(), QueueError> {
        let Some(events) = &self.events else { return Ok(()) };
        let TransportReset::Told(told) = *lock(&self.parking.reset) else { return Ok(()) };
        if events.avail_idx()? != told {
            *lock(&self.parking.reset) = TransportReset::Done;
            self.begin_waiting_connections(ops);
            self.accept_clients(ops);
        }
        Ok(())
    }

    /// Takes packets from the guest. Returns whether there may be more.
    fn transmit(&mut self, watch: &mut dyn Watch) -> Result<bool, QueueError> {
        self.tx.disable_notification()?;
        for _ in 0..PACKETS_PER_WAKE_UP {
            if !self.muxer.can_receive() {
                break;
            }
            let Some(chain) = self.tx.pop()? else {
                if self.tx.enable_notification()? {
                    self.tx.disable_notification()?;
                    continue;
                }
                return Ok(false);
            };
            receive(&mut self.muxer, &self.memory, &chain, watch)?;
            self.tx.add_used(chain, 0)?;
        }
        Ok(true)
    }

    /// Fills receive buffers. Returns whether it stopped for the budget alone.
    fn fill(&mut self, watch: &mut dyn Watch) -> Result<bool, QueueError> {
        // The guest need not tell of new buffers while there is nothing to put into them.
        self.rx.disable_notification()?;
        let mut budget = BUFFERS_PER_WAKE_UP;
        while self.muxer.has_output() {
            if budget == 0 {
                return Ok(true);
            }
            budget = budget.saturating_sub(self.take_buffers()?);
            if self.buffers.is_empty() {
                if !self.rx.enable_notification()? {
                    return Ok(false);
                }
                self.rx.disable_notification()?;
                budget = budget.saturating_sub(1);
                continue;
            }
            self.muxer.fill(&self.memory, &self.buffers, &mut self.used, watch)?;
            let count = self.used.len();
            for (buffer, len) in self.buffers.drain(..count).zip(self.used.drain(..)) {
                self.rx.add_used(buffer.into_chain(), len)?;
            }
            budget = budget.saturating_sub(u32::try_from(count).unwrap_or(u32::MAX));
        }
        Ok(false)
    }

    /// Takes receive buffers from the queue, up to [`BUFFERS_PER_READ`]. Returns how many were
    /// not usable and went back.
    fn take_buffers(&mut self) -> Result<u32, QueueError> {
        let mut unusable = 0_u32;
        while self.buffers.len() < BUFFERS_PER_READ && unusable < BUFFERS_PER_WAKE_UP {
            let Some(chain) = self.rx.pop()? else { break };
            match RxBuffer::new(chain) {
                Ok(buffer) => self.buffers.push(buffer),
                Err(chain) => {
                    self.rx.add_used(chain, 0)?;
                    unusable = unusable.saturating_add(1);
                }
            }
        }
        Ok(unusable)
    }

    /// The queues are in a state that nobody can explain: they are not looked at again.
    fn stop(&mut self, ops: &mut EventOps) {
        self.muxer.close(&mut Registrar(ops));
        let kicks = [Some(self.rx.kick()), Some(self.tx.kick()), self.events.as_ref().map(VirtQueue::kick)];
        for kick in kicks.into_iter().flatten().chain([self.shared.wake()]) {
            let _ = ops.remove(Events::empty(kick));
        }
        if let Some(uds) = &self.uds {
            let _ = ops.remove(Events::empty(uds.listener()));
        }
        self.interrupt.needs_reset();
    }
}

impl MutEventSubscriber for Engine {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(reason) = self.watch_all(ops) {
            error!(device = "vsock", %reason, "The event loop cannot watch the device");
            self.stop(ops);
            return;
        }
        if let Err(reason) = self.muxer.watch_all(&mut Registrar(ops)) {
            error!(device = "vsock", %reason, "The event loop cannot watch the connections");
            self.stop(ops);
            return;
        }
        self.begin_waiting_connections(ops);
        self.pump(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            RX_KICK => self.rx.acknowledge_kick(),
            TX_KICK => self.tx.acknowledge_kick(),
            EVENT_KICK => {
                if let Some(events) = &self.events {
                    events.acknowledge_kick();
                }
            }
            WAKE => self.begin_waiting_connections(ops),
            CLIENT => self.accept_clients(ops),
            token => self.muxer.ready(token, events.event_set(), &mut Registrar(ops)),
        }
        self.pump(ops);
    }
}

impl ActiveHalf for Engine {
    /// Receive buffers without a packet are the driver's again; connections wait for the next
    /// active half.
    fn park(self: Box<Self>) -> Vec<Option<Queue>> {
        *lock(&self.parking.muxer) = Some(self.muxer);
        let unfilled = u16::try_from(self.buffers.len()).unwrap_or(u16::MAX);
        vec![Some(self.rx.park(unfilled)), Some(self.tx.park(0)), self.events.map(|events| events.park(0))]
    }
}

/// Hands one packet of the guest to the muxer. What is no packet is dropped.
fn receive(muxer: &mut Muxer, memory: &GuestMemory, chain: &Chain, watch: &mut dyn Watch) -> Result<(), QueueError> {
    let Some((head, rest)) = chain.readable().split_at(HEADER_LEN) else {
        debug!(device = "vsock", "A packet is shorter than a header");
        return Ok(());
    };
    let mut bytes = [0; HEADER_SIZE];
    head.read(memory, &mut bytes)?;
    // From here on this copy counts: the guest may have changed the original (its length, above
    // all) before the payload is looked at.
    let header = Header::from_bytes(&bytes);
    let payload = rest.split_at(header.len).map(|(payload, _)| payload);
    muxer.receive(memory, &header, payload, watch)
}

/// Registers a muxer's descriptors with the event loop.
struct Registrar<'a, 'b>(&'a mut EventOps<'b>);

impl Watch for Registrar<'_, '_> {
    fn watch(&mut self, fd: BorrowedFd<'_>, token: u32, events: EventSet) -> io::Result<()> {
        self.0.add(Events::with_data_raw(fd.as_raw_fd(), token, events)).map_err(|error| match error {
            event_manager::Error::Epoll(errno) => io::Error::from_raw_os_error(errno.errno()),
            other => io::Error::other(other),
        })
    }

    fn forget(&mut self, fd: BorrowedFd<'_>) {
        if let Err(error) = self.0.remove(Events::empty_raw(fd.as_raw_fd())) {
            // Not registered: nothing to forget.
            debug!(device = "vsock", ?error, "A descriptor was not watched");
        }
    }
}
