//! Another processor that changes what the device reads.

use vm_memory::{Bytes, GuestAddress};

use super::Subject;
use super::subject::{ANSWER, SAID};
use crate::BusDevice;
use crate::testkit::{Meanwhile, Ring, eventually};

/// Numbers that are always the same, and never the same twice: xorshift.
fn scramble(seed: u32) -> u32 {
    let mut value = seed.wrapping_mul(0x9e37_79b9) | 1;
    value ^= value << 13;
    value ^= value >> 17;
    value ^ (value << 5)
}

/// Heads, lengths, places and flags that change all the time: what the device uses is what it checked.
pub fn descriptors_that_change(mut subject: Subject) {
    let mut running = subject.start();
    for _ in 0..200 {
        let ring = &running.rings[subject.queue()];
        let hostile = Ring::with_parts(&running.guest.memory, ring.size, ring.descriptors, ring.avail, ring.used);
        let buffers = subject.buffers(&running.guest);
        let other_processor = Meanwhile::repeat(move |turn| {
            let chosen = scramble(turn);
            let buffer = buffers[chosen as usize % buffers.len()];
            let addr = [buffer.addr, SAID, ANSWER, 0x8000, u64::MAX][chosen as usize / 8 % 5];
            let len = [buffer.len, 1, 4096, 1 << 20, u32::MAX][chosen as usize / 64 % 5];
            for index in 0..4 {
                hostile.write_descriptor(index, addr, len, chosen >> (8 + index) & 7, (chosen >> 20) as u16 % 4);
            }
        });
        for head in 0..8 {
            running.rings[subject.queue()].publish(head % 4);
            subject.kick(&running);
            running.guest.event_loop.settle();
        }
        drop(other_processor);
        running.guest.set_status(0);
        running = running.guest.start(subject.features());
    }
    subject.revive(running);
}

/// The bytes of the request change while it is served: it is answered as what it was at one time, or the device gives up.
pub fn requests_that_change(mut subject: Subject) {
    for round in 0..4 {
        let mut running = subject.start();
        let buffers = subject.buffers(&running.guest);
        let memory = running.guest.memory.clone();
        let said = subject.request().said.clone();
        {
            let _hostile = Meanwhile::repeat(move |turn| {
                let chosen = scramble(turn);
                let Some(right) = said.get(chosen as usize % said.len().max(1)) else { return };
                let at = GuestAddress(SAID + u64::from(chosen) % said.len() as u64);
                let byte = if turn.is_multiple_of(2) { *right } else { (chosen >> (8 * (round % 3))) as u8 };
                memory.write_obj(byte, at).unwrap();
            });
            for _ in 0..200 {
                running.rings[subject.queue()].offer(&buffers);
                subject.kick(&running);
                let mut answered = false;
                eventually("An answer or DEVICE_NEEDS_RESET", || {
                    answered |= !running.rings[subject.queue()].take_used().is_empty();
                    answered || running.guest.status() & 0x40 != 0
                });
                if !answered {
                    break;
                }
            }
        }
        subject.revive(running);
    }
}

/// The configuration space has no moment at which it may not be touched.
pub fn a_configuration_that_is_read_and_written_meanwhile(mut subject: Subject) {
    let mut running = subject.start();
    let transport = std::sync::Arc::clone(&running.guest.transport);
    let other_processor = Meanwhile::repeat(move |turn| {
        let chosen = scramble(turn);
        let offset = 0x100 + u64::from(chosen % 0x48);
        let width = 1 << (chosen >> 8 & 3);
        transport.write(offset, &chosen.to_le_bytes().repeat(2)[..width]);
        transport.read(offset, &mut [0; 8][..width]);
    });
    for _ in 0..300 {
        subject.ask(&mut running);
    }
    drop(other_processor);
    subject.revive(running);
}
