//! A driver that breaks every rule, and floods.

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;

use super::*;

fn listening() -> (Driver, Receiver<UnixStream>) {
    let (driver, connector) = start();
    let (sender, receiver) = channel();
    connector.listen(1, Box::new(move |stream| drop(sender.send(stream))));
    (driver, receiver)
}

const PORTS: Ports = Ports { host: 1, guest: 2 };

/// The device still serves a well-behaved connection.
fn assert_alive(driver: &mut Driver, streams: &Receiver<UnixStream>) {
    let ports = Ports { host: 1, guest: 0xffff };
    driver.request(ports);
    let mut host = streams.recv_timeout(PATIENCE).unwrap();
    driver.data(ports, b"alive");
    let mut word = [0; 5];
    host.set_read_timeout(Some(PATIENCE)).unwrap();
    host.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"alive");
    driver.control(ports, op::RST);
}

/// CVE-2019-18960: header length, payload descriptor's length and what is really there disagree.
#[test]
fn lengths_that_disagree() {
    let header_at = TX_PACKET;
    let payload_at = TX_PACKET + 0x1000;
    for claimed in [0_u32, 1, 10, 11, 4096, 65536, 65537, 262_144, 262_145, u32::MAX] {
        for actual in [0_u32, 1, 10, 11, 4096] {
            let (mut driver, streams) = listening();
            driver.request(PORTS);
            let mut host = streams.recv_timeout(PATIENCE).unwrap();
            host.set_nonblocking(true).unwrap();
            let header = Header { len: claimed, ..Driver::packet(PORTS, op::RW) };
            driver.running.guest.poke(header_at, &header.to_bytes());
            driver.send_chain(&[Buffer::readable(header_at, HEADER_LEN), Buffer::readable(payload_at, actual)]);
            let mut bytes = vec![0; 1 << 20];
            if claimed <= actual {
                driver.settle();
                let count = host.read(&mut bytes).unwrap_or(0);
                assert_eq!(count, claimed as usize, "{claimed} of {actual}");
            } else {
                driver.expect(op::RST);
                assert_eq!(host.read(&mut bytes).unwrap(), 0, "{claimed} of {actual}");
            }
            assert_alive(&mut driver, &streams);
        }
    }
}

#[test]
fn headers_that_are_cut_short() {
    let (mut driver, streams) = listening();
    for len in [0, 1, HEADER_LEN - 1] {
        driver.send_chain(&[Buffer::readable(TX_PACKET, len)]);
    }
    // Nothing to read at all.
    driver.send_chain(&[Buffer::writable(TX_PACKET, 100)]);
    driver.expect_silence();
    assert_alive(&mut driver, &streams);
}

#[test]
fn payload_up_to_and_past_the_end_of_memory() {
    let (mut driver, streams) = listening();
    driver.request(PORTS);
    let mut host = streams.recv_timeout(PATIENCE).unwrap();
    let end = HIGH_REGION + crate::testkit::REGION_SIZE;
    let header = Header { len: 100, ..Driver::packet(PORTS, op::RW) };
    driver.running.guest.poke(TX_PACKET, &header.to_bytes());
    let head = Buffer::readable(TX_PACKET, HEADER_LEN);
    driver.send_chain(&[head, Buffer::readable(end - 100, 100)]);
    assert_alive(&mut driver, &streams);
    driver.running.rings[TX].offer(&[head, Buffer::readable(end - 99, 100)]);
    driver.running.guest.kick(TX as u32);
    driver.running.guest.wait_needs_reset();
    // Its connections are over, with what was good.
    let mut all = Vec::new();
    host.read_to_end(&mut all).unwrap();
    assert_eq!(all, [0; 100]);
}

