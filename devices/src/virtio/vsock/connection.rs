//! The protocol of one connection, without descriptors and queues (virtio 1.2 section 5.10.6).

use super::credit::{Credit, Overrun};
use super::packet::{HOST_CID, Header, SHUTDOWN_BOTH, SHUTDOWN_RCV, SHUTDOWN_SEND, TYPE_STREAM, op};

/// The ports of a connection. The two context ids are always the host's and the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// Port on the host.
    pub host_port: u32,
    /// Port in the guest.
    pub guest_port: u32,
}

/// What a packet of the guest means for the side that holds the descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing but bookkeeping.
    Nothing,
    /// The guest accepted the connection that the host asked for.
    Connected,
    /// The payload is to be delivered.
    Payload,
    /// The guest ended one or both directions, see [`Connection::guest_closed`].
    Closing,
    /// The guest ended or refused the connection.
    Ended,
    /// The guest broke the protocol: the connection is to be reset.
    Violation,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The host asked for the connection, the guest did not answer yet.
    Requested,
    Established,
}

/// Control packets that the guest is owed. A set: none of them is worth sending twice.
#[derive(Clone, Copy, Debug, Default)]
struct Owed {
    request: bool,
    response: bool,
    shutdown: bool,
    credit_request: bool,
    credit_update: bool,
}

/// State of one connection.
///
/// ```text
///   host asks:   Requested ── RESPONSE ─▶ Established     (RST: refused)
///   guest asks:  ─────────── REQUEST ──▶ Established
///   Established: each side may end either direction once, in any order (SHUTDOWN)
/// ```
#[derive(Debug)]
pub struct Connection {
    key: Key,
    guest_cid: u64,
    phase: Phase,
    credit: Credit,
    owed: Owed,
    /// A credit request is under way.
    asked_for_credit: bool,
    /// SHUTDOWN flags that the guest sent.
    guest_closed: u32,
    /// SHUTDOWN flags of the host: sent, or owed.
    host_closed: u32,
}

impl Connection {
    /// A connection that the host asks for. `host_closed` are the directions, as SHUTDOWN flags,
    /// that the host will not use.
    pub fn request(key: Key, guest_cid: u64, window: u32, host_closed: u32) -> Self {
        let owed = Owed { request: true, shutdown: host_closed != 0, ..Owed::default() };
        Self {
            key,
            guest_cid,
            phase: Phase::Requested,
            credit: Credit::new(window),
            owed,
            asked_for_credit: false,
            guest_closed: 0,
            host_closed,
        }
    }

    /// A connection that the guest asked for with `request`, and that is accepted.
    pub fn accept(request: &Header, key: Key, guest_cid: u64, window: u32) -> Self {
        let mut credit = Credit::new(window);
        credit.learn(request);
        Self {
            key,
            guest_cid,
            phase: Phase::Established,
            credit,
            owed: Owed { response: true, ..Owed::default() },
            asked_for_credit: false,
            guest_closed: 0,
            host_closed: 0,
        }
    }

    /// Ports of the connection.
    pub fn key(&self) -> Key {
        self.key
    }

    /// SHUTDOWN flags that the guest sent.
    pub fn guest_closed(&self) -> u32 {
        self.guest_closed
    }

    /// Takes a packet of the guest that is addressed to this connection.
    pub fn receive(&mut self, header: &Header) -> Verdict {
        self.credit.learn(header);
        if self.credit.available() > 0 {
            self.asked_for_credit = false;
        }
        match (header.op, self.phase) {
            (op::RST, _) => Verdict::Ended,
            (op::RESPONSE, Phase::Requested) => {
                self.phase = Phase::Established;
                Verdict::Connected
            }
            (op::RW, Phase::Established) => self.receive_payload(header.len),
            (op::SHUTDOWN, Phase::Established) => {
                self.guest_closed |= header.flags & SHUTDOWN_BOTH;
                Verdict::Closing
            }
            (op::CREDIT_UPDATE, Phase::Established) => Verdict::Nothing,
            (op::CREDIT_REQUEST, Phase::Established) => {
                self.owed.credit_update = true;
                Verdict::Nothing
            }
            _ => Verdict::Violation,
        }
    }

    fn receive_payload(&mut self, len: u32) -> Verdict {
        if self.guest_closed & SHUTDOWN_SEND != 0 {
            return Verdict::Violation;
        }
        match self.credit.receive(len) {
            Err(Overrun) => Verdict::Violation,
            Ok(()) if self.host_closed & SHUTDOWN_RCV != 0 => {
                // It was under way when the host's receiving end went: nobody will read it.
                self.forwarded(len);
                Verdict::Nothing
            }
            Ok(()) => Verdict::Payload,
        }
    }

