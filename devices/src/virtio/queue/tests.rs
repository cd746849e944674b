//! Queues of drivers that make every mistake: virtio 1.2 section 2.7.

use std::sync::Arc;

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use super::*;
use crate::testkit::{Buffer, HIGH_REGION, Meanwhile, REGION_SIZE, Ring, memory};

const SIZE: u16 = 16;
const RING: u64 = 0x1_0000;
const DATA: u64 = 0x10_0000;
const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

fn queue_of(size: u16, features: u64) -> (Ring, VirtQueue) {
    let memory = memory();
    let ring = Ring::new(&memory, RING, size);
    let (active, _) = ring.activate();
    let queue = VirtQueue::new(active, &memory, features);
    (ring, queue)
}

fn queue() -> (Ring, VirtQueue) {
    queue_of(SIZE, 0)
}

/// Offers the chain at descriptor 0 after `write` has written descriptors, and pops it.
fn pop_written(write: impl FnOnce(&Ring)) -> Result<Option<Chain>, QueueError> {
    let (mut ring, mut queue) = queue();
    write(&ring);
    ring.publish(0);
    queue.pop()
}

fn serve_all(queue: &mut VirtQueue) -> Result<bool, QueueError> {
    queue.serve(|_, _| Ok(0))
}

#[test]
fn a_chain_is_read_and_written_over_its_buffers() {
    let (mut ring, mut queue) = queue();
    let memory = queue.memory().clone();
    memory.write_slice(b"hello world", GuestAddress(DATA)).unwrap();
    let head = ring.offer(&[
        Buffer::readable(DATA, 6),
        Buffer::readable(DATA + 6, 5),
        Buffer::writable(DATA + 0x100, 2),
        Buffer::writable(DATA + 0x200, 3),
    ]);

    let chain = queue.pop().unwrap().unwrap();
    assert_eq!((chain.head(), chain.readable().len(), chain.writable().len()), (head, 11, 5));
    let mut text = [0; 11];
    assert_eq!(chain.readable().read(&memory, &mut text).unwrap(), 11);
    assert_eq!(&text, b"hello world");
    let (first, rest) = chain.readable().split_at(4).unwrap();
    assert_eq!(first.read(&memory, &mut text).unwrap(), 4);
    assert_eq!(rest.read(&memory, &mut text).unwrap(), 7);
    assert_eq!(&text[..7], b"o world");
    assert_eq!(rest.read_obj::<u64>(&memory).unwrap(), None);
    assert_eq!(rest.read_obj::<u32>(&memory).unwrap(), Some(u32::from_le_bytes(*b"o wo")));
    assert!(rest.split_at(8).is_none());

    assert_eq!(chain.writable().write(&memory, b"abcdefg").unwrap(), 5);
    queue.add_used(chain, 5).unwrap();
    assert_eq!(ring.take_used(), [(head, 5)]);
    let mut written = [0; 3];
    memory.read_slice(&mut written, GuestAddress(DATA + 0x200)).unwrap();
    assert_eq!(&written, b"cde");
    assert!(queue.pop().unwrap().is_none());
}

#[test]
fn an_available_index_beyond_the_queue_is_an_error() {
    for (idx, fails) in [(SIZE, false), (SIZE + 1, true), (0x8000, true), (u16::MAX, true)] {
        let (ring, mut queue) = queue();
        ring.set_avail_idx(idx);
        assert_eq!(queue.pop().is_err(), fails, "idx {idx}");
    }
}

#[test]
fn an_available_index_that_goes_backwards_is_an_error() {
    let (mut ring, mut queue) = queue();
    ring.offer(&[Buffer::readable(DATA, 1)]);
    ring.offer(&[Buffer::readable(DATA, 1)]);
    serve_all(&mut queue).unwrap();
    ring.set_avail_idx(1);
    assert!(matches!(queue.pop(), Err(QueueError::AvailRing(_))));
    assert!(matches!(serve_all(&mut queue), Err(QueueError::AvailRing(_))));
}

