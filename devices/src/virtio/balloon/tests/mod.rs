//! A driver that inflates, reports and counts, first as Linux does it.

mod hostile;
mod model;

use std::num::NonZeroU32;

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};

use super::*;
use crate::testkit::{Buffer, Guest, HIGH_REGION, REGION_SIZE, Running, eventually};

/// Where requests are put, and pages to give back.
const REQUEST: u64 = 0x1000;
const PAGES: u64 = 0x10_0000;

const STATS: u64 = 1 << 1;
const REPORTING: u64 = 1 << 5;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;

/// Offset of `actual` in the configuration space.
const ACTUAL: u64 = 0x104;

fn everything() -> BalloonConfig {
    BalloonConfig { deflate_on_oom: true, free_page_reporting: true, ..Default::default() }
}

fn guest(config: &BalloonConfig) -> (Guest, BalloonHandle) {
    let (balloon, handle) = Balloon::new(config, 2 * REGION_SIZE).unwrap();
    (Guest::new(Box::new(balloon)), handle)
}

fn start(features: u64) -> (Running, BalloonHandle) {
    let (guest, handle) = guest(&everything());
    (guest.start(features), handle)
}

fn pfn(addr: u64) -> u32 {
    (addr / PAGE_SIZE) as u32
}

/// Sends bytes to a queue and waits until the device has used them.
fn send(running: &mut Running, queue: usize, bytes: &[u8]) {
    running.guest.poke(REQUEST, bytes);
    running.rings[queue].offer(&[Buffer::readable(REQUEST, bytes.len() as u32)]);
    running.guest.kick(queue as u32);
    assert_eq!(running.wait_used(queue, 1).len(), 1);
}

fn inflate(running: &mut Running, pages: &[u32]) {
    let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
    send(running, INFLATE, &bytes);
}

/// Fills `count` pages from `addr` with ones.
fn fill(running: &Running, addr: u64, count: u64) {
    running.guest.poke(addr, &vec![1; (count * PAGE_SIZE) as usize]);
}

/// Whether the page at `addr` was given back, or still has what `fill` wrote.
fn is_gone(running: &Running, addr: u64) -> bool {
    let page = running.guest.peek(addr, PAGE_SIZE as usize);
    assert!(page.iter().all(|byte| *byte == page[0]), "A page goes as a whole or not at all");
    page[0] == 0
}

fn gone(running: &Running, addr: u64, count: u64) -> Vec<bool> {
    (0..count).map(|index| is_gone(running, addr + index * PAGE_SIZE)).collect()
}

#[test]
fn inflated_pages_go_and_their_neighbours_stay() {
    let (mut running, _) = start(0);
    fill(&running, PAGES, 6);
    let page = pfn(PAGES);
    // As Linux sends them: in no order.
    inflate(&mut running, &[page + 3, page + 1, page + 2]);
    assert_eq!(gone(&running, PAGES, 6), [false, true, true, true, false, false]);
    running.guest.wait_interrupt(VIRTIO_MMIO_INT_VRING);
    // The guest takes one back and uses it.
    send(&mut running, DEFLATE, &(page + 1).to_le_bytes());
    fill(&running, PAGES + PAGE_SIZE, 1);
    assert_eq!(gone(&running, PAGES, 3), [false, false, true]);
}

#[test]
fn what_was_sent_before_driver_ok_is_served() {
    let (guest, _) = guest(&BalloonConfig::default());
    guest.poke(PAGES, &[1; PAGE_SIZE as usize]);
    guest.poke(REQUEST, &pfn(PAGES).to_le_bytes());
    let mut running = guest.start_with(0, |_, rings| {
        rings[INFLATE].offer(&[Buffer::readable(REQUEST, 4)]);
    });
    running.wait_used(INFLATE, 1);
    assert!(is_gone(&running, PAGES));
}

#[test]
fn the_target_reaches_the_driver_and_its_answer_the_host() {
    let target = 3 * PAGE_SIZE + 1;
    let (guest, handle) = guest(&BalloonConfig { target, ..Default::default() });
    assert_eq!((handle.target(), handle.actual(), handle.is_active()), (3 * PAGE_SIZE, 0, false));
    let running = guest.start(0);
    assert!(handle.is_active());
    assert_eq!(running.guest.read_config::<4>(0), [3, 0, 0, 0]);
    handle.set_target(REGION_SIZE).unwrap();
    running.guest.wait_interrupt(VIRTIO_MMIO_INT_CONFIG);
    assert_eq!(running.guest.read_config::<4>(0), ((REGION_SIZE / PAGE_SIZE) as u32).to_le_bytes());
    running.guest.transport_write(ACTUAL, &5_u32.to_le_bytes());
    assert_eq!(handle.actual(), 5 * PAGE_SIZE);
    assert_eq!(handle.changed().read().unwrap(), 1);
    // A driver that goes takes its promise with it.
    running.guest.set_status(0);
    assert_eq!((handle.actual(), handle.is_active()), (0, false));
    assert_eq!(handle.target(), REGION_SIZE);
}

