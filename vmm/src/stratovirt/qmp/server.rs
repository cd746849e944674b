//! The thread that serves a QMP socket: one client at a time, as StratoVirt does. Who connects meanwhile is greeted when
//! the other has left.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{SockFlag, accept4};
use serde_json::Value;
use tracing::{debug, warn};

use super::commands;
use super::connection::Connection;
use super::error::CommandError;
use super::event::{Event, EventQueue};
use super::framing::{FramingError, Request};
use super::front::Front;
use super::message::{Greeting, Reply};
use super::monitor::Monitor;
use super::rate::RateLimit;

/// How long a client that does not read holds up the end of the server.
const FAREWELL: Duration = Duration::from_millis(500);

/// When to try again to accept a client for whom this process has no descriptor left: nothing tells when it has one.
const ACCEPT_AGAIN: Duration = Duration::from_millis(200);

/// A served QMP socket. It ends with the machine, or when this is dropped.
pub struct QmpServer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    events: Arc<EventQueue>,
    stopping: AtomicBool,
}

/// Serves QMP for `front` on a listening stream socket in a thread of its own.
pub fn serve(front: Front, listener: OwnedFd) -> io::Result<QmpServer> {
    let events = Arc::new(EventQueue::new()?);
    let shared = Arc::new(Shared { events: Arc::clone(&events), stopping: AtomicBool::new(false) });
    let server = Server {
        listener,
        client: None,
        accept_failed: false,
        rate: RateLimit::new(Instant::now()),
        monitor: Monitor::new(front, events),
        shared: Arc::clone(&shared),
    };
    let thread = thread::Builder::new().name("qmp".into()).spawn(move || server.run())?;
    Ok(QmpServer { shared, thread: Some(thread) })
}

impl QmpServer {
    /// Waits until the machine has ended and the client has been told.
    pub fn join(mut self) {
        self.join_thread();
    }

    fn join_thread(&mut self) {
        if let Some(thread) = self.thread.take() {
            // An error is a panic, which its own message has told.
            let _ = thread.join();
        }
    }
}

impl Drop for QmpServer {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        self.shared.events.wake();
        self.join_thread();
    }
}

struct Server {
    listener: OwnedFd,
    client: Option<Connection>,
    /// The last attempt to accept a client has failed.
    accept_failed: bool,
    rate: RateLimit,
    monitor: Monitor,
    shared: Arc<Shared>,
}

/// What there is to do.
struct Ready {
    /// The machine has ended.
    ended: bool,
    /// Somebody connects, or the client has sent something or has left.
    input: bool,
}

impl Server {
    fn run(mut self) {
        // Looked at after the events were taken, which also takes the wake-up that came with the wish to stop.
        while !self.shared.stopping.load(Ordering::Acquire) {
            let ready = match self.wait() {
                Ok(ready) => ready,
                Err(error) => {
                    // poll on valid descriptors: nothing that trying again would change.
                    warn!(%error, "The QMP server ends");
                    return;
                }
            };
            if ready.input {
                self.input();
            }
            self.serve_requests();
            self.monitor.look_at_balloon();
            if self.monitor.ending().is_some() || ready.ended {
                return self.farewell();
            }
            self.send_events();
            self.flush();
        }
    }

    fn wait(&mut self) -> io::Result<Ready> {
        let timeout = match std::mem::take(&mut self.accept_failed) {
            true => PollTimeout::try_from(ACCEPT_AGAIN).unwrap_or(PollTimeout::ZERO),
            false => PollTimeout::NONE,
        };
        let accepting = if timeout.is_none() { PollFlags::POLLIN } else { PollFlags::empty() };
        let wake = PollFd::new(self.shared.events.descriptor(), PollFlags::POLLIN);
        let exit = PollFd::new(self.monitor.machine().exit_fd(), PollFlags::POLLIN);
        let peer = match &self.client {
            None => PollFd::new(self.listener.as_fd(), accepting),
            Some(client) => {
                let mut interest = PollFlags::empty();
                interest.set(PollFlags::POLLIN, !client.is_full());
                interest.set(PollFlags::POLLOUT, client.has_output());
                PollFd::new(client.as_fd(), interest)
            }
        };
        let balloon = self.monitor.balloon_changed().map(|changed| PollFd::new(changed, PollFlags::POLLIN));
        let mut descriptors: Vec<_> = [exit, peer, wake].into_iter().chain(balloon).collect();
        match poll(&mut descriptors, timeout) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut happened = descriptors.iter().map(|descriptor| descriptor.revents().unwrap_or(PollFlags::empty()));
        let input = PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR;
        let ended = happened.next().is_some_and(|events| !events.is_empty());
        Ok(Ready { ended, input: happened.next().is_some_and(|events| events.intersects(input)) })
    }