#[test]
fn a_head_out_of_range_is_an_error() {
    for head in [SIZE, SIZE + 1, u16::MAX] {
        let (mut ring, mut queue) = queue();
        ring.publish(head);
        assert!(matches!(queue.pop(), Err(QueueError::DescriptorIndex(index)) if index == head));
    }
}

#[test]
fn a_next_out_of_range_is_an_error() {
    for next in [SIZE, u16::MAX] {
        let result = pop_written(|ring| ring.write_descriptor(0, DATA, 1, VRING_DESC_F_NEXT, next));
        assert!(matches!(result, Err(QueueError::DescriptorIndex(index)) if index == next));
    }
}

#[test]
fn loops_of_every_length_are_errors() {
    for length in 1..=SIZE {
        let result = pop_written(|ring| {
            for index in 0..length {
                ring.write_descriptor(index, DATA, 1, VRING_DESC_F_NEXT, (index + 1) % length);
            }
        });
        assert!(matches!(result, Err(QueueError::Endless(0))), "length {length}");
    }
}

#[test]
fn a_loop_behind_a_tail_is_an_error() {
    let result = pop_written(|ring| {
        for index in 0..8 {
            ring.write_descriptor(index, DATA, 1, VRING_DESC_F_NEXT, (index + 1).min(7));
        }
    });
    assert!(matches!(result, Err(QueueError::Endless(0))));
}

#[test]
fn chains_of_one_descriptor_up_to_the_whole_queue_are_taken() {
    for length in 1..=SIZE {
        let (mut ring, mut queue) = queue();
        ring.offer(&vec![Buffer::writable(DATA, 3); length.into()]);
        let chain = queue.pop().unwrap().unwrap();
        assert_eq!(chain.writable().len(), 3 * u32::from(length));
    }
}

#[test]
fn a_readable_buffer_after_a_writable_one_is_an_error() {
    let result = pop_written(|ring| {
        ring.write_descriptor(0, DATA, 1, VRING_DESC_F_NEXT | VRING_DESC_F_WRITE, 1);
        ring.write_descriptor(1, DATA, 1, 0, 0);
    });
    assert!(matches!(result, Err(QueueError::Order(1))));
}

#[test]
fn empty_buffers_count_for_nothing() {
    let (mut ring, mut queue) = queue();
    ring.offer(&[
        Buffer::readable(0, 0),
        Buffer::readable(DATA, 2),
        Buffer::readable(u64::MAX, 0),
        Buffer::writable(DATA, 0),
    ]);
    let chain = queue.pop().unwrap().unwrap();
    assert_eq!((chain.readable().len(), chain.writable().len()), (2, 0));
    assert!(chain.writable().is_empty());
}

#[test]
fn buffers_outside_memory_are_errors() {
    for (addr, len) in [
        (REGION_SIZE, 1),
        (REGION_SIZE - 1, 2),
        (HIGH_REGION - 1, 2),
        (HIGH_REGION + REGION_SIZE - 16, 17),
        (0, u32::MAX),
        (u64::MAX, 1),
        (u64::MAX - 1, 2),
        (u64::MAX, u32::MAX),
    ] {
        let result = pop_written(|ring| ring.write_descriptor(0, addr, len, 0, 0));
        assert!(matches!(result, Err(QueueError::Memory { .. })), "{addr:#x} {len}");
    }
    let last = HIGH_REGION + REGION_SIZE - 16;
    assert!(pop_written(|ring| ring.write_descriptor(0, last, 16, 0, 0)).is_ok());
}

#[test]
fn a_buffer_over_two_adjoining_regions_is_taken_in_two_parts() {
    let regions = [(GuestAddress(0), 0x10_0000), (GuestAddress(0x10_0000), 0x1000)];
    let memory = GuestMemory::from_ranges(&regions).unwrap();
    let mut ring = Ring::new(&memory, RING, SIZE);
    let mut queue = VirtQueue::new(ring.activate().0, &memory, 0);
    ring.offer(&[Buffer::writable(0x10_0000 - 3, 8)]);
    let chain = queue.pop().unwrap().unwrap();
    assert_eq!(chain.writable().write(&memory, b"12345678").unwrap(), 8);
    assert_eq!(chain.writable().buffers(&memory).unwrap().len(), 8);
    let mut bytes = [0; 5];
    memory.read_slice(&mut bytes, GuestAddress(0x10_0000)).unwrap();
    assert_eq!(&bytes, b"45678");
}

