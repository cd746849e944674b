//! A connection with deadlines.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

/// Where a server of chunks is. As text, `unix:PATH` or `tcp:ADDRESS:PORT`: no name, because programs that are linked
/// statically cannot look names up, and nobody should wait for that who starts a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Address {
    /// A socket of this host.
    Unix(PathBuf),
    /// `HOST:PORT`.
    Tcp(String),
}

/// The text is no address.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no address of a server of chunks: unix:PATH, from the root on, or tcp:ADDRESS:PORT")]
pub struct AddressError(String);

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let unix = text.strip_prefix("unix:").filter(|path| path.starts_with('/'));
        let tcp = text.strip_prefix("tcp:").filter(|name| name.parse::<SocketAddr>().is_ok());
        match (unix, tcp) {
            (Some(path), _) => Ok(Self::Unix(path.into())),
            (_, Some(name)) => Ok(Self::Tcp(name.to_owned())),
            _ => Err(AddressError(text.to_owned())),
        }
    }
}

impl TryFrom<String> for Address {
    type Error = AddressError;

    fn try_from(text: String) -> Result<Self, AddressError> {
        text.parse()
    }
}

impl From<Address> for String {
    fn from(address: Address) -> Self {
        address.to_string()
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(name) => write!(f, "tcp:{name}"),
        }
    }
}

/// A connection whose every use has a deadline.
#[derive(Debug)]
pub struct Stream {
    socket: Socket,
    /// Whoever waits gives up when it is readable.
    ended: Option<Arc<EventFd>>,
}

#[derive(Debug)]
enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    /// Connects to `address`, or to the first of its addresses that answers. Each may take so long.
    pub fn connect(address: &Address, patience: Duration) -> io::Result<Self> {
        let socket = match address {
            Address::Unix(path) => Socket::Unix(connect_unix(path)?),
            Address::Tcp(name) => Socket::Tcp(connect_tcp(name, patience)?),
        };
        Self::new(socket)
    }

    /// One that a listener has accepted.
    pub fn accepted_unix(stream: UnixStream) -> io::Result<Self> {
        Self::new(Socket::Unix(stream))
    }

    /// As [`accepted_unix`](Self::accepted_unix).
    pub fn accepted_tcp(stream: TcpStream) -> io::Result<Self> {
        Self::new(Socket::Tcp(stream))
    }

    fn new(socket: Socket) -> io::Result<Self> {
        match &socket {
            Socket::Unix(stream) => stream.set_nonblocking(true)?,
            Socket::Tcp(stream) => {
                stream.set_nonblocking(true)?;
                // A request is smaller than any packet and waited for.
                stream.set_nodelay(true)?;
            }
        }
        Ok(Self { socket, ended: None })
    }

    /// Gives up waiting once `ended` is readable.
    pub fn give_up_on(&mut self, ended: Arc<EventFd>) {
        self.ended = Some(ended);
    }

    /// Fills `buffer` until the deadline; without one, for ever.
    pub fn read_exact(&mut self, buffer: &mut [u8], deadline: Option<Instant>) -> io::Result<()> {
        let mut done = 0;
        while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match self.read(rest) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(length) => done += length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.wait(libc::POLLIN, deadline)?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Sends all of `bytes` until the deadline.
    pub fn write_all(&mut self, bytes: &[u8], deadline: Instant) -> io::Result<()> {
        let mut done = 0;
        while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
            match self.write(rest) {
                Ok(length) => done += length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.wait(libc::POLLOUT, Some(deadline))?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut self.socket {
            Socket::Unix(stream) => stream.read(buffer),
            Socket::Tcp(stream) => stream.read(buffer),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.socket {
            Socket::Unix(stream) => stream.write(bytes),
            Socket::Tcp(stream) => stream.write(bytes),
        }
    }

    /// Waits for the socket. `TimedOut` at the deadline, `ConnectionAborted` when everything has ended.
    fn wait(&self, events: libc::c_short, deadline: Option<Instant>) -> io::Result<()> {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        // Rounded up, so that the last part of a millisecond is not waited for in circles.
        let milliseconds =
            left.map_or(-1, |left| libc::c_int::try_from(left.as_millis()).unwrap_or(libc::c_int::MAX - 1) + 1);
        let entry = |fd, events| libc::pollfd { fd, events, revents: 0 };
        let ended = self.ended.as_ref().map_or(-1, |ended| ended.as_raw_fd());
        // A descriptor of -1 is not looked at.
        let mut entries = [entry(self.as_raw_fd(), events), entry(ended, libc::POLLIN)];
        // SAFETY: two entries, which live through the call.
        if unsafe { libc::poll(entries.as_mut_ptr(), 2, milliseconds) } < 0 {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::Interrupted { Ok(()) } else { Err(error) };
        }
        let [_, ended] = entries;
        if ended.revents != 0 { Err(io::ErrorKind::ConnectionAborted.into()) } else { Ok(()) }
    }
}

impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        match &self.socket {
            Socket::Unix(stream) => stream.as_raw_fd(),
            Socket::Tcp(stream) => stream.as_raw_fd(),
        }
    }
}

/// Connects at once, or not: a server with more clients waiting than it has room for is as good as gone.
fn connect_unix(path: &Path) -> io::Result<UnixStream> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(socket.into())
}

fn connect_tcp(name: &str, patience: Duration) -> io::Result<TcpStream> {
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for address in name.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, patience) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn addresses_are_read_as_they_are_written() {
        for text in ["unix:/run/chunks", "tcp:192.0.2.7:4711", "tcp:[::1]:1"] {
            assert_eq!(text.parse::<Address>().map(|address| address.to_string()), Ok(text.to_owned()));
        }
        for text in [
            "",
            "/run/chunks",
            "unix:run/chunks",
            "unix:",
            "tcp:",
            "tcp:a",
            "tcp:::1",
            "tcp:192.0.2.7",
            "tcp:192.0.2.7:65536",
            "tcp:node-7:4711",
            "udp:192.0.2.7:1",
        ] {
            let error = text.parse::<Address>().expect_err("no address").to_string();
            assert!(error.starts_with(&format!("{text:?} is no address")), "{error}");
        }
    }

    #[test]
    fn nobody_waits_in_line_for_a_server() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).expect("bind");
        nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(1).expect("short")).expect("listen");
        let waiting: Vec<_> = (0..8).map_while(|_| connect_unix(&path).ok()).collect();
        assert!((1..8).contains(&waiting.len()), "{}", waiting.len());
    }
}
