//! A driver that asks for entropy, too much of it, and in odd places.

use std::time::Instant;

use super::*;
use crate::testkit::{Buffer, Guest, PATIENCE, REGION_SIZE, Running};

const DATA: u64 = 0x10_0000;

fn start() -> Running {
    Guest::new(Box::new(Rng::new(RateLimits::default()).unwrap())).start(0)
}

fn ask(running: &mut Running, buffers: &[Buffer]) -> u32 {
    running.rings[0].offer(buffers);
    running.guest.kick(0);
    running.wait_used(0, 1)[0].1
}

#[test]
fn buffers_are_filled_with_what_does_not_repeat() {
    let mut running = start();
    assert_eq!(running.guest.read(8), 4);
    let buffers = [Buffer::writable(DATA, 32), Buffer::writable(DATA + 0x100, 32)];
    assert_eq!(ask(&mut running, &buffers), 64);
    let first = running.guest.peek(DATA, 32);
    let second = running.guest.peek(DATA + 0x100, 32);
    assert!(first != second && first != [0; 32] && second != [0; 32]);
    assert_eq!(running.guest.peek(DATA + 32, 1), [0]);
    running.guest.wait_interrupt(1);
}

#[test]
fn a_request_is_capped_at_its_limit_and_one_past_it() {
    let mut running = start();
    for (wanted, len) in [(MAX_REQUEST, MAX_REQUEST), (MAX_REQUEST + 1, MAX_REQUEST)] {
        assert_eq!(ask(&mut running, &[Buffer::writable(DATA, wanted)]), len);
    }
    assert_eq!(running.guest.peek(DATA + u64::from(MAX_REQUEST), 1), [0]);
    let all_of_memory = Buffer::writable(0, REGION_SIZE as u32);
    assert_eq!(ask(&mut running, &[all_of_memory]), MAX_REQUEST);
}

#[test]
fn a_request_without_writable_bytes_gets_nothing() {
    let mut running = start();
    assert_eq!(ask(&mut running, &[Buffer::readable(DATA, 16)]), 0);
    assert_eq!(ask(&mut running, &[Buffer::writable(DATA, 0)]), 0);
    assert_eq!(running.guest.peek(DATA, 16), [0; 16]);
}

#[test]
fn a_flood_of_requests_is_served_and_the_loop_stays_responsive() {
    let mut running = start();
    for _ in 0..20 {
        for _ in 0..QUEUE_SIZE {
            running.rings[0].offer(&[Buffer::writable(DATA, MAX_REQUEST)]);
        }
        running.guest.kick(0);
        running.guest.event_loop.settle();
        running.wait_used(0, QUEUE_SIZE.into());
    }
}

#[test]
fn a_driver_that_kicks_only_when_it_is_asked_to_is_never_forgotten() {
    for event_idx in [false, true] {
        let features = if event_idx { 1 << 29 } else { 0 };
        let mut running = Guest::new(Box::new(Rng::new(RateLimits::default()).unwrap())).start(features);
        let offer = |running: &mut Running| {
            running.rings[0].offer(&[Buffer::writable(DATA, 1)]);
            if running.rings[0].wants_kick(event_idx) {
                running.guest.kick(0);
            }
        };
        // The second chain comes at every moment of the first one's life, one of which is when the
        // device has seen that there is no other and has not asked for notifications yet.
        for delay in (0..4000).cycle().take(20_000) {
            offer(&mut running);
            for _ in 0..delay {
                std::hint::spin_loop();
            }
            offer(&mut running);
            let deadline = Instant::now() + PATIENCE;
            let mut used = 0;
            while used < 2 {
                assert!(Instant::now() < deadline, "The device has forgotten its driver");
                used += running.rings[0].take_used().len();
            }
        }
    }
}

#[test]
fn a_loop_of_descriptors_needs_a_reset() {
    let mut running = start();
    running.rings[0].write_descriptor(0, DATA, 16, 3, 0);
    running.rings[0].publish(0);
    running.guest.kick(0);
    running.guest.wait_needs_reset();
}

#[test]
fn a_limit_on_bytes_holds_back_what_is_more_and_gives_it_later() {
    use crate::virtio::rate_limiter::BucketConfig;
    use std::num::NonZeroU64;
    // A bucket of one request that takes ten minutes to fill, and a burst of two requests.
    let nonzero = |value| NonZeroU64::new(value).unwrap();
    let bytes = BucketConfig { size: nonzero(1000), one_time_burst: 2000, refill_ns: nonzero(600_000_000_000) };
    let limits = RateLimits { ops: None, bytes: Some(bytes) };
    let mut running = Guest::new(Box::new(Rng::new(limits).unwrap())).start(0);
    for _ in 0..5 {
        running.rings[0].offer(&[Buffer::writable(DATA, 1000)]);
    }
    running.guest.kick(0);
    assert_eq!(running.wait_used(0, 3).len(), 3);
    // A driver that kicks again, or starts anew, gets no more.
    for _ in 0..100 {
        running.guest.kick(0);
    }
    running.guest.event_loop.settle();
    assert_eq!(running.rings[0].take_used(), []);
    running.guest.set_status(0);
    let mut running = running.guest.start(0);
    running.rings[0].offer(&[Buffer::writable(DATA, 1000)]);
    running.guest.kick(0);
    running.guest.event_loop.settle();
    assert_eq!(running.rings[0].take_used(), []);

    // A bucket that is full again soon: all requests are served in the end, without another kick.
    let bytes = BucketConfig { size: nonzero(1000), one_time_burst: 0, refill_ns: nonzero(1_000_000) };
    let limits = RateLimits { ops: None, bytes: Some(bytes) };
    let mut running = Guest::new(Box::new(Rng::new(limits).unwrap())).start(0);
    for _ in 0..20 {
        running.rings[0].offer(&[Buffer::writable(DATA, 1000)]);
    }
    running.guest.kick(0);
    assert_eq!(running.wait_used(0, 20).len(), 20);
}
