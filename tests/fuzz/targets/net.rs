//! Frames out and in (virtio 1.2 section 5.1.6), through an interface in a network namespace.

#![no_main]

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::LazyLock;

use arbitrary::Arbitrary;
use devices::testkit::memory;
use devices::virtio::net::{Net, NetConfig, Tap};
use inlay_fuzz::{Case, Request, leave_network, play_with};
use libfuzzer_sys::fuzz_target;

const NAME: &str = "fuzz0";

#[derive(Arbitrary, Debug)]
struct Frame {
    queue: bool,
    header: [u8; 12],
    payload: Vec<u8>,
    len: u16,
}

impl Request for Frame {
    fn queue(&self) -> Option<u8> {
        Some(self.queue.into())
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = [&self.header[..], &self.payload].concat();
        bytes.resize(bytes.len() + usize::from(self.len % 2048), 0);
        bytes
    }
}

/// An interface of a network namespace that has nothing else, and a socket on the host's side of it.
struct Wire {
    tap: Tap,
    socket: OwnedFd,
}

static WIRE: LazyLock<Wire> = LazyLock::new(|| {
    leave_network();
    let tap = Tap::open(NAME).expect("An interface");
    // SAFETY: the request outlives the calls that read it, its name ends with zeros, and results are checked.
    let socket = unsafe {
        let socket = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC, 0);
        assert!(socket >= 0, "A packet socket");
        let mut request: libc::ifreq = std::mem::zeroed();
        request.ifr_name[..NAME.len()]
            .copy_from_slice(&NAME.as_bytes().iter().map(|byte| *byte as i8).collect::<Vec<_>>());
        request.ifr_ifru.ifru_flags = libc::IFF_UP as i16;
        assert_eq!(libc::ioctl(socket, libc::SIOCSIFFLAGS as _, &request), 0, "An interface that is up");
        assert_eq!(libc::ioctl(socket, libc::SIOCGIFINDEX as _, &mut request), 0, "Its index");
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = request.ifr_ifru.ifru_ifindex;
        let size = size_of::<libc::sockaddr_ll>() as u32;
        assert_eq!(libc::bind(socket, (&raw const address).cast(), size), 0, "A socket on the interface");
        OwnedFd::from_raw_fd(socket)
    };
    Wire { tap, socket }
});

fuzz_target!(init: LazyLock::force(&WIRE), |input: (bool, Case<Frame>)| {
    let (anti_spoof, case) = input;
    let tap = WIRE.tap.as_fd().try_clone_to_owned().expect("The interface again");
    let taps = vec![Tap::from_fd(tap).expect("The interface again")];
    let config = NetConfig { anti_spoof, ..NetConfig::new("net", taps, [2, 0, 0, 0, 0, 1]) };
    let host = |said: &[u8]| {
        let frame = [said, &[0; 14]].concat();
        // SAFETY: the frame outlives the call. It may be refused.
        unsafe { libc::send(WIRE.socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
    };
    play_with(Box::new(Net::new(config).expect("An interface")), memory(), &case, Box::new(host));
});
