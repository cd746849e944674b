//! Devices under drivers that nobody thought of: random registers, random rings.
//!
//! What is held is that nothing panics, nothing works without end, and a device that was reset is
//! as good as new.

use proptest::prelude::*;
use seccomp::Confinement;
use virtio_bindings::virtio_mmio::*;
use vm_memory::{Bytes, GuestAddress};

use crate::BusDevice;
use crate::testkit::{Buffer, Guest, Ring, memory};
use crate::virtio::blk::{Blk, BlkConfig};
use crate::virtio::queue::{CHAINS_PER_WAKE_UP, Chain, QueueError, VirtQueue};
use crate::virtio::rate_limiter::RateLimits;
use crate::virtio::rng::Rng;

const RING: u64 = 0x1_0000;
const DATA: u64 = 0x2000;

fn blk() -> Box<Blk> {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let config = BlkConfig::new("d", file);
    Box::new(Blk::new(config, Confinement::On).unwrap())
}

/// Register values that get somewhere, and any others.
fn value() -> impl Strategy<Value = u32> {
    prop_oneof![
        prop::sample::select(vec![0, 1, 2, 3, 4, 0xb, 0xf, 0x40, 0x80, 0x8f, 16, 256, 257]),
        prop::sample::select(vec![RING as u32, 0x1_4000, 0x1_5000, u32::MAX]),
        any::<u32>(),
    ]
}

fn access() -> impl Strategy<Value = (u64, u32)> {
    let register = prop_oneof![
        4 => Just(u64::from(VIRTIO_MMIO_STATUS)),
        4 => (0..0x40_u64).prop_map(|index| 4 * index),
        1 => 0..0x1000_u64,
    ];
    (register, value())
}

#[derive(Clone, Debug)]
struct RandomDescriptor {
    addr: u64,
    len: u32,
    flags: u32,
    next: u16,
}

fn descriptor() -> impl Strategy<Value = RandomDescriptor> {
    let addr = prop_oneof![
        6 => prop::sample::select(vec![DATA, DATA + 16, 0, RING, RING + 0x4000, RING + 0x5000]),
        1 => any::<u64>(),
    ];
    let len = prop_oneof![
        6 => prop::sample::select(vec![0, 1, 15, 16, 17, 511, 512, 513, 4096]),
        1 => any::<u32>(),
    ];
    // Mostly without INDIRECT, which ends the game.
    let flags = prop_oneof![9 => 0..4_u32, 1 => 0..8_u32];
    (addr, len, flags, 0..10_u16).prop_map(|(addr, len, flags, next)| RandomDescriptor { addr, len, flags, next })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn any_accesses_leave_a_transport_that_a_reset_makes_new(
        accesses in prop::collection::vec((access(), any::<bool>()), 1..200),
    ) {
        let guest = Guest::new(blk());
        for ((offset, value), write) in accesses {
            if write {
                guest.transport.write(offset, &value.to_le_bytes());
            } else {
                guest.transport.read(offset, &mut [0; 4]);
            }
        }
        guest.set_status(0);
        prop_assert_eq!(guest.status(), 0);
        guest.start(0);
    }

    #[test]
    fn any_ring_is_served_with_an_end(
        descriptors in prop::collection::vec(descriptor(), 8),
        heads in prop::collection::vec(0..9_u16, 8),
        idx in 0..12_u16,
        header in (0..10_u32, any::<u64>()),
    ) {
        let memory = memory();
        memory.write_obj(header.0, GuestAddress(DATA)).unwrap();
        memory.write_obj(header.1, GuestAddress(DATA + 8)).unwrap();
        let mut ring = Ring::new(&memory, RING, 8);
        for (index, random) in (0..).zip(&descriptors) {
            ring.write_descriptor(index, random.addr, random.len, random.flags, random.next);
        }
        for head in heads {
            ring.publish(head);
        }
        ring.set_avail_idx(idx);
        let mut queue = VirtQueue::new(ring.activate().0, &memory, 0);
        let mut served = 0;
        let result = queue.serve(|memory, chain: &Chain| -> Result<u32, QueueError> {
            served += 1;
            let readable = chain.readable();
            let mut bytes = [0; 600];
            let copied = readable.read(memory, &mut bytes)?;
            assert_eq!(copied, 600.min(readable.len() as usize));
            let writable = chain.writable();
            let (front, back) = writable.split_at(writable.len() / 2).unwrap();
            assert_eq!(front.buffers(memory)?.len() + back.buffers(memory)?.len(), writable.len() as usize);
            Ok(writable.len())
        });
        prop_assert!(served <= CHAINS_PER_WAKE_UP);
        if result.is_ok() {
            prop_assert_eq!(u32::from(ring.used_idx()), served);
        }
    }

    #[test]
    fn any_ring_leaves_devices_that_a_reset_makes_new(
        descriptors in prop::collection::vec(descriptor(), 8),
        heads in prop::collection::vec(0..9_u16, 1..8),
        header in (0..10_u32, 0..4096_u64),
        entropy in any::<bool>(),
    ) {
        let guest = if entropy {
            Guest::new(Box::new(Rng::new(RateLimits::default()).unwrap()))
        } else {
            Guest::new(blk())
        };
        guest.poke(DATA, &header.0.to_le_bytes());
        guest.poke(DATA + 8, &header.1.to_le_bytes());
        let running = guest.bring_up(0, |_, rings| {
            for (index, random) in (0..).zip(&descriptors) {
                rings[0].write_descriptor(index, random.addr, random.len, random.flags, random.next);
            }
            for head in heads {
                rings[0].publish(head);
            }
        });
        let guest = running.guest;
        guest.event_loop.settle();
        guest.set_status(0);
        // The ring's memory is clean again, and a flush or a request for entropy is answered.
        let mut running = guest.start(0);
        running.guest.poke(DATA, &4_u32.to_le_bytes());
        running.rings[0].offer(&[Buffer::readable(DATA, 16), Buffer::writable(DATA + 16, 1)]);
        running.guest.kick(0);
        prop_assert_eq!(running.wait_used(0, 1), [(0, 1)]);
    }
}
