//! The device on a real tap interface. Skipped by name where that is not permitted.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::thread;

use crate::testkit::{Buffer, Guest, Running, eventually};
use crate::virtio::kernel_vhost::{KernelVhost, VhostKind};
use crate::virtio::net::{MAX_MTU, MAX_QUEUE_PAIRS, MIN_MTU, Net, NetConfig, NetError, Tap, TapError};

pub(super) const NAME: &str = "inlaytest0";
pub(super) const MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 1];
/// An ethertype for experiments (IEEE 802): nobody else on the interface speaks it.
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];
pub(super) const DATA: u64 = 0x10_0000;
const GUEST_TSO4: u32 = 7;
const MRG_RXBUF: u32 = 15;

/// Runs `test` in a thread with a network namespace of its own, which is gone afterwards.
pub(super) fn in_namespace(test: impl FnOnce() + Send + 'static) {
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

pub(super) fn frame(fill: u8) -> Vec<u8> {
    let mut frame = [[0xff; 6], MAC].concat();
    frame.extend(ETHERTYPE);
    frame.extend([fill; 50]);
    frame
}

/// Sets the interface up and returns a packet socket on it.
pub(super) fn packet_socket() -> OwnedFd {
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
        let net = Net::new(NetConfig::new("eth0", vec![tap], MAC)).unwrap();
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
        let net = Net::new(NetConfig::new("eth0", vec![tap], MAC)).unwrap();
        Guest::new(Box::new(net)).start(1 << GUEST_TSO4);
    });
}

