//! All connections of a device: what comes from where goes whither. Knows no queue and no event
//! loop.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use vmm_sys_util::epoll::EventSet;

use super::MAX_CONNECTIONS;
use super::connection::{Connection, Key};
use super::connector::{Connect, ConnectError, Done, Shared, lock};
use super::link::{Fate, Link, Opening, RxBuffer};
use super::packet::{HEADER_LEN, HOST_CID, Header, SHUTDOWN_RCV, SHUTDOWN_SEND, TYPE_STREAM, op};
use super::stream::{HostEnd, HostStream};
use super::uds::{Greeting, UdsServer, read_greeting};
use crate::GuestMemory;
use crate::virtio::queue::{QueueError, Segments};

/// RSTs to packets without a connection that may wait for receive buffers. A guest that sends
/// more and gives no buffers is not listened to until it does.
const MAX_STRAY_RESETS: usize = 128;

/// Bytes that a connection buffers for a slow receiver on the host, while there are few.
const WINDOW: u32 = 256 << 10;

/// The same for a connection that is made while there are [`FEW_CONNECTIONS`] or more: so all
/// of them together cannot hold more than about 32 MiB.
const SMALL_WINDOW: u32 = 16 << 10;

/// How many connections get the large window.
const FEW_CONNECTIONS: usize = 64;

/// What is to be known of a client of the Unix socket.
const CLIENT_EVENTS: EventSet =
    EventSet::IN.union(EventSet::OUT).union(EventSet::READ_HANG_UP).union(EventSet::EDGE_TRIGGERED);

