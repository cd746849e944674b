//! The active half: the life of a connection.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use tracing::{debug, error, info, warn};
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use super::VhostUserKind;
use super::backoff::Backoff;
use super::caller::Pending;
use super::device::Shared;
use super::resume;
use super::rings::{Ring, Rings, settle};
use super::session::{Inflight, Offer, Session, SessionError, connect};
use crate::virtio::{ActivateError, Activation, Interrupt};
use crate::{ActiveHalf, GuestMemory};

/// Events of the loop.
const DONE: u32 = 0;
const TIMER: u32 = 1;
const SOCKET: u32 = 2;

/// The connection.
///
/// ```text
///              set up                hangs up, or speaks unasked
///   Calling ───────────▶ Up ────────────────────────────────▶ Waiting
///      ▲  └──────────────── fails, or takes too long ──────────▶ │ │
///      └──────────────────────── after a pause ──────────────────┘ │
///                                          absent for too long     ▼
///                                             needs a reset ◀──── Away
/// ```
enum Link {
    Calling(Pending<Outcome>),
    Up(Session),
    Waiting,
    Away,
}

/// What comes of an attempt: a session whose rings run, and what its backend offers if it was asked anew.
type Outcome = Result<Attempt, SessionError>;

struct Attempt {
    session: Session,
    offer: Option<Offer>,
    inflight: Option<Arc<Inflight>>,
}

/// The active half of a device that another process serves.
pub struct Engine {
    shared: Arc<Shared>,
    memory: GuestMemory,
    interrupt: Interrupt,
    rings: Arc<Rings>,
    /// By queue index, at the places where the rings were begun.
    queues: Vec<Option<Queue>>,
    /// Whether a backend may have worked on the rings since then.
    begun: bool,
    inflight: Option<Arc<Inflight>>,
    link: Link,
    backoff: Backoff,
    done: EventFd,
    timer: TimerFd,
}