    /// `count` bytes of the guest's reached their receiver.
    pub fn forwarded(&mut self, count: u32) {
        self.credit.forward(count);
        if self.credit.worth_announcing() {
            self.owed.credit_update = true;
        }
    }

    /// The receiver of the guest's bytes is gone, with all that it did not take.
    pub fn discard_buffered(&mut self) {
        self.forwarded(self.credit.buffered());
    }

    /// The host ends the directions in `flags`.
    pub fn close(&mut self, flags: u32) {
        if flags & !self.host_closed != 0 {
            self.host_closed |= flags;
            self.owed.shutdown = true;
        }
    }

    /// Bytes that may be sent to the guest now.
    pub fn may_send(&self) -> u32 {
        if self.sends() { self.credit.available() } else { 0 }
    }

    /// Whether the direction to the guest is open.
    fn sends(&self) -> bool {
        self.phase == Phase::Established
            && self.host_closed & SHUTDOWN_SEND == 0
            && self.guest_closed & SHUTDOWN_RCV == 0
    }

    /// Whether neither direction will carry anything more.
    pub fn is_finished(&self) -> bool {
        let to_guest = self.host_closed & SHUTDOWN_SEND | self.guest_closed & SHUTDOWN_RCV;
        let to_host = self.host_closed & SHUTDOWN_RCV | self.guest_closed & SHUTDOWN_SEND;
        to_guest != 0 && to_host != 0
    }

    /// If there is no credit left, asks the guest for some, once.
    pub fn ask_for_credit_if_out(&mut self) {
        if self.sends() && self.credit.available() == 0 && !self.asked_for_credit {
            self.asked_for_credit = true;
            self.owed.credit_request = true;
        }
    }

    /// Whether [`next_control`](Self::next_control) has a packet.
    pub fn owes_control(&self) -> bool {
        let owed = &self.owed;
        match self.phase {
            Phase::Requested => owed.request,
            Phase::Established => owed.response || owed.shutdown || owed.credit_request || owed.credit_update,
        }
    }

    /// The next control packet for the guest.
    pub fn next_control(&mut self) -> Option<Header> {
        let established = self.phase == Phase::Established;
        let owed = &mut self.owed;
        if std::mem::take(&mut owed.request) {
            return Some(self.header(op::REQUEST, 0));
        }
        if !established {
            return None;
        }
        if std::mem::take(&mut owed.response) {
            return Some(self.header(op::RESPONSE, 0));
        }
        if std::mem::take(&mut owed.shutdown) {
            let mut header = self.header(op::SHUTDOWN, 0);
            header.flags = self.host_closed;
            return Some(header);
        }
        if std::mem::take(&mut owed.credit_request) {
            return Some(self.header(op::CREDIT_REQUEST, 0));
        }
        owed.credit_update.then(|| self.header(op::CREDIT_UPDATE, 0))
    }

    /// The header of a packet with `len` bytes of payload, which count as sent.
    pub fn data_header(&mut self, len: u32) -> Header {
        self.credit.send(len);
        self.header(op::RW, len)
    }

    /// The packet that ends this connection for the guest.
    pub fn reset_header(&mut self) -> Header {
        self.header(op::RST, 0)
    }

    /// Every packet carries our side of the credit, so no update is owed after it.
    fn header(&mut self, op: u16, len: u32) -> Header {
        let mut header = Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: self.key.host_port,
            dst_port: self.key.guest_port,
            len,
            kind: TYPE_STREAM,
            op,
            ..Header::default()
        };
        self.credit.announce(&mut header);
        self.owed.credit_update = false;
        header
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: Key = Key { host_port: 1 << 30, guest_port: 1024 };

    fn packet(op: u16) -> Header {
        Header { op, buf_alloc: 1000, ..Header::default() }
    }

    fn payload(len: u32) -> Header {
        Header { len, ..packet(op::RW) }
    }

    fn shutdown(flags: u32) -> Header {
        Header { flags, ..packet(op::SHUTDOWN) }
    }

    fn established() -> Connection {
        let mut connection = Connection::accept(&packet(op::REQUEST), KEY, 3, 100);
        assert_eq!(connection.next_control().unwrap().op, op::RESPONSE);
        connection
    }