/// How descriptors are watched.
pub trait Watch {
    /// Reports `events` of `fd` with `token` from now on.
    fn watch(&mut self, fd: BorrowedFd<'_>, token: u32, events: EventSet) -> io::Result<()>;

    /// No longer reports on `fd`.
    fn forget(&mut self, fd: BorrowedFd<'_>);
}

/// What a token stands for.
enum Slot {
    /// A client of the Unix socket that did not say yet whereto.
    Client(UnixStream),
    /// A connection, in whatever state.
    Link(Box<Link>),
}

/// The connections of an active device.
pub struct Muxer {
    guest_cid: u64,
    shared: Arc<Shared>,
    uds: Option<Arc<UdsServer>>,
    slots: HashMap<u32, Slot>,
    /// Where the search for a free token begins.
    next_token: u32,
    by_key: HashMap<Key, u32>,
    /// Links with something for the guest, each once, in the order of their turn.
    turns: VecDeque<u32>,
    /// RSTs that belong to no link.
    resets: VecDeque<Header>,
}

impl Muxer {
    /// No connections yet.
    pub fn new(guest_cid: u64, shared: Arc<Shared>, uds: Option<Arc<UdsServer>>) -> Self {
        Self {
            guest_cid,
            shared,
            uds,
            slots: HashMap::new(),
            next_token: 0,
            by_key: HashMap::new(),
            turns: VecDeque::new(),
            resets: VecDeque::new(),
        }
    }

    /// Whether [`receive`](Self::receive) may be called: whether its answer has a place.
    pub fn can_receive(&self) -> bool {
        self.resets.len() < MAX_STRAY_RESETS
    }

    /// Whether [`fill`](Self::fill) would use a buffer, as far as is known without trying.
    pub fn has_output(&self) -> bool {
        !self.resets.is_empty() || !self.turns.is_empty()
    }

    /// Begins a connection to the guest.
    pub fn connect(&mut self, connect: Connect, watch: &mut dyn Watch) {
        let Connect { port, end, done } = connect;
        if let Err((done, reason)) = self.try_connect(port, end, done, watch) {
            done(Err(reason));
        }
    }

    fn try_connect(
        &mut self,
        port: u32,
        end: HostEnd,
        done: Done,
        watch: &mut dyn Watch,
    ) -> Result<(), (Done, ConnectError)> {
        let stream = match HostStream::new(end) {
            Ok(stream) => stream,
            Err(error) => return Err((done, ConnectError::HostEnd(error))),
        };
        let Some(token) = self.free_token() else {
            return Err((done, ConnectError::TooManyConnections));
        };
        if let Err(error) = watch.watch(stream.fd(), token, stream.interest()) {
            let reason = match error.raw_os_error() {
                Some(libc::EPERM) => ConnectError::NotPollable,
                _ => ConnectError::HostEnd(error),
            };
            return Err((done, reason));
        }
        self.request(token, port, stream, Opening::Caller(done));
        Ok(())
    }

    /// Puts a connection to the guest's `port` at `token`, whose descriptor is watched already.
    fn request(&mut self, token: u32, guest_port: u32, stream: HostStream, opening: Opening) {
        let key = Key { host_port: self.free_host_port(), guest_port };
        let mut closed = 0;
        if !stream.reads() {
            closed |= SHUTDOWN_SEND;
        }
        if !stream.writes() {
            closed |= SHUTDOWN_RCV;
        }
        let connection = Connection::request(key, self.guest_cid, self.window(), closed);
        self.insert(token, Link::new(connection, stream, Some(opening)));
    }

    /// Takes a client of the Unix socket.
    pub fn client_arrived(&mut self, client: UnixStream, watch: &mut dyn Watch) {
        // Without room it is closed, which is all that can be said to it.
        let Some(token) = self.free_token() else { return };
        if watch.watch(client.as_fd(), token, CLIENT_EVENTS).is_ok() {
            self.slots.insert(token, Slot::Client(client));
        }
    }

    /// Watches all descriptors, on an event loop that does not know them. Each is reported once
    /// at least, as they are edge-triggered.
    pub fn watch_all(&self, watch: &mut dyn Watch) -> io::Result<()> {
        for (token, slot) in &self.slots {
            match slot {
                Slot::Client(client) => watch.watch(client.as_fd(), *token, CLIENT_EVENTS)?,
                Slot::Link(link) => watch.watch(link.stream().fd(), *token, link.stream().interest())?,
            }
        }
        Ok(())
    }

    /// A watched descriptor has news.
    pub fn ready(&mut self, token: u32, events: EventSet, watch: &mut dyn Watch) {
        match self.slots.get_mut(&token) {
            Some(Slot::Link(link)) => {
                let fate = link.ready(events);
                self.decide(token, fate, watch);
            }
            Some(Slot::Client(_)) => self.client_ready(token, events, watch),
            None => {}
        }
    }

    fn client_ready(&mut self, token: u32, events: EventSet, watch: &mut dyn Watch) {
        let Some(Slot::Client(client)) = self.slots.remove(&token) else { return };
        match read_greeting(&client) {
            Greeting::Connect(port) => {
                let stream = HostStream::adopt(HostEnd::Duplex(client.into()));
                self.request(token, port, stream, Opening::Client);
                // What was sent with the line makes no edge of its own.
                self.ready(token, events, watch);
            }
            Greeting::Incomplete if !events.intersects(EventSet::READ_HANG_UP | EventSet::HANG_UP) => {
                self.slots.insert(token, Slot::Client(client));
            }
            _ => watch.forget(client.as_fd()),
        }
    }

    /// Takes a packet of the guest, whose `payload` is `None` when the packet is shorter than its
    /// header says. Only when [`can_receive`](Self::can_receive).
    pub fn receive(
        &mut self,
        memory: &GuestMemory,
        header: &Header,
        payload: Option<Segments<'_>>,
        watch: &mut dyn Watch,
    ) -> Result<(), QueueError> {
        if header.src_cid != self.guest_cid {
            // An answer would go to somebody else.
            return Ok(());
        }
        let key = Key { host_port: header.dst_port, guest_port: header.src_port };
        let is_ours = header.dst_cid == HOST_CID && header.kind == TYPE_STREAM;
        let token = self.by_key.get(&key).copied().filter(|_| is_ours);
        match token.and_then(|token| Some((token, self.slots.get_mut(&token)?))) {
            Some((token, Slot::Link(link))) => {
                let fate = match payload {
                    Some(payload) => link.receive(memory, header, payload)?,
                    None => Fate::Reset,
                };
                self.decide(token, fate, watch);
            }
            _ if header.op == op::RST => {}
            _ if header.op == op::REQUEST && is_ours && payload.is_some() => {
                self.accept(header, key, watch);
            }
            _ => self.resets.push_back(header.reset_reply()),
        }
        Ok(())
    }

    /// The guest wants a connection to one of the host's ports.
    fn accept(&mut self, request: &Header, key: Key, watch: &mut dyn Watch) {
        if self.try_accept(request, key, watch).is_none() {
            self.resets.push_back(request.reset_reply());
        }
    }

    fn try_accept(&mut self, request: &Header, key: Key, watch: &mut dyn Watch) -> Option<()> {
        let token = self.free_token()?;
        let listener = self.shared.listener(key.host_port);
        let (ours, theirs) = match (&listener, &self.uds) {
            (Some(_), _) => UnixStream::pair().map(|(ours, theirs)| (ours, Some(theirs))).ok()?,
            (None, Some(uds)) => (uds.connect_out(key.host_port).ok()?, None),
            (None, None) => return None,
        };
        let stream = HostStream::new(HostEnd::Duplex(ours.into())).ok()?;
        watch.watch(stream.fd(), token, stream.interest()).ok()?;
        let connection = Connection::accept(request, key, self.guest_cid, self.window());
        self.insert(token, Link::new(connection, stream, None));
        if let (Some(listener), Some(theirs)) = (listener, theirs) {
            lock(&listener)(theirs);
        }
        Some(())
    }

    fn insert(&mut self, token: u32, mut link: Link) {
        self.by_key.insert(link.connection().key(), token);
        link.in_line = true;
        self.turns.push_back(token);
        self.slots.insert(token, Slot::Link(Box::new(link)));
    }

    /// Does what is to become of a link, and puts it in line if it has something for the guest.
    fn decide(&mut self, token: u32, fate: Fate, watch: &mut dyn Watch) {
        let Some(Slot::Link(link)) = self.slots.get_mut(&token) else { return };
        match fate {
            Fate::Keep => {
                if link.has_output() && !link.in_line {
                    link.in_line = true;
                    self.turns.push_back(token);
                }
            }
            Fate::Orphan => {
                self.by_key.remove(&link.connection().key());
            }
            Fate::Drop | Fate::Reset => {
                if fate == Fate::Reset {
                    self.resets.push_back(link.reset_header());
                }
                let key = link.connection().key();
                // An orphan's ports may be another link's by now.
                if self.by_key.get(&key) == Some(&token) {
                    self.by_key.remove(&key);
                }
                if link.in_line {
                    self.turns.retain(|other| *other != token);
                }
                link.fail(ConnectError::Refused);
                watch.forget(link.stream().fd());
                self.slots.remove(&token);
            }
        }
    }

    /// Puts what there is for the guest into `buffers`, in order, and for each that it uses the
    /// length into `used`.
    pub fn fill(
        &mut self,
        memory: &GuestMemory,
        buffers: &[RxBuffer],
        used: &mut Vec<u32>,
        watch: &mut dyn Watch,
    ) -> Result<(), QueueError> {
        while let Some(rest) = buffers.get(used.len()..).filter(|rest| !rest.is_empty()) {
            if let (Some(header), Some(buffer)) = (self.resets.pop_front(), rest.first()) {
                buffer.put_header(memory, header)?;
                used.push(HEADER_LEN);
                continue;
            }
            let Some(token) = self.turns.pop_front() else { break };
            if let Some(Slot::Link(link)) = self.slots.get_mut(&token) {
                link.in_line = false;
                let fate = link.fill(memory, rest, used)?;
                self.decide(token, fate, watch);
            }
        }
        Ok(())
    }

    /// Ends all connections, because the guest cannot be talked to until it resets the device.
    pub fn close(&mut self, watch: &mut dyn Watch) {
        for (_, slot) in self.slots.drain() {
            match slot {
                Slot::Client(client) => watch.forget(client.as_fd()),
                Slot::Link(mut link) => {
                    link.fail(ConnectError::Reset);
                    watch.forget(link.stream().fd());
                }
            }
        }
        self.by_key.clear();
        self.turns.clear();
        self.resets.clear();
    }

    fn window(&self) -> u32 {
        if self.slots.len() < FEW_CONNECTIONS { WINDOW } else { SMALL_WINDOW }
    }

    /// A token that stands for nothing, unless there are [`MAX_CONNECTIONS`] already.
    fn free_token(&mut self) -> Option<u32> {
        if self.slots.len() >= MAX_CONNECTIONS {
            return None;
        }
        loop {
            let token = self.next_token;
            self.next_token = token.wrapping_add(1) & MAX_TOKEN;
            if !self.slots.contains_key(&token) {
                return Some(token);
            }
        }
    }

    /// A host port that no connection has. There are many times more than connections.
    fn free_host_port(&self) -> u32 {
        loop {
            let port = self.shared.next_port();
            if !self.by_key.keys().any(|key| key.host_port == port) {
                return port;
            }
        }
    }
}

/// Tokens are kept small: the engine has its own beside them.
pub const MAX_TOKEN: u32 = (1 << 16) - 1;

impl Drop for Muxer {
    fn drop(&mut self) {
        for slot in self.slots.values_mut() {
            if let Slot::Link(link) = slot {
                link.fail(ConnectError::Reset);
            }
        }
    }
}
