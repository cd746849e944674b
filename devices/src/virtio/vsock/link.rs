//! One connection together with its host end.

use std::io;

use vmm_sys_util::epoll::EventSet;

use super::connection::{Connection, Verdict};
use super::connector::{ConnectError, Done};
use super::packet::{HEADER_LEN, Header, SHUTDOWN_BOTH, SHUTDOWN_RCV, SHUTDOWN_SEND};
use super::stream::{HostStream, Read, WriteError};
use crate::GuestMemory;
use crate::virtio::queue::{Chain, GuestBuffers, QueueError, Segments};

/// What is to become of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Fate {
    /// It stays.
    Keep,
    /// It goes. The guest knows already.
    Drop,
    /// It goes, and the guest is told with an RST.
    Reset,
    /// The guest is done with it, but what the guest sent is not all delivered: its ports are
    /// free, it goes when it is flushed.
    Orphan,
}

/// Who waits for a connection to be made.
pub enum Opening {
    /// A caller in this process.
    Caller(Done),
    /// A client of the Unix socket, which reads `OK <host port>` when it is made.
    Client,
}

/// A receive buffer of the guest that has room for a header and some payload.
pub struct RxBuffer {
    chain: Chain,
}

impl RxBuffer {
    /// `None` when the chain is no receive buffer.
    pub fn new(chain: Chain) -> Result<Self, Chain> {
        if chain.readable().is_empty() && chain.writable().len() > HEADER_LEN { Ok(Self { chain }) } else { Err(chain) }
    }

    /// The chain, to be given back to the driver.
    pub fn into_chain(self) -> Chain {
        self.chain
    }

    fn payload(&self) -> Segments<'_> {
        let whole = self.chain.writable();
        whole.split_at(HEADER_LEN).map_or(whole, |(_, payload)| payload)
    }

    /// Puts a packet's header before the payload.
    pub fn put_header(&self, memory: &GuestMemory, header: Header) -> Result<(), QueueError> {
        self.chain.writable().write(memory, &header.to_bytes()).map(drop)
    }
}

/// A connection and its host end.
pub struct Link {
    connection: Connection,
    stream: HostStream,
    opening: Option<Opening>,
    /// The host end may have something to read: said so, and was not read dry since.
    readable: bool,
    /// [`Fate::Orphan`] was its fate.
    orphan: bool,
    /// It stands in line for receive buffers.
    pub in_line: bool,
}

impl Link {
    /// Ties `connection` to `stream`. `opening` waits for the guest's answer.
    pub fn new(connection: Connection, stream: HostStream, opening: Option<Opening>) -> Self {
        Self { connection, stream, opening, readable: false, orphan: false, in_line: false }
    }

    /// The protocol's half.
    pub fn connection(&mut self) -> &mut Connection {
        &mut self.connection
    }

    /// The descriptor's half.
    pub fn stream(&self) -> &HostStream {
        &self.stream
    }

    /// Tells who waits for the connection that there will be none.
    pub fn fail(&mut self, reason: ConnectError) {
        // A client of the Unix socket sees its connection closed.
        if let Some(Opening::Caller(done)) = self.opening.take() {
            done(Err(reason));
        }
    }

    /// Whether there is something for the guest, and the guest lets it come.
    pub fn has_output(&self) -> bool {
        let data = self.readable && self.connection.may_send() > 0;
        !self.orphan && (self.connection.owes_control() || data)
    }

    /// Takes a packet of the guest.
    pub fn receive(
        &mut self,
        memory: &GuestMemory,
        header: &Header,
        payload: Segments<'_>,
    ) -> Result<Fate, QueueError> {
        Ok(match self.connection.receive(header) {
            Verdict::Nothing => Fate::Keep,
            Verdict::Connected => self.opened(),
            Verdict::Payload => return self.deliver(memory, payload),
            Verdict::Closing => self.guest_closing(),
            Verdict::Ended if self.stream.is_flushed() => Fate::Drop,
            Verdict::Ended => {
                self.orphan = true;
                Fate::Orphan
            }
            Verdict::Violation => Fate::Reset,
        })
    }

    fn opened(&mut self) -> Fate {
        let port = self.connection.key().host_port;
        match self.opening.take() {
            Some(Opening::Caller(done)) => done(Ok(port)),
            Some(Opening::Client) => {
                let told = self.stream.greet(format!("OK {port}\n").as_bytes());
                return if told.is_ok() { Fate::Keep } else { Fate::Reset };
            }
            None => {}
        }
        Fate::Keep
    }

    fn deliver(&mut self, memory: &GuestMemory, payload: Segments<'_>) -> Result<Fate, QueueError> {
        match self.stream.write(memory, payload) {
            Ok(count) => {
                self.forwarded(count);
                Ok(Fate::Keep)
            }
            Err(WriteError::Broken) => Ok(self.receiver_gone()),
            Err(WriteError::Guest(error)) => Err(error),
        }
    }

