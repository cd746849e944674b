//! One client: bytes and descriptors in, bytes out, neither without bound.

use std::collections::VecDeque;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, send};
use serde::Serialize;

use super::framing::{Framing, FramingError, Request};

/// Bytes that a client leaves unread before it is not listened to any more, and events for it are dropped.
pub const MAX_OUTPUT: usize = 256 << 10;

/// Descriptors that came and that no command has taken.
pub const MAX_FILES: usize = 16;

/// Descriptors in one message (`SCM_MAX_FD` of the kernel): with room for all of them none can get lost.
const MAX_FILES_OF_MESSAGE: usize = 253;

/// What ends each reply and event.
const LINE_END: &[u8] = b"\r\n";

/// A connected client.
pub struct Connection {
    socket: OwnedFd,
    framing: Framing,
    files: VecDeque<OwnedFd>,
    output: Vec<u8>,
    control: Vec<u8>,
}

impl Connection {
    /// A client that is greeted with nothing yet.
    pub fn new(socket: OwnedFd) -> Self {
        let control = nix::cmsg_space!([RawFd; MAX_FILES_OF_MESSAGE]);
        Self { socket, framing: Framing::default(), files: VecDeque::new(), output: Vec::new(), control }
    }

    /// Takes what can be read at once. False when the client has closed its end.
    pub fn receive(&mut self) -> io::Result<bool> {
        let mut bytes = [0; 4096];
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
        let message = match recvmsg::<()>(self.socket.as_raw_fd(), &mut parts, Some(&mut self.control), flags) {
            Ok(message) => message,
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => return Ok(true),
            Err(error) => return Err(error.into()),
        };
        for control in message.cmsgs()? {
            let ControlMessageOwned::ScmRights(descriptors) = control else { continue };
            // SAFETY: the kernel has made these descriptors for this message, and nobody else knows of them.
            let received = descriptors.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
            self.files.extend(received);
        }
        self.files.truncate(MAX_FILES);
        let count = message.bytes;
        self.framing.push(bytes.get(..count).unwrap_or_default());
        Ok(count > 0)
    }

    /// The next request that is complete, unless the client has too much to read first.
    pub fn next_request(&mut self) -> Option<Result<Request, FramingError>> {
        if self.is_full() { None } else { self.framing.next_request() }
    }

    /// The descriptor that came first of those that are left.
    pub fn take_file(&mut self) -> Option<OwnedFd> {
        self.files.pop_front()
    }

    /// Adds a message to what the client gets.
    pub fn send(&mut self, message: &impl Serialize) {
        // Strings and numbers: nothing that JSON does not have.
        if serde_json::to_writer(&mut self.output, message).is_ok() {
            self.output.extend_from_slice(LINE_END);
        }
    }

    /// Writes as much as the client takes at once.
    pub fn flush(&mut self) -> io::Result<()> {
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        while !self.output.is_empty() {
            match send(self.socket.as_raw_fd(), &self.output, flags) {
                Ok(count) => drop(self.output.drain(..count)),
                Err(nix::Error::EINTR) => {}
                Err(nix::Error::EAGAIN) => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Whether the client has not taken all that is meant for it.
    pub fn has_output(&self) -> bool {
        !self.output.is_empty()
    }

    /// Whether the client has left so much unread that it gets no more.
    pub fn is_full(&self) -> bool {
        self.output.len() >= MAX_OUTPUT
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{ControlMessage, sendmsg};
    use std::fs::File;
    use std::io::{IoSlice, Read, Write};
    use std::os::unix::net::UnixStream;

    fn pair() -> (Connection, UnixStream) {
        let (ours, theirs) = UnixStream::pair().expect("socket pair");
        (Connection::new(ours.into()), theirs)
    }

    fn send_files(to: &UnixStream, bytes: &[u8], files: &[RawFd]) {
        let rights = [ControlMessage::ScmRights(files)];
        let sent = sendmsg::<()>(to.as_raw_fd(), &[IoSlice::new(bytes)], &rights, MsgFlags::empty(), None);
        assert_eq!(sent, Ok(bytes.len()));
    }

    #[test]
    fn descriptors_come_in_order_and_close_on_exec() {
        let (mut connection, client) = pair();
        let (first, second) = (File::open("/dev/null").expect("open"), File::open("/dev/zero").expect("open"));
        send_files(&client, b"{", &[first.as_raw_fd(), second.as_raw_fd()]);
        assert!(connection.receive().expect("receive"));
        drop(connection.take_file().expect("the first"));
        let mut zero = File::from(connection.take_file().expect("the second"));
        let mut byte = [1];
        zero.read_exact(&mut byte).expect("read");
        assert_eq!(byte, [0]);
        // SAFETY: asks for the flags of a descriptor that is open.
        let flags = unsafe { libc::fcntl(zero.as_raw_fd(), libc::F_GETFD) };
        assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
        assert!(connection.take_file().is_none());
    }

    #[test]
    fn descriptors_beyond_the_limit_are_closed() {
        let (mut connection, client) = pair();
        let (reader, writer) = std::io::pipe().expect("pipe");
        send_files(&client, b" ", &[writer.as_raw_fd(); MAX_FILES_OF_MESSAGE]);
        drop(writer);
        assert!(connection.receive().expect("receive"));
        assert_eq!(connection.files.len(), MAX_FILES);
        send_files(&client, b" ", &[client.as_raw_fd()]);
        assert!(connection.receive().expect("receive"));
        assert_eq!(connection.files.len(), MAX_FILES);
        while let Some(file) = connection.take_file() {
            drop(file);
        }
        // The end of the pipe: no descriptor of its other side is left.
        let mut reader = reader;
        assert_eq!(reader.read(&mut [0]).expect("read"), 0);
    }

    #[test]
    fn a_client_that_does_not_read_is_not_listened_to() {
        let (mut connection, mut client) = pair();
        client.write_all(br#"{"execute":"a"}"#).expect("write");
        assert!(connection.receive().expect("receive"));
        while !connection.is_full() {
            connection.send(&"x".repeat(1000));
        }
        assert!(connection.next_request().is_none());
        while connection.has_output() {
            connection.flush().expect("flush");
            let _ = client.read(&mut [0; 65536]).expect("read");
        }
        assert!(connection.next_request().is_some());
    }

    #[test]
    fn the_end_of_a_client_is_seen() {
        let (mut connection, client) = pair();
        assert!(connection.receive().expect("nothing yet"));
        drop(client);
        assert!(!connection.receive().expect("receive"));
        connection.send(&0);
        assert!(connection.flush().is_err());
    }
}