    fn input(&mut self) {
        let Some(client) = &mut self.client else { return self.accept() };
        match client.receive() {
            Ok(true) => {}
            Ok(false) => {
                // What it has sent before it left is still meant, and it may still read.
                self.serve_requests();
                if self.monitor.ending().is_none() {
                    self.flush();
                    self.client = None;
                }
            }
            Err(error) => {
                debug!(%error, "The QMP client is gone");
                self.client = None;
            }
        }
    }

    fn accept(&mut self) {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        match accept4(self.listener.as_raw_fd(), flags) {
            Ok(socket) => {
                // SAFETY: the kernel has made this descriptor for this call, and nobody else knows of it.
                let mut client = Connection::new(unsafe { OwnedFd::from_raw_fd(socket) });
                // What happened while nobody listened is over.
                drop(self.shared.events.take());
                client.send(&Greeting::default());
                self.client = Some(client);
            }
            // Who wanted to connect has left already.
            Err(nix::Error::ECONNABORTED | nix::Error::EAGAIN | nix::Error::EINTR) => {}
            Err(error) => {
                warn!(%error, "A QMP client cannot be accepted");
                self.accept_failed = true;
            }
        }
    }

    fn serve_requests(&mut self) {
        while self.monitor.ending().is_none() {
            if self.client.as_ref().is_some_and(Connection::is_full) {
                self.flush();
            }
            let Some(client) = &mut self.client else { return };
            let Some(request) = client.next_request() else { return };
            let lost = matches!(request, Err(FramingError::TooLong));
            let (id, answer) = match request {
                Ok(Request { execute, arguments, id }) => {
                    let answer = if self.rate.admit(Instant::now()) {
                        commands::serve(&mut self.monitor, client, &execute, arguments)
                    } else {
                        Err(CommandError::Throttled)
                    };
                    (id, answer)
                }
                Err(FramingError::Request { source, id }) => (id, Err(CommandError::NoRequest(source))),
                Err(error) => (None, Err(CommandError::Framing(error))),
            };
            self.reply(answer, id);
            self.send_events();
            if lost {
                self.flush();
                self.client = None;
            }
        }
    }

    fn reply(&mut self, answer: Result<Value, CommandError>, id: Option<Value>) {
        if let Err(error) = &answer {
            debug!(error = error as &dyn std::error::Error, "A QMP command is refused");
        }
        if let Some(client) = &mut self.client {
            client.send(&Reply::new(answer, id));
        }
    }

    /// Events come after the reply to the command that caused them, as StratoVirt's do.
    fn send_events(&mut self) {
        for event in self.shared.events.take() {
            match &mut self.client {
                Some(client) if !client.is_full() => client.send(&event),
                _ => debug!(?event, "Nobody is told of an event"),
            }
        }
    }

    fn flush(&mut self) {
        let Some(client) = &mut self.client else { return };
        if let Err(error) = client.flush() {
            debug!(%error, "The QMP client is gone");
            self.client = None;
        }
    }

    /// Tells the client that the machine has ended, and ends the machine where a client asked for it.
    fn farewell(mut self) {
        if let Some(reason) = self.monitor.ending() {
            self.shared.events.push(Event::Shutdown { guest: false, reason });
        } else if let Some(reason) = self.monitor.machine().exit_reason() {
            for event in Event::of_exit(&reason) {
                self.shared.events.push(event);
            }
        }
        self.send_events();
        self.flush();
        let deadline = Instant::now() + FAREWELL;
        while let Some(client) = self.client.as_ref().filter(|client| client.has_output()) {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
            let mut descriptor = [PollFd::new(client.as_fd(), PollFlags::POLLOUT)];
            if !matches!(poll(&mut descriptor, timeout), Ok(1) | Err(nix::Error::EINTR)) {
                break;
            }
            self.flush();
        }
        if self.monitor.ending().is_some() {
            self.monitor.machine().stop();
        }
        // A snapshot that has all memory is brought to an end.
        self.monitor.front.migration().join();
    }
}
