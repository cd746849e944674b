//! An interface across a pause, a snapshot, and in the machine that is restored from it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use super::interface::{DATA, MAC, NAME, frame, in_namespace, packet_socket};
use crate::testkit::{Buffer, Guest, Running};
use crate::virtio::net::{Net, NetConfig, Tap};

const ETHTOOL_GTXCSUM: u32 = 0x16;
const ETHTOOL_GTSO: u32 = 0x1e;
const GUEST_CSUM: u64 = 1 << 1;
const GUEST_TSO4: u64 = 1 << 7;
/// Of each receive buffer, and from one to the next.
const ROOM: u64 = 0x800;
/// Where frames to be sent are.
const OUTPUT: u64 = DATA + 0x10_0000;

/// A device on the interface behind `tap`, as another process gets it.
fn device(tap: &Tap) -> Box<Net> {
    let copy = Tap::from_fd(tap.as_fd().try_clone_to_owned().unwrap()).unwrap();
    Box::new(Net::new(NetConfig::new("eth0", vec![copy], MAC)).unwrap())
}

fn send(socket: &OwnedFd, bytes: &[u8]) {
    // SAFETY: `bytes` is as long as the call is told.
    let sent = unsafe { libc::send(socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
    assert_eq!(sent, bytes.len() as isize, "{}", io::Error::last_os_error());
}

/// What the host has received of our kind, in order.
fn received(socket: &OwnedFd, count: usize) -> Vec<u8> {
    let mut fills = Vec::new();
    crate::testkit::eventually("Frames on the host", || {
        let mut seen = [0; 200];
        // SAFETY: `seen` is as long as the call is told.
        while unsafe { libc::recv(socket.as_raw_fd(), seen.as_mut_ptr().cast(), seen.len(), 0) } > 0 {
            fills.push(seen[20]);
        }
        fills.len() >= count
    });
    fills
}

/// The guest's sends, one after the other from `first` on, without waiting for them.
fn transmit(running: &mut Running, first: u8, count: u8) {
    for index in first..first + count {
        let at = OUTPUT + ROOM * u64::from(index);
        running.guest.poke(at, &[0; 12]);
        running.guest.poke(at + 12, &frame(index));
        running.rings[1].offer(&[Buffer::readable(at, 12 + frame(index).len() as u32)]);
    }
    running.guest.kick(1);
}

#[test]
fn frames_arrive_once_whatever_happens_meanwhile() {
    in_namespace(|| {
        let tap = Tap::open(NAME).unwrap();
        let socket = packet_socket();
        let mut running = Guest::new(device(&tap)).start(0);
        for index in 0..200 {
            running.rings[0].offer(&[Buffer::writable(DATA + ROOM * index, ROOM as u32)]);
        }
        running.guest.kick(0);
        for round in 0..8_u8 {
            send(&socket, &frame(4 * round));
            transmit(&mut running, 4 * round, 2);
            send(&socket, &frame(4 * round + 1));
            running.guest.transport.park();
            // These come while nobody is there to take them.
            send(&socket, &frame(4 * round + 2));
            transmit(&mut running, 4 * round + 2, 2);
            send(&socket, &frame(4 * round + 3));
            let before = running.guest.peek(0, 4 << 20);
            running.guest.event_loop.settle();
            assert!(running.guest.peek(0, 4 << 20) == before, "A parked device touches nothing");
            running = if round % 2 == 0 {
                running.guest.transport.unpark();
                running
            } else {
                running.move_to(device(&tap))
            };
        }
        assert_eq!(received(&socket, 32), (0..32).collect::<Vec<_>>());
        running.wait_used(1, 32);
        // The host may have said something of its own on the interface.
        let ours = |running: &Running, count: u16| {
            let fills = (0..u64::from(count)).map(|index| DATA + ROOM * index).filter_map(|at| {
                let bytes = running.guest.peek(at + 12, 21);
                (bytes[12..14] == [0x88, 0xb5]).then(|| bytes[20])
            });
            fills.collect::<Vec<_>>()
        };
        crate::testkit::eventually("Frames in the guest", || ours(&running, running.rings[0].used_idx()).len() >= 32);
        running.guest.event_loop.settle();
        assert_eq!(ours(&running, running.rings[0].used_idx()), (0..32).collect::<Vec<_>>());
    });
}

/// Whether the host leaves a task to who is behind the interface.
fn offload(socket: &OwnedFd, command: u32) -> bool {
    let mut value = [command, 0];
    // SAFETY: plain data.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (target, source) in request.ifr_name.iter_mut().zip(NAME.bytes()) {
        *target = source as libc::c_char;
    }
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    // SAFETY: the request names an interface and points to an `ethtool_value`, both of which live through the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    value[1] != 0
}

/// Firecracker's issues 4680 and 4826: an interface that a restore finds in another state than the guest believes.
#[test]
fn offloads_are_what_the_guest_has_accepted_after_a_restore_too() {
    in_namespace(|| {
        let tap = Tap::open(NAME).unwrap();
        let socket = packet_socket();
        for (features, checksum, segmentation) in
            [(0, false, false), (GUEST_CSUM, true, false), (GUEST_CSUM | GUEST_TSO4, true, true)]
        {
            let running = Guest::new(device(&tap)).start(features);
            let state = || (offload(&socket, ETHTOOL_GTXCSUM), offload(&socket, ETHTOOL_GTSO));
            assert_eq!(state(), (checksum, segmentation), "{features:#x}");
            // The restore's interface is fresh, or was another guest's.
            for others in [0, libc::TUN_F_CSUM | libc::TUN_F_TSO4] {
                tap.set_offloads(others).unwrap();
                let other = others != 0;
                assert_eq!(state(), (other, other));
                running.guest.transport.park();
                let moved = Guest::with_memory(device(&tap), running.guest.memory.clone());
                moved.transport.restore(&running.guest.transport.save().unwrap()).unwrap();
                moved.transport.unpark();
                assert_eq!(state(), (checksum, segmentation), "{features:#x} {others:#x}");
            }
        }
    });
}