#[test]
fn packets_to_others_and_of_other_types() {
    let (mut driver, streams) = listening();
    let request = Driver::packet(PORTS, op::REQUEST);
    for wrong in [
        Header { dst_cid: 1, ..request },
        Header { dst_cid: CID, ..request },
        Header { dst_cid: u64::MAX, ..request },
        Header { dst_cid: HOST_CID | 1 << 32, ..request },
        Header { kind: 0, ..request },
        Header { kind: 2, ..request },
    ] {
        driver.send(wrong, &[]);
        assert_eq!(driver.expect(op::RST).header, wrong.reset_reply());
    }
    // Who claims to be somebody else gets no answer, and an RST never does.
    for wrong in [
        Header { src_cid: 4, ..request },
        Header { src_cid: HOST_CID, ..request },
        Header { src_cid: CID | 1 << 32, ..request },
        Header { op: op::RST, ..request },
        Header { op: op::RST, kind: 7, ..request },
    ] {
        driver.send(wrong, &[]);
    }
    driver.expect_silence();
    assert_alive(&mut driver, &streams);
}

#[test]
fn operations_out_of_order() {
    for operation in [0, op::REQUEST, op::RESPONSE, 8, u16::MAX] {
        let (mut driver, streams) = listening();
        driver.request(PORTS);
        driver.control(PORTS, operation);
        driver.expect(op::RST);
        let mut host = streams.recv_timeout(PATIENCE).unwrap();
        assert_eq!(host.read(&mut [0]).unwrap(), 0, "{operation}");
        assert_alive(&mut driver, &streams);
    }
    let (mut driver, streams) = listening();
    for operation in [0, op::RESPONSE, op::SHUTDOWN, op::RW, op::CREDIT_UPDATE, op::CREDIT_REQUEST] {
        driver.control(PORTS, operation);
        driver.expect(op::RST);
    }
    assert_alive(&mut driver, &streams);
}

#[test]
fn more_than_the_window() {
    let (mut driver, streams) = listening();
    driver.control(PORTS, op::REQUEST);
    let window = driver.expect(op::RESPONSE).header.buf_alloc;
    let mut host = streams.recv_timeout(PATIENCE).unwrap();
    // Nobody reads: the socket takes some, and the window takes the rest.
    let chunk = vec![7; 16 << 10];
    let mut sent = 0;
    let mut reset = false;
    while !reset {
        driver.data(PORTS, &chunk);
        sent += chunk.len();
        driver.settle();
        driver.poll();
        reset = driver.arrived.drain(..).any(|packet| packet.header.op == op::RST);
        assert!(sent < 4 << 20, "A bound");
    }
    assert!(sent > window as usize);
    // What was taken is not taken back.
    let mut all = Vec::new();
    host.read_to_end(&mut all).unwrap();
    assert!(!all.is_empty() && all.len() < sent);
    assert_alive(&mut driver, &streams);
}

#[test]
fn lies_about_credit() {
    let (mut driver, streams) = listening();
    driver.request(PORTS);
    let mut host = streams.recv_timeout(PATIENCE).unwrap();
    host.set_nonblocking(true).unwrap();
    for (buf_alloc, fwd_cnt) in [(0, 0), (0, u32::MAX), (u32::MAX, 1), (10, 1 << 31)] {
        driver.send(Header { buf_alloc, fwd_cnt, ..Driver::packet(PORTS, op::CREDIT_UPDATE) }, &[]);
        let _ = host.write(&[0; 100]);
        driver.settle();
    }
    driver.poll();
    let sent: usize = driver.arrived.drain(..).map(|packet| packet.data.len()).sum();
    assert_eq!(sent, 0);
    assert_alive(&mut driver, &streams);
}

