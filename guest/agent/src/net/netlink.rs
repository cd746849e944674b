//! Requests to rtnetlink (rtnetlink(7)), one at a time, on a blocking socket of their own.

use std::io;

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

/// Answers are multipart; the kernel fills at most this much a read (NLMSG_GOODSIZE is far less).
const BUFFER: usize = 32 << 10;
/// nlmsghdr is 16 bytes (RFC 3549, section 2.3.2), and messages are aligned to 4.
const HEADER: usize = 16;
const ALIGN: usize = 4;

/// A socket to rtnetlink.
pub struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// Opens the socket in the caller's network namespace.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Sends a request that changes something and waits until the kernel has done it.
    pub fn change(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.send(message, NLM_F_REQUEST | NLM_F_ACK | flags)?;
        self.receive(|_| {})
    }

    /// Asks for all objects of a kind.
    pub fn dump(&mut self, message: RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.send(message, NLM_F_REQUEST | NLM_F_DUMP)?;
        let mut answers = Vec::new();
        self.receive(|answer| answers.push(answer))?;
        Ok(answers)
    }

    fn send(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut request = NetlinkMessage::from(message);
        request.header.flags = flags;
        request.header.sequence_number = self.sequence;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        Ok(())
    }

    /// Reads until the end of the answer: "done" after a dump, an acknowledgement (error 0) after a change.
    fn receive(&mut self, mut each: impl FnMut(RouteNetlinkMessage)) -> io::Result<()> {
        loop {
            let mut buffer = Vec::with_capacity(BUFFER);
            self.socket.recv(&mut buffer, 0)?;
            let mut rest = buffer.as_slice();
            while rest.len() >= HEADER {
                let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
                let length = usize::try_from(message.header.length).unwrap_or(rest.len()).max(HEADER);
                rest = rest.get(length.next_multiple_of(ALIGN)..).unwrap_or_default();
                if message.header.sequence_number != self.sequence {
                    continue;
                }
                match message.payload {
                    NetlinkPayload::InnerMessage(answer) => each(answer),
                    NetlinkPayload::Done(_) => return Ok(()),
                    NetlinkPayload::Error(answer) => {
                        return answer.code.map_or(Ok(()), |_| Err(answer.to_io()));
                    }
                    _ => {}
                }
            }
        }
    }
}
