//! One port at work: bytes from a queue to the host, and from the host to a queue.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events};
use tracing::{debug, warn};
use virtio_queue::Queue;

use super::config::{PortInfo, PortState};
use super::control::{Saying, Sayings};
use crate::virtio::queue::{Chain, QueueError, VirtQueue};

/// Bytes that one system call moves at most, so that a guest's large buffers do not make one call
/// long: what a pipe holds.
const PIECE: u32 = 64 << 10;

/// System calls of one port and direction in one wake-up; the rest waits until the other devices of
/// the loop had their turn.
const CALLS_PER_WAKE_UP: u32 = 16;

/// What an event of a port is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The guest has buffers for input.
    ReceiveKick,
    /// The guest has output.
    TransmitKick,
    /// The host has input.
    Input,
    /// The host takes output again.
    Output,
    /// A client of the host.
    Client,
}

/// Tokens that a port has: one for each source.
pub const TOKENS_PER_PORT: u32 = 5;

/// The sources in the order of their numbers.
pub const SOURCES: [Source; TOKENS_PER_PORT as usize] =
    [Source::ReceiveKick, Source::TransmitKick, Source::Input, Source::Output, Source::Client];

/// Output that the host has taken in part.
struct Partial {
    chain: Chain,
    taken: u32,
}

/// A port of an active device.
pub struct Port {
    pub info: Arc<PortInfo>,
    /// Messages for the driver.
    pub sayings: Sayings,
    pub rx: VirtQueue,
    pub tx: VirtQueue,
    partial: Option<Partial>,
    /// Bytes of the first chain that were taken before the machine was parked.
    taken_before: u32,
    /// The driver knows the port.
    ready: bool,
    /// Somebody in the guest takes input.
    guest_open: bool,
    input_watched: Option<RawFd>,
    output_watched: Option<RawFd>,
    listener_watched: bool,
    token: u32,
}

impl Port {
    /// A port where its driver left it, whose events carry `token` and the next numbers. Where there are no control messages
    /// it is open from the start.
    pub fn new(info: Arc<PortInfo>, rx: VirtQueue, tx: VirtQueue, token: u32, open: bool) -> Self {
        let PortState { ready, guest_open, taken, mut sayings } = info.state().clone();
        if ready {
            // Whoever was at the host's end may be gone, or somebody may have come.
            sayings.push(Saying::Open(info.host.is_connected()));
        }
        Self {
            info,
            sayings,
            rx,
            tx,
            partial: None,
            taken_before: taken,
            ready,
            guest_open: open || guest_open,
            input_watched: None,
            output_watched: None,
            listener_watched: false,
            token,
        }
    }

    fn token(&self, source: Source) -> u32 {
        let number = SOURCES.iter().position(|other| *other == source).unwrap_or_default();
        self.token.saturating_add(u32::try_from(number).unwrap_or_default())
    }

    /// Watches the queues, and the host as far as it is wanted now.
    pub fn start(&mut self, ops: &mut EventOps) -> event_manager::Result<()> {
        ops.add(Events::with_data(self.rx.kick(), self.token(Source::ReceiveKick), EventSet::IN))?;
        ops.add(Events::with_data(self.tx.kick(), self.token(Source::TransmitKick), EventSet::IN))?;
        // The driver may have filled them before.
        self.rx.kick_again();
        self.tx.kick_again();
        self.watch_listener(ops);
        Ok(())
    }

    /// Gives the queues back, receive and transmit, and says where the driver is.
    pub fn park(self) -> (Queue, Queue) {
        let taken = self.partial.as_ref().map_or(self.taken_before, |partial| partial.taken);
        let unserved = u16::from(self.partial.is_some());
        *self.info.state() = PortState { ready: self.ready, guest_open: self.guest_open, taken, sayings: self.sayings };
        (self.rx.park(0), self.tx.park(unserved))
    }

