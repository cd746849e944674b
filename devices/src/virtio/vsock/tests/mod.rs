//! A guest's vsock driver, friendly and hostile, against the whole device.

mod data;
mod handshake;
mod hostile;
mod kernel;
mod moving;
mod throughput;
mod uds;

use std::collections::{HashMap, VecDeque};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use super::packet::*;
use super::*;
use crate::testkit::{Buffer, Guest, HIGH_REGION, PATIENCE, Ring, Running, eventually};

const CID: u64 = 3;
const RX: usize = 0;
const TX: usize = 1;

/// Where the driver keeps its buffers.
const RX_HEADERS: u64 = 0x8_0000;
const RX_PAYLOADS: u64 = 0x10_0000;
const TX_PACKET: u64 = 0x20_0000;

/// Linux's receive buffers.
const RX_PAYLOAD: u64 = 4096;
const RX_BUFFERS: u64 = 64;

/// What the driver announces as its buffer for each connection.
const BUF_ALLOC: u32 = 256 << 10;

struct Packet {
    header: Header,
    data: Vec<u8>,
}

/// The driver and its device.
struct Driver {
    running: Running,
    /// Which receive buffer a chain is.
    buffers: HashMap<u16, u64>,
    arrived: VecDeque<Packet>,
}

/// Both ends of a connection from the guest's view.
#[derive(Clone, Copy)]
struct Ports {
    host: u32,
    guest: u32,
}

fn device(uds_path: Option<PathBuf>) -> (Vsock, Connector) {
    Vsock::new(VsockConfig { guest_cid: CID, uds_path }).unwrap()
}

/// A running device whose driver has given it all its receive buffers.
fn start() -> (Driver, Connector) {
    let (vsock, connector) = device(None);
    (Driver::start(vsock), connector)
}

fn pair() -> (UnixStream, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    (ours, theirs)
}

/// Asks for a connection and returns where the outcome will be.
fn connect(connector: &Connector, port: u32, end: HostEnd) -> Receiver<Result<u32, ConnectError>> {
    let (sender, receiver) = channel();
    connector.connect(port, end, Box::new(move |outcome| sender.send(outcome).unwrap()));
    receiver
}

fn outcome(receiver: &Receiver<Result<u32, ConnectError>>) -> Result<u32, ConnectError> {
    receiver.recv_timeout(PATIENCE).expect("The outcome of a connection")
}

impl Driver {
    fn start(vsock: Vsock) -> Self {
        let mut driver = Self::start_starved(vsock);
        driver.offer_buffers(RX_BUFFERS);
        driver
    }

    /// Without receive buffers.
    fn start_starved(vsock: Vsock) -> Self {
        Self::bring_up(Guest::new(Box::new(vsock)))
    }

    fn bring_up(guest: Guest) -> Self {
        Self { running: guest.start(0), buffers: HashMap::new(), arrived: VecDeque::new() }
    }

    /// Resets the device and brings it up again.
    fn restart(self) -> Self {
        let guest = self.running.guest;
        guest.transport.reset();
        guest.poke(HIGH_REGION, &vec![0; 3 * Ring::FOOTPRINT as usize]);
        let mut driver = Self::bring_up(guest);
        driver.offer_buffers(RX_BUFFERS);
        driver
    }

    fn offer_buffers(&mut self, count: u64) {
        for index in 0..count {
            self.offer_buffer(index);
        }
        self.running.guest.kick(RX as u32);
    }

    fn offer_buffer(&mut self, index: u64) {
        let header = Buffer::writable(RX_HEADERS + 64 * index, HEADER_LEN);
        let payload = Buffer::writable(RX_PAYLOADS + RX_PAYLOAD * index, RX_PAYLOAD as u32);
        let head = self.running.rings[RX].offer(&[header, payload]);
        self.buffers.insert(head, index);
    }

