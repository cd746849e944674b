//! The active half of a network device whose frames the host's kernel moves: vhost-net. The
//! control queue stays here, for the kernel does not know it.

use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use tracing::error;
use virtio_queue::Queue;

use super::engine::{ControlQueue, spread};
use super::shared::Shared;
use super::tap::Tap;
use crate::virtio::complaints::STOPS;
use crate::virtio::kernel_vhost::{KernelRings, KernelVhost};
use crate::virtio::{ActivateError, ActiveQueue, Interrupt};
use crate::{ActiveHalf, GuestMemory};

const CONTROL_KICK: u32 = 0;
const WAKE: u32 = 1;
const ERROR: u32 = 2;

/// Leaves the frames to the kernel and serves the control queue.
pub struct KernelEngine {
    taps: Vec<Arc<Tap>>,
    pairs: Vec<KernelRings>,
    control: Option<ControlQueue>,
    shared: Arc<Shared>,
    interrupt: Interrupt,
    /// Whether the kernel moves frames: the link is up.
    serving: bool,
}

impl KernelEngine {
    /// Hands `pairs` of queues to the kernel.
    #[expect(clippy::too_many_arguments, reason = "The parts of an activation, each used once")]
    pub fn new(
        taps: Vec<Arc<Tap>>,
        vhost: &[Arc<KernelVhost>],
        pairs: Vec<[ActiveQueue; 2]>,
        control: Option<ControlQueue>,
        shared: Arc<Shared>,
        memory: &GuestMemory,
        acked_features: u64,
        interrupt: Interrupt,
    ) -> Result<Self, ActivateError> {
        let rings = |(vhost, queues): (&Arc<KernelVhost>, [ActiveQueue; 2])| {
            KernelRings::new(Arc::clone(vhost), memory, acked_features, queues.into(), &interrupt)
        };
        let pairs = vhost.iter().zip(pairs).map(rings).collect::<Result<_, _>>().map_err(ActivateError::Setup)?;
        Ok(Self { taps, pairs, control, shared, interrupt, serving: false })
    }

    /// Connects the queues to the taps while the link is up, and lets the host use as many as the
    /// guest does.
    fn follow(&mut self) -> std::io::Result<()> {
        spread(&self.taps, self.shared.pairs());
        let up = self.shared.link_up();
        if up != self.serving {
            for (rings, tap) in self.pairs.iter().zip(&self.taps) {
                rings.serve(up.then(|| tap.file()))?;
            }
            self.serving = up;
        }
        Ok(())
    }

    fn watch_all(&self, ops: &mut EventOps) -> event_manager::Result<()> {
        for rings in &self.pairs {
            ops.add(Events::with_data(rings.error(), ERROR, EventSet::IN))?;
        }
        if let Some(control) = &self.control {
            ops.add(Events::with_data(control.queue.kick(), CONTROL_KICK, EventSet::IN))?;
        }
        ops.add(Events::with_data(self.shared.wake(), WAKE, EventSet::IN))
    }

    fn stop(&mut self, reason: &(dyn std::error::Error + 'static), ops: &mut EventOps) {
        self.interrupt.complaints().tell("net", reason, STOPS);
        for rings in &self.pairs {
            let _ = ops.remove(Events::empty(rings.error()));
        }
        if let Some(control) = &self.control {
            let _ = ops.remove(Events::empty(control.queue.kick()));
        }
        let _ = ops.remove(Events::empty(self.shared.wake()));
        self.pairs.clear();
        self.interrupt.needs_reset();
    }

    fn command(&mut self, ops: &mut EventOps) {
        let Some(control) = &mut self.control else { return };
        match control.serve(&self.shared) {
            Ok(true) => self.interrupt.used_buffers(),
            Ok(false) => {}
            Err(reason) => self.stop(&reason, ops),
        }
    }
}

impl MutEventSubscriber for KernelEngine {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(reason) = self.watch_all(ops) {
            error!(device = "net", %reason, "The event loop cannot watch the device");
            self.interrupt.needs_reset();
            return;
        }
        self.command(ops);
        if let Err(reason) = self.follow() {
            self.stop(&reason, ops);
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            CONTROL_KICK => self.command(ops),
            WAKE => drop(self.shared.wake().read()),
            _ => return self.stop(&std::io::Error::other("The kernel cannot go on with a queue"), ops),
        }
        if let Err(reason) = self.follow() {
            self.stop(&reason, ops);
        }
    }
}

impl ActiveHalf for KernelEngine {
    fn park(self: Box<Self>) -> Vec<Option<Queue>> {
        let queues = self.pairs.into_iter().flat_map(|rings| rings.park());
        queues.chain([self.control.map(|control| control.queue.park(0))]).collect()
    }
}