#[test]
fn a_flood_that_is_not_listened_to_costs_no_memory_and_stops_nobody() {
    let (vsock, connector) = device(None);
    let (sender, streams) = channel();
    connector.listen(1, Box::new(move |stream| drop(sender.send(stream))));
    let mut driver = Driver::start_starved(vsock);
    // Each wants an RST, and there is no buffer to put one in.
    let stray = Driver::packet(Ports { host: 5, guest: 6 }, op::RW);
    driver.running.guest.poke(TX_PACKET, &stray.to_bytes());
    let mut taken = 0;
    for _ in 0..128 {
        driver.running.rings[TX].offer(&[Buffer::readable(TX_PACKET, HEADER_LEN)]);
        driver.running.guest.kick(TX as u32);
        taken += driver.running.wait_used(TX, 1).len();
    }
    driver.running.rings[TX].offer(&[Buffer::readable(TX_PACKET, HEADER_LEN)]);
    driver.running.guest.kick(TX as u32);
    driver.expect_silence();
    taken += driver.running.rings[TX].take_used().len();
    // The 129th waits in the guest's ring.
    assert_eq!(taken, 128);
    driver.offer_buffers(RX_BUFFERS);
    driver.running.wait_used(TX, 1);
    for _ in 0..129 {
        driver.expect(op::RST);
    }
    assert_alive(&mut driver, &streams);
}

#[test]
fn connections_made_and_dropped_without_end_leave_nothing() {
    let (vsock, connector) = device(None);
    connector.listen(1, Box::new(drop));
    let mut driver = Driver::start_starved(vsock);
    for guest in 0..5000 {
        driver.control(Ports { host: 1, guest }, op::REQUEST);
        driver.control(Ports { host: 1, guest }, op::RST);
    }
    driver.offer_buffers(1);
    driver.expect_silence();
}

#[test]
fn no_connection_beyond_the_last() {
    let (mut driver, streams) = listening();
    let mut held = Vec::new();
    for guest in 0..MAX_CONNECTIONS as u32 {
        driver.request(Ports { host: 1, guest });
        held.push(streams.recv_timeout(PATIENCE).unwrap());
    }
    let one_more = Ports { host: 1, guest: 0x10000 };
    driver.control(one_more, op::REQUEST);
    driver.expect(op::RST);
    held.pop();
    driver.expect(op::SHUTDOWN);
    driver.control(Ports { host: 1, guest: MAX_CONNECTIONS as u32 - 1 }, op::RST);
    while let Some(packet) = driver.arrived.pop_front() {
        assert_eq!(packet.header.op, op::SHUTDOWN);
    }
    driver.control(one_more, op::REQUEST);
    loop {
        match driver.receive().header.op {
            op::RESPONSE => break,
            other => assert_eq!(other, op::SHUTDOWN),
        }
    }
}

#[test]
fn receive_buffers_that_are_none() {
    let (vsock, connector) = device(None);
    let mut driver = Driver::start_starved(vsock);
    let useless: [&[Buffer]; 4] = [
        &[Buffer::writable(RX_HEADERS, 0)],
        &[Buffer::writable(RX_HEADERS, HEADER_LEN)],
        &[Buffer::readable(RX_HEADERS, 100)],
        &[Buffer::readable(RX_HEADERS, 100), Buffer::writable(RX_HEADERS, 100)],
    ];
    for chain in useless {
        driver.running.rings[RX].offer(chain);
    }
    driver.running.guest.kick(RX as u32);
    driver.settle();
    assert_eq!(driver.running.rings[RX].used_idx(), 0, "Nothing to put into them");
    let (_host, theirs) = pair();
    let done = connect(&connector, 1, HostEnd::Duplex(theirs.into()));
    assert!(driver.running.wait_used(RX, useless.len()).iter().all(|(_, len)| *len == 0));
    driver.offer_buffers(1);
    driver.answer(1);
    assert!(outcome(&done).is_ok());
}

#[test]
fn a_broken_ring_stops_the_device_until_it_is_reset() {
    for queue in [RX, TX] {
        let (mut driver, connector) = start();
        let (mut host, theirs) = pair();
        driver.established(&connector, HostEnd::Duplex(theirs.into()));
        let idx = driver.running.rings[queue].used_idx();
        driver.running.rings[queue].set_avail_idx(idx.wrapping_add(1000));
        driver.running.guest.kick(queue as u32);
        // A receive queue is looked at when there is something to receive.
        let _ = host.write(&[0; 1 << 16]);
        driver.running.guest.wait_needs_reset();
        // Closed with unread bytes, a socket is reset rather than ended.
        assert!(matches!(host.read(&mut [0]), Ok(0) | Err(_)));

        let mut driver = driver.restart();
        let (_host, theirs) = pair();
        driver.established(&connector, HostEnd::Duplex(theirs.into()));
    }
}

