//! Rings where none can be, and indices that lie: virtio 1.2 sections 2.7 and 4.2.2.

use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::Subject;
use crate::testkit::{Guest, HIGH_REGION, REGION_SIZE, Ring, Running};

const DRIVER_OK: u32 = 0xf;
const NEEDS_RESET: u32 = 0x40;

pub fn an_avail_idx_that_runs_ahead(mut subject: Subject) {
    let mut running = subject.start();
    let size = running.rings[subject.queue()].size;
    for idx in [size + 1, 0x8000, u16::MAX] {
        // From here, not from 0: the device has answered a request.
        running.rings[subject.queue()].set_avail_idx(idx.wrapping_add(running.rings[subject.queue()].used_idx()));
        running = subject.expect_broken(running);
    }
}

pub fn an_avail_idx_that_goes_backwards(mut subject: Subject) {
    let mut running = subject.start();
    for _ in 0..3 {
        subject.ask(&mut running);
    }
    running.rings[subject.queue()].set_avail_idx(2);
    subject.expect_broken(running);
}

/// The maximum of each queue.
fn sizes(guest: &Guest) -> Vec<u16> {
    let size = |index| {
        guest.write(VIRTIO_MMIO_QUEUE_SEL, index);
        u16::try_from(guest.read(VIRTIO_MMIO_QUEUE_NUM_MAX)).unwrap()
    };
    (0..).map(size).take_while(|size| *size != 0).collect()
}

/// Brings a fresh device up with a ring of the subject's queue that `place` may move; returns the status.
fn bring_up(subject: &Subject, guest: &Guest, place: impl FnOnce(&mut Ring)) -> (u32, Vec<Ring>) {
    guest.set_status(0);
    assert!(guest.negotiate(subject.features()));
    let mut rings: Vec<_> = (0..).zip(sizes(guest)).map(|(index, size)| guest.ring(index, size)).collect();
    place(&mut rings[subject.queue()]);
    for (index, ring) in (0..).zip(&rings) {
        guest.set_up_queue(index, ring);
    }
    (guest.set_status(DRIVER_OK), rings)
}

/// Descriptor table, available ring and used ring, with their sizes in bytes.
fn parts(ring: &mut Ring) -> [(&mut u64, u64); 3] {
    let size = u64::from(ring.size);
    [(&mut ring.descriptors, 16 * size), (&mut ring.avail, 6 + 2 * size), (&mut ring.used, 6 + 8 * size)]
}

pub fn rings_outside_of_memory(mut subject: Subject) {
    let guest = subject.guest();
    for part in 0..3 {
        let place = |at: &dyn Fn(u64) -> u64| {
            let (status, _) = bring_up(&subject, &guest, |ring| {
                let mut parts = parts(ring);
                let (addr, len) = &mut parts[part];
                **addr = at(*len) & !0xf;
            });
            assert_eq!(status, DRIVER_OK | NEEDS_RESET, "part {part}");
        };
        // Over the end of a region and into the hole behind it, with one aligned step or with all but one.
        place(&|len| REGION_SIZE - len + 0x10);
        place(&|_| REGION_SIZE - 0x10);
        place(&|_| REGION_SIZE);
        // Out of the hole into the next region, and over the end of all memory.
        place(&|_| HIGH_REGION - 0x10);
        place(&|len| HIGH_REGION + REGION_SIZE - len + 0x10);
        place(&|_| 1 << 40);
        place(&|len| (u64::MAX - len) & !0xf);
        place(&|_| u64::MAX);
    }
    subject.revive(Running { guest, rings: Vec::new() });
}

pub fn rings_at_the_edges_of_memory_work(mut subject: Subject) {
    let guest = subject.guest();
    for part in 0..3 {
        for end in [REGION_SIZE, HIGH_REGION + REGION_SIZE] {
            let (status, rings) = bring_up(&subject, &guest, |ring| {
                let mut parts = parts(ring);
                let (addr, len) = &mut parts[part];
                **addr = (end - *len) & !0xf;
            });
            assert_eq!(status, DRIVER_OK);
            subject.ask_over(&guest, rings);
        }
    }
}

pub fn sizes_that_cannot_be(mut subject: Subject) {
    let guest = subject.guest();
    let max = sizes(&guest)[subject.queue()];
    let wide = u32::from(max);
    for size in [0, 3, wide - 1, wide + 1, 2 * wide, 257, 1 << 15, 1 << 16, 1 << 16 | wide, u32::MAX] {
        guest.set_status(0);
        assert!(guest.negotiate(subject.features()));
        for (index, size) in (0..).zip(sizes(&guest)) {
            guest.set_up_queue(index, &guest.ring(index, size));
        }
        // Once more, with another size.
        guest.write(VIRTIO_MMIO_QUEUE_SEL, subject.queue() as u32);
        guest.write(VIRTIO_MMIO_QUEUE_READY, 0);
        guest.write(VIRTIO_MMIO_QUEUE_NUM, size);
        guest.write(VIRTIO_MMIO_QUEUE_READY, 1);
        assert_eq!(guest.set_status(DRIVER_OK), DRIVER_OK | NEEDS_RESET, "size {size:#x}");
    }
    subject.revive(Running { guest, rings: Vec::new() });
}

