//! Tables that descriptors refer to: virtio 1.2 section 2.7.5.3. Refused where they were not negotiated, checked where
//! they were.

use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_INDIRECT_DESC, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};

use super::Subject;
use super::subject::SAID;
use crate::testkit::{Buffer, HIGH_REGION, Meanwhile, REGION_SIZE, Ring, Running};

/// Where tables are put, and a second one.
const TABLE: u64 = 0x8_0000;
const OTHER_TABLE: u64 = 0x9_0000;

const INDIRECT: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// A table in memory, as if it were a ring's.
fn table_at(running: &Running, addr: u64) -> Ring {
    Ring::with_parts(&running.guest.memory, 1024, addr, 0, 0)
}

/// Writes a chain of `buffers` to the table at `addr`.
fn write_table(running: &Running, addr: u64, buffers: &[Buffer]) {
    table_at(running, addr).write_chain(buffers);
}

/// Offers a chain whose first descriptors are `direct` and whose last one refers to a table of `len` bytes at `addr`.
fn offer(subject: &Subject, running: &mut Running, direct: &[Buffer], addr: u64, len: u32, flags: u32) {
    let ring = &mut running.rings[subject.queue()];
    let mut buffers = direct.to_vec();
    buffers.push(Buffer::readable(addr, len));
    let head = ring.write_chain(&buffers);
    let last = (head + direct.len() as u16) % ring.size;
    ring.write_descriptor(last, addr, len, VRING_DESC_F_INDIRECT | flags, 1);
    ring.publish(head);
}

/// The request, through a table that was offered.
#[track_caller]
fn expect_answer(subject: &Subject, running: &mut Running) {
    subject.kick(running);
    let used = running.wait_used(subject.queue(), 1);
    assert_eq!((used.len(), used[0].1), (1, subject.request().written));
    assert_eq!(running.guest.status(), 0xf);
}

pub fn tables_that_were_not_negotiated(mut subject: Subject) {
    for (len, flags) in
        [(32, 0), (0, 0), (17, 0), (16 * 1025, 0), (u32::MAX, 0), (16, VRING_DESC_F_NEXT), (16, VRING_DESC_F_WRITE)]
    {
        for direct in [0, 1] {
            let mut running = subject.start();
            let buffers = subject.buffers(&running.guest);
            write_table(&running, TABLE, &buffers);
            offer(&subject, &mut running, &vec![Buffer::readable(SAID, 1); direct], TABLE, len, flags);
            subject.expect_broken(running);
        }
    }
}

pub fn tables_in_order(mut subject: Subject) {
    let mut running = subject.start_with(INDIRECT);
    let buffers = subject.buffers(&running.guest);
    let size = usize::from(running.rings[subject.queue()].size);
    let bytes = |count: usize| 16 * count as u32;
    // Whole, and with a flag that means nothing here.
    for flags in [0, VRING_DESC_F_WRITE] {
        write_table(&running, TABLE, &buffers);
        offer(&subject, &mut running, &[], TABLE, bytes(buffers.len()), flags);
        expect_answer(&subject, &mut running);
    }
    // A part of it direct.
    let (direct, rest) = buffers.split_at(buffers.len() - 1);
    write_table(&running, TABLE, rest);
    offer(&subject, &mut running, direct, TABLE, bytes(rest.len()), 0);
    expect_answer(&subject, &mut running);
    // A table that is larger than the chain in it, one as long as the queue, and one at the very end of memory.
    let mut padded = buffers.clone();
    padded.resize(size, Buffer { len: 0, ..*buffers.last().unwrap() });
    write_table(&running, TABLE, &padded);
    offer(&subject, &mut running, &[], TABLE, bytes(size), 0);
    expect_answer(&subject, &mut running);
    for end in [REGION_SIZE, HIGH_REGION + REGION_SIZE] {
        let addr = end - u64::from(bytes(buffers.len()));
        write_table(&running, addr, &buffers);
        offer(&subject, &mut running, &[], addr, bytes(buffers.len()), 0);
        expect_answer(&subject, &mut running);
    }
    // Descriptors without a table are what they were.
    subject.ask(&mut running);
    subject.revive(running);
}