#[test]
fn a_target_is_checked_at_its_limit_and_one_past_it() {
    let (_guest, handle) = guest(&BalloonConfig::default());
    let memory = 2 * REGION_SIZE;
    assert_eq!(handle.set_target(memory), Ok(()));
    assert_eq!(handle.set_target(memory + 1), Err(BalloonError::Target { target: memory + 1, memory }));
    assert_eq!(handle.target(), memory);
}

#[test]
fn options_are_offered_as_configured() {
    let offered = |config: &BalloonConfig| guest(config).0.offered_features() & 0x3f;
    assert_eq!(offered(&BalloonConfig::default()), STATS);
    assert_eq!(offered(&everything()), STATS | REPORTING | 1 << 2);
}

#[test]
fn reported_pages_go_at_both_numbers_that_a_driver_may_use() {
    // With statistics left out the queue is 4 by the specification, 2 for Linux before 6.11.
    for (enabled, queue) in [(vec![0, 1, 4], 4), (vec![0, 1, 2], 2), (vec![0, 1, 2, 3, 4], 4)] {
        let (guest, _) = guest(&everything());
        let mut running = guest.start_queues(REPORTING, &enabled);
        let high = HIGH_REGION + PAGES;
        fill(&running, PAGES, 4);
        fill(&running, high, 4);
        let buffers = [Buffer::writable(PAGES, 0x2000), Buffer::writable(high + 0x1000, 0x3000)];
        running.rings[queue].offer(&buffers);
        running.guest.kick(queue as u32);
        assert_eq!(running.wait_used(queue, 1), [(0, 0)]);
        assert_eq!(gone(&running, PAGES, 4), [true, true, false, false], "queue {queue}");
        assert_eq!(gone(&running, high, 4), [false, true, true, true], "queue {queue}");
    }
}

#[test]
fn a_negotiated_queue_that_is_not_there_needs_a_reset() {
    let (guest, _) = guest(&everything());
    let running = guest.bring_up_queues(REPORTING | STATS, &[0, 1, 2]);
    running.guest.wait_needs_reset();
}

/// One statistic as it stands in a report.
fn stat(tag: u16, value: u64) -> Vec<u8> {
    [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()
}

fn offer_report(running: &mut Running, report: &[u8]) {
    running.guest.poke(REQUEST, report);
    running.rings[2].offer(&[Buffer::readable(REQUEST, report.len() as u32)]);
    running.guest.kick(2);
}

#[test]
fn statistics_are_asked_for_again_and_again() {
    let (mut running, handle) = start(STATS);
    assert_eq!(handle.stats(), None);
    offer_report(&mut running, &[stat(4, 1000), stat(5, 2000), stat(10, 3)].concat());
    let expected = GuestStats { free: Some(1000), total: Some(2000), oom_kills: Some(3), ..Default::default() };
    eventually("A report", || handle.stats() == Some(expected));
    assert_eq!(running.rings[2].used_idx(), 0, "The device keeps the report until it wants another");
    handle.set_stats_interval(NonZeroU32::new(1));
    for free in [500, 400] {
        running.wait_used(2, 1);
        running.guest.wait_interrupt(VIRTIO_MMIO_INT_VRING);
        offer_report(&mut running, &stat(4, free));
        eventually("A report", || handle.stats().and_then(|stats| stats.free) == Some(free));
    }
    assert_eq!(handle.stats().unwrap().total, None, "Nothing is left of older reports");
}

#[test]
fn a_device_that_was_reset_is_as_good_as_new() {
    let (mut running, handle) = start(STATS | REPORTING);
    offer_report(&mut running, &stat(4, 1));
    eventually("A report", || handle.stats().is_some());
    running.guest.set_status(0);
    assert_eq!(handle.stats(), None);
    let mut running = running.guest.start(STATS);
    fill(&running, PAGES, 1);
    inflate(&mut running, &[pfn(PAGES)]);
    assert!(is_gone(&running, PAGES));
}