pub fn the_smallest_queues(mut subject: Subject) {
    let guest = subject.guest();
    for size in [1, 2] {
        let (status, rings) = bring_up(&subject, &guest, |ring| ring.size = size);
        assert_eq!(status, DRIVER_OK, "size {size}");
        if subject.fits(&guest, size) {
            subject.ask_over(&guest, rings);
        }
    }
    subject.revive(Running { guest, rings: Vec::new() });
}

pub fn a_queue_that_is_ready_without_addresses(mut subject: Subject) {
    let guest = subject.guest();
    for part in 0..3 {
        let (status, _) = bring_up(&subject, &guest, |ring| *parts(ring)[part].0 = 0);
        assert_eq!(status, DRIVER_OK | NEEDS_RESET, "part {part}");
    }
    subject.revive(Running { guest, rings: Vec::new() });
}

pub fn rings_over_each_other(mut subject: Subject) {
    let guest = subject.guest();
    for [from, onto] in [[0, 1], [0, 2], [1, 0], [1, 2], [2, 0], [2, 1]] {
        let (_, mut rings) = bring_up(&subject, &guest, |ring| {
            let addr = *parts(ring)[onto].0;
            *parts(ring)[from].0 = addr;
        });
        let ring = &mut rings[subject.queue()];
        for head in 0..4 {
            ring.write_descriptor(head, ring.descriptors, 64, u32::from(head) % 3, head + 1);
            ring.publish(head);
            guest.kick(subject.queue() as u32);
        }
        guest.event_loop.settle();
        // Whatever it has done, it did it in these rings.
    }
    subject.revive(Running { guest, rings: Vec::new() });
}

/// Every queue, also those with nothing to do: a broken one that the device does not look at yet harms nobody.
pub fn any_queue_broken(mut subject: Subject) {
    let mut running = subject.start();
    for queue in 0..running.rings.len() {
        running.rings[queue].write_descriptor(0, u64::MAX, u32::MAX, 3, 0);
        running.rings[queue].publish(0);
        running.guest.kick(queue as u32);
        running.guest.event_loop.settle();
        running.rings[queue].set_avail_idx(0x8000);
        running.guest.kick(queue as u32);
        running.guest.event_loop.settle();
        running = subject.revive(running);
    }
}

/// A device can do without a queue or gives up, and a failed activation can be tried again.
pub fn any_queue_missing(mut subject: Subject) {
    let count = subject.start().rings.len() as u32;
    let mut guest = subject.guest();
    for missing in 0..count {
        for also_the_next in [false, true] {
            let enabled: Vec<u32> =
                (0..count).filter(|index| *index != missing && !(also_the_next && *index == missing + 1)).collect();
            guest.set_status(0);
            let running = guest.bring_up_queues(subject.features(), &enabled);
            for queue in 0..count {
                running.guest.kick(queue);
            }
            running.guest.event_loop.settle();
            assert!([DRIVER_OK, DRIVER_OK | NEEDS_RESET].contains(&running.guest.status()));
            guest = subject.revive(running).guest;
        }
    }
}

/// 65535 is followed by 0, also where the driver names its events.
pub fn indices_that_wrap(mut subject: Subject) {
    let running = subject.start_with(1 << VIRTIO_RING_F_EVENT_IDX);
    let (queue, start) = (subject.queue(), u16::MAX - 2);
    let mut running = at_index(&mut subject, running, start);
    for round in 0..6 {
        running.rings[queue].set_used_event(start.wrapping_add(round));
        subject.ask(&mut running);
        running.guest.wait_interrupt(1);
    }
    assert_eq!(running.rings[queue].used_idx(), 3);
    // An event that is far away: no interrupt.
    running.rings[queue].set_used_event(start);
    running.guest.take_interrupt();
    subject.ask(&mut running);
    running.guest.event_loop.settle();
    assert_eq!(running.guest.take_interrupt(), 0);
}

/// The device after so many requests that its indices are `start`: it is told so, or, where it cannot be saved, asked.
fn at_index(subject: &mut Subject, mut running: Running, start: u16) -> Running {
    let queue = subject.queue();
    running.guest.transport.park();
    let Ok(mut state) = running.guest.transport.save() else {
        running.guest.transport.unpark();
        let mut left = usize::from(start);
        while left > 0 {
            let count = left.min(subject.fill_count(&running));
            for _ in 0..count {
                subject.offer(&mut running);
            }
            subject.kick(&running);
            running.wait_used(queue, count);
            left -= count;
        }
        return running;
    };
    (state.queues[queue].next_avail, state.queues[queue].next_used) = (start, start);
    let guest = Guest::with_memory(subject.make(), running.guest.memory.clone());
    guest.transport.restore(&state).unwrap();
    let mut moved = Running { guest, rings: running.rings };
    moved.rings[queue].go_to(start);
    moved.guest.transport.unpark();
    moved
}
