//! The Unix socket for other programs, and what they say on it before a connection is theirs.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Longest line that a client may send: `CONNECT 4294967295\r\n`, with room.
const MAX_LINE: usize = 32;

/// The listening socket.
pub struct UdsServer {
    listener: UnixListener,
    path: PathBuf,
}

impl UdsServer {
    /// Listens on `path`, which must not exist.
    pub fn bind(path: PathBuf) -> io::Result<Self> {
        let listener = UnixListener::bind(&path)?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener, path })
    }

    /// Readable when a client waits.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// The next client, if one waits.
    pub fn accept(&self) -> io::Result<UnixStream> {
        let (stream, _) = self.listener.accept()?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    }

    /// Connects to who listens for the guest's connections to `port`. Connecting to a Unix
    /// socket does not block: it succeeds, or fails at once (a full backlog is a failure too).
    pub fn connect_out(&self, port: u32) -> io::Result<UnixStream> {
        connect_nonblocking(&port_path(&self.path, port))
    }

    /// Removes the socket file.
    pub fn unlink(&self) {
        // Somebody removed it already: the same outcome.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// `<path>_<port>`
fn port_path(path: &Path, port: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!("_{port}"));
    name.into()
}

fn connect_nonblocking(path: &Path) -> io::Result<UnixStream> {
    use std::os::fd::{FromRawFd, OwnedFd};
    use std::os::unix::ffi::OsStrExt;

    // SAFETY: a plain call; the result is checked.
    let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just opened and belongs to nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut address = libc::sockaddr_un { sun_family: 0, sun_path: [0; 108] };
    address.sun_family = libc::sa_family_t::try_from(libc::AF_UNIX).unwrap_or_default();
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() >= address.sun_path.len() {
        return Err(io::ErrorKind::InvalidFilename.into());
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = libc::c_char::from_ne_bytes([*from]);
    }
    let len = libc::socklen_t::try_from(size_of::<libc::sockaddr_un>()).unwrap_or_default();
    // SAFETY: `address` is a valid address of `len` bytes, terminated by at least one zero.
    let result = unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), len) };
    if result == 0 { Ok(socket.into()) } else { Err(io::Error::last_os_error()) }
}

/// What a client's first bytes amount to.
#[derive(Debug, PartialEq, Eq)]
pub enum Greeting {
    /// It wants to be connected to this port.
    Connect(u32),
    /// More must come.
    Incomplete,
    /// Nothing that is understood.
    Nonsense,
}

/// Looks at a client's first line, and takes it from the socket once it is whole. What follows it
/// stays: that is the guest's already.
pub fn read_greeting(client: &UnixStream) -> Greeting {
    let mut line = [0; MAX_LINE];
    let seen = match receive(client, &mut line, libc::MSG_PEEK) {
        Ok(seen) => seen,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Greeting::Incomplete,
        Err(_) => return Greeting::Nonsense,
    };
    let seen = line.get(..seen).unwrap_or_default();
    let Some(end) = seen.iter().position(|byte| *byte == b'\n') else {
        // An end of file reads as nothing, a line without end as a full buffer.
        let is_open = !seen.is_empty() && seen.len() < MAX_LINE;
        return if is_open { Greeting::Incomplete } else { Greeting::Nonsense };
    };
    let Some(port) = seen.get(..end).and_then(parse_line) else { return Greeting::Nonsense };
    let whole = line.get_mut(..=end).unwrap_or_default();
    match receive(client, whole, 0) {
        Ok(taken) if taken == whole.len() => Greeting::Connect(port),
        _ => Greeting::Nonsense,
    }
}

fn parse_line(line: &[u8]) -> Option<u32> {
    let line = std::str::from_utf8(line).ok()?;
    let (word, port) = line.trim_end_matches('\r').split_once(' ')?;
    let is_number = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    if word.eq_ignore_ascii_case("CONNECT") && is_number { port.parse().ok() } else { None }
}

fn receive(client: &UnixStream, bytes: &mut [u8], flags: libc::c_int) -> io::Result<usize> {
    // SAFETY: the pointer and length are those of a live slice.
    let count =
        unsafe { libc::recv(client.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len(), flags | libc::MSG_DONTWAIT) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn greeting_of(bytes: &[u8]) -> (Greeting, UnixStream) {
        let (mut client, server) = UnixStream::pair().unwrap();
        client.write_all(bytes).unwrap();
        drop(client);
        (read_greeting(&server), server)
    }

    #[test]
    fn the_line_is_taken_and_what_follows_stays() {
        let (greeting, mut server) = greeting_of(b"CONNECT 1024\nhello\n");
        assert_eq!(greeting, Greeting::Connect(1024));
        let mut rest = String::new();
        server.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "hello\n");
    }

    #[test]
    fn lines() {
        let max = format!("CONNECT {}\r\n", u32::MAX);
        for (line, expected) in [
            ("connect 0\n", Greeting::Connect(0)),
            (max.as_str(), Greeting::Connect(u32::MAX)),
            ("CONNECT 4294967296\n", Greeting::Nonsense),
            ("CONNECT -1\n", Greeting::Nonsense),
            ("CONNECT +1\n", Greeting::Nonsense),
            ("CONNECT  1\n", Greeting::Nonsense),
            ("CONNECT\n", Greeting::Nonsense),
            ("CONNECT \n", Greeting::Nonsense),
            ("\n", Greeting::Nonsense),
            ("GET / HTTP/1.1\r\n", Greeting::Nonsense),
            ("", Greeting::Nonsense),
            ("CONNECT 1", Greeting::Incomplete),
            // At the limit without an end, and one past it.
            ("CONNECT 0000000000000000000001\n", Greeting::Connect(1)),
            ("CONNECT 000000000000000000000001\n", Greeting::Nonsense),
        ] {
            assert_eq!(greeting_of(line.as_bytes()).0, expected, "{line:?}");
        }
        assert_eq!(greeting_of(b"CONNECT \xff\n").0, Greeting::Nonsense);
    }
}
