//! Source addresses, rates, and headers and lengths that lie.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use super::wire::{DATA, HEADER, MAC, Mode, PLAIN, UNLIMITED, Wire};
use crate::testkit::Buffer;
use crate::virtio::net::MAX_OFFLOADED_FRAME;
use crate::virtio::rate_limiter::{BucketConfig, RateLimits};

const GUARDED: Mode = Mode { anti_spoof: true, ..PLAIN };

/// A header of zeroes and a frame from `source`.
fn frame_from(source: [u8; 6]) -> Vec<u8> {
    [[0; HEADER].as_slice(), &[0xff; 6], source.as_slice(), &[0x88, 0xb5], &[7; 50]].concat()
}

/// `count` operations at once, and one more each hour.
fn ops(count: u64) -> RateLimits {
    let size = NonZeroU64::new(count).unwrap();
    let refill_ns = NonZeroU64::new(3_600_000_000_000 * count).unwrap();
    RateLimits { ops: Some(BucketConfig { size, one_time_burst: 0, refill_ns }), bytes: None }
}

/// One operation at once, and one more each 20 ms.
fn slow() -> RateLimits {
    let refill_ns = NonZeroU64::new(20_000_000).unwrap();
    RateLimits { ops: Some(BucketConfig { size: NonZeroU64::MIN, one_time_burst: 0, refill_ns }), bytes: None }
}

#[test]
fn frames_from_another_source_address_are_dropped_and_counted() {
    let mut wire = Wire::start(GUARDED);
    let mut seen = [0; 200];
    for source in [[0x02, 0, 0, 0, 0, 2], [0xff; 6], [0; 6], [0x03, 0, 0, 0, 0, 1]] {
        wire.guest_sends(&frame_from(source));
    }
    let good = frame_from(MAC);
    wire.guest_sends(&good);
    assert_eq!(wire.pairs[0].host.recv(&mut seen).unwrap(), good.len());
    assert_eq!(seen[..good.len()], good);
    let counters = wire.counters();
    assert_eq!((counters.spoofed, counters.sent), (4, 1));
}

#[test]
fn without_the_switch_any_source_address_passes() {
    let mut wire = Wire::start(PLAIN);
    wire.guest_sends(&frame_from([2; 6]));
    assert_eq!((wire.counters().spoofed, wire.counters().sent), (0, 1));
}

#[test]
fn a_source_address_may_be_split_over_buffers() {
    let mut wire = Wire::start(GUARDED);
    let good = frame_from(MAC);
    wire.memory.write_slice(&good, GuestAddress(DATA)).unwrap();
    for cut in [1, 12, 20, 26, 27] {
        let rest = good.len() as u32 - cut;
        wire.pairs[0].tx.offer(&[Buffer::readable(DATA, cut), Buffer::readable(DATA + u64::from(cut), rest)]);
        wire.wait_sent(1);
        let mut seen = [0; 200];
        assert_eq!(wire.pairs[0].host.recv(&mut seen).unwrap(), good.len());
        assert_eq!(seen[..good.len()], good);
    }
}

/// The address changes while the device looks at it: what it checked is what it sends.
#[test]
fn a_source_address_that_does_not_hold_still() {
    let mut wire = Wire::start(GUARDED);
    wire.memory.write_slice(&frame_from(MAC), GuestAddress(DATA)).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let (stopped, memory) = (Arc::clone(&stop), wire.memory.clone());
    let meddler = std::thread::spawn(move || {
        while !stopped.load(Ordering::Relaxed) {
            for last in [2_u8, 1] {
                memory.write_obj(last, GuestAddress(DATA + HEADER as u64 + 11)).unwrap();
            }
        }
    });
    let mut sent = 0;
    for _ in 0..500 {
        wire.pairs[0].tx.offer(&[Buffer::readable(DATA, frame_from(MAC).len() as u32)]);
        wire.wait_sent(1);
        if wire.counters().sent > sent {
            sent += 1;
            let mut seen = [0; 200];
            wire.pairs[0].host.recv(&mut seen).unwrap();
            assert_eq!(seen[HEADER + 6..HEADER + 12], MAC);
        }
    }
    stop.store(true, Ordering::Relaxed);
    meddler.join().unwrap();
    assert_eq!(wire.counters().sent + wire.counters().spoofed, 500);
}