    #[test]
    fn host_initiated_handshake() {
        let mut connection = Connection::request(KEY, 3, 100, SHUTDOWN_RCV);
        let request = connection.next_control().unwrap();
        assert_eq!((request.op, request.buf_alloc, request.dst_cid), (op::REQUEST, 100, 3));
        // What the host already closed is told once the guest knows the connection.
        assert_eq!(connection.next_control(), None);
        assert_eq!(connection.may_send(), 0);
        assert_eq!(connection.receive(&packet(op::RESPONSE)), Verdict::Connected);
        assert_eq!(connection.may_send(), 1000);
        let shutdown = connection.next_control().unwrap();
        assert_eq!((shutdown.op, shutdown.flags), (op::SHUTDOWN, SHUTDOWN_RCV));
        assert!(!connection.owes_control());
    }

    #[test]
    fn nothing_but_an_answer_is_legal_before_the_answer() {
        for op in [op::REQUEST, op::RW, op::SHUTDOWN, op::CREDIT_UPDATE, op::CREDIT_REQUEST, 0, 8] {
            let mut connection = Connection::request(KEY, 3, 100, 0);
            assert_eq!(connection.receive(&packet(op)), Verdict::Violation, "op {op}");
        }
        let mut connection = Connection::request(KEY, 3, 100, 0);
        assert_eq!(connection.receive(&packet(op::RST)), Verdict::Ended);
    }

    #[test]
    fn established_connections_take_no_second_handshake_and_no_unknown_operation() {
        for op in [op::REQUEST, op::RESPONSE, 0, 8, u16::MAX] {
            assert_eq!(established().receive(&packet(op)), Verdict::Violation, "op {op}");
        }
    }

    #[test]
    fn payload_beyond_the_window_is_a_violation() {
        let mut connection = established();
        assert_eq!(connection.receive(&payload(100)), Verdict::Payload);
        assert_eq!(connection.receive(&payload(1)), Verdict::Violation);
    }

    #[test]
    fn payload_after_the_guests_shutdown_is_a_violation() {
        let mut connection = established();
        assert_eq!(connection.receive(&shutdown(SHUTDOWN_SEND)), Verdict::Closing);
        assert_eq!(connection.receive(&payload(1)), Verdict::Violation);
    }

    #[test]
    fn payload_that_nobody_takes_is_credited_at_once() {
        let mut connection = established();
        connection.close(SHUTDOWN_RCV);
        assert_eq!(connection.next_control().unwrap().flags, SHUTDOWN_RCV);
        for _ in 0..10 {
            assert_eq!(connection.receive(&payload(100)), Verdict::Nothing);
        }
        assert_eq!(connection.next_control().unwrap().fwd_cnt, 1000);
    }

    #[test]
    fn credit_is_asked_for_once_and_again_after_it_ran_out_again() {
        let mut connection = established();
        connection.data_header(1000);
        connection.ask_for_credit_if_out();
        connection.ask_for_credit_if_out();
        assert_eq!(connection.next_control().unwrap().op, op::CREDIT_REQUEST);
        assert!(!connection.owes_control());
        connection.ask_for_credit_if_out();
        assert!(!connection.owes_control());
        let update = Header { fwd_cnt: 1000, ..packet(op::CREDIT_UPDATE) };
        assert_eq!(connection.receive(&update), Verdict::Nothing);
        connection.data_header(1000);
        connection.ask_for_credit_if_out();
        assert_eq!(connection.next_control().unwrap().op, op::CREDIT_REQUEST);
    }

    #[test]
    fn any_packet_serves_as_credit_update() {
        let mut connection = established();
        assert_eq!(connection.receive(&packet(op::CREDIT_REQUEST)), Verdict::Nothing);
        assert!(connection.owes_control());
        connection.data_header(1);
        assert!(!connection.owes_control());
    }

    #[test]
    fn finished_needs_both_directions_by_whichever_side() {
        for (guest, host, finished) in [
            (0, 0, false),
            (SHUTDOWN_SEND, 0, false),
            (SHUTDOWN_RCV, 0, false),
            (SHUTDOWN_BOTH, 0, true),
            (0, SHUTDOWN_BOTH, true),
            (SHUTDOWN_SEND, SHUTDOWN_SEND, true),
            (SHUTDOWN_SEND, SHUTDOWN_RCV, false),
            (SHUTDOWN_RCV, SHUTDOWN_RCV, true),
        ] {
            let mut connection = established();
            connection.receive(&shutdown(guest));
            connection.close(host);
            assert_eq!(connection.is_finished(), finished, "guest {guest} host {host}");
        }
    }

    #[test]
    fn flags_of_a_shutdown_add_up_and_unknown_ones_are_ignored() {
        let mut connection = established();
        connection.receive(&shutdown(SHUTDOWN_RCV | 0xf0));
        connection.receive(&shutdown(SHUTDOWN_SEND));
        assert_eq!(connection.guest_closed(), SHUTDOWN_BOTH);
    }
}
