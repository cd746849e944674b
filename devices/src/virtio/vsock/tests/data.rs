//! Bytes, their flow control, and the ends of streams: nothing is lost.

use std::io::{ErrorKind, PipeReader, PipeWriter, Read, Write};
use std::thread;

use super::*;

fn source() -> (PipeWriter, HostEnd) {
    let (reader, writer) = std::io::pipe().unwrap();
    (writer, HostEnd::Source(reader.into()))
}

fn sink() -> (PipeReader, HostEnd) {
    let (reader, writer) = std::io::pipe().unwrap();
    (reader, HostEnd::Sink(writer.into()))
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|index| (index * 31 + index / 251) as u8).collect()
}

impl Driver {
    fn announce(&mut self, ports: Ports, buf_alloc: u32, fwd_cnt: u32) {
        let update = Self::packet(ports, op::CREDIT_UPDATE);
        self.send(Header { buf_alloc, fwd_cnt, ..update }, &[]);
    }

    /// Reads from the device until its SHUTDOWN, keeping at most `buffer` bytes before it tells
    /// the device that they are taken.
    fn receive_all(&mut self, ports: Ports, buffer: u32) -> (Vec<u8>, u32) {
        let mut all = Vec::new();
        let mut taken = 0_u32;
        let update = |fwd_cnt| Header { buf_alloc: buffer, fwd_cnt, ..Self::packet(ports, op::CREDIT_UPDATE) };
        self.send(update(0), &[]);
        loop {
            let Packet { header, data } = self.receive();
            match header.op {
                op::RW => {
                    all.extend(&data);
                    assert!(all.len() as u32 - taken <= buffer, "The device has that much credit");
                }
                op::CREDIT_REQUEST => {
                    taken = all.len() as u32;
                    self.announce(ports, buffer, taken);
                }
                op::SHUTDOWN => return (all, header.flags),
                op::CREDIT_UPDATE => {}
                other => panic!("{other}"),
            }
        }
    }

    /// Writes to the device as far as its window goes, waiting for credit.
    fn send_all(&mut self, ports: Ports, data: &[u8]) {
        let (mut window, mut forwarded) = (0_u32, 0_u32);
        let mut sent = 0_u32;
        self.control(ports, op::CREDIT_REQUEST);
        for chunk in data.chunks(16 << 10) {
            while window.saturating_sub(sent.wrapping_sub(forwarded)) < chunk.len() as u32 {
                let header = self.expect(op::CREDIT_UPDATE).header;
                (window, forwarded) = (header.buf_alloc, header.fwd_cnt);
            }
            self.data(ports, chunk);
            sent += chunk.len() as u32;
            self.poll();
            for packet in self.arrived.drain(..) {
                (window, forwarded) = (packet.header.buf_alloc, packet.header.fwd_cnt);
            }
        }
    }
}

#[test]
fn a_source_reaches_the_guest_whole_with_little_credit() {
    for buffer in [1, 1000, 64 << 10, 1 << 20] {
        let (mut driver, connector) = start();
        let (mut writer, end) = source();
        let ports = driver.established(&connector, end);
        assert_eq!(driver.expect(op::SHUTDOWN).header.flags, SHUTDOWN_RCV);
        driver.announce(ports, buffer, 0);
        let sent = pattern(if buffer == 1 { 100 } else { 300_000 });
        let expected = sent.clone();
        let feeder = thread::spawn(move || writer.write_all(&sent).unwrap());
        let (received, flags) = driver.receive_all(ports, buffer);
        assert_eq!(flags, SHUTDOWN_BOTH);
        assert!(received == expected, "{} bytes of {}", received.len(), expected.len());
        feeder.join().unwrap();
        // The guest reads to the end, then closes.
        driver.control(ports, op::RST);
        driver.expect_silence();
    }
}

#[test]
fn a_slow_sink_gets_everything_and_then_the_end() {
    let (mut driver, connector) = start();
    let (mut reader, end) = sink();
    let ports = driver.established(&connector, end);
    assert_eq!(driver.expect(op::SHUTDOWN).header.flags, SHUTDOWN_SEND);
    let sent = pattern(1 << 20);
    let expected = sent.clone();
    let taker = thread::spawn(move || {
        let mut all: Vec<u8> = Vec::new();
        let mut some = [0; 5000];
        loop {
            thread::sleep(Duration::from_micros(100));
            match reader.read(&mut some).unwrap() {
                0 => return all,
                count => all.extend(some.iter().take(count)),
            }
        }
    });
    driver.send_all(ports, &sent);
    driver.shutdown(ports, SHUTDOWN_SEND);
    // Flushed first, then answered.
    driver.expect(op::RST);
    assert!(taker.join().unwrap() == expected);
}

#[test]
fn what_the_guest_sent_before_it_went_is_still_delivered() {
    // A pipe takes 64 KiB, so half of it waits in the device when the guest says it is over:
    // politely, or with the RST that Linux sends when its close is not answered in time.
    for polite in [true, false] {
        let (mut driver, connector) = start();
        let (mut reader, end) = sink();
        let ports = driver.established(&connector, end);
        let sent = pattern(128 << 10);
        driver.data(ports, &sent[..64 << 10]);
        driver.data(ports, &sent[64 << 10..]);
        driver.shutdown(ports, SHUTDOWN_BOTH);
        if !polite {
            driver.control(ports, op::RST);
            // Its ports are free again at once, for it and for the host.
            driver.data(ports, b"?");
            driver.expect(op::SHUTDOWN);
            driver.expect(op::RST);
        }
        let mut all = Vec::new();
        reader.read_to_end(&mut all).unwrap();
        assert!(all == sent);
        if polite {
            driver.expect(op::SHUTDOWN);
            driver.expect(op::RST);
        }
    }
}

