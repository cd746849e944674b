//! Chains that have no end, no sense or no place: virtio 1.2 sections 2.7.4 and 2.7.5.

use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use super::Subject;
use super::subject::{ANSWER, SAID};
use crate::testkit::{Buffer, HIGH_REGION, REGION_SIZE, Ring, Running};

/// Offers what `write` makes of the descriptor table, from descriptor 0 on.
fn offer_written(subject: &mut Subject, write: impl FnOnce(&Ring)) -> Running {
    let mut running = subject.start();
    let ring = &mut running.rings[subject.queue()];
    write(ring);
    ring.publish(0);
    running
}

/// A chain that no device can make anything of.
#[track_caller]
fn breaks(subject: &mut Subject, write: impl FnOnce(&Ring)) {
    let running = offer_written(subject, write);
    subject.expect_broken(running);
}

/// A loop of this many descriptors behind a tail of that many.
fn write_loop(ring: &Ring, tail: u16, length: u16) {
    for index in 0..tail + length {
        let next = if index + 1 == tail + length { tail } else { index + 1 };
        ring.write_descriptor(index, SAID, 1, VRING_DESC_F_NEXT, next);
    }
}

pub fn loops(mut subject: Subject) {
    for (tail, length) in [(0, 1), (0, 2), (1, 1), (3, 2)] {
        breaks(&mut subject, |ring| write_loop(ring, tail, length));
    }
    breaks(&mut subject, |ring| write_loop(ring, 0, ring.size));
    breaks(&mut subject, |ring| write_loop(ring, ring.size - 1, 1));
}

pub fn indices_out_of_range(mut subject: Subject) {
    for beyond in [0, 1, 0x7fff] {
        breaks(&mut subject, |ring| {
            ring.write_descriptor(0, SAID, 1, VRING_DESC_F_NEXT, ring.size.saturating_add(beyond));
        });
        let mut running = subject.start();
        let ring = &mut running.rings[subject.queue()];
        ring.publish(ring.size.saturating_add(beyond));
        subject.expect_broken(running);
    }
}

pub fn buffers_outside_of_memory(mut subject: Subject) {
    for (addr, len) in [
        (REGION_SIZE, 1),
        (REGION_SIZE - 1, 2),
        (HIGH_REGION - 1, 2),
        (HIGH_REGION + REGION_SIZE - 15, 16),
        (1 << 40, 16),
        (0, u32::MAX),
        (u64::MAX, 1),
        (u64::MAX - 15, 16),
        (u64::MAX, u32::MAX),
    ] {
        for flags in [0, VRING_DESC_F_WRITE] {
            breaks(&mut subject, |ring| ring.write_descriptor(0, addr, len, flags, 0));
            // As the last of an otherwise good chain.
            breaks(&mut subject, |ring| {
                ring.write_descriptor(0, SAID, 16, VRING_DESC_F_NEXT, 1);
                ring.write_descriptor(1, addr, len, flags, 0);
            });
        }
    }
}

pub fn a_readable_buffer_after_a_writable_one(mut subject: Subject) {
    for len in [0, 1, 4096] {
        breaks(&mut subject, |ring| {
            ring.write_descriptor(0, ANSWER, len, VRING_DESC_F_NEXT | VRING_DESC_F_WRITE, 1);
            ring.write_descriptor(1, SAID, 16, 0, 0);
        });
    }
}

/// Empty ones change nothing. Where they point to no memory a device may also say that there is none.
pub fn empty_descriptors(mut subject: Subject) {
    let mut running = subject.start();
    for addr in [0, SAID, REGION_SIZE - 1, REGION_SIZE, u64::MAX] {
        let mut buffers = subject.buffers(&running.guest);
        if !subject.request().said.is_empty() {
            buffers.insert(0, Buffer::readable(addr, 0));
        }
        buffers.push(Buffer { addr, len: 0, ..*buffers.last().unwrap() });
        if addr < REGION_SIZE {
            subject.ask_with(&mut running, &buffers);
        } else {
            running.rings[subject.queue()].offer(&buffers);
            running = subject.expect_either(running);
        }
    }
}

