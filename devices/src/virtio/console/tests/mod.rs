//! A driver that talks to pipes, sockets and terminals, first as Linux does it.

mod hostile;

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};

use super::*;
use crate::testkit::{Buffer, Guest, Running, eventually};

const MULTIPORT: u64 = 1 << 1;

/// Where messages, output and input are put.
const MESSAGE: u64 = 0x1000;
const OUTPUT: u64 = 0x10_0000;
const INPUT: u64 = 0x20_0000;
const CONTROL: u64 = 0x30_0000;
const CONTROL_SIZE: u32 = 64;

const CONTROL_RX: usize = 2;
const CONTROL_TX: usize = 3;

fn port(number: u32, console: bool, host: PortEnd) -> PortConfig {
    let name = (!console).then(|| format!("port{number}"));
    PortConfig { number, console, name, host }
}

fn guest(ports: Vec<PortConfig>) -> Guest {
    Guest::new(Box::new(Console::new(ConsoleConfig { ports }).unwrap()))
}

/// The host's end as streams, and what the test has of it.
fn streams() -> (PortEnd, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let input = File::from(OwnedFd::from(theirs));
    let output = input.try_clone().unwrap();
    (PortEnd::Streams { input: Some(input), output: Some(output) }, ours)
}

/// Brings the device up as Linux does: buffers for messages, then "ready".
fn start_multiport(ports: Vec<PortConfig>) -> Running {
    let mut running = guest(ports).start(MULTIPORT);
    for index in 0..32 {
        let addr = CONTROL + index * u64::from(CONTROL_SIZE);
        running.rings[CONTROL_RX].offer(&[Buffer::writable(addr, CONTROL_SIZE)]);
    }
    running.guest.kick(CONTROL_RX as u32);
    say(&mut running, 0, 0, 1);
    running
}

