//! Drivers that never stop, never answer, or wait for what they were promised.

use std::sync::Arc;
use std::time::Instant;

use virtio_bindings::virtio_mmio::VIRTIO_MMIO_QUEUE_NOTIFY;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::Subject;
use super::subject::ANSWER;
use crate::BusDevice;
use crate::testkit::{Buffer, Guest, Meanwhile, PATIENCE, Running, eventually, memory};
use crate::virtio::rate_limiter::RateLimits;
use crate::virtio::rng::Rng;

/// Another device on the same loop, in a machine of its own.
fn neighbour(running: &Running) -> Running {
    let rng = Rng::new(RateLimits::default()).unwrap();
    Guest::on_loop(Box::new(rng), memory(), Arc::clone(&running.guest.event_loop)).start(0)
}

#[track_caller]
fn ask_neighbour(neighbour: &mut Running) {
    neighbour.rings[0].offer(&[Buffer::writable(ANSWER, 16)]);
    neighbour.guest.kick(0);
    assert_eq!(neighbour.wait_used(0, 1)[0].1, 16);
}

/// The ring is full again as soon as something was taken from it.
pub fn a_flood_leaves_the_loop_to_others(mut subject: Subject) {
    let running = subject.start();
    let mut neighbour = neighbour(&running);
    let Running { guest, mut rings } = running;
    let mut ring = rings.swap_remove(subject.queue());
    let buffers = subject.buffers(&guest);
    let head = ring.write_chain(&buffers);
    let (transport, queue) = (Arc::clone(&guest.transport), subject.queue() as u32);
    let mut offered = 0_u16;
    let flood = Meanwhile::repeat(move |_| {
        while offered.wrapping_sub(ring.used_idx()) < ring.size {
            ring.publish(head);
            offered = offered.wrapping_add(1);
        }
        transport.write(VIRTIO_MMIO_QUEUE_NOTIFY.into(), &queue.to_le_bytes());
    });
    for _ in 0..100 {
        ask_neighbour(&mut neighbour);
    }
    drop(flood);
    guest.event_loop.wait_rest();
    subject.revive(Running { guest, rings });
}

pub fn a_storm_of_kicks_with_nothing_to_do(mut subject: Subject) {
    let mut running = subject.start();
    let mut neighbour = neighbour(&running);
    let transport = Arc::clone(&running.guest.transport);
    let count = running.rings.len() as u32;
    let storm = Meanwhile::repeat(move |turn| {
        transport.write(VIRTIO_MMIO_QUEUE_NOTIFY.into(), &(turn % (count + 1)).to_le_bytes());
    });
    for _ in 0..100 {
        ask_neighbour(&mut neighbour);
        subject.ask(&mut running);
    }
    drop(storm);
    running.guest.event_loop.wait_rest();
    assert_eq!(running.guest.status(), 0xf);
}

/// The driver neither takes used buffers nor acknowledges interrupts.
pub fn answers_that_nobody_takes(mut subject: Subject) {
    let mut running = subject.start();
    let count = subject.fill_count(&running);
    for _ in 0..count {
        subject.offer(&mut running);
    }
    subject.kick(&running);
    let queue = subject.queue();
    eventually("All answers", || usize::from(running.rings[queue].used_idx()) == count);
    for _ in 0..100 {
        subject.kick(&running);
    }
    running.guest.event_loop.wait_rest();
    assert_eq!(usize::from(running.rings[queue].used_idx()), count);
    subject.revive(running);
}

/// CVE-2020-16843, in all directions: all buffers are with the device, and nothing else happens.
pub fn full_queues_without_end(mut subject: Subject) {
    let mut running = subject.start();
    for index in 0..running.rings.len() {
        for _ in 0..running.rings[index].size {
            running.rings[index].offer(&[Buffer::writable(ANSWER, 64)]);
        }
        running.guest.kick(index as u32);
    }
    running.guest.event_loop.wait_rest();
    subject.revive(running);
}

/// A driver that sleeps until the interrupt that it has asked for, and kicks only when it was asked to: whatever one side
/// has to say to the other arrives, and with `EVENT_IDX` nothing else does.
pub fn interrupts_are_neither_lost_nor_unwanted(mut subject: Subject) {
    for event_idx in [false, true] {
        let mut running = subject.start_with(u64::from(event_idx) << VIRTIO_RING_F_EVENT_IDX);
        let queue = subject.queue();
        let batch = subject.fill_count(&running).min(7);
        // A ring of zeros asks for an interrupt at its first entry.
        let (mut taken, mut asked, mut interrupts) = (0_u16, 1, 0);
        for round in 0..600 {
            let mut outstanding = 1 + round % batch;
            for _ in 0..outstanding {
                subject.offer(&mut running);
                if running.rings[queue].wants_kick(event_idx) {
                    subject.kick(&running);
                }
                for _ in 0..round % 97 * 10 {
                    std::hint::spin_loop();
                }
            }
            while outstanding > 0 {
                let used = running.rings[queue].take_used().len();
                outstanding -= used;
                taken = taken.wrapping_add(used as u16);
                if outstanding == 0 || used > 0 {
                    continue;
                }
                running.rings[queue].set_avail_flags(0);
                running.rings[queue].set_used_event(taken);
                asked += 1;
                std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
                if running.rings[queue].used_idx() == taken {
                    sleep_until_interrupt(&running.guest);
                    interrupts += 1;
                }
                running.rings[queue].set_avail_flags(1);
            }
            interrupts += u32::from(running.guest.take_interrupt() != 0);
        }
        assert!(!event_idx || interrupts <= asked, "{interrupts} interrupts, {asked} wanted");
    }
}

#[track_caller]
fn sleep_until_interrupt(guest: &Guest) {
    let deadline = Instant::now() + PATIENCE;
    while guest.take_interrupt() == 0 {
        assert!(Instant::now() < deadline, "A driver waits for an interrupt that was lost");
        std::thread::yield_now();
    }
}
