//! The end of a device, or a pause, while it has much to do. CVE-2026-45782: what completes later touches nothing.

use std::collections::HashSet;

use vm_memory::{Bytes, GuestAddress};

use super::Subject;
use super::subject::ANSWER;
use crate::GuestMemory;
use crate::testkit::{Running, eventually};

/// Offers as many requests as fit, and notifies; returns the heads of their chains.
fn load(subject: &Subject, running: &mut Running) -> Vec<u16> {
    let heads = (0..subject.fill_count(running)).filter_map(|_| subject.offer(running)).collect();
    subject.kick(running);
    heads
}

/// Some time that is another one each time, without sleeping.
fn dawdle(turn: u32) {
    for _ in 0..turn * 200 {
        std::hint::spin_loop();
    }
}

/// The driver has its memory back: nobody writes to it any more.
#[track_caller]
fn expect_untouched(memory: &GuestMemory, settle: impl FnOnce()) {
    let pattern = [0xee; 2048];
    memory.write_slice(&pattern, GuestAddress(ANSWER)).unwrap();
    settle();
    let mut found = [0; 2048];
    memory.read_slice(&mut found, GuestAddress(ANSWER)).unwrap();
    assert_eq!(found, pattern);
}

pub fn reset_under_load(mut subject: Subject) {
    let mut running = subject.start();
    for turn in 0..60 {
        load(&subject, &mut running);
        dawdle(turn);
        running.guest.set_status(0);
        let used = running.rings[subject.queue()].used_idx();
        expect_untouched(&running.guest.memory, || running.guest.event_loop.settle());
        assert_eq!(running.rings[subject.queue()].used_idx(), used);
        running = running.guest.start(subject.features());
    }
    subject.revive(running);
}

/// The machine ends.
pub fn dropped_under_load(mut subject: Subject) {
    for turn in 0..10 {
        let mut running = subject.start();
        load(&subject, &mut running);
        dawdle(6 * turn);
        let memory = running.guest.memory.clone();
        drop(running);
        expect_untouched(&memory, std::thread::yield_now);
    }
}

/// Stops and goes on, and every chain is answered once.
fn interrupted(subject: &mut Subject, mut interrupt: impl FnMut(&mut Subject, &Running)) {
    let mut running = subject.start();
    let queue = subject.queue();
    for turn in 0..30 {
        let mut left: HashSet<u16> = load(subject, &mut running).into_iter().collect();
        dawdle(2 * turn);
        interrupt(subject, &running);
        eventually("All answers", || {
            for (head, len) in running.rings[queue].take_used() {
                assert_eq!(len, subject.request().written);
                assert!(left.remove(&head), "Chain {head} is answered once");
            }
            left.is_empty()
        });
    }
    running.guest.event_loop.settle();
    assert!(running.rings[queue].take_used().is_empty());
    subject.revive(running);
}

pub fn parked_under_load(mut subject: Subject) {
    interrupted(&mut subject, |subject, running| {
        let transport = &running.guest.transport;
        transport.park();
        let used = running.rings[subject.queue()].used_idx();
        running.guest.event_loop.settle();
        assert_eq!(running.rings[subject.queue()].used_idx(), used, "A parked device does nothing");
        transport.unpark();
    });
}

pub fn replaced_under_load(mut subject: Subject) {
    interrupted(&mut subject, |subject, running| running.guest.transport.replace(subject.make()).unwrap());
}

/// The event loop has ended, or has no room.
pub fn an_event_loop_that_refuses_the_device(mut subject: Subject) {
    let guest = subject.guest();
    guest.event_loop.refuse_next();
    let running = guest.bring_up(subject.features(), |_, _| {});
    assert_eq!(running.guest.status(), 0x4f);
    subject.revive(running);
}