fn message(port: u32, event: u16, value: u16) -> Vec<u8> {
    [&port.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat()
}

fn say(running: &mut Running, port: u32, event: u16, value: u16) {
    say_bytes(running, &message(port, event, value));
}

fn say_bytes(running: &mut Running, bytes: &[u8]) {
    running.guest.poke(MESSAGE, bytes);
    running.rings[CONTROL_TX].offer(&[Buffer::readable(MESSAGE, bytes.len() as u32)]);
    running.guest.kick(CONTROL_TX as u32);
    running.wait_used(CONTROL_TX, 1);
}

/// The next messages of the device.
fn hear(running: &mut Running, count: usize) -> Vec<Vec<u8>> {
    let used = running.wait_used(CONTROL_RX, count);
    assert_eq!(used.len(), count);
    let read = |(head, len): &(u16, u32)| {
        running.guest.peek(CONTROL + u64::from(*head) * u64::from(CONTROL_SIZE), *len as usize)
    };
    used.iter().map(read).collect()
}

/// What the device has said since.
fn heard(running: &mut Running) -> usize {
    running.guest.event_loop.settle();
    running.rings[CONTROL_RX].take_used().len()
}

fn print(running: &mut Running, queue: usize, text: &[u8]) {
    running.guest.poke(OUTPUT, text);
    running.rings[queue].offer(&[Buffer::readable(OUTPUT, text.len() as u32)]);
    running.guest.kick(queue as u32);
}

fn read(host: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let mut done = 0;
    eventually("Output", || {
        match host.read(&mut bytes[done..]) {
            Ok(count) => done += count,
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        done == len
    });
    bytes
}

#[test]
fn a_driver_without_control_messages_has_one_port() {
    let (end, mut host) = streams();
    let mut running = guest(vec![port(0, true, end), port(1, false, streams().0)]).start(0);
    print(&mut running, 1, b"hello");
    assert_eq!(read(&mut host, 5), b"hello");
    running.wait_used(1, 1);
    host.write_all(b"input").unwrap();
    running.rings[0].offer(&[Buffer::writable(INPUT, 3)]);
    running.rings[0].offer(&[Buffer::writable(INPUT + 3, 100)]);
    running.guest.kick(0);
    assert_eq!(running.wait_used(0, 2), [(0, 3), (1, 2)]);
    assert_eq!(running.guest.peek(INPUT, 5), b"input");
    // Later input wakes the device without the driver's doing.
    running.rings[0].offer(&[Buffer::writable(INPUT, 100)]);
    running.guest.kick(0);
    running.guest.event_loop.settle();
    host.write_all(b"more").unwrap();
    assert_eq!(running.wait_used(0, 1), [(2, 4)]);
}

#[test]
fn ports_are_introduced_by_number_kind_and_name() {
    let mut running = start_multiport(vec![port(0, true, streams().0), port(3, false, streams().0)]);
    assert_eq!(running.guest.read_config::<8>(4), [4, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(hear(&mut running, 2), [message(0, 1, 1), message(3, 1, 1)]);
    say(&mut running, 0, 3, 1);
    assert_eq!(hear(&mut running, 2), [message(0, 4, 1), message(0, 6, 1)]);
    say(&mut running, 3, 3, 1);
    assert_eq!(hear(&mut running, 2), [[message(3, 7, 1), b"port3".to_vec()].concat(), message(3, 6, 1)]);
}

#[test]
fn a_port_has_queues_of_its_own_and_no_input_before_it_is_opened() {
    let (end, mut host) = streams();
    let mut running = start_multiport(vec![port(1, false, end)]);
    host.write_all(b"early").unwrap();
    running.rings[4].offer(&[Buffer::writable(INPUT, 100)]);
    running.guest.kick(4);
    running.guest.event_loop.settle();
    assert_eq!(running.rings[4].take_used(), []);
    say(&mut running, 1, 6, 1);
    assert_eq!(running.wait_used(4, 1), [(0, 5)]);
    print(&mut running, 5, b"output");
    assert_eq!(read(&mut host, 6), b"output");
    // Closed again: input waits.
    say(&mut running, 1, 6, 0);
    host.write_all(b"late").unwrap();
    running.rings[4].offer(&[Buffer::writable(INPUT, 100)]);
    running.guest.kick(4);
    running.guest.event_loop.settle();
    assert_eq!(running.rings[4].take_used(), []);
}

#[test]
fn a_socket_serves_one_client_after_the_other() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("console");
    let listener = UnixListener::bind(&path).unwrap();
    let mut running = start_multiport(vec![port(0, true, PortEnd::Listener(listener.into()))]);
    hear(&mut running, 1);
    say(&mut running, 0, 3, 1);
    say(&mut running, 0, 6, 1);
    assert_eq!(hear(&mut running, 1), [message(0, 4, 1)]);
    print(&mut running, 1, b"nobody reads this");
    running.wait_used(1, 1);
    // One buffer is always there; the end of a client does not use it up.
    running.rings[0].offer(&[Buffer::writable(INPUT, 100)]);
    running.guest.kick(0);
    for turn in 1..=3_u8 {
        let mut client = UnixStream::connect(&path).unwrap();
        client.set_nonblocking(true).unwrap();
        assert_eq!(hear(&mut running, 1), [message(0, 6, 1)]);
        print(&mut running, 1, &[turn; 10]);
        assert_eq!(read(&mut client, 10), [turn; 10]);
        running.wait_used(1, 1);
        client.write_all(&[turn; 7]).unwrap();
        assert_eq!(running.wait_used(0, 1)[0].1, 7);
        assert_eq!(running.guest.peek(INPUT, 7), [turn; 7]);
        running.rings[0].offer(&[Buffer::writable(INPUT, 100)]);
        running.guest.kick(0);
        drop(client);
        assert_eq!(hear(&mut running, 1), [message(0, 6, 0)]);
        assert_eq!(running.rings[0].take_used(), []);
    }
}

#[test]
fn a_terminal_is_raw_and_has_a_path() {
    let (end, path) = pty().unwrap();
    let mut running = guest(vec![port(0, true, end)]).start(0);
    let mut user = File::options().read(true).write(true).open(path).unwrap();
    user.write_all(b"\x03\n").unwrap();
    running.rings[0].offer(&[Buffer::writable(INPUT, 100)]);
    running.guest.kick(0);
    assert_eq!(running.wait_used(0, 1), [(0, 2)]);
    assert_eq!(running.guest.peek(INPUT, 2), b"\x03\n");
    print(&mut running, 1, b"a\nb");
    let mut text = [0; 3];
    user.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"a\nb");
}

#[test]
fn output_goes_to_a_file_and_input_may_be_nothing() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let end = PortEnd::Streams { input: Some(File::open("/dev/null").unwrap()), output: Some(file.reopen().unwrap()) };
    let mut running = guest(vec![port(0, true, end)]).start(0);
    running.rings[0].offer(&[Buffer::writable(INPUT, 100)]);
    running.guest.kick(0);
    print(&mut running, 1, b"kept");
    running.wait_used(1, 1);
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "kept");
    assert_eq!(running.rings[0].take_used(), []);
}

#[test]
fn an_emergency_goes_to_the_console_without_a_queue() {
    let (end, mut host) = streams();
    let guest = guest(vec![port(0, true, end)]);
    guest.set_status(1);
    guest.set_status(3);
    for byte in b"oops" {
        guest.transport_write(0x108, &u32::from(*byte).to_le_bytes());
    }
    assert_eq!(read(&mut host, 4), b"oops");
}

#[test]
fn a_device_that_was_reset_is_as_good_as_new() {
    let (end, mut host) = streams();
    let running = start_multiport(vec![port(0, true, end)]);
    running.guest.set_status(0);
    let mut running = running.guest.start(0);
    print(&mut running, 1, b"again");
    assert_eq!(read(&mut host, 5), b"again");
}

#[test]
fn ports_are_checked_at_their_limit_and_one_past_it() {
    let make = |numbers: &[u32]| {
        let ports = numbers.iter().map(|number| port(*number, false, streams().0)).collect();
        Console::new(ConsoleConfig { ports }).map(drop)
    };
    assert!(make(&[0, MAX_PORTS - 1]).is_ok());
    assert!(matches!(make(&[MAX_PORTS]), Err(ConsoleError::Number(MAX_PORTS))));
    assert!(matches!(make(&[2, 2]), Err(ConsoleError::Twice(2))));
}