#[test]
fn a_chain_longer_than_4_gib_is_an_error() {
    // 16 buffers of 256 MiB are one byte more than 32 bits can count. The memory is not touched.
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 256 << 20)]).unwrap();
    for (last, fails) in [((256 << 20) - 1, false), (256 << 20, true)] {
        let mut ring = Ring::new(&memory, RING, SIZE);
        let mut queue = VirtQueue::new(ring.activate().0, &memory, 0);
        let mut buffers = vec![Buffer::readable(0, 256 << 20); 15];
        buffers.push(Buffer::writable(0, last));
        ring.offer(&buffers);
        match queue.pop() {
            Ok(chain) => {
                assert!(!fails);
                assert_eq!(chain.unwrap().writable().len(), last);
            }
            Err(error) => assert!(fails && matches!(error, QueueError::TooLong(0)), "{error}"),
        }
    }
}

#[test]
fn indirect_descriptors_are_refused_whatever_their_table() {
    for (len, flags) in [
        (32, VRING_DESC_F_INDIRECT),
        (0, VRING_DESC_F_INDIRECT),
        (17, VRING_DESC_F_INDIRECT),
        (16 * 1024, VRING_DESC_F_INDIRECT),
        (16, VRING_DESC_F_INDIRECT | VRING_DESC_F_NEXT),
        (16, VRING_DESC_F_INDIRECT | VRING_DESC_F_WRITE),
    ] {
        let write = |ring: &Ring| ring.write_descriptor(0, DATA, len, flags, 1);
        assert!(matches!(pop_written(write), Err(QueueError::Indirect(0))), "{len} {flags}");
    }
    let behind_a_direct_one = |ring: &Ring| {
        ring.write_descriptor(0, DATA, 1, VRING_DESC_F_NEXT, 1);
        ring.write_descriptor(1, DATA, 16, VRING_DESC_F_INDIRECT, 0);
    };
    assert!(matches!(pop_written(behind_a_direct_one), Err(QueueError::Indirect(1))));
    let (mut ring, mut queue) = queue();
    ring.write_descriptor(0, DATA, 16, VRING_DESC_F_INDIRECT, 0);
    ring.publish(0);
    let memory = Arc::new(queue.memory().clone());
    assert!(matches!(queue.pop_descriptor_chain(&memory), Err(QueueError::Indirect(0))));
}

#[test]
fn the_raw_view_of_a_chain_is_the_checked_one() {
    let (mut ring, mut queue) = queue();
    let head = ring.offer(&[Buffer::readable(DATA, 4), Buffer::writable(DATA, 8)]);
    let memory = Arc::new(queue.memory().clone());
    let chain = queue.pop_descriptor_chain(&memory).unwrap().unwrap();
    assert_eq!(chain.head_index(), head);
    assert_eq!(chain.map(|descriptor| descriptor.len()).collect::<Vec<_>>(), [4, 8]);
    queue.add_used_head(head, 8).unwrap();
    assert_eq!(ring.take_used(), [(head, 8)]);
    assert!(queue.pop_descriptor_chain(&memory).unwrap().is_none());
}

#[test]
fn buffers_that_overlap_the_ring_itself_do_no_harm() {
    let (mut ring, mut queue) = queue();
    let memory = queue.memory().clone();
    for part in [ring.descriptors, ring.avail, ring.used] {
        ring.offer(&[Buffer::readable(part, 64), Buffer::writable(part, 64)]);
    }
    for _ in 0..3 {
        // What the device writes over the rings decides what it finds next; any error will do.
        let Ok(Some(chain)) = queue.pop() else { return };
        chain.writable().write(&memory, &[0xff; 64]).unwrap();
        queue.add_used(chain, 64).unwrap();
    }
}

