//! A driver that flushes.

use super::*;
use crate::testkit::{Buffer, Guest, Running};

const REQUEST: u64 = 0x1000;
const ANSWER: u64 = 0x2000;
const START: u64 = 0x1_8000_0000;

fn start(file: Option<File>) -> Running {
    Guest::new(Box::new(Pmem::new(START, 2 << 20, file))).start(0)
}

fn ask(running: &mut Running, request: u32) -> u32 {
    running.guest.poke(REQUEST, &request.to_le_bytes());
    running.guest.poke(ANSWER, &[0xff; 8]);
    running.rings[0].offer(&[Buffer::readable(REQUEST, 4), Buffer::writable(ANSWER, 4)]);
    running.guest.kick(0);
    assert_eq!(running.wait_used(0, 1)[0].1, 4);
    assert_eq!(running.guest.peek(ANSWER + 4, 4), [0xff; 4]);
    u32::from_le_bytes(running.guest.peek(ANSWER, 4).try_into().unwrap())
}

#[test]
fn the_driver_learns_where_the_memory_is() {
    let running = start(None);
    assert_eq!(running.guest.read_config::<8>(0), START.to_le_bytes());
    assert_eq!(running.guest.read_config::<8>(8), (2_u64 << 20).to_le_bytes());
    assert_eq!(running.guest.read_config::<8>(16), [0; 8]);
}

#[test]
fn a_flush_is_answered_with_or_without_a_file() {
    for file in [Some(tempfile::tempfile().unwrap()), None] {
        assert_eq!(ask(&mut start(file), 0), 0);
    }
}

#[test]
fn a_file_that_cannot_be_made_durable_is_told() {
    // A pipe has nothing to sync.
    let (reader, _writer) = std::io::pipe().unwrap();
    let mut running = start(Some(File::from(std::os::fd::OwnedFd::from(reader))));
    assert_eq!(ask(&mut running, 0), 1);
}

#[test]
fn requests_that_nobody_knows_fail() {
    let mut running = start(None);
    for request in [1, 2, u32::MAX] {
        assert_eq!(ask(&mut running, request), 1, "{request}");
    }
}

#[test]
fn a_storm_of_flushes_is_answered_as_a_whole() {
    let mut running = start(Some(tempfile::tempfile().unwrap()));
    running.guest.poke(REQUEST, &[0; 4]);
    for _ in 0..10 {
        for _ in 0..QUEUE_SIZE / 2 {
            running.rings[0].offer(&[Buffer::readable(REQUEST, 4), Buffer::writable(ANSWER, 4)]);
        }
        running.guest.kick(0);
        running.wait_used(0, usize::from(QUEUE_SIZE / 2));
    }
}

#[test]
fn lengths_that_are_too_short_need_a_reset() {
    for (request, answer) in [(3, 4), (0, 4), (4, 3), (4, 0), (0, 0)] {
        let mut running = start(None);
        running.guest.poke(ANSWER, &[0xff; 4]);
        running.rings[0].offer(&[Buffer::readable(REQUEST, request), Buffer::writable(ANSWER, answer)]);
        running.guest.kick(0);
        running.guest.wait_needs_reset();
        assert_eq!(running.guest.peek(ANSWER, 4), [0xff; 4], "{request} {answer}");
    }
}

#[test]
fn lengths_that_are_too_long_count_as_far_as_they_mean_something() {
    let mut running = start(None);
    running.guest.poke(REQUEST, &[0; 4]);
    running.rings[0].offer(&[Buffer::readable(REQUEST, 1 << 20), Buffer::writable(0x20_0000, 1 << 20)]);
    running.guest.kick(0);
    assert_eq!(running.wait_used(0, 1), [(0, 4)]);
}