#[test]
fn an_interface_that_goes_away_does_not_keep_the_loop_busy() {
    in_namespace(|| {
        let tap = Tap::open(NAME).unwrap();
        let _socket = packet_socket();
        let net = Net::new(NetConfig::new("eth0", vec![tap], MAC)).unwrap();
        let mut running = Guest::new(Box::new(net)).start(0);
        for _ in 0..8 {
            running.rings[0].offer(&[Buffer::writable(DATA, 2048)]);
        }
        running.guest.kick(0);
        delete_interface();
        running.guest.event_loop.wait_rest();
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

/// Headers whose numbers contradict each other, the frame or the features: the host drops what it
/// does not believe, and goes on.
#[test]
fn headers_that_lie_about_offloads_and_lengths() {
    in_namespace(|| {
        let tap = Tap::open(NAME).unwrap();
        let socket = packet_socket();
        let net = Net::new(NetConfig::new("eth0", vec![tap], MAC)).unwrap();
        let mut running = Guest::new(Box::new(net)).start(0);
        let sent = frame(0x11);
        // Flags, type of segmentation, then little-endian: length of headers, of a segment,
        // where checksums start and where they go.
        let numbers = [0_u16, 1, 13, 64, 65, 1500, u16::MAX];
        for flags in [0_u8, 1, 2, 0xff] {
            for gso in [0_u8, 1, 3, 4, 5, 0x80, 0xff] {
                for (hdr_len, gso_size) in [(0, 0), (u16::MAX, 1), (64, 0), (54, 1460), (1, u16::MAX)] {
                    for start in numbers {
                        let mut header = vec![flags, gso];
                        for number in [hdr_len, gso_size, start, numbers[usize::from(start % 7)], 0] {
                            header.extend(number.to_le_bytes());
                        }
                        running.guest.poke(DATA, &[header.as_slice(), &sent].concat());
                        running.rings[1].offer(&[Buffer::readable(DATA, 12 + sent.len() as u32)]);
                        running.guest.kick(1);
                        assert_eq!(running.wait_used(1, 1).len(), 1);
                    }
                }
            }
        }
        drain(&socket);
        exchange(&mut running, &socket);
    });
}

fn drain(socket: &OwnedFd) {
    let mut seen = [0_u8; 2000];
    // SAFETY: `seen` is as long as the call is told.
    while unsafe { libc::recv(socket.as_raw_fd(), seen.as_mut_ptr().cast(), seen.len(), 0) } >= 0 {}
}

#[test]
fn frames_after_a_reset_wait_for_the_next_driver() {
    in_namespace(|| {
        let tap = Tap::open(NAME).unwrap();
        let socket = packet_socket();
        let net = Net::new(NetConfig::new("eth0", vec![tap], MAC)).unwrap();
        let mut running = Guest::new(Box::new(net)).start(0);
        exchange(&mut running, &socket);
        running.rings[0].offer(&[Buffer::writable(DATA + 0x8000, 0x1000)]);
        running.guest.kick(0);
        running.guest.event_loop.settle();
        let guest = running.guest;
        guest.set_status(0);
        let untouched = guest.peek(DATA + 0x8000, 0x1000);
        let late = frame(0x77);
        // SAFETY: `late` is as long as the call is told.
        unsafe { libc::send(socket.as_raw_fd(), late.as_ptr().cast(), late.len(), 0) };
        guest.event_loop.settle();
        assert_eq!(guest.peek(DATA + 0x8000, 0x1000), untouched);
        exchange(&mut guest.start(0), &socket);
    });
}

#[test]
fn several_queues_by_name_and_by_descriptor() {
    const MQ: u32 = 22;
    const CTRL_VQ: u32 = 17;
    /// Where no buffer for frames is.
    const COMMAND: u64 = DATA + 0x8_0000;
    in_namespace(|| {
        let by_name = Tap::open_queues(NAME, 3).unwrap();
        let descriptors: Vec<_> = by_name.iter().map(|tap| tap.as_fd().try_clone_to_owned().unwrap()).collect();
        drop(by_name);
        let taps: Vec<_> = descriptors.into_iter().map(|fd| Tap::from_fd(fd).unwrap()).collect();
        let socket = packet_socket();
        let net = Net::new(NetConfig::new("eth0", taps, MAC)).unwrap();
        let control = net.control();
        let guest = Guest::new(Box::new(net));
        assert_eq!(u16::from_le_bytes(guest.read_config(8)), 3);
        let mut running = guest.start(1 << MQ | 1 << CTRL_VQ);
        assert_eq!(running.rings.len(), 7);
        exchange(&mut running, &socket);
        for pairs in [3_u8, 1, 2] {
            running.guest.poke(COMMAND, &[4, 0, pairs, 0]);
            running.rings[6].offer(&[Buffer::readable(COMMAND, 4), Buffer::writable(COMMAND + 8, 1)]);
            running.guest.kick(6);
            running.wait_used(6, 1);
            assert_eq!(running.guest.peek(COMMAND + 8, 1), [0]);
            assert_eq!(control.queue_pairs(), u16::from(pairs));
            // Whatever queue the host chooses, it is one that is served.
            let before = control.counters().received;
            for ring in [0, 2, 4] {
                for _ in 0..8 {
                    running.rings[ring].offer(&[Buffer::writable(DATA + 0x1000, 0x1_1000)]);
                }
                running.guest.kick(ring as u32);
            }
            let sent = frame(pairs);
            for _ in 0..4 {
                // SAFETY: `sent` is as long as the call is told.
                unsafe { libc::send(socket.as_raw_fd(), sent.as_ptr().cast(), sent.len(), 0) };
            }
            eventually("Frames", || control.counters().received >= before + 4);
        }
        // A driver that knows one pair only has its control queue right behind it.
        let guest = running.guest;
        guest.set_status(0);
        assert_eq!(control.queue_pairs(), 1);
        let mut running = guest.start(1 << CTRL_VQ);
        running.guest.poke(COMMAND, &[9, 9]);
        running.rings[2].offer(&[Buffer::readable(COMMAND, 2), Buffer::writable(COMMAND + 8, 1)]);
        running.guest.kick(2);
        assert_eq!(running.wait_used(2, 1), [(0, 1)]);
    });
}

#[test]
fn configurations_that_make_no_device() {
    in_namespace(|| {
        let taps = |name: &str, count| Tap::open_queues(name, count).unwrap();
        let mtu = |mtu| {
            let config = NetConfig { mtu: Some(mtu), ..NetConfig::new("eth0", taps("inlaytest1", 1), MAC) };
            Net::new(config).map(|net| Guest::new(Box::new(net)).read_config::<2>(10))
        };
        assert!(matches!(mtu(MIN_MTU - 1), Err(NetError::Mtu { mtu: 67, .. })));
        assert_eq!(mtu(MIN_MTU).unwrap(), [68, 0]);
        assert_eq!(mtu(MAX_MTU).unwrap(), MAX_MTU.to_le_bytes());
        assert!(matches!(mtu(MAX_MTU + 1), Err(NetError::Mtu { .. })));

        let new = |taps, mac| Net::new(NetConfig::new("eth0", taps, mac)).map(drop);
        assert!(matches!(new(vec![], MAC), Err(NetError::Pairs { count: 0, .. })));
        assert!(matches!(new(taps("a", MAX_QUEUE_PAIRS + 1), MAC), Err(NetError::Pairs { count: 17, .. })));
        new(taps("b", MAX_QUEUE_PAIRS), MAC).unwrap();
        assert!(matches!(new(taps("c", 1), [1, 0, 0, 0, 0, 0]), Err(NetError::Mac { .. })));
        assert!(matches!(new(taps("c", 1), [0; 6]), Err(NetError::Mac { .. })));
        let two = vec![Tap::open("d").unwrap(), Tap::open("e").unwrap()];
        assert!(matches!(new(two, MAC), Err(NetError::SingleQueue { .. })));
    });
}

#[test]
fn offered_features_follow_the_configuration() {
    const MTU: u64 = 1 << 3;
    const MQ: u64 = 1 << 22;
    const CTRL_MAC_ADDR: u64 = 1 << 23;
    in_namespace(|| {
        let offered = |count, mtu, anti_spoof| {
            let taps = Tap::open_queues(NAME, count).unwrap();
            let net = Net::new(NetConfig { mtu, anti_spoof, ..NetConfig::new("eth0", taps, MAC) }).unwrap();
            Guest::new(Box::new(net)).offered_features() & (MTU | MQ | CTRL_MAC_ADDR)
        };
        assert_eq!(offered(1, None, false), CTRL_MAC_ADDR);
        assert_eq!(offered(1, Some(1500), true), MTU);
        assert_eq!(offered(2, None, true), MQ);
    });
}

#[test]
fn an_address_and_a_number_of_pairs_survive_a_move() {
    in_namespace(|| {
        let device = |name| {
            let taps = Tap::open_queues(name, 2).unwrap();
            let net = Net::new(NetConfig::new("eth0", taps, MAC)).unwrap();
            (net.control(), Box::new(net))
        };
        let (control, net) = device("inlaytest1");
        let mut running = Guest::new(net).start(1 << 17 | 1 << 21 | 1 << 22 | 1 << 23);
        let mac = [0x02, 9, 8, 7, 6, 5];
        for command in [[&[1, 1], mac.as_slice()].concat(), vec![4, 0, 2, 0]] {
            running.guest.poke(DATA, &command);
            running.rings[4].offer(&[Buffer::readable(DATA, command.len() as u32), Buffer::writable(DATA + 64, 1)]);
            running.guest.kick(4);
            running.wait_used(4, 1);
        }
        assert_eq!((control.mac(), control.queue_pairs()), (mac, 2));
        for _ in 0..8 {
            running.rings[0].offer(&[Buffer::writable(DATA, 0x1000)]);
        }
        running.guest.kick(0);
        running.guest.event_loop.settle();

        let (control, net) = device(NAME);
        let socket = packet_socket();
        let mut running = running.move_to(net);
        assert_eq!((control.mac(), control.queue_pairs(), control.status()), (mac, 2, 3));
        running.guest.wait_interrupt(2);
        exchange(&mut running, &socket);
        // A reset forgets what the driver has chosen.
        running.guest.set_status(0);
        assert_eq!((control.mac(), control.queue_pairs()), (MAC, 1));
    });
}

#[test]
fn frames_cross_a_vhost_net_in_both_directions() {
    if !std::path::Path::new("/dev/vhost-net").exists() {
        eprintln!("SKIPPED: needs /dev/vhost-net");
        return;
    }
    in_namespace(|| {
        let vhost = || vec![KernelVhost::open(VhostKind::Net).unwrap()];
        let limited = NetConfig {
            anti_spoof: true,
            vhost: vhost(),
            ..NetConfig::new("eth0", vec![Tap::open("inlaytest1").unwrap()], MAC)
        };
        assert!(matches!(Net::new(limited), Err(NetError::VhostUnseen { .. })));

        let tap = Tap::open(NAME).unwrap();
        let socket = packet_socket();
        let net = Net::new(NetConfig { vhost: vhost(), ..NetConfig::new("eth0", vec![tap], MAC) }).unwrap();
        let control = net.control();
        let mut guest = Guest::new(Box::new(net));
        let all = guest.offered_features() & !(1 << 32);
        for features in [all, all & !(1 << MRG_RXBUF), 0] {
            let mut running = guest.start(features);
            exchange(&mut running, &socket);
            // The kernel interrupts by itself.
            running.guest.wait_interrupt(1);
            // The same while it was parked in between.
            running.guest.transport.park();
            running.guest.transport.unpark();
            exchange(&mut running, &socket);
            guest = running.guest;
            guest.set_status(0);
        }
        assert_eq!(control.counters(), Default::default(), "Nobody here has seen a frame");
    });
}
