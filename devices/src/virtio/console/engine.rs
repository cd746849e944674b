//! The active half: which event belongs to which port, and the control queues.

use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use tracing::{debug, error};
use virtio_queue::Queue;

use super::config::{F_MULTIPORT, PortInfo};
use super::control::{MESSAGE_SIZE, Said, Saying};
use super::port::{Port, SOURCES, TOKENS_PER_PORT};
use crate::ActiveHalf;
use crate::virtio::complaints::STOPS;
use crate::virtio::queue::{QueueError, VirtQueue};
use crate::virtio::{ActivateError, Activation, Interrupt};

/// Numbers of the control queues (section 5.3.2).
const CONTROL_RX: usize = 2;
const CONTROL_TX: usize = 3;

/// Tokens of the control queues; those of ports follow.
const CONTROL_RX_KICK: u32 = 0;
const CONTROL_TX_KICK: u32 = 1;
const FIRST_PORT: u32 = 2;

/// Buffers for messages that one wake-up uses: more than there are messages at a time.
const BUFFERS_PER_WAKE_UP: u32 = 128;

/// The queues of a driver that knows control messages.
struct Control {
    /// From device to driver.
    rx: VirtQueue,
    tx: VirtQueue,
}

/// The active half of a console device.
pub struct Engine {
    ports: Vec<Port>,
    control: Option<Control>,
    /// Queues that the device has.
    queue_count: usize,
    interrupt: Interrupt,
}

impl Engine {
    /// Takes over the queues.
    pub fn new(activation: Activation, infos: &[Arc<PortInfo>]) -> Result<Self, ActivateError> {
        let Activation { memory, mut queues, acked_features, interrupt } = activation;
        let queue_count = queues.len();
        let multiport = acked_features & (1 << F_MULTIPORT) != 0;
        let mut take = |index: usize| {
            let active = queues.get_mut(index).and_then(Option::take).ok_or(ActivateError::QueueMissing(index))?;
            Ok(VirtQueue::new(active, &memory, acked_features))
        };
        let mut ports = Vec::new();
        let mut token = FIRST_PORT;
        for info in infos.iter().filter(|info| multiport || info.number == 0) {
            let rx = receive_queue(info.number);
            let (rx, tx) = (take(rx)?, take(rx.saturating_add(1))?);
            ports.push(Port::new(Arc::clone(info), rx, tx, token, !multiport));
            token = token.saturating_add(TOKENS_PER_PORT);
        }
        let control = if multiport { Some(Control { rx: take(CONTROL_RX)?, tx: take(CONTROL_TX)? }) } else { None };
        Ok(Self { ports, control, queue_count, interrupt })
    }

    fn start(&mut self, ops: &mut EventOps) -> event_manager::Result<()> {
        if let Some(control) = &self.control {
            ops.add(Events::with_data(control.rx.kick(), CONTROL_RX_KICK, EventSet::IN))?;
            ops.add(Events::with_data(control.tx.kick(), CONTROL_TX_KICK, EventSet::IN))?;
            control.tx.kick_again();
        }
        self.ports.iter_mut().try_for_each(|port| port.start(ops))
    }

    fn serve(&mut self, token: u32, ops: &mut EventOps) -> Result<(), QueueError> {
        match token.checked_sub(FIRST_PORT) {
            None if token == CONTROL_TX_KICK => self.listen(ops)?,
            None => {
                if let Some(control) = &self.control {
                    control.rx.acknowledge_kick();
                }
            }
            Some(token) => {
                let port = self.ports.get_mut(token.div_euclid(TOKENS_PER_PORT) as usize);
                let source = SOURCES.get(token.rem_euclid(TOKENS_PER_PORT) as usize);
                if let (Some(port), Some(source)) = (port, source) {
                    port.serve(*source, ops)?;
                }
            }
        }
        self.speak()?;
        self.notify()
    }