#[test]
fn frames_of_impossible_lengths_are_dropped_and_counted() {
    let mut wire = Wire::start(PLAIN);
    for (len, passes) in [
        (0, false),
        (1, false),
        (HEADER as u32, false),
        (HEADER as u32 + 13, false),
        (HEADER as u32 + 14, true),
        (MAX_OFFLOADED_FRAME, true),
        (MAX_OFFLOADED_FRAME + 1, false),
        (1 << 20, false),
    ] {
        let before = wire.counters();
        wire.pairs[0].tx.offer(&[Buffer::readable(DATA, len)]);
        wire.wait_sent(1);
        let after = wire.counters();
        let expected = if passes { (1, 0) } else { (0, 1) };
        assert_eq!((after.sent - before.sent, after.send_dropped - before.send_dropped), expected, "{len}");
    }
}

#[test]
fn what_exceeds_the_transmit_limit_waits_in_order() {
    let mut wire = Wire::start(Mode { tx_limits: ops(3), ..PLAIN });
    for index in 0..5_u64 {
        wire.memory.write_slice(&frame_from([2, 0, 0, 0, 0, index as u8]), GuestAddress(DATA + index * 256)).unwrap();
        wire.pairs[0].tx.offer(&[Buffer::readable(DATA + index * 256, 76)]);
    }
    wire.wait_sent(3);
    wire.assert_idle();
    assert_eq!((wire.counters().sent, wire.pairs[0].tx.used_idx()), (3, 3));
    // The other direction has a limit of its own.
    wire.give(DATA + 0x8000, 2048);
    wire.host_sends(&[1; 60]);
    wire.wait_received(1);

    let mut wire = Wire::start(Mode { tx_limits: slow(), ..PLAIN });
    for index in 0..4_u64 {
        wire.memory.write_slice(&frame_from([2, 0, 0, 0, 0, index as u8]), GuestAddress(DATA + index * 256)).unwrap();
        wire.pairs[0].tx.offer(&[Buffer::readable(DATA + index * 256, 76)]);
    }
    wire.wait_sent(4);
    for index in 0..4 {
        let mut seen = [0; 200];
        wire.pairs[0].host.recv(&mut seen).unwrap();
        assert_eq!(seen[HEADER + 11], index);
    }
}

#[test]
fn what_exceeds_the_receive_limit_waits_in_order() {
    let mut wire = Wire::start(Mode { rx_limits: ops(2), ..PLAIN });
    for index in 0..4 {
        wire.give(DATA + index * 0x800, 2048);
        wire.host_sends(&[index as u8; 60]);
    }
    wire.wait_received(2);
    wire.assert_idle();
    assert_eq!((wire.counters().received, wire.pairs[0].rx.used_idx()), (2, 2));

    for merge in [false, true] {
        let mut wire = Wire::start(Mode { rx_limits: slow(), merge, ..PLAIN });
        for index in 0..4 {
            wire.give(DATA + index * 0x800, 2048);
            wire.host_sends(&[index as u8; 60]);
        }
        assert_eq!(wire.wait_received(4), [(0, 72), (1, 72), (2, 72), (3, 72)]);
        for index in 0..4 {
            assert_eq!(wire.peek(DATA + index * 0x800 + HEADER as u64, 1), [index as u8]);
        }
    }
}

#[test]
fn bytes_are_limited_without_their_headers() {
    let bucket = BucketConfig {
        size: NonZeroU64::new(200).unwrap(),
        one_time_burst: 0,
        refill_ns: NonZeroU64::new(Duration::from_secs(36_000).as_nanos() as u64).unwrap(),
    };
    let mut wire = Wire::start(Mode { tx_limits: RateLimits { bytes: Some(bucket), ..UNLIMITED }, ..PLAIN });
    // 100 bytes each: two of them are within the limit, headers are not counted.
    for _ in 0..3 {
        wire.pairs[0].tx.offer(&[Buffer::readable(DATA, HEADER as u32 + 100)]);
    }
    wire.wait_sent(2);
    wire.assert_idle();
    assert_eq!(wire.counters().sent, 2);
}
