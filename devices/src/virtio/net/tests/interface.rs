//! The device on a real tap interface. Skipped by name where that is not permitted.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::thread;
use std::time::Duration;

use crate::testkit::{Buffer, Guest, Running, eventually};
use crate::virtio::net::{Net, NetConfig, Tap, TapError};

const NAME: &str = "inlaytest0";
const MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 1];
/// An ethertype for experiments (IEEE 802): nobody else on the interface speaks it.
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];
const DATA: u64 = 0x10_0000;
const GUEST_TSO4: u32 = 7;
const MRG_RXBUF: u32 = 15;

/// Runs `test` in a thread with a network namespace of its own, which is gone afterwards.
fn in_namespace(test: impl FnOnce() + Send + 'static) {
    thread::spawn(move || {
        // SAFETY: only this thread's network namespace changes.
        let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        let tun = OpenOptions::new().read(true).write(true).open("/dev/net/tun");
        if result != 0 || tun.is_err() {
            eprintln!("SKIPPED: needs CAP_SYS_ADMIN, CAP_NET_ADMIN and /dev/net/tun");
            return;
        }
        test();
    })
    .join()
    .unwrap();
}

fn frame(fill: u8) -> Vec<u8> {
    let mut frame = [[0xff; 6], MAC].concat();
    frame.extend(ETHERTYPE);
    frame.extend([fill; 50]);
    frame
}

/// Sets the interface up and returns a packet socket on it.
fn packet_socket() -> OwnedFd {
    // SAFETY: plain system calls on structures that live through them; each result is checked.
    unsafe {
        let protocol = i32::from(u16::from_ne_bytes(ETHERTYPE));
        let socket = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_NONBLOCK, protocol);
        assert!(socket >= 0, "{}", io::Error::last_os_error());
        let socket = OwnedFd::from_raw_fd(socket);
        let mut request: libc::ifreq = std::mem::zeroed();
        for (target, source) in request.ifr_name.iter_mut().zip(NAME.bytes()) {
            *target = source as libc::c_char;
        }
        let index = {
            assert_eq!(libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFINDEX, &mut request), 0);
            request.ifr_ifru.ifru_ifindex
        };
        request.ifr_ifru.ifru_flags = libc::IFF_UP as i16;
        assert_eq!(libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request), 0);
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = u16::from_ne_bytes(ETHERTYPE);
        address.sll_ifindex = index;
        let size = size_of_val(&address) as u32;
        assert_eq!(libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size), 0);
        socket
    }
}

/// Deletes the interface under whoever has it open, as an administrator may.
fn delete_interface() {
    let status = std::process::Command::new("ip").args(["link", "delete", NAME]).status().unwrap();
    assert!(status.success());
}

/// Sends one frame each way.
fn exchange(running: &mut Running, socket: &OwnedFd) {
    let sent = frame(0x5a);
    running.guest.poke(DATA, &[0; 12]);
    running.guest.poke(DATA + 12, &sent);
    running.rings[1].offer(&[Buffer::readable(DATA, 12 + sent.len() as u32)]);
    running.guest.kick(1);
    let mut seen = [0; 200];
    eventually("A frame on the host", || {
        // SAFETY: `seen` is as long as the call is told.
        let len = unsafe { libc::recv(socket.as_raw_fd(), seen.as_mut_ptr().cast(), seen.len(), 0) };
        len == sent.len() as isize && seen[..sent.len()] == sent
    });

    let returned = frame(0xa5);
    for _ in 0..64 {
        running.rings[0].offer(&[Buffer::writable(DATA, 0x1_1000)]);
    }
    running.guest.kick(0);
    eventually("A frame in the guest", || {
        // The host may say hello to its new neighbour first, so it is sent until it is seen.
        // SAFETY: `returned` is as long as the call is told.
        unsafe { libc::send(socket.as_raw_fd(), returned.as_ptr().cast(), returned.len(), 0) };
        running.guest.event_loop.settle();
        running.guest.peek(DATA + 12, returned.len()) == returned
    });
    assert_eq!(running.guest.peek(DATA + 10, 2), [1, 0]);
}

#[test]
fn frames_cross_a_real_interface_in_both_directions() {
    in_namespace(|| {
        let tap = Tap::open(NAME).unwrap();
        let socket = packet_socket();
        let net = Net::new(NetConfig { id: "eth0".into(), tap, mac: MAC });
        let mut guest = Guest::new(Box::new(net));
        assert_eq!(guest.read(8), 1);
        for (offset, byte) in (0..).zip(MAC) {
            assert_eq!(guest.read_config(offset), [byte]);
        }
        let all = guest.offered_features() & !(1 << 32);
        for features in [all, all & !(1 << MRG_RXBUF), 0] {
            let mut running = guest.start(features);
            exchange(&mut running, &socket);
            guest = running.guest;
            guest.set_status(0);
        }
    });
}

#[test]
fn an_offload_without_checksums_is_not_passed_on() {
    in_namespace(|| {
        let tap = Tap::open(NAME).unwrap();
        let net = Net::new(NetConfig { id: "eth0".into(), tap, mac: MAC });
        Guest::new(Box::new(net)).start(1 << GUEST_TSO4);
    });
}

#[test]
fn an_interface_that_goes_away_does_not_keep_the_loop_busy() {
    in_namespace(|| {
        let tap = Tap::open(NAME).unwrap();
        let _socket = packet_socket();
        let net = Net::new(NetConfig { id: "eth0".into(), tap, mac: MAC });
        let mut running = Guest::new(Box::new(net)).start(0);
        for _ in 0..8 {
            running.rings[0].offer(&[Buffer::writable(DATA, 2048)]);
        }
        running.guest.kick(0);
        delete_interface();
        running.guest.event_loop.settle();
        let before = running.guest.event_loop.rounds();
        thread::sleep(Duration::from_millis(50));
        assert!(running.guest.event_loop.rounds() - before <= 2);
    });
}

#[test]
fn a_descriptor_that_was_handed_over_is_checked() {
    in_namespace(|| {
        let wrong = OpenOptions::new().read(true).write(true).open("/dev/null").unwrap();
        assert!(matches!(Tap::from_fd(wrong.into()), Err(TapError::WrongKind)));
        let detached = OpenOptions::new().read(true).write(true).open("/dev/net/tun").unwrap();
        assert!(matches!(Tap::from_fd(detached.into()), Err(TapError::WrongKind)));

        let tap = Tap::open(NAME).unwrap();
        let copy = tap.as_fd().try_clone_to_owned().unwrap();
        drop(tap);
        let tap = Tap::from_fd(copy).unwrap();
        tap.set_offloads(0).unwrap();
    });
}

#[test]
fn interface_names_have_1_to_15_bytes() {
    for name in ["", "sixteen-bytes-xx", "nul\0"] {
        assert!(matches!(Tap::open(name), Err(TapError::Name(_))), "{name:?}");
    }
    in_namespace(|| {
        Tap::open("fifteen-bytes-x").unwrap();
    });
}