    /// Takes messages from the driver.
    fn listen(&mut self, ops: &mut EventOps) -> Result<(), QueueError> {
        let Some(control) = &mut self.control else { return Ok(()) };
        let ports = &mut self.ports;
        let interrupt = control.tx.serve(|memory, chain| {
            let mut message = [0; MESSAGE_SIZE];
            if chain.readable().read(memory, &mut message)? < MESSAGE_SIZE {
                debug!(device = "console", bytes = chain.readable().len(), "A message is too short");
                return Ok(0);
            }
            // From here on this copy counts.
            match Said::parse(message) {
                Some(Said::DeviceReady(true)) => ports.iter_mut().for_each(|port| port.sayings.push(Saying::Add)),
                Some(Said::PortReady(number, true)) => {
                    if let Some(port) = find(ports, number) {
                        port.driver_is_ready();
                    }
                }
                Some(Said::PortOpen(number, open)) => {
                    if let Some(port) = find(ports, number) {
                        port.guest_opens(open, ops)?;
                    }
                }
                said => debug!(device = "console", ?said, "The driver cannot be helped"),
            }
            Ok(0)
        })?;
        if interrupt {
            self.interrupt.used_buffers();
        }
        Ok(())
    }

    /// Sends what is to be said, as far as there are buffers.
    fn speak(&mut self) -> Result<(), QueueError> {
        let Some(control) = &mut self.control else { return Ok(()) };
        let mut budget = BUFFERS_PER_WAKE_UP;
        for port in &mut self.ports {
            while let Some(saying) = port.sayings.first() {
                let Some(chain) = control.rx.pop()? else {
                    if control.rx.enable_notification()? {
                        continue;
                    }
                    return Ok(());
                };
                budget = budget.saturating_sub(1);
                if budget == 0 {
                    control.rx.put_back(chain);
                    control.rx.kick_again();
                    return Ok(());
                }
                let name = port.info.name.as_deref().unwrap_or_default();
                let message = saying.to_bytes(port.info.number, name);
                if (chain.writable().len() as usize) < message.len() {
                    // A driver that takes a part of a message would take it for another.
                    control.rx.add_used(chain, 0)?;
                    continue;
                }
                let len = chain.writable().write(control.rx.memory(), &message)?;
                control.rx.add_used(chain, u32::try_from(len).unwrap_or_default())?;
                port.sayings.sent();
            }
        }
        Ok(())
    }

    /// Interrupts the driver if any queue asks for it.
    fn notify(&mut self) -> Result<(), QueueError> {
        let mut wanted = false;
        for queue in self.queues_mut() {
            wanted |= queue.needs_notification()?;
        }
        if wanted {
            self.interrupt.used_buffers();
        }
        Ok(())
    }

    fn queues_mut(&mut self) -> impl Iterator<Item = &mut VirtQueue> {
        let control = self.control.iter_mut().flat_map(|control| [&mut control.rx, &mut control.tx]);
        self.ports.iter_mut().flat_map(|port| [&mut port.rx, &mut port.tx]).chain(control)
    }

    /// The queues are in a state that nobody can explain: they are not looked at again.
    fn stop(&mut self, ops: &mut EventOps) {
        for port in &mut self.ports {
            port.stop(ops);
        }
        if let Some(control) = &self.control {
            let _ = ops.remove(Events::empty(control.rx.kick()));
            let _ = ops.remove(Events::empty(control.tx.kick()));
        }
        self.interrupt.needs_reset();
    }
}

/// Number of the receive queue of a port; the transmit queue is the next (section 5.3.2).
fn receive_queue(port: u32) -> usize {
    match port as usize {
        0 => 0,
        number => number.saturating_add(1).saturating_mul(2),
    }
}

fn find(ports: &mut [Port], number: u32) -> Option<&mut Port> {
    ports.iter_mut().find(|port| port.info.number == number)
}

impl ActiveHalf for Engine {
    fn park(self: Box<Self>) -> Vec<Option<Queue>> {
        let mut queues: Vec<Option<Queue>> = (0..self.queue_count).map(|_| None).collect();
        let mut put = |index: usize, queue| {
            if let Some(place) = queues.get_mut(index) {
                *place = Some(queue);
            }
        };
        for port in self.ports {
            let index = receive_queue(port.info.number);
            let (rx, tx) = port.park();
            put(index, rx);
            put(index.saturating_add(1), tx);
        }
        if let Some(control) = self.control {
            put(CONTROL_RX, control.rx.park(0));
            put(CONTROL_TX, control.tx.park(0));
        }
        queues
    }
}

impl MutEventSubscriber for Engine {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(reason) = self.start(ops) {
            error!(device = "console", %reason, "The event loop cannot watch the device");
            self.stop(ops);
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if let Err(reason) = self.serve(events.data(), ops) {
            self.interrupt.complaints().tell("console", &reason, STOPS);
            self.stop(ops);
        }
    }
}