#[test]
fn descriptors_that_change_while_they_are_read_are_read_once() {
    let (mut ring, mut queue) = queue();
    let memory = queue.memory().clone();
    let hostile = Ring::with_parts(&memory, SIZE, ring.descriptors, ring.avail, ring.used);
    let _hostile = Meanwhile::repeat(move |turn| {
        let len = if turn.is_multiple_of(2) { 16 } else { u32::MAX };
        let flags = turn % 8;
        hostile.write_descriptor(0, DATA, len, flags, (turn % 32) as u16);
        hostile.write_descriptor(1, DATA, len, flags & !1, 0);
    });
    for _ in 0..20_000 {
        ring.publish(0);
        match queue.pop() {
            // What came through is as it was checked: in memory, at its length.
            Ok(Some(chain)) => {
                let mut bytes = [0; 64];
                let readable = chain.readable().read(&memory, &mut bytes).unwrap();
                assert_eq!(readable as u32, chain.readable().len());
                assert!(chain.writable().buffers(&memory).is_ok());
                queue.add_used(chain, 0).unwrap();
            }
            Ok(None) => panic!("A chain was published"),
            Err(QueueError::AvailRing(error)) => panic!("{error}"),
            Err(_) => {}
        }
    }
}

#[test]
fn indices_wrap_at_65535() {
    for features in [0, EVENT_IDX] {
        let memory = memory();
        let mut ring = Ring::new(&memory, RING, SIZE);
        let (mut active, _) = ring.activate();
        ring.start_at(&mut active, u16::MAX - 1);
        let mut queue = VirtQueue::new(active, &memory, features);
        for round in 0..6_u16 {
            ring.set_used_event((u16::MAX - 1).wrapping_add(round));
            let head = ring.offer(&[Buffer::writable(DATA, 1)]);
            assert!(serve_all(&mut queue).unwrap(), "round {round}");
            assert_eq!(ring.take_used(), [(head, 0)]);
        }
        assert_eq!(ring.used_idx(), 4);
    }
}

#[test]
fn event_idx_interrupts_only_past_the_event_that_the_driver_named() {
    let (mut ring, mut queue) = queue_of(SIZE, EVENT_IDX);
    ring.set_used_event(2);
    for (round, wanted) in [(0, false), (1, false), (2, true), (3, false)] {
        ring.offer(&[Buffer::writable(DATA, 1)]);
        assert_eq!(serve_all(&mut queue).unwrap(), wanted, "round {round}");
    }
    // A batch that passes the event is one interrupt.
    ring.set_used_event(5);
    for _ in 0..4 {
        ring.offer(&[Buffer::writable(DATA, 1)]);
    }
    assert!(serve_all(&mut queue).unwrap());
    assert!(!serve_all(&mut queue).unwrap());
}

#[test]
fn the_no_interrupt_flag_is_respected() {
    let (mut ring, mut queue) = queue();
    ring.set_avail_flags(1);
    ring.offer(&[Buffer::writable(DATA, 1)]);
    assert!(!serve_all(&mut queue).unwrap());
    ring.set_avail_flags(0);
    ring.offer(&[Buffer::writable(DATA, 1)]);
    assert!(serve_all(&mut queue).unwrap());
}

#[test]
fn notifications_are_off_while_the_queue_is_served_and_on_after_it() {
    let (mut ring, mut queue) = queue();
    ring.offer(&[Buffer::writable(DATA, 1)]);
    queue
        .serve(|_, _| {
            assert_eq!(ring.used_flags(), 1);
            Ok(0)
        })
        .unwrap();
    assert_eq!(ring.used_flags(), 0);
}

#[test]
fn a_chain_that_arrives_while_the_last_one_is_served_is_not_missed() {
    let (mut ring, mut queue) = queue();
    ring.offer(&[Buffer::writable(DATA, 1)]);
    let mut served = 0;
    queue
        .serve(|_, _| {
            served += 1;
            if served == 1 {
                ring.offer(&[Buffer::writable(DATA, 1)]);
            }
            Ok(0)
        })
        .unwrap();
    assert_eq!(served, 2);
}

