//! The control queue, friendly and not: virtio 1.2 section 5.1.6.5.

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::wire::{DATA, Mode, PLAIN, Wire};
use crate::testkit::{Buffer, eventually};

const OK: u8 = 0;
const ERR: u8 = 1;

const RX: u8 = 0;
const MAC: u8 = 1;
const VLAN: u8 = 2;
const ANNOUNCE: u8 = 3;
const MQ: u8 = 4;

/// CTRL_VQ, CTRL_RX, CTRL_RX_EXTRA, GUEST_ANNOUNCE, MQ, CTRL_MAC_ADDR.
const ALL: u64 = 1 << 17 | 1 << 18 | 1 << 20 | 1 << 21 | 1 << 22 | 1 << 23;

fn wire() -> Wire {
    Wire::start(Mode { acked_features: ALL, pairs: 2, ..PLAIN })
}

/// Counts of two tables, and as many bytes of addresses as `addresses` says.
fn tables(unicast: u32, multicast: u32, addresses: [usize; 2]) -> Vec<u8> {
    let mut data = unicast.to_le_bytes().to_vec();
    data.extend(vec![2; 6 * addresses[0]]);
    data.extend(multicast.to_le_bytes());
    data.extend(vec![3; 6 * addresses[1]]);
    data
}

#[test]
fn commands_of_a_linux_driver_are_accepted() {
    let mut wire = wire();
    for command in 0..6 {
        for value in [0, 1] {
            assert_eq!(wire.command(RX, command, &[value]), OK, "{command} {value}");
        }
    }
    for (unicast, multicast) in [(0, 0), (3, 0), (0, 5), (64, 64)] {
        let data = tables(unicast, multicast, [unicast as usize, multicast as usize]);
        assert_eq!(wire.command(MAC, 0, &data), OK);
    }
    let mac = [0x02, 1, 2, 3, 4, 5];
    assert_eq!(wire.command(MAC, 1, &mac), OK);
    assert_eq!(wire.owner.mac(), mac);
}

#[test]
fn commands_that_were_not_negotiated_are_refused() {
    let mut wire = Wire::start(PLAIN);
    let before = wire.owner.mac();
    assert_eq!(wire.command(RX, 0, &[1]), ERR);
    assert_eq!(wire.command(RX, 2, &[1]), ERR);
    assert_eq!(wire.command(MAC, 0, &tables(0, 0, [0, 0])), ERR);
    assert_eq!(wire.command(MAC, 1, &[2, 0, 0, 0, 0, 9]), ERR);
    assert_eq!(wire.command(ANNOUNCE, 0, &[]), ERR);
    assert_eq!(wire.command(MQ, 0, &[1, 0]), ERR);
    assert_eq!(wire.owner.mac(), before);
}

#[test]
fn nonsense_on_the_control_queue_is_refused() {
    let mut wire = wire();
    for (class, command, data) in [
        (RX, 6, vec![1]),
        (RX, 0, vec![]),
        (RX, 0, vec![2]),
        (RX, 0, vec![1, 0]),
        (VLAN, 0, vec![1, 0]),
        (5, 0, vec![0; 8]),
        (255, 255, vec![]),
        (ANNOUNCE, 0, vec![0]),
        (ANNOUNCE, 1, vec![]),
        // Addresses of a group, of nobody, too short and too long.
        (MAC, 1, vec![1, 0, 0, 0, 0, 1]),
        (MAC, 1, vec![0; 6]),
        (MAC, 1, vec![2; 5]),
        (MAC, 1, vec![2; 7]),
        (MAC, 2, vec![]),
        // Tables that are not as long as they say, or whose length overflows.
        (MAC, 0, vec![]),
        (MAC, 0, vec![0; 7]),
        (MAC, 0, tables(1, 0, [0, 0])),
        (MAC, 0, tables(0, 0, [0, 1])),
        (MAC, 0, tables(u32::MAX, 0, [0, 0])),
        (MAC, 0, tables(0x2aaa_aaab, 0, [0, 0])),
        (MAC, 0, tables(0, u32::MAX, [0, 0])),
    ] {
        assert_eq!(wire.command(class, command, &data), ERR, "{class} {command} {data:?}");
    }
}

