//! Connections across a pause, a snapshot, and in the machine that is restored from it.

use std::io::{Read, Write};

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::*;

const EVENTS: usize = 2;
/// Where the driver keeps its buffers for events: Linux gives eight.
const EVENT_BUFFERS: u64 = 0x7_0000;
const EVENT_COUNT: u64 = 8;

fn event_buffer(index: u64) -> [Buffer; 1] {
    [Buffer::writable(EVENT_BUFFERS + 8 * index, 8)]
}

/// A driver like Linux's.
fn with_events(vsock: Vsock, features: u64) -> Driver {
    let running = Guest::new(Box::new(vsock)).start(features);
    let mut driver = Driver { running, buffers: HashMap::new(), arrived: VecDeque::new() };
    driver.offer_buffers(RX_BUFFERS);
    for index in 0..EVENT_COUNT {
        driver.running.rings[EVENTS].offer(&event_buffer(index));
    }
    driver.running.guest.kick(EVENTS as u32);
    driver.settle();
    driver
}

impl Driver {
    /// The same driver in a machine that was restored, and the way to its sockets.
    fn moved(self) -> (Self, Connector) {
        let (vsock, connector) = device(None);
        let running = self.running.move_to(Box::new(vsock));
        (Self { running, ..self }, connector)
    }

    fn take_reset(&mut self) {
        assert_eq!(self.running.wait_used(EVENTS, 1)[0].1, 4);
    }

    /// What Linux does when it has acted on an event.
    fn give_event_buffer_back(&mut self, event_idx: bool) {
        self.running.rings[EVENTS].offer(&event_buffer(0));
        assert!(self.running.rings[EVENTS].wants_kick(event_idx));
        self.running.guest.kick(EVENTS as u32);
    }
}

#[test]
fn a_connection_waits_until_the_driver_has_acted_on_the_reset() {
    for event_idx in [false, true] {
        let features = u64::from(event_idx) << VIRTIO_RING_F_EVENT_IDX;
        let (mut driver, connector) = with_events(device(None).0, features).moved();
        driver.take_reset();
        let (ours, theirs) = pair();
        let done = connect(&connector, 1024, HostEnd::Duplex(theirs.into()));
        driver.expect_silence();
        // Also where the machine is only paused meanwhile.
        driver.running.guest.transport.park();
        driver.running.guest.transport.unpark();
        driver.expect_silence();
        driver.give_event_buffer_back(event_idx);
        let ports = driver.answer(1024);
        assert_eq!(outcome(&done).unwrap(), ports.host);
        // And nothing is told a second time.
        assert!(driver.running.rings[EVENTS].take_used().is_empty());
        drop(ours);
    }
}

#[test]
fn a_driver_that_never_acts_on_the_reset_keeps_nothing_busy() {
    let (mut driver, connector) = with_events(device(None).0, 0).moved();
    driver.take_reset();
    let (_ours, theirs) = pair();
    let done = connect(&connector, 1024, HostEnd::Duplex(theirs.into()));
    driver.expect_silence();
    let before = driver.running.guest.event_loop.rounds();
    driver.expect_silence();
    let rounds = driver.running.guest.event_loop.rounds() - before;
    assert!(rounds <= 4, "{rounds} rounds while nothing happens");
    drop(driver);
    assert!(matches!(outcome(&done), Err(ConnectError::Closed)));
}

#[test]
fn ports_of_before_are_not_given_out_again() {
    let (vsock, connector) = device(None);
    let mut driver = with_events(vsock, 0);
    let (_ours, theirs) = pair();
    let before = driver.established(&connector, HostEnd::Duplex(theirs.into()));
    let (mut driver, connector) = driver.moved();
    driver.take_reset();
    driver.give_event_buffer_back(false);
    let (_ours, theirs) = pair();
    let after = driver.established(&connector, HostEnd::Duplex(theirs.into()));
    assert_eq!(after.host, before.host + 1);
}

#[test]
fn a_state_of_the_first_version_is_read() {
    let (mut vsock, _) = device(None);
    vsock.restore(&DeviceState::nothing()).unwrap();
    assert!(vsock.restore(&DeviceState::encode(VIRTIO_ID_VSOCK, &"no port").unwrap()).is_err());
}

#[test]
fn bytes_under_way_in_a_pause_arrive_once() {
    let (vsock, connector) = device(None);
    let mut driver = with_events(vsock, 0);
    let (mut ours, theirs) = pair();
    let ports = driver.established(&connector, HostEnd::Duplex(theirs.into()));
    let (mut sent, mut expected) = (0_u8, Vec::new());
    for round in 0..20 {
        // Both ways, with packets that wait in both queues when the machine is parked.
        for index in 0..6 {
            let header = Header { len: 1, ..Driver::packet(ports, op::RW) };
            let at = TX_PACKET + 0x200 * index;
            driver.running.guest.poke(at, &header.to_bytes());
            driver.running.guest.poke(at + 0x100, &[sent]);
            driver.running.rings[TX].offer(&[Buffer::readable(at, HEADER_LEN), Buffer::readable(at + 0x100, 1)]);
            expected.push(sent);
            sent = sent.wrapping_add(1);
        }
        driver.running.guest.kick(TX as u32);
        ours.write_all(&[round]).unwrap();
        driver.running.guest.transport.park();
        driver.running.guest.transport.save().unwrap();
        driver.running.guest.transport.unpark();
        driver.running.wait_used(TX, 6);
    }
    let mut seen = vec![0; expected.len()];
    ours.read_exact(&mut seen).unwrap();
    assert_eq!(seen, expected);
    let mut arrived = Vec::new();
    while arrived.len() < 20 {
        arrived.extend(driver.expect(op::RW).data);
    }
    assert_eq!(arrived, (0..20).collect::<Vec<u8>>());
    driver.expect_silence_but_credit();
}

#[test]
fn packets_of_before_reach_nobody_after() {
    let (vsock, connector) = device(None);
    let mut driver = with_events(vsock, 0);
    let (mut ours, theirs) = pair();
    let ports = driver.established(&connector, HostEnd::Duplex(theirs.into()));
    driver.running.guest.transport.park();
    // What the guest had sent and nobody taken when it was saved.
    let header = Header { len: 1, ..Driver::packet(ports, op::RW) };
    driver.running.guest.poke(TX_PACKET, &header.to_bytes());
    driver.running.rings[TX].offer(&[Buffer::readable(TX_PACKET, HEADER_LEN), Buffer::readable(TX_PACKET + 0x100, 1)]);
    let (mut driver, _connector) = driver.moved();
    driver.take_reset();
    driver.running.wait_used(TX, 1);
    assert_eq!(driver.expect(op::RST).header.src_port, ports.host);
    assert_eq!(ours.read(&mut [0]).unwrap(), 0, "The host's end went with the machine that was saved");
}

impl Driver {
    fn expect_silence_but_credit(&mut self) {
        self.settle();
        self.poll();
        assert!(self.arrived.iter().all(|packet| packet.header.op == op::CREDIT_UPDATE));
    }
}
