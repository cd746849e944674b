//! How connections are made, refused, and ended by a reset.

use std::fs::File;
use std::io::{Read, Write};

use super::*;

#[test]
fn configuration_space_is_the_context_id() {
    let guest = Guest::new(Box::new(device(None).0));
    assert_eq!(guest.transport.device_type(), 19);
    assert_eq!(u64::from_le_bytes(guest.read_config(0)), CID);
    assert_eq!(u32::from_le_bytes(guest.read_config(8)), 0);
}

#[test]
fn reserved_context_ids_are_refused() {
    for (guest_cid, good) in [(0, false), (1, false), (2, false), (3, true), (0xffff_fffe, true), (0xffff_ffff, false)]
    {
        let made = Vsock::new(VsockConfig { guest_cid, uds_path: None });
        assert_eq!(made.is_ok(), good, "{guest_cid}");
    }
}

#[test]
fn host_connects_and_talks() {
    let (mut driver, connector) = start();
    let (mut host, theirs) = pair();
    let ports = driver.established(&connector, HostEnd::Duplex(theirs.into()));

    host.write_all(b"hello guest").unwrap();
    let packet = driver.expect(op::RW);
    assert_eq!(packet.data, b"hello guest");
    assert_eq!((packet.header.src_port, packet.header.dst_port), (ports.host, ports.guest));

    driver.data(ports, b"hello host");
    let mut answer = [0; 10];
    host.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"hello host");
}

#[test]
fn connections_wait_for_the_driver() {
    let (vsock, connector) = device(None);
    let (_host, theirs) = pair();
    let done = connect(&connector, 1024, HostEnd::Duplex(theirs.into()));
    let mut driver = Driver::start(vsock);
    let ports = driver.answer(1024);
    assert_eq!(outcome(&done).unwrap(), ports.host);
}

#[test]
fn each_connection_has_a_host_port_of_its_own_even_after_a_reset() {
    let (mut driver, connector) = start();
    let mut ends = Vec::new();
    let mut seen = Vec::new();
    for _ in 0..3 {
        let (host, theirs) = pair();
        seen.push(driver.established(&connector, HostEnd::Duplex(theirs.into())).host);
        ends.push(host);
    }
    let mut driver = driver.restart();
    let (_host, theirs) = pair();
    seen.push(driver.established(&connector, HostEnd::Duplex(theirs.into())).host);
    let count = seen.len();
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen.len(), count);
}

#[test]
fn guest_refuses() {
    let (mut driver, connector) = start();
    let (mut host, theirs) = pair();
    let done = connect(&connector, 7, HostEnd::Duplex(theirs.into()));
    let request = driver.expect(op::REQUEST).header;
    driver.control(Ports { host: request.src_port, guest: 7 }, op::RST);
    assert!(matches!(outcome(&done), Err(ConnectError::Refused)));
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
}

#[test]
fn reset_ends_connections_and_fails_those_being_made() {
    let (mut driver, connector) = start();
    let (mut host, theirs) = pair();
    driver.established(&connector, HostEnd::Duplex(theirs.into()));
    let (_other, theirs) = pair();
    let done = connect(&connector, 1024, HostEnd::Duplex(theirs.into()));
    driver.expect(op::REQUEST);
    driver.running.guest.transport.reset();
    assert!(matches!(outcome(&done), Err(ConnectError::Reset)));
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_closed_device_refuses() {
    let (vsock, connector) = device(None);
    let (_host, theirs) = pair();
    let waiting = connect(&connector, 1, HostEnd::Duplex(theirs.into()));
    drop(vsock);
    assert!(matches!(outcome(&waiting), Err(ConnectError::Closed)));
    let (_host, theirs) = pair();
    let late = connect(&connector, 1, HostEnd::Duplex(theirs.into()));
    assert!(matches!(outcome(&late), Err(ConnectError::Closed)));
}

#[test]
fn descriptors_that_cannot_be_waited_for_are_refused() {
    let (_driver, connector) = start();
    let file = tempfile::tempfile().unwrap();
    let done = connect(&connector, 1, HostEnd::Sink(file.into()));
    assert!(matches!(outcome(&done), Err(ConnectError::NotPollable)));
    let null = File::open("/dev/null").unwrap();
    let done = connect(&connector, 1, HostEnd::Source(null.into()));
    assert!(matches!(outcome(&done), Err(ConnectError::NotPollable)));
}

#[test]
fn guest_connects_to_a_listener() {
    let (mut driver, connector) = start();
    let (sender, receiver) = channel();
    // A listener may use the connector it was given to.
    let inner = connector.clone();
    connector.listen(
        1025,
        Box::new(move |stream| {
            inner.listen(1, Box::new(|_| {}));
            sender.send(stream).unwrap();
        }),
    );
    let ports = Ports { host: 1025, guest: 5000 };
    driver.request(ports);
    let mut host = receiver.recv_timeout(PATIENCE).unwrap();
    driver.data(ports, b"log line\n");
    let mut line = [0; 9];
    host.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"log line\n");
    host.write_all(b"thanks").unwrap();
    assert_eq!(driver.expect(op::RW).data, b"thanks");
}

#[test]
fn guest_connects_to_a_port_without_listener() {
    let (mut driver, _connector) = start();
    let ports = Ports { host: 1, guest: 2 };
    driver.control(ports, op::REQUEST);
    let reset = driver.expect(op::RST).header;
    assert_eq!((reset.src_port, reset.dst_port), (1, 2));
}