pub fn tables_that_are_wrong(mut subject: Subject) {
    let size = u32::from(subject.start().rings[subject.queue()].size);
    let mut wrong = |what: &str, addr: u64, len: u32, flags: u32, write: &dyn Fn(&Ring)| {
        let mut running = subject.start_with(INDIRECT);
        let buffers = subject.buffers(&running.guest);
        if addr == TABLE {
            write_table(&running, TABLE, &buffers);
        }
        write(&table_at(&running, TABLE));
        offer(&subject, &mut running, &[], addr, len, flags);
        subject.kick(&running);
        crate::testkit::eventually(what, || running.guest.status() & 0x40 != 0);
        subject.revive(running);
    };
    for len in [0, 1, 15, 17, 16 * (size + 1), 16 << 16, 16 * (1 << 16 | 1), u32::MAX, u32::MAX - 15] {
        wrong("a length", TABLE, len, 0, &|_| {});
    }
    wrong("a next after it", TABLE, 32, VRING_DESC_F_NEXT, &|_| {});
    for addr in [REGION_SIZE - 8, REGION_SIZE, HIGH_REGION - 8, HIGH_REGION + REGION_SIZE - 15, 1 << 40, u64::MAX - 7] {
        wrong("a place", addr, 16, 0, &|_| {});
    }
    wrong("another table in it", TABLE, 32, 0, &|table| {
        table.write_descriptor(0, OTHER_TABLE, 16, VRING_DESC_F_INDIRECT, 0);
    });
    wrong("itself in it", TABLE, 32, 0, &|table| {
        table.write_descriptor(0, SAID, 1, VRING_DESC_F_NEXT, 1);
        table.write_descriptor(1, TABLE, 32, VRING_DESC_F_INDIRECT, 0);
    });
    wrong("a next out of it", TABLE, 32, 0, &|table| table.write_descriptor(0, SAID, 1, VRING_DESC_F_NEXT, 2));
    wrong("a loop", TABLE, 32, 0, &|table| table.write_descriptor(0, SAID, 1, VRING_DESC_F_NEXT, 0));
    wrong("a wrong order", TABLE, 32, 0, &|table| {
        table.write_descriptor(0, SAID, 1, VRING_DESC_F_NEXT | VRING_DESC_F_WRITE, 1);
        table.write_descriptor(1, SAID, 1, 0, 0);
    });
    wrong("a buffer outside of memory", TABLE, 16, 0, &|table| table.write_descriptor(0, REGION_SIZE, 1, 0, 0));
    // As long as the queue, and one descriptor before it.
    let mut running = subject.start_with(INDIRECT);
    write_table(&running, TABLE, &vec![Buffer::readable(SAID, 0); size as usize]);
    offer(&subject, &mut running, &[Buffer::readable(SAID, 0)], TABLE, 16 * size, 0);
    subject.expect_broken(running);
}

/// A table that changes between the moments at which it is looked at.
pub fn tables_that_change(mut subject: Subject) {
    for _ in 0..20 {
        let mut running = subject.start_with(INDIRECT);
        let buffers = subject.buffers(&running.guest);
        let table = table_at(&running, TABLE);
        let right = buffers.clone();
        let other_processor = Meanwhile::repeat(move |turn| {
            for (index, buffer) in (0..).zip(&right) {
                let more = index + 1 < right.len() as u16;
                let flags = u32::from(more) | if buffer.writable { VRING_DESC_F_WRITE } else { 0 };
                table.write_descriptor(index, buffer.addr, buffer.len, flags, index + 1);
            }
            let (addr, len) = [(TABLE, 32), (u64::MAX, 16), (SAID, u32::MAX)][turn as usize % 3];
            table.write_descriptor(turn as u16 % 2, addr, len, turn / 2 % 8, turn as u16 % 3);
        });
        for _ in 0..20 {
            offer(&subject, &mut running, &[], TABLE, 16 * buffers.len() as u32, 0);
            subject.kick(&running);
            running.guest.event_loop.settle();
        }
        drop(other_processor);
        subject.revive(running);
    }
}
