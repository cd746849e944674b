//! The host's ends of vsock connections.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept4, bind, connect as connect_to, listen, socket,
};

/// Any context id of this host (vsock(7)).
const ANY: u32 = libc::VMADDR_CID_ANY;

fn stream() -> OwnedFd {
    socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap()
}

/// Reads, writes and shutdowns are the same on every stream socket; only names are not, and nobody asks for them.
fn as_stream(socket: OwnedFd) -> UnixStream {
    UnixStream::from(socket)
}

/// Connects to a guest's port, which may not be listened to yet.
pub fn connect(cid: u32, port: u32, limit: Duration) -> UnixStream {
    let started = Instant::now();
    loop {
        let socket = stream();
        match connect_to(socket.as_raw_fd(), &VsockAddr::new(cid, port)) {
            Ok(()) => return as_stream(socket),
            Err(error) => assert!(started.elapsed() < limit, "Cannot connect to port {port} of {cid}: {error}"),
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// A port of the host.
pub struct Listener(OwnedFd);

impl Listener {
    /// Listens.
    pub fn bind(port: u32) -> Self {
        let socket = stream();
        bind(socket.as_raw_fd(), &VsockAddr::new(ANY, port)).unwrap();
        listen(&socket, Backlog::new(1).unwrap()).unwrap();
        Self(socket)
    }

    /// Waits for a guest.
    pub fn accept(&self) -> UnixStream {
        let fd = accept4(self.0.as_raw_fd(), SockFlag::SOCK_CLOEXEC).unwrap();
        // SAFETY: the kernel has made this descriptor for this call, and nobody else knows of it.
        as_stream(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}