    fn forwarded(&mut self, count: usize) {
        // Bounded by the window, which is a u32.
        self.connection.forwarded(u32::try_from(count).unwrap_or(u32::MAX));
    }

    fn guest_closing(&mut self) -> Fate {
        if self.connection.guest_closed() & SHUTDOWN_RCV != 0 {
            self.stream.end_reading();
        }
        self.settle()
    }

    /// Passes on the guest's end of stream once all before it is delivered, and answers a
    /// SHUTDOWN that leaves nothing open with the RST that the guest waits for.
    fn settle(&mut self) -> Fate {
        if !self.stream.is_flushed() {
            return Fate::Keep;
        }
        if self.orphan {
            return Fate::Drop;
        }
        let guest_closed = self.connection.guest_closed();
        if guest_closed != 0 && self.connection.is_finished() {
            return Fate::Reset;
        }
        if guest_closed & SHUTDOWN_SEND != 0 {
            self.stream.end_writing();
        }
        Fate::Keep
    }

    /// The host end has news.
    pub fn ready(&mut self, events: EventSet) -> Fate {
        let gone = EventSet::HANG_UP | EventSet::ERROR;
        if self.stream.reads() && events.intersects(gone | EventSet::IN | EventSet::READ_HANG_UP) {
            self.readable = true;
        }
        // A hang-up of a FIFO that is read says only that nobody writes it any more.
        if self.stream.writes() && events.intersects(gone) {
            return self.receiver_gone();
        }
        if events.contains(EventSet::OUT) && !self.stream.is_flushed() {
            return match self.stream.flush() {
                Ok(count) => {
                    self.forwarded(count);
                    self.settle()
                }
                Err(_) => self.receiver_gone(),
            };
        }
        Fate::Keep
    }

    /// Nobody on the host takes what the guest sends.
    fn receiver_gone(&mut self) -> Fate {
        self.stream.discard();
        self.connection.discard_buffered();
        if self.orphan {
            return Fate::Drop;
        }
        if !self.stream.reads() {
            self.fail(ConnectError::HostEnd(io::ErrorKind::BrokenPipe.into()));
            return Fate::Reset;
        }
        if self.connection.guest_closed() & SHUTDOWN_SEND == 0 {
            self.connection.close(SHUTDOWN_RCV);
        }
        // What it wrote before it went is still to be read.
        self.settle()
    }

    /// Puts what there is for the guest into `buffers`, and the lengths used into `used`. What
    /// it does not use, it does not touch.
    pub fn fill(
        &mut self,
        memory: &GuestMemory,
        buffers: &[RxBuffer],
        used: &mut Vec<u32>,
    ) -> Result<Fate, QueueError> {
        let Some(first) = buffers.first().filter(|_| !self.orphan) else { return Ok(Fate::Keep) };
        if let Some(header) = self.connection.next_control() {
            first.put_header(memory, header)?;
            used.push(HEADER_LEN);
            return Ok(Fate::Keep);
        }
        let credit = self.connection.may_send();
        if !self.readable || credit == 0 {
            return Ok(Fate::Keep);
        }
        match self.stream.read(&payload_buffers(memory, buffers, credit)?) {
            Read::Bytes(count) => {
                self.put_payload(memory, buffers, used, count)?;
                self.connection.ask_for_credit_if_out();
            }
            Read::Blocked => self.readable = false,
            Read::End => {
                self.readable = false;
                self.connection.close(SHUTDOWN_SEND);
                return Ok(self.settle());
            }
        }
        Ok(Fate::Keep)
    }

    /// Puts the headers before `count` bytes that were read into the buffers' payload.
    fn put_payload(
        &mut self,
        memory: &GuestMemory,
        buffers: &[RxBuffer],
        used: &mut Vec<u32>,
        count: usize,
    ) -> Result<(), QueueError> {
        let mut left = u32::try_from(count).unwrap_or(u32::MAX);
        for buffer in buffers {
            if left == 0 {
                break;
            }
            let len = left.min(buffer.payload().len());
            left = left.saturating_sub(len);
            buffer.put_header(memory, self.connection.data_header(len))?;
            used.push(HEADER_LEN.saturating_add(len));
        }
        Ok(())
    }

    /// The RST that tells the guest of the end.
    pub fn reset_header(&mut self) -> Header {
        self.connection.close(SHUTDOWN_BOTH);
        self.connection.reset_header()
    }
}

/// Room for payload in `buffers`, at most `limit` bytes.
fn payload_buffers<'m>(
    memory: &'m GuestMemory,
    buffers: &[RxBuffer],
    limit: u32,
) -> Result<GuestBuffers<'m>, QueueError> {
    let mut room = GuestBuffers::default();
    let mut left = limit;
    for buffer in buffers {
        let payload = buffer.payload();
        let len = left.min(payload.len());
        let Some((payload, _)) = payload.split_at(len) else { break };
        payload.append_to(memory, &mut room)?;
        left = left.saturating_sub(len);
        if left == 0 {
            break;
        }
    }
    Ok(room)
}