    /// Takes what arrived, and gives the buffers back.
    fn poll(&mut self) {
        let used = self.running.rings[RX].take_used();
        let any = !used.is_empty();
        for (head, len) in used {
            let index = self.buffers.remove(&head).expect("A receive buffer");
            let bytes = self.running.guest.peek(RX_HEADERS + 64 * index, HEADER_SIZE);
            let header = Header::from_bytes(bytes.as_slice().try_into().unwrap());
            assert_eq!(len, HEADER_LEN + header.len, "{header:?}");
            assert_eq!(
                (header.dst_cid, header.kind),
                (CID, if header.op == op::RST { header.kind } else { TYPE_STREAM })
            );
            let data = self.running.guest.peek(RX_PAYLOADS + RX_PAYLOAD * index, header.len as usize);
            self.arrived.push_back(Packet { header, data });
            self.offer_buffer(index);
        }
        if any {
            self.running.guest.kick(RX as u32);
        }
    }

    #[track_caller]
    fn receive(&mut self) -> Packet {
        let mut packet = None;
        eventually("A packet", || {
            self.poll();
            packet = self.arrived.pop_front();
            packet.is_some()
        });
        packet.unwrap()
    }

    /// The next packet but credit updates.
    #[track_caller]
    fn expect(&mut self, op: u16) -> Packet {
        loop {
            let packet = self.receive();
            if packet.header.op == op {
                return packet;
            }
            assert_eq!(packet.header.op, op::CREDIT_UPDATE, "{:?}", packet.header);
        }
    }

    /// Nothing comes from the device within a moment.
    fn expect_silence(&mut self) {
        self.settle();
        std::thread::sleep(Duration::from_millis(20));
        self.poll();
        let ops: Vec<_> = self.arrived.iter().map(|packet| packet.header.op).collect();
        assert!(ops.is_empty(), "{ops:?}");
    }

    /// Returns when the device has looked at everything.
    fn settle(&self) {
        self.running.guest.event_loop.settle();
    }

    fn send(&mut self, header: Header, data: &[u8]) {
        self.running.guest.poke(TX_PACKET, &header.to_bytes());
        self.running.guest.poke(TX_PACKET + 0x100, data);
        let mut buffers = vec![Buffer::readable(TX_PACKET, HEADER_LEN)];
        if !data.is_empty() {
            buffers.push(Buffer::readable(TX_PACKET + 0x100, data.len() as u32));
        }
        self.send_chain(&buffers);
    }

    /// Sends a chain and waits until the device gave it back.
    fn send_chain(&mut self, buffers: &[Buffer]) {
        self.running.rings[TX].offer(buffers);
        self.running.guest.kick(TX as u32);
        assert_eq!(self.running.wait_used(TX, 1)[0].1, 0);
    }

    fn packet(ports: Ports, op: u16) -> Header {
        Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: ports.guest,
            dst_port: ports.host,
            kind: TYPE_STREAM,
            op,
            buf_alloc: BUF_ALLOC,
            ..Header::default()
        }
    }

    fn control(&mut self, ports: Ports, op: u16) {
        self.send(Self::packet(ports, op), &[]);
    }

    fn shutdown(&mut self, ports: Ports, flags: u32) {
        self.send(Header { flags, ..Self::packet(ports, op::SHUTDOWN) }, &[]);
    }

    fn data(&mut self, ports: Ports, data: &[u8]) {
        self.send(Header { len: data.len() as u32, ..Self::packet(ports, op::RW) }, data);
    }

    /// Answers the host's request for a connection to `port`.
    #[track_caller]
    fn answer(&mut self, port: u32) -> Ports {
        let request = self.expect(op::REQUEST).header;
        assert_eq!(request.dst_port, port);
        let ports = Ports { host: request.src_port, guest: request.dst_port };
        self.control(ports, op::RESPONSE);
        ports
    }

    /// An established connection from the host that ends in `end`.
    #[track_caller]
    fn established(&mut self, connector: &Connector, end: HostEnd) -> Ports {
        let done = connect(connector, 1024, end);
        let ports = self.answer(1024);
        assert_eq!(outcome(&done).unwrap(), ports.host);
        ports
    }

    /// Makes the connection `ports` to a port that the host listens on.
    #[track_caller]
    fn request(&mut self, ports: Ports) {
        self.control(ports, op::REQUEST);
        self.expect(op::RESPONSE);
    }
}