/// The length of a packet changes while the device looks at it: what it checked is what it uses.
#[test]
fn a_header_that_does_not_hold_still() {
    let (mut driver, streams) = listening();
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let memory = driver.running.guest.memory.clone();
    let header_at = TX_PACKET + 0x8000;
    let meddler = std::thread::spawn(move || {
        use vm_memory::{Bytes, GuestAddress};
        while !stopped.load(Ordering::Relaxed) {
            for len in [10_u32, 1 << 20, u32::MAX, 0] {
                memory.write_obj(len, GuestAddress(header_at + 24)).unwrap();
            }
        }
    });
    let mut received = 0;
    for guest in 0..300 {
        let ports = Ports { host: 1, guest };
        driver.request(ports);
        let mut host = streams.recv_timeout(PATIENCE).unwrap();
        driver.running.guest.poke(header_at, &Driver::packet(ports, op::RW).to_bytes());
        driver.send_chain(&[Buffer::readable(header_at, HEADER_LEN), Buffer::readable(TX_PACKET, 10)]);
        driver.control(ports, op::RST);
        let mut bytes = Vec::new();
        host.read_to_end(&mut bytes).unwrap();
        assert!([0, 10].contains(&bytes.len()), "{}", bytes.len());
        received += bytes.len();
        driver.settle();
        driver.poll();
        driver.arrived.clear();
    }
    stop.store(true, Ordering::Relaxed);
    meddler.join().unwrap();
    println!("{received} bytes of 3000");
    assert_alive(&mut driver, &streams);
}

fn any_packet() -> impl Strategy<Value = (Header, Vec<u8>)> {
    let op = prop_oneof![8 => 0_u16..9, 1 => any::<u16>()];
    let number = prop_oneof![Just(0_u32), Just(1), Just(100), Just(1 << 18), Just(u32::MAX), any::<u32>()];
    let data = proptest::collection::vec(any::<u8>(), 0..200);
    (op, 1_u32..3, 1_u32..4, 0_u32..8, number.clone(), number.clone(), number, data, 0..5).prop_map(
        |(op, host, guest, flags, buf_alloc, fwd_cnt, len, data, honest)| {
            let len = if honest > 0 { data.len() as u32 } else { len };
            let header = Driver::packet(Ports { host, guest }, op);
            (Header { flags, buf_alloc, fwd_cnt, len, ..header }, data)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any packets in any order, while the host talks: the device goes on.
    #[test]
    fn noise(packets in proptest::collection::vec(any_packet(), 1..100)) {
        let (mut driver, streams) = listening();
        let mut held: Vec<UnixStream> = Vec::new();
        for (index, (header, data)) in packets.into_iter().enumerate() {
            driver.send(header, &data);
            held.extend(streams.try_iter());
            match index % 7 {
                0 => held.truncate(2),
                1 => held.iter_mut().for_each(|host| {
                    host.set_nonblocking(true).unwrap();
                    let _ = host.write(&[1; 300]);
                    let _ = host.read(&mut [0; 100]);
                }),
                2 => driver.poll(),
                _ => {}
            }
        }
        drop(held);
        driver.settle();
        driver.poll();
        driver.arrived.clear();
        while streams.try_recv().is_ok() {}
        let ports = Ports { host: 1, guest: 0xffff };
        driver.control(ports, op::REQUEST);
        // Others' last packets may come before.
        while driver.receive().header.op != op::RESPONSE {}
        drop(streams.recv_timeout(PATIENCE).unwrap());
    }
}
