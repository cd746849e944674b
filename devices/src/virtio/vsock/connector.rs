//! How the rest of the process reaches the guest's sockets.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use libc::EFD_CLOEXEC;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::stream::HostEnd;

/// First port that is given to connections from the host. Services listen on low ports.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// The last one; above are ports that neither side gives out by itself.
const LAST_HOST_PORT: u32 = (1 << 31) - 1;

/// Called once with the host port of an established connection, or why there is none.
pub type Done = Box<dyn FnOnce(Result<u32, ConnectError>) + Send>;

/// Called with each connection from the guest to a port.
pub type Accept = Box<dyn FnMut(UnixStream) + Send>;

/// Why a connection into the guest was not made.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nothing listens on the port, or the guest has no memory for it.
    #[error("The guest refused the connection")]
    Refused,
    /// The driver reset the device before the guest answered.
    #[error("The device was reset before the guest answered")]
    Reset,
    /// The device has [`MAX_CONNECTIONS`](super::MAX_CONNECTIONS) connections.
    #[error("The device has no room for another connection")]
    TooManyConnections,
    /// The device is gone.
    #[error("The device is closed")]
    Closed,
    /// The kernel cannot wait for the descriptor: a regular file or a directory.
    #[error("The descriptor cannot be waited for, as a pipe or a socket can")]
    NotPollable,
    /// The descriptor cannot be used.
    #[error("The descriptor cannot be used")]
    HostEnd(#[source] io::Error),
}

/// Makes connections into the guest, and takes those that the guest makes.
///
/// Usable from any thread, and before the guest's driver is there: then connections wait for it.
#[derive(Clone)]
pub struct Connector {
    shared: Arc<Shared>,
}

impl Connector {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Connects `end` to `port` in the guest.
    ///
    /// `done` is called once: on the event loop's thread with the connection's host port or the
    /// guest's refusal, on the thread that resets the device with [`ConnectError::Reset`], on the
    /// thread that drops it with [`ConnectError::Closed`] (or on this one, when it is gone
    /// already). It must not block.
    pub fn connect(&self, port: u32, end: HostEnd, done: Box<dyn FnOnce(Result<u32, ConnectError>) + Send>) {
        self.shared.submit(Connect { port, end, done });
    }

    /// Hands connections from the guest to the host's `port` to `accept`, instead of to the Unix
    /// socket `<uds_path>_<port>`. A later call for the same port replaces an earlier one.
    ///
    /// `accept` is called on the event loop's thread with one end of a fresh socket pair, and
    /// must not block.
    pub fn listen(&self, port: u32, accept: Box<dyn FnMut(UnixStream) + Send>) {
        lock(&self.shared.listeners).insert(port, Arc::new(Mutex::new(accept)));
    }
}

/// A connection that was asked for and not begun.
pub(super) struct Connect {
    pub port: u32,
    pub end: HostEnd,
    pub done: Done,
}

/// What outlives a reset of the device.
pub(super) struct Shared {
    /// `None` after the device was closed.
    waiting: Mutex<Option<VecDeque<Connect>>>,
    /// Readable when something was added to `waiting`.
    wake: EventFd,
    listeners: Mutex<HashMap<u32, Arc<Mutex<Accept>>>>,
    /// Where the search for a free port begins. Kept over resets: a guest that still remembers
    /// a connection must not see its port again at once.
    next_port: AtomicU32,
}

impl Shared {
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            waiting: Mutex::new(Some(VecDeque::new())),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            listeners: Mutex::new(HashMap::new()),
            next_port: AtomicU32::new(FIRST_HOST_PORT),
        })
    }

    /// Readable when [`take_waiting`](Self::take_waiting) has something, or after
    /// [`wake_up`](Self::wake_up).
    pub fn wake(&self) -> &EventFd {
        &self.wake
    }

    /// Makes the event loop come back to the device.
    pub fn wake_up(&self) {
        // A full counter is readable already.
        let _ = self.wake.write(1);
    }

    fn submit(&self, connect: Connect) {
        let mut waiting = lock(&self.waiting);
        match waiting.as_mut() {
            Some(queue) => {
                queue.push_back(connect);
                drop(waiting);
                self.wake_up();
            }
            None => {
                drop(waiting);
                (connect.done)(Err(ConnectError::Closed));
            }
        }
    }

    /// The connections that were asked for since the last call.
    pub fn take_waiting(&self) -> VecDeque<Connect> {
        lock(&self.waiting).as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Refuses all that waits and all that comes.
    pub fn close(&self) {
        // Unlocked before the callbacks run, which may use the connector.
        let waiting = lock(&self.waiting).take();
        for connect in waiting.unwrap_or_default() {
            (connect.done)(Err(ConnectError::Closed));
        }
        lock(&self.listeners).clear();
    }

    /// Who takes connections to `port`. Called without the table locked, so that it may change
    /// the table.
    pub fn listener(&self, port: u32) -> Option<Arc<Mutex<Accept>>> {
        lock(&self.listeners).get(&port).cloned()
    }

    /// The host port whose turn it is.
    pub fn upcoming_port(&self) -> u32 {
        self.next_port.load(Ordering::Relaxed)
    }

    /// Goes on with `port`; one that is not given out begins the turn anew.
    pub fn set_upcoming_port(&self, port: u32) {
        let known = (FIRST_HOST_PORT..=LAST_HOST_PORT).contains(&port);
        self.next_port.store(if known { port } else { FIRST_HOST_PORT }, Ordering::Relaxed);
    }

    /// The next host port in turn.
    pub fn next_port(&self) -> u32 {
        let following = |port: u32| match port {
            FIRST_HOST_PORT..LAST_HOST_PORT => Some(port.saturating_add(1)),
            _ => Some(FIRST_HOST_PORT),
        };
        let turn = self.next_port.fetch_update(Ordering::Relaxed, Ordering::Relaxed, following);
        turn.unwrap_or(FIRST_HOST_PORT)
    }
}

/// A panic of a callback must not become one here; what these locks guard has no invariant
/// that half a change breaks.
pub(super) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