    /// Watches nothing any more.
    pub fn stop(&mut self, ops: &mut EventOps) {
        for queue in [&self.rx, &self.tx] {
            let _ = ops.remove(Events::empty(queue.kick()));
        }
        self.watch_input(None, ops);
        self.watch_output(None, ops);
        if let Some(listener) = self.info.host.listener().filter(|_| self.listener_watched) {
            let _ = ops.remove(Events::empty(listener));
        }
    }

    /// Does what an event asks for.
    pub fn serve(&mut self, source: Source, ops: &mut EventOps) -> Result<(), QueueError> {
        match source {
            Source::ReceiveKick => {
                self.rx.acknowledge_kick();
                self.receive(ops)
            }
            Source::Input => self.receive(ops),
            Source::TransmitKick => {
                self.tx.acknowledge_kick();
                self.transmit(ops)
            }
            Source::Output => {
                self.watch_output(None, ops);
                self.transmit(ops)
            }
            Source::Client => self.accept(ops),
        }
    }

    /// The driver has set the port up.
    pub fn driver_is_ready(&mut self) {
        self.ready = true;
        if self.info.console {
            self.sayings.push(Saying::Console);
        }
        if self.info.name.is_some() {
            self.sayings.push(Saying::Name);
        }
        if self.info.host.is_connected() {
            self.sayings.push(Saying::Open(true));
        }
    }

    /// A program of the guest opened the port or closed it.
    pub fn guest_opens(&mut self, open: bool, ops: &mut EventOps) -> Result<(), QueueError> {
        self.guest_open = open;
        self.receive(ops)
    }

    /// Moves input into the guest's buffers until one of the two has none.
    fn receive(&mut self, ops: &mut EventOps) -> Result<(), QueueError> {
        let Some(input) = self.info.host.input().filter(|_| self.guest_open) else {
            self.watch_input(None, ops);
            return Ok(());
        };
        for _ in 0..CALLS_PER_WAKE_UP {
            let Some(chain) = self.rx.pop()? else {
                if self.rx.enable_notification()? {
                    continue;
                }
                // Input that nobody can take would wake the loop without end.
                self.watch_input(None, ops);
                return Ok(());
            };
            let writable = chain.writable();
            let Some((piece, _)) = writable.split_at(writable.len().min(PIECE)).filter(|(piece, _)| !piece.is_empty())
            else {
                self.rx.add_used(chain, 0)?;
                continue;
            };
            match piece.buffers(self.rx.memory())?.read_from(input.as_fd()) {
                Ok(0) => {
                    self.rx.put_back(chain);
                    self.disconnect(true, ops);
                    return Ok(());
                }
                Ok(len) => self.rx.add_used(chain, u32::try_from(len).unwrap_or(PIECE))?,
                Err(error) => {
                    self.rx.put_back(chain);
                    if error.kind() == io::ErrorKind::WouldBlock {
                        self.watch_input(Some(&input), ops);
                    } else {
                        debug!(port = self.info.number, %error, "The input of a port has ended");
                        self.disconnect(true, ops);
                    }
                    return Ok(());
                }
            }
        }
        self.rx.kick_again();
        Ok(())
    }

