//! Registers at any time, at any width: virtio 1.2 section 4.2.2.

use virtio_bindings::virtio_mmio::*;

use super::Subject;
use crate::BusDevice;
use crate::testkit::{Guest, Running};
use crate::virtio::mmio::WINDOW_SIZE;

/// The ways to each state: INIT, ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK, FAILED, and NEEDS_RESET last.
const WAYS: [&[u32]; 7] =
    [&[], &[1], &[1, 3], &[1, 3, 0xb], &[1, 3, 0xb, 0xf], &[1, 3, 0xb, 0xf, 0x8f], &[1, 3, 0xb, 0xf]];

fn go(subject: &mut Subject, way: &[u32]) -> Guest {
    let guest = subject.guest();
    for status in way {
        if *status == 0xb {
            guest.accept_features(subject.features() | 1 << 32);
        }
        if *status == 0xf {
            for index in 0.. {
                guest.write(VIRTIO_MMIO_QUEUE_SEL, index);
                let Ok(size @ 1..) = u16::try_from(guest.read(VIRTIO_MMIO_QUEUE_NUM_MAX)) else { break };
                guest.set_up_queue(index, &guest.ring(index, size));
            }
        }
        assert_eq!(guest.set_status(*status), *status);
    }
    guest
}

/// Every offset with every width, for reading and for writing, with values that mean something here and there.
pub fn any_access_in_every_state(mut subject: Subject) {
    for (index, way) in WAYS.into_iter().enumerate() {
        let guest = go(&mut subject, way);
        if index + 1 == WAYS.len() {
            guest.transport.interrupt().needs_reset();
        }
        for offset in (0..WINDOW_SIZE).chain([1 << 32, u64::MAX - 8, u64::MAX - 3, u64::MAX]) {
            for width in [0, 1, 2, 3, 4, 8, 16] {
                guest.transport.read(offset, &mut vec![0; width]);
                // The status last: nothing that comes before a reset may be missed.
                if offset != u64::from(VIRTIO_MMIO_STATUS) {
                    for fill in [0xff, 0x01] {
                        guest.transport.write(offset, &vec![fill; width]);
                    }
                }
            }
        }
        for status in [u32::MAX, 0x80, 0x40, 0x10] {
            guest.write(VIRTIO_MMIO_STATUS, status);
        }
        subject.revive(Running { guest, rings: Vec::new() });
    }
}

/// CVE-2026-5747: what the device was told about its queues cannot change under it.
pub fn queues_are_frozen_while_the_device_works(mut subject: Subject) {
    let mut running = subject.start();
    let count = running.rings.len() as u32;
    for queue in (0..count).chain([count, count + 1, 0xffff, u32::MAX]) {
        running.guest.write(VIRTIO_MMIO_QUEUE_SEL, queue);
        for register in [VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_READY]
            .into_iter()
            .chain((VIRTIO_MMIO_QUEUE_DESC_LOW..=VIRTIO_MMIO_QUEUE_USED_HIGH).step_by(4))
        {
            for value in [0, 1, 32768, 65536, u32::MAX] {
                running.guest.write(register, value);
            }
        }
        let there = u32::from(queue < count);
        assert_eq!(running.guest.read(VIRTIO_MMIO_QUEUE_READY), there);
        running.guest.accept_features(u64::MAX);
        subject.ask(&mut running);
    }
    subject.revive(running);
}

pub fn processors_that_fight_over_the_status(mut subject: Subject) {
    let guest = subject.guest();
    let features = subject.features();
    let queue = subject.queue() as u32;
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for round in 0..40 {
                    guest.negotiate(features);
                    for index in 0..3 {
                        guest.set_up_queue(index, &guest.ring(index, 16));
                    }
                    guest.set_status(0xf);
                    guest.kick(queue);
                    guest.set_status(if round % 3 == 0 { 0x8f } else { 0 });
                }
            });
        }
    });
    subject.revive(Running { guest, rings: Vec::new() });
}
