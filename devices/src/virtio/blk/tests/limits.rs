//! What a drive's limits hold back, and what a driver cannot do about it.

use std::num::NonZeroU64;

use super::*;
use crate::virtio::rate_limiter::{BucketConfig, RateLimits};

/// A bucket that never fills again while a test runs.
fn bucket(size: u64, one_time_burst: u64) -> Option<BucketConfig> {
    let size = NonZeroU64::new(size).unwrap();
    Some(BucketConfig { size, one_time_burst, refill_ns: NonZeroU64::new(1 << 60).unwrap() })
}

fn offer_reads(running: &mut Running, count: u64) {
    write_header(&running.guest, READ, 1);
    for _ in 0..count {
        let buffers = [Buffer::readable(HEADER, 16), Buffer::writable(DATA, 1024), Buffer::writable(STATUS, 1)];
        running.rings[0].offer(&buffers);
    }
    running.guest.kick(0);
}

#[test]
fn operations_and_bytes_beyond_a_bucket_wait_and_a_reset_does_not_help() {
    for engine in ENGINES {
        for limits in [
            RateLimits { ops: bucket(3, 2), bytes: None },
            RateLimits { ops: None, bytes: bucket(4 * 1024, 1024) },
            RateLimits { ops: bucket(5, 0), bytes: bucket(1 << 40, 0) },
        ] {
            let mut running = start_config(BlkConfig { limits, engine, ..config(&file()) });
            offer_reads(&mut running, 20);
            assert_eq!(running.wait_used(0, 5).len(), 5, "{engine:?} {limits:?}");
            for _ in 0..3 {
                running.guest.kick(0);
                running.guest.event_loop.settle();
            }
            assert_eq!(running.rings[0].used_idx(), 5);
            running.guest.set_status(0);
            let mut running = running.guest.start(ALL);
            offer_reads(&mut running, 1);
            running.guest.event_loop.settle();
            assert_eq!(running.rings[0].used_idx(), 0);
        }
    }
}

#[test]
fn what_waited_is_done_when_there_are_tokens_again() {
    for engine in ENGINES {
        let ops =
            BucketConfig { size: NonZeroU64::MIN, one_time_burst: 0, refill_ns: NonZeroU64::new(1_000_000).unwrap() };
        let limits = RateLimits { ops: Some(ops), bytes: None };
        let mut running = start_config(BlkConfig { limits, engine, ..config(&file()) });
        offer_reads(&mut running, 20);
        assert!(running.wait_used(0, 20).iter().all(|(_, len)| *len == 1025), "{engine:?}");
        running.guest.wait_interrupt(1);
    }
}

#[test]
fn more_requests_than_may_be_under_way_are_all_done() {
    for engine in ENGINES {
        let mut running = start_config(BlkConfig { queues: 2, queue_size: 1024, engine, ..config(&file()) });
        write_header(&running.guest, READ, 1);
        for index in 0..2 {
            for _ in 0..340 {
                running.rings[index].offer(&[
                    Buffer::readable(HEADER, 16),
                    Buffer::writable(DATA, 512),
                    Buffer::writable(STATUS, 1),
                ]);
            }
            running.guest.kick(index as u32);
        }
        for index in 0..2 {
            assert_eq!(running.wait_used(index, 340).len(), 340, "{engine:?}");
        }
    }
}

#[test]
fn an_idle_drive_does_not_wake_its_loop() {
    for engine in ENGINES {
        let mut running = start_config(BlkConfig { engine, ..config(&file()) });
        assert_eq!(request(&mut running, READ, 0, &[Buffer::writable(DATA, 512)]).0, OK);
        running.guest.event_loop.wait_rest();
    }
}