#[test]
fn a_chain_that_arrives_before_notifications_are_on_is_reported() {
    for features in [0, EVENT_IDX] {
        let (mut ring, mut queue) = queue_of(SIZE, features);
        queue.disable_notification().unwrap();
        assert!(queue.pop().unwrap().is_none());
        ring.offer(&[Buffer::writable(DATA, 1)]);
        assert!(queue.enable_notification().unwrap());
        assert!(queue.pop().unwrap().is_some());
        assert!(!queue.enable_notification().unwrap());
    }
}

#[test]
fn an_endless_supply_ends_at_the_budget_and_kicks_again() {
    let (mut ring, mut queue) = queue();
    let mut served = 0;
    ring.offer(&[Buffer::writable(DATA, 1)]);
    let interrupt = queue
        .serve(|_, _| {
            served += 1;
            ring.offer(&[Buffer::writable(DATA, 1)]);
            Ok(0)
        })
        .unwrap();
    assert_eq!((served, interrupt), (CHAINS_PER_WAKE_UP, true));
    assert_eq!(queue.kick().read().unwrap(), 1);
}

#[test]
fn the_budget_at_its_limit_and_one_below() {
    for (offered, kicked) in [(CHAINS_PER_WAKE_UP - 1, false), (CHAINS_PER_WAKE_UP, true)] {
        let (mut ring, mut queue) = queue_of(128, 0);
        for _ in 0..offered {
            ring.offer(&[Buffer::writable(DATA, 1)]);
        }
        serve_all(&mut queue).unwrap();
        assert_eq!(u32::from(ring.used_idx()), offered);
        assert_eq!(queue.kick().read().is_ok(), kicked);
    }
}

#[test]
fn several_chains_are_published_at_once() {
    let (mut ring, mut queue) = queue();
    let mut chains = Vec::new();
    for len in 1..=3 {
        ring.offer(&[Buffer::writable(DATA, len)]);
        chains.push((queue.pop().unwrap().unwrap(), len));
    }
    assert_eq!(ring.used_idx(), 0);
    queue.add_used_together(chains).unwrap();
    assert_eq!(ring.take_used(), [(0, 1), (1, 2), (2, 3)]);
    assert!(queue.needs_notification().unwrap());
    assert!(!queue.needs_notification().unwrap());
}

#[test]
fn held_buffers_are_handed_out_from_where_they_are() {
    let (mut ring, mut queue) = queue_of(1024, 0);
    let memory = queue.memory().clone();
    let buffers: Vec<_> = (0..1024).map(|index| Buffer::readable(DATA + 2 * index, 2)).collect();
    ring.offer(&buffers);
    let chain = queue.pop().unwrap().unwrap();
    let pattern: Vec<u8> = (0..2048_u32).map(|index| (index / 8) as u8).collect();
    memory.write_slice(&pattern, GuestAddress(DATA)).unwrap();
    let mut held = chain.readable().held_buffers(&memory).unwrap();
    drop(memory);
    assert_eq!(held.next_call().1, 1024);
    held.advance(3);
    assert_eq!(held.next_call().1, 1023);
    assert!(!held.is_aligned(2));
    let mut copy = vec![0; 3000];
    assert_eq!(held.copy_to(&mut copy), 2045);
    assert!(copy[..2045] == pattern[3..]);
    held.advance(2044);
    held.copy_from(&[7, 8]);
    assert_eq!(queue.memory().read_obj::<u8>(GuestAddress(DATA + 2047)).unwrap(), 7);
    held.advance(5);
    assert_eq!((held.next_call().1, held.copy_to(&mut copy)), (0, 0));
}

#[test]
fn a_chain_that_is_put_back_is_the_next_one_again() {
    let (mut ring, mut queue) = queue();
    let heads = [ring.offer(&[Buffer::writable(DATA, 1)]), ring.offer(&[Buffer::writable(DATA, 2)])];
    for _ in 0..3 {
        let chain = queue.pop().unwrap().unwrap();
        assert_eq!(chain.head(), heads[0]);
        queue.put_back(chain);
    }
    for head in heads {
        let chain = queue.pop().unwrap().unwrap();
        assert_eq!(chain.head(), head);
        queue.add_used(chain, 0).unwrap();
    }
    assert!(queue.pop().unwrap().is_none());
}