/// The same bytes in the smallest pieces that the queue has descriptors for.
pub fn a_byte_in_each_descriptor(mut subject: Subject) {
    let mut running = subject.start();
    let whole = subject.buffers(&running.guest);
    let mut left = usize::from(running.rings[subject.queue()].size) - whole.len();
    let mut buffers = Vec::new();
    for buffer in whole {
        let pieces = left.min(buffer.len as usize - 1) as u32;
        left -= pieces as usize;
        let piece = |index| Buffer { addr: buffer.addr + u64::from(index), len: 1, ..buffer };
        buffers.extend((0..pieces).map(piece));
        buffers.push(Buffer { addr: buffer.addr + u64::from(pieces), len: buffer.len - pieces, ..buffer });
    }
    subject.ask_with(&mut running, &buffers);
}

pub fn as_many_descriptors_as_the_queue_has(mut subject: Subject) {
    let mut running = subject.start();
    let size = running.rings[subject.queue()].size.into();
    for count in [size - 1, size] {
        let mut buffers = subject.buffers(&running.guest);
        let last = *buffers.last().unwrap();
        buffers.resize(count, Buffer { len: 0, ..last });
        subject.ask_with(&mut running, &buffers);
    }
}

pub fn chains_of_nothing(mut subject: Subject) {
    for buffer in [Buffer::readable(SAID, 0), Buffer::writable(ANSWER, 0), Buffer::readable(u64::MAX, 0)] {
        for count in [1, 2, 16] {
            let mut running = subject.start();
            running.rings[subject.queue()].offer(&vec![buffer; count]);
            subject.expect_either(running);
        }
    }
}

pub fn buffers_of_the_wrong_direction(mut subject: Subject) {
    let mut running = subject.start();
    let mut buffers = subject.buffers(&running.guest);
    for writable in [false, true] {
        buffers.iter_mut().for_each(|buffer| buffer.writable = writable);
        running.rings[subject.queue()].offer(&buffers);
        running = subject.expect_either(running);
    }
}

/// What is said, and the room for the answer, of every length up to the right one, and a little beyond.
pub fn requests_cut_short_anywhere(mut subject: Subject) {
    let mut running = subject.start();
    let whole = subject.buffers(&running.guest);
    for (cut, buffer) in whole.iter().enumerate() {
        for len in (0..=buffer.len + 16).filter(|len| *len < 130 || len % 64 < 2) {
            let mut buffers = whole.clone();
            buffers[cut].len = len;
            running.rings[subject.queue()].offer(&buffers);
            running = subject.expect_either(running);
        }
    }
}

/// What the device reads from its rings, and writes over them.
pub fn buffers_over_the_rings(mut subject: Subject) {
    let mut running = subject.start();
    let ring = &running.rings[subject.queue()];
    for part in [ring.descriptors, ring.avail, ring.used] {
        for writable in [false, true] {
            let mut buffers = subject.buffers(&running.guest);
            buffers.push(Buffer { addr: part, len: 256, writable: true });
            for buffer in buffers.iter_mut().filter(|buffer| buffer.writable == writable) {
                buffer.addr = part;
            }
            running.rings[subject.queue()].offer(&buffers);
            subject.kick(&running);
            running.guest.event_loop.settle();
            running = subject.revive(running);
        }
    }
}

pub fn buffers_over_each_other(mut subject: Subject) {
    let mut running = subject.start();
    let mut buffers = subject.buffers(&running.guest);
    buffers.push(Buffer::writable(SAID, 4096));
    buffers.push(Buffer::writable(SAID + 1, 4096));
    for buffer in &mut buffers {
        buffer.addr = buffer.addr.min(SAID + 2);
    }
    running.rings[subject.queue()].offer(&buffers);
    subject.expect_either(running);
}

/// All of a region in each descriptor: what a device moves is bounded by what it knows, not by what it is offered.
pub fn chains_as_long_as_can_be(mut subject: Subject) {
    for writable in [false, true] {
        let mut running = subject.start();
        let ring = &mut running.rings[subject.queue()];
        let buffer = Buffer { addr: 0, len: REGION_SIZE as u32, writable };
        let count = usize::from(ring.size).min(1023);
        ring.offer(&vec![buffer; count]);
        subject.expect_either(running);
    }
}
