//! The host kernel's connections. Skipped by name where it has no vhost-vsock.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::*;
use crate::virtio::kernel_vhost::{KernelVhost, VhostKind};

/// A context id that no other guest of a test host has.
const GUEST: u64 = 0x1a1a_0003;

#[test]
fn a_program_of_the_host_reaches_the_guest_through_vhost_vsock() {
    if !std::path::Path::new("/dev/vhost-vsock").exists() {
        eprintln!("SKIPPED: needs /dev/vhost-vsock");
        return;
    }
    let vhost = || KernelVhost::open(VhostKind::Vsock).unwrap();
    let device = KernelVsock::new(KernelVsockConfig { guest_cid: GUEST, vhost: vhost() }).unwrap();
    let twice = KernelVsock::new(KernelVsockConfig { guest_cid: GUEST, vhost: vhost() });
    assert!(matches!(twice, Err(VsockError::Vhost(_))), "A context id belongs to one guest");
    let reserved = KernelVsock::new(KernelVsockConfig { guest_cid: 2, vhost: vhost() });
    assert!(matches!(reserved, Err(VsockError::GuestCid(2))));

    let guest = Guest::new(Box::new(device));
    assert_eq!(u64::from_le_bytes(guest.read_config(0)), GUEST);
    let mut running = guest.start(0);
    running.rings[RX].offer(&[Buffer::writable(RX_HEADERS, 4096)]);
    running.guest.kick(RX as u32);
    let _socket = begin_to_connect(5);
    assert_eq!(running.wait_used(RX, 1), [(0, HEADER_LEN)]);
    let bytes = running.guest.peek(RX_HEADERS, HEADER_SIZE);
    let request = Header::from_bytes(bytes.as_slice().try_into().unwrap());
    assert_eq!((request.op, request.dst_cid, request.dst_port), (op::REQUEST, GUEST, 5));
    running.guest.wait_interrupt(1);
}

/// Begins a connection to the guest's `port`, as any program of the host would.
fn begin_to_connect(port: u32) -> OwnedFd {
    // SAFETY: plain system calls on structures that live through them; each result is checked.
    unsafe {
        let socket = libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_NONBLOCK, 0);
        assert!(socket >= 0, "{}", io::Error::last_os_error());
        let socket = OwnedFd::from_raw_fd(socket);
        let mut address: libc::sockaddr_vm = std::mem::zeroed();
        address.svm_family = libc::AF_VSOCK as u16;
        address.svm_cid = GUEST as u32;
        address.svm_port = port;
        let size = size_of_val(&address) as u32;
        assert_eq!(libc::connect(socket.as_raw_fd(), (&raw const address).cast(), size), -1);
        assert_eq!(io::Error::last_os_error().raw_os_error(), Some(libc::EINPROGRESS));
        socket
    }
}