impl Engine {
    /// Takes over the queues.
    pub fn new(activation: Activation, shared: Arc<Shared>) -> Result<Self, ActivateError> {
        let Activation { memory, queues, acked_features, interrupt } = activation;
        let mut list = Vec::with_capacity(queues.len());
        for (index, active) in queues.iter().enumerate() {
            let ring = active.as_ref().map(|active| Ring::new(&memory, index, active));
            list.extend(ring.transpose().map_err(|error| ActivateError::Setup(io::Error::other(error)))?);
        }
        let rings = Rings {
            memory: memory.clone(),
            features: shared.kind.backend_features(acked_features),
            max_size: list.iter().map(|ring| ring.place.queue_max_size).max().unwrap_or_default(),
            list,
            call: interrupt.lend_line().map_err(ActivateError::Setup)?,
        };
        Ok(Self {
            memory,
            interrupt,
            rings: Arc::new(rings),
            queues: queues.into_iter().map(|active| active.map(|active| active.queue)).collect(),
            begun: false,
            inflight: None,
            link: Link::Waiting,
            backoff: Backoff::new(shared.patience),
            done: EventFd::new(EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(ActivateError::Setup)?,
            timer: TimerFd::new().map_err(|error| ActivateError::Setup(error.into()))?,
            shared,
        })
    }

    fn watch(&self, ops: &mut EventOps) -> event_manager::Result<()> {
        ops.add(Events::with_data(&self.done, DONE, EventSet::IN))?;
        ops.add(Events::with_data(&self.timer, TIMER, EventSet::IN))
    }

    /// Makes an attempt with the connection that is left, or with a new one.
    fn attempt(&mut self) {
        if let Err(reason) = self.begin() {
            self.retry(&reason);
        }
    }

    fn begin(&mut self) -> Result<(), SessionError> {
        let idle = self.shared.idle().take();
        let stream = match &idle {
            Some(session) => session.socket().try_clone().map_err(SessionError::Descriptor)?,
            None => connect(&self.shared.socket)?,
        };
        let socket = stream.try_clone().map_err(SessionError::Descriptor)?;
        let done = self.done.try_clone().map_err(SessionError::Descriptor)?;
        let plan = self.plan().map_err(SessionError::Descriptor)?;
        self.begun = true;
        self.arm(Some(self.shared.patience.answers));
        self.link = Link::Calling(self.shared.caller.begin(socket, Some(done), move || plan.carry_out(idle, stream)));
        Ok(())
    }

    fn plan(&self) -> io::Result<Plan> {
        let mut bases = Vec::with_capacity(self.rings.list.len());
        let mut in_order = true;
        for queue in self.queues.iter().flatten() {
            if self.begun {
                bases.push(resume::used_index(&self.memory, queue)?);
                in_order &= resume::is_in_order(&self.memory, queue)?;
            } else {
                bases.push(queue.next_avail());
            }
        }
        let Shared { kind, requests, queues, .. } = &*self.shared;
        Ok(Plan {
            kind: kind.clone(),
            requests: *requests,
            queues: *queues,
            rings: Arc::clone(&self.rings),
            bases,
            in_order,
            inflight: self.inflight.clone(),
        })
    }

    /// An attempt has ended.
    fn attempted(&mut self, ops: &mut EventOps) {
        // Nothing to read after a stale event.
        let _ = self.done.read();
        let Link::Calling(pending) = &self.link else { return };
        let Some(outcome) = pending.poll() else { return };
        match outcome.and_then(|attempt| self.accept(attempt, ops)) {
            Ok(()) => {}
            Err(reason @ SessionError::Disorder) => self.give_up(&reason),
            Err(reason) => self.retry(&reason),
        }
    }

    fn accept(&mut self, attempt: Attempt, ops: &mut EventOps) -> Result<(), SessionError> {
        let Attempt { session, offer, inflight } = attempt;
        let events = EventSet::IN | EventSet::READ_HANG_UP;
        ops.add(Events::with_data(session.socket(), SOCKET, events))
            .map_err(|error| SessionError::Descriptor(io::Error::other(error)))?;
        self.arm(None);
        self.inflight = inflight;
        self.backoff.arrived(Instant::now());
        self.link = Link::Up(session);
        if let Some(offer) = offer {
            info!(device = self.shared.id, "Another vhost-user backend has taken over");
            let mut config = self.shared.config();
            if *config != offer.config {
                *config = offer.config;
                self.interrupt.config_changed();
            }
        }
        // What the last backend was told and did not do, and what it did and could not tell.
        for ring in &self.rings.list {
            // A full counter is readable already.
            let _ = ring.kick.write(1);
        }
        self.interrupt.used_buffers();
        Ok(())
    }

    /// The backend has hung up, or says something without being asked.
    fn lost(&mut self, ops: &mut EventOps) {
        let Link::Up(session) = std::mem::replace(&mut self.link, Link::Waiting) else { return };
        let _ = ops.remove(Events::empty(session.socket()));
        drop(session);
        self.retry(&SessionError::Lost);
    }

    fn retry(&mut self, reason: &SessionError) {
        let Some(pause) = self.backoff.pause(Instant::now()) else {
            self.give_up(reason);
            return;
        };
        let (device, reason) = (&self.shared.id, reason as &dyn std::error::Error);
        warn!(device, reason, ?pause, "The vhost-user backend is away");
        self.link = Link::Waiting;
        self.arm(Some(pause));
    }

    fn give_up(&mut self, reason: &SessionError) {
        let (device, reason) = (&self.shared.id, reason as &dyn std::error::Error);
        error!(device, reason, "The device stops until the driver resets it");
        self.link = Link::Away;
        self.arm(None);
        self.interrupt.needs_reset();
    }

    fn tick(&mut self) {
        // Each way sets the timer anew or off, which makes it not readable.
        match &self.link {
            // It ends soon, and says so.
            Link::Calling(pending) => {
                pending.give_up();
                self.arm(None);
            }
            Link::Waiting => self.attempt(),
            Link::Up(_) | Link::Away => self.arm(None),
        }
    }

    /// Sets the timer, or switches it off.
    fn arm(&mut self, after: Option<Duration>) {
        // A pause of nothing would switch it off.
        let set = match after {
            Some(after) => self.timer.reset(after.max(Duration::from_millis(1)), None),
            None => self.timer.clear(),
        };
        if let Err(error) = set {
            error!(device = self.shared.id, %error, "The timer of a vhost-user device cannot be set");
        }
    }

    /// Takes the rings back from the backend, and leaves the queues where it stopped.
    fn stop(&mut self) {
        let patience = self.shared.patience.answers;
        let session = match std::mem::replace(&mut self.link, Link::Away) {
            Link::Up(session) => Some(session),
            Link::Calling(pending) => pending.wait(patience).and_then(Result::ok).map(|attempt| attempt.session),
            Link::Waiting | Link::Away => None,
        };
        let bases = session.and_then(|session| self.stop_session(session));
        if !self.begun {
            return;
        }
        let mut bases = bases.unwrap_or_default().into_iter();
        for queue in self.queues.iter_mut().flatten() {
            if let Err(error) = settle(&self.memory, queue, bases.next()) {
                debug!(device = self.shared.id, %error, "A ring is not where it was");
            }
        }
    }

    /// Stops the rings and keeps the connection for the next driver. When that does not work, the connection ends.
    fn stop_session(&self, mut session: Session) -> Option<Vec<u16>> {
        let socket = session.socket().try_clone().ok()?;
        let rings = Arc::clone(&self.rings);
        let call = move || session.stop(&rings).map(|bases| (session, bases));
        match self.shared.caller.begin(socket, None, call).wait(self.shared.patience.answers)? {
            Ok((session, bases)) => {
                *self.shared.idle() = Some(session);
                Some(bases)
            }
            Err(reason) => {
                let (device, reason) = (&self.shared.id, &reason as &dyn std::error::Error);
                warn!(device, reason, "The vhost-user backend does not stop, and is left");
                None
            }
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.stop();
    }
}

impl ActiveHalf for Engine {
    /// The backend ends what it has begun and tells where it stopped; the connection is kept.
    fn park(mut self: Box<Self>) -> Vec<Option<Queue>> {
        self.stop();
        std::mem::take(&mut self.queues)
    }
}

impl MutEventSubscriber for Engine {
    fn init(&mut self, ops: &mut EventOps) {
        match self.watch(ops) {
            Ok(()) => self.attempt(),
            Err(reason) => {
                error!(device = self.shared.id, %reason, "The event loop cannot watch the device");
                self.interrupt.needs_reset();
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            DONE => self.attempted(ops),
            TIMER => self.tick(),
            _ => self.lost(ops),
        }
    }
}

/// What an attempt does, in the thread that waits for the backend.
struct Plan {
    kind: VhostUserKind,
    requests: u16,
    queues: u16,
    rings: Arc<Rings>,
    bases: Vec<u16>,
    /// Whether the rings can be resumed by their indices alone.
    in_order: bool,
    inflight: Option<Arc<Inflight>>,
}

impl Plan {
    fn carry_out(self, idle: Option<Session>, stream: UnixStream) -> Outcome {
        let (mut session, offer) = match idle {
            Some(session) => (session, None),
            None => {
                let (session, offer) = Session::negotiate(stream, &self.kind, self.requests, self.queues)?;
                (session, Some(offer))
            }
        };
        if !self.in_order && !session.tracks_inflight() {
            return Err(SessionError::Disorder);
        }
        let inflight = session.set_up(&self.rings, &self.bases, self.inflight)?;
        Ok(Attempt { session, offer, inflight })
    }
}
