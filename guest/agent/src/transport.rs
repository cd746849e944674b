//! Where the host is: vsock in a guest, Unix sockets in a directory when tests drive the agent.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, VsockAddr, connect, socket};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixListener;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockListener};

/// The two ways to the host.
#[derive(Debug, Clone)]
pub enum Transport {
    /// AF_VSOCK, ports as in the parameters.
    Vsock,
    /// Sockets `PORT.sock` in this directory; a peer's port is the number its own socket is bound to as `PORT.peer`.
    Unix(PathBuf),
}

/// A stream to or from the host.
pub trait Stream: AsyncRead + AsyncWrite + Send + Sync + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin> Stream for T {}

/// A connection, whatever carries it.
pub type Connection = Box<dyn Stream>;

/// A listening socket whose connections come with the port of their peer.
pub enum Listener {
    /// In a guest.
    Vsock(VsockListener),
    /// In a test.
    Unix(UnixListener),
}

impl Transport {
    /// The address of `port` in ttrpc's form.
    pub fn ttrpc_address(&self, port: u32) -> String {
        match self {
            Self::Vsock => format!("vsock://-1:{port}"),
            Self::Unix(directory) => format!("unix://{}", socket_path(directory, port).display()),
        }
    }

    /// Listens on `port`.
    pub fn listen(&self, port: u32) -> io::Result<Listener> {
        match self {
            Self::Vsock => {
                let address = tokio_vsock::VsockAddr::new(VMADDR_CID_ANY, port);
                Ok(Listener::Vsock(VsockListener::bind(address)?))
            }
            Self::Unix(directory) => Ok(Listener::Unix(UnixListener::bind(socket_path(directory, port))?)),
        }
    }

    /// Connects to `port` of the host, blocking; a host that does not listen refuses at once.
    pub fn connect_to_host(&self, port: u32) -> io::Result<File> {
        let family = match self {
            Self::Vsock => AddressFamily::Vsock,
            Self::Unix(_) => AddressFamily::Unix,
        };
        let fd: OwnedFd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        match self {
            Self::Vsock => connect_fd(&fd, &VsockAddr::new(VMADDR_CID_HOST, port))?,
            Self::Unix(directory) => connect_fd(&fd, &UnixAddr::new(&socket_path(directory, port))?)?,
        }
        Ok(File::from(fd))
    }
}

fn connect_fd(fd: &OwnedFd, address: &dyn nix::sys::socket::SockaddrLike) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    Ok(connect(fd.as_raw_fd(), address)?)
}

fn socket_path(directory: &Path, port: u32) -> PathBuf {
    directory.join(format!("{port}.sock"))
}

impl Listener {
    /// The next connection and its peer's port.
    pub async fn accept(&self) -> io::Result<(Connection, u32)> {
        match self {
            Self::Vsock(listener) => {
                let (stream, address) = listener.accept().await?;
                Ok((Box::new(stream), address.port()))
            }
            Self::Unix(listener) => {
                let (stream, address) = listener.accept().await?;
                let port = address.as_pathname().and_then(peer_port);
                Ok((Box::new(stream), port.unwrap_or(0)))
            }
        }
    }
}

fn peer_port(path: &Path) -> Option<u32> {
    path.file_name()?.to_str()?.strip_suffix(".peer")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peers_port_is_in_the_name_of_its_socket() {
        assert_eq!(peer_port(Path::new("/run/x/71.peer")), Some(71));
        assert_eq!(peer_port(Path::new("/run/x/71.sock")), None);
        assert_eq!(peer_port(Path::new("x.peer")), None);
    }
}