#[test]
fn a_broken_sink_resets() {
    let (mut driver, connector) = start();
    let (reader, end) = sink();
    let ports = driver.established(&connector, end);
    driver.expect(op::SHUTDOWN);
    driver.data(ports, b"x");
    drop(reader);
    driver.expect(op::RST);
    // The connection is gone.
    driver.data(ports, b"y");
    driver.expect(op::RST);
}

#[test]
fn each_half_of_a_socket_closes_by_itself() {
    let (mut driver, connector) = start();
    let (mut host, theirs) = pair();
    let ports = driver.established(&connector, HostEnd::Duplex(theirs.into()));

    // The host ends its half; the guest still talks.
    host.write_all(b"question").unwrap();
    host.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(driver.expect(op::RW).data, b"question");
    assert_eq!(driver.expect(op::SHUTDOWN).header.flags, SHUTDOWN_SEND);
    driver.data(ports, b"answer");
    driver.shutdown(ports, SHUTDOWN_SEND);
    let mut answer = String::new();
    host.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "answer");
    driver.expect(op::RST);
}

#[test]
fn the_guest_ends_its_half_first() {
    let (mut driver, connector) = start();
    let (mut host, theirs) = pair();
    let ports = driver.established(&connector, HostEnd::Duplex(theirs.into()));
    driver.data(ports, b"question");
    driver.shutdown(ports, SHUTDOWN_SEND);
    let mut question = String::new();
    host.read_to_string(&mut question).unwrap();
    assert_eq!(question, "question");
    host.write_all(b"answer").unwrap();
    assert_eq!(driver.expect(op::RW).data, b"answer");
    drop(host);
    driver.expect(op::RST);
}

#[test]
fn a_guest_that_takes_no_more_breaks_the_hosts_pipe() {
    let (mut driver, connector) = start();
    let (mut host, theirs) = pair();
    let ports = driver.established(&connector, HostEnd::Duplex(theirs.into()));
    driver.shutdown(ports, SHUTDOWN_RCV);
    driver.settle();
    assert_eq!(host.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    driver.data(ports, b"still here");
    let mut words = [0; 10];
    host.read_exact(&mut words).unwrap();

    let (mut writer, end) = source();
    let ports = driver.established(&connector, end);
    driver.expect(op::SHUTDOWN);
    driver.shutdown(ports, SHUTDOWN_RCV);
    driver.expect(op::RST);
    assert_eq!(writer.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
}

#[test]
fn a_host_that_left_has_its_last_words_delivered() {
    let (mut driver, connector) = start();
    let (mut host, theirs) = pair();
    let ports = driver.established(&connector, HostEnd::Duplex(theirs.into()));
    host.write_all(b"last words").unwrap();
    drop(host);
    let mut words = Vec::new();
    let mut closed = 0;
    while closed != SHUTDOWN_BOTH {
        let Packet { header, data } = driver.receive();
        match header.op {
            op::RW => words.extend(data),
            op::SHUTDOWN => closed |= header.flags,
            other => panic!("{other}"),
        }
    }
    assert_eq!(words, b"last words");
    driver.control(ports, op::RST);
    driver.expect_silence();
}

#[test]
fn receive_buffers_that_come_late_are_filled() {
    let (vsock, connector) = device(None);
    let mut driver = Driver::start_starved(vsock);
    let (mut host, theirs) = pair();
    let done = connect(&connector, 9, HostEnd::Duplex(theirs.into()));
    host.write_all(&pattern(10_000)).unwrap();
    driver.expect_silence();
    driver.offer_buffers(1);
    driver.answer(9);
    assert!(outcome(&done).is_ok());
    let mut all = Vec::new();
    while all.len() < 10_000 {
        all.extend(driver.expect(op::RW).data);
    }
    assert!(all == pattern(10_000));
}

#[test]
fn headers_and_payload_may_lie_anywhere() {
    let (mut driver, connector) = start();
    let (mut host, theirs) = pair();
    let ports = driver.established(&connector, HostEnd::Duplex(theirs.into()));
    let header = Header { len: 10, ..Driver::packet(ports, op::RW) };
    let mut packet = header.to_bytes().to_vec();
    packet.extend(b"0123456789");
    driver.running.guest.poke(TX_PACKET, &packet);
    let layouts: [&[u32]; 5] = [&[54], &[44, 10], &[1, 43, 1, 9], &[50, 4], &[0, 44, 0, 10, 0]];
    for lengths in layouts {
        let mut at = TX_PACKET;
        let mut chain = Vec::new();
        for len in lengths {
            chain.push(Buffer::readable(at, *len));
            at += u64::from(*len);
        }
        driver.send_chain(&chain);
        let mut words = [0; 10];
        host.read_exact(&mut words).unwrap();
        assert_eq!(&words, b"0123456789", "{lengths:?}");
    }
}
