//! What a guest can make this process keep.

use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use super::Subject;
use crate::testkit::{Buffer, Running};

/// Bytes by which a flood may make the process larger: what allocators round and keep, not what grows with the flood.
const SLACK: u64 = 2 << 20;

/// Rings full of requests, right and wrong, in the measured flood. Of what is kept for each request of a ring of 64, 32
/// bytes would show, and of what is kept for each reset 2 KiB.
const ROUNDS: usize = 1000;

/// Names the test that this process was started for.
const ALONE: &str = "INLAY_TEST_ALONE";

/// Lines of the log at most: each device and its neighbour complain a few times and are not listened to any more.
const MAX_LINES: u64 = 2 * crate::virtio::complaints::MAX_TOLD as u64;

/// The process grows by no more than it does at rest, whatever it is asked: right requests, wrong ones, resets, writes to
/// its registers. Nor does its log. Other tests would be counted too, so the flood has a process of its own.
pub fn a_flood_costs_no_memory(mut subject: Subject) {
    if std::env::var(ALONE).is_ok_and(|name| name == subject.name()) {
        tracing::subscriber::set_global_default(Lines).unwrap();
        let mut running = subject.start();
        for _ in 0..ROUNDS / 10 {
            running = flood(&mut subject, running);
        }
        let before = anonymous_memory();
        for _ in 0..ROUNDS {
            running = flood(&mut subject, running);
        }
        let grown = anonymous_memory().saturating_sub(before);
        assert!(grown <= SLACK, "{grown} bytes more after the flood");
        let lines = LINES.load(Ordering::Relaxed);
        assert!(lines <= MAX_LINES, "{lines} lines in the log");
        return;
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", subject.name(), "--nocapture"])
        .env(ALONE, subject.name())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}{}", String::from_utf8_lossy(&output.stderr));
}

/// Lines of the log, as it is without special wishes.
static LINES: AtomicU64 = AtomicU64::new(0);

/// A log that only counts.
struct Lines;

impl Subscriber for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::INFO
    }

    fn event(&self, _: &Event<'_>) {
        LINES.fetch_add(1, Ordering::Relaxed);
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

fn flood(subject: &mut Subject, mut running: Running) -> Running {
    let count = subject.fill_count(&running);
    for _ in 0..count {
        subject.offer(&mut running);
    }
    subject.kick(&running);
    running.wait_used(subject.queue(), count);
    // What nobody understands, on each queue, and whatever a register takes.
    for index in 0..running.rings.len() {
        for len in [0, 1, 4096] {
            running.rings[index].offer(&[Buffer::readable(super::subject::SAID, len), Buffer::writable(0x8000, len)]);
        }
        running.guest.kick(index as u32);
        running.guest.event_loop.settle();
        running.rings[index].set_avail_idx(0x8000);
        running.guest.kick(index as u32);
    }
    for offset in (0x100..0x140).step_by(4) {
        running.guest.transport_write(offset, &[0xff; 4]);
    }
    running.guest.event_loop.settle();
    running.guest.set_status(0);
    running.guest.start(subject.features())
}

/// Bytes of this process that are neither files nor the guest's memory, which is a file.
fn anonymous_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}