    /// Moves output to the host until one of the two has enough.
    fn transmit(&mut self, ops: &mut EventOps) -> Result<(), QueueError> {
        if self.output_watched.is_some() {
            // The host has not caught up with what came before.
            return Ok(());
        }
        for _ in 0..CALLS_PER_WAKE_UP {
            let next = match self.partial.take() {
                Some(partial) => Some(partial),
                None => self.tx.pop()?.map(|chain| Partial { chain, taken: std::mem::take(&mut self.taken_before) }),
            };
            let Some(Partial { chain, taken }) = next else {
                if self.tx.enable_notification()? {
                    continue;
                }
                return Ok(());
            };
            let Some((_, rest)) = chain.readable().split_at(taken).filter(|(_, rest)| !rest.is_empty()) else {
                self.tx.add_used(chain, 0)?;
                continue;
            };
            let Some(output) = self.info.host.output() else {
                self.tx.add_used(chain, 0)?;
                continue;
            };
            let (piece, _) = rest.split_at(rest.len().min(PIECE)).ok_or_else(|| chain.malformed())?;
            match piece.buffers(self.tx.memory())?.write_to(output.as_fd()) {
                Ok(len) => {
                    let taken = taken.saturating_add(u32::try_from(len).unwrap_or(PIECE));
                    self.partial = Some(Partial { chain, taken });
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if self.info.console {
                        self.tx.add_used(chain, 0)?;
                        continue;
                    }
                    self.partial = Some(Partial { chain, taken });
                    self.watch_output(Some(&output), ops);
                    return Ok(());
                }
                Err(error) => {
                    debug!(port = self.info.number, %error, "The output of a port has ended");
                    self.tx.add_used(chain, 0)?;
                    self.disconnect(false, ops);
                }
            }
        }
        self.tx.kick_again();
        Ok(())
    }

    fn accept(&mut self, ops: &mut EventOps) -> Result<(), QueueError> {
        match self.info.host.accept() {
            Ok(true) => {
                self.watch_listener(ops);
                self.say_whether_open();
                self.receive(ops)
            }
            Ok(false) => Ok(()),
            Err(error) => {
                warn!(port = self.info.number, %error, "A client of a console port cannot be accepted");
                Ok(())
            }
        }
    }

    /// One direction of the host's end has ended.
    fn disconnect(&mut self, input: bool, ops: &mut EventOps) {
        self.watch_input(None, ops);
        self.watch_output(None, ops);
        if input {
            self.info.host.end_of_input();
        } else {
            self.info.host.end_of_output();
        }
        self.watch_listener(ops);
        if !self.info.host.is_connected() {
            self.say_whether_open();
        }
        // What waited for the output of before is dealt with again.
        self.tx.kick_again();
    }

    fn say_whether_open(&mut self) {
        if self.ready {
            self.sayings.push(Saying::Open(self.info.host.is_connected()));
        }
    }

    fn watch_input(&mut self, input: Option<&Arc<File>>, ops: &mut EventOps) {
        let token = self.token(Source::Input);
        watch(&mut self.input_watched, input, token, EventSet::IN, ops);
    }

    fn watch_output(&mut self, output: Option<&Arc<File>>, ops: &mut EventOps) {
        let token = self.token(Source::Output);
        watch(&mut self.output_watched, output, token, EventSet::OUT, ops);
    }

    /// Watches the listener while there is no client. Edge-triggered: one that cannot be accepted for lack of
    /// descriptors waits for the next, instead of keeping the loop busy.
    fn watch_listener(&mut self, ops: &mut EventOps) {
        let Some(listener) = self.info.host.listener() else { return };
        let wanted = !self.info.host.is_connected();
        if wanted == self.listener_watched {
            return;
        }
        let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let result = if wanted {
            ops.add(Events::with_data(listener, self.token(Source::Client), events))
        } else {
            ops.remove(Events::empty(listener))
        };
        match result {
            Ok(()) => self.listener_watched = wanted,
            Err(reason) => warn!(port = self.info.number, %reason, "The listener of a port cannot be watched"),
        }
    }
}

/// Makes `watched` what is wanted.
fn watch(watched: &mut Option<RawFd>, wanted: Option<&Arc<File>>, token: u32, events: EventSet, ops: &mut EventOps) {
    let fd = wanted.map(|file| file.as_raw_fd());
    if *watched == fd {
        return;
    }
    if let Some(fd) = watched.take() {
        let _ = ops.remove(Events::empty_raw(fd));
    }
    if let Some(fd) = fd {
        // A plain file cannot be watched, but is always ready and never gets here.
        match ops.add(Events::with_data_raw(fd, token, events)) {
            Ok(()) => *watched = Some(fd),
            Err(reason) => debug!(%reason, "A descriptor of a port cannot be watched"),
        }
    }
}