#[test]
fn the_number_of_queue_pairs_has_limits() {
    let mut wire = wire();
    for (pairs, answer) in [(0_u16, ERR), (1, OK), (2, OK), (3, ERR), (0x8000, ERR), (u16::MAX, ERR)] {
        assert_eq!(wire.command(MQ, 0, &pairs.to_le_bytes()), answer, "{pairs}");
    }
    assert_eq!(wire.owner.queue_pairs(), 2);
    assert_eq!(wire.command(MQ, 0, &[1]), ERR);
}

#[test]
fn a_command_without_room_for_its_answer_stops_the_device() {
    for chain in [&[Buffer::readable(DATA, 3)][..], &[Buffer::readable(DATA, 3), Buffer::writable(DATA, 0)]] {
        let mut wire = wire();
        wire.send_command(chain);
        wire.wait_needs_reset();
    }
}

#[test]
fn a_command_may_lie_in_any_buffers() {
    let mut wire = wire();
    let ack = Buffer::writable(DATA + 0x100, 4);
    wire.memory.write_slice(&[MQ, 0, 2, 0], GuestAddress(DATA)).unwrap();
    let [a, b, c, d] = [0, 1, 2, 3].map(|at| Buffer::readable(DATA + at, 1));
    wire.send_command(&[a, b, c, d, ack]);
    eventually("An answer", || wire.control.used_idx() == 1);
    assert_eq!(wire.owner.queue_pairs(), 2);
    // Too short to be a command at all.
    for (answers, chain) in (2..).zip([vec![ack], vec![a, ack]]) {
        wire.memory.write_slice(&[0xee], GuestAddress(DATA + 0x100)).unwrap();
        wire.send_command(&chain);
        eventually("An answer", || wire.control.used_idx() == answers);
        assert_eq!(wire.peek(DATA + 0x100, 1), [ERR]);
    }
}

#[test]
fn queues_are_served_once_the_driver_uses_them() {
    let mut wire = wire();
    wire.give_to(1, DATA, 2048);
    wire.pairs[1].host.send(&[7; 100]).unwrap();
    wire.settle();
    assert_eq!(wire.pairs[1].rx.used_idx(), 0, "Only one pair is in use");
    assert_eq!(wire.command(MQ, 0, &[2, 0]), OK);
    eventually("A frame", || wire.pairs[1].rx.used_idx() == 1);
    // And not any more when it does not.
    assert_eq!(wire.command(MQ, 0, &[1, 0]), OK);
    wire.give_to(1, DATA, 2048);
    wire.pairs[1].host.send(&[8; 100]).unwrap();
    wire.assert_idle();
    assert_eq!(wire.pairs[1].rx.used_idx(), 1);
}

#[test]
fn a_driver_is_asked_to_announce_itself_until_it_did() {
    let mut wire = wire();
    assert_eq!(wire.owner.status(), 1);
    wire.owner.announce();
    assert_eq!(wire.owner.status(), 3);
    assert_eq!(wire.interrupt.pending() & 2, 2);
    assert_eq!(wire.command(ANNOUNCE, 0, &[]), OK);
    assert_eq!(wire.owner.status(), 1);
}

#[test]
fn a_link_that_is_down_carries_nothing_and_goes_on_when_it_is_up() {
    let mut wire = wire();
    wire.owner.set_link(false);
    assert_eq!((wire.owner.status(), wire.interrupt.pending() & 2), (0, 2));
    wire.settle();
    wire.give(DATA + 0x4000, 2048);
    wire.host_sends(&[1; 60]);
    wire.guest_sends(&[0; 100]);
    assert_eq!(wire.counters().send_dropped, 1);
    assert_eq!(wire.pairs[0].rx.used_idx(), 0);
    wire.assert_idle();
    wire.owner.set_link(true);
    assert_eq!(wire.wait_received(1).len(), 1);
    wire.guest_sends(&[0; 100]);
    assert_eq!(wire.counters().sent, 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever a command is, it is answered and the device goes on.
    #[test]
    fn any_command_is_answered(class in 0..8_u8, command in 0..8_u8, data in prop::collection::vec(any::<u8>(), 0..100)) {
        let mut wire = wire();
        let answer = wire.command(class, command, &data);
        prop_assert!(answer == OK || answer == ERR);
        prop_assert!((1..=2).contains(&wire.owner.queue_pairs()));
        prop_assert_eq!(wire.owner.mac()[0] & 1, 0);
        prop_assert_eq!(wire.command(RX, 0, &[1]), OK);
    }
}
