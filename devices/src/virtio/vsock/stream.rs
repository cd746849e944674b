//! The host end of a connection: a descriptor, and what it did not take yet.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use vmm_sys_util::epoll::EventSet;

use crate::GuestMemory;
use crate::virtio::queue::{GuestBuffers, QueueError, Segments};

/// What a connection is tied to on the host.
#[derive(Debug)]
pub enum HostEnd {
    /// A stream socket, used in both directions.
    Duplex(OwnedFd),
    /// The guest reads from it, such as the FIFO of a process's standard input.
    Source(OwnedFd),
    /// The guest writes to it, such as the FIFO of a process's standard output.
    Sink(OwnedFd),
}

/// Outcome of reading from the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Read {
    /// This many bytes, never 0.
    Bytes(usize),
    /// Nothing now.
    Blocked,
    /// Nothing ever again.
    End,
}

/// Why the guest's bytes could not be taken.
#[derive(Debug)]
pub enum WriteError {
    /// The receiver on the host is gone.
    Broken,
    /// The bytes are not in guest memory.
    Guest(QueueError),
}

/// A non-blocking descriptor with a buffer for what the guest sent faster than it is taken.
///
/// The buffer's bound is the credit that the guest has: [`Credit`](super::credit::Credit).
///
/// Writing to a descriptor whose reader is gone raises SIGPIPE; Rust programs ignore it from
/// their start, and whoever embeds this crate in another kind of program must too.
#[derive(Debug)]
pub struct HostStream {
    end: HostEnd,
    backlog: Vec<u8>,
    /// Bytes at the start of `backlog` that were written.
    taken: usize,
}

impl HostStream {
    /// Takes over a descriptor and makes it non-blocking.
    pub fn new(end: HostEnd) -> io::Result<Self> {
        let stream = Self::adopt(end);
        set_nonblocking(stream.fd())?;
        Ok(stream)
    }

    /// Takes over a descriptor that is non-blocking.
    pub fn adopt(end: HostEnd) -> Self {
        Self { end, backlog: Vec::new(), taken: 0 }
    }

    /// The descriptor.
    pub fn fd(&self) -> BorrowedFd<'_> {
        match &self.end {
            HostEnd::Duplex(fd) | HostEnd::Source(fd) | HostEnd::Sink(fd) => fd.as_fd(),
        }
    }

    /// What to wait for. Edge-triggered: a connection that cannot go on for lack of credit or
    /// guest buffers costs neither wake-ups nor system calls.
    pub fn interest(&self) -> EventSet {
        let events = match self.end {
            HostEnd::Duplex(_) => EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP,
            HostEnd::Source(_) => EventSet::IN,
            HostEnd::Sink(_) => EventSet::OUT,
        };
        events | EventSet::EDGE_TRIGGERED
    }

    /// Whether the guest can read from this end.
    pub fn reads(&self) -> bool {
        !matches!(self.end, HostEnd::Sink(_))
    }

    /// Whether the guest can write to this end.
    pub fn writes(&self) -> bool {
        !matches!(self.end, HostEnd::Source(_))
    }

    /// Whether everything that the guest sent was taken.
    pub fn is_flushed(&self) -> bool {
        self.taken == self.backlog.len()
    }

    /// Reads once, straight into guest memory. `buffers` must not be empty.
    pub fn read(&self, buffers: &GuestBuffers<'_>) -> Read {
        match buffers.read_from(self.fd()) {
            Ok(0) => Read::End,
            Ok(count) => Read::Bytes(count),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Read::Blocked,
            // A terminal whose other end closed says EIO, a socket ECONNRESET: nothing more comes.
            Err(_) => Read::End,
        }
    }

    /// Takes `payload` out of guest memory: straight to the descriptor, and what that does not
    /// take into the buffer. Returns how many bytes reached the descriptor.
    pub fn write(&mut self, memory: &GuestMemory, payload: Segments<'_>) -> Result<usize, WriteError> {
        let mut sent = 0;
        if self.is_flushed() {
            let buffers = payload.buffers(memory).map_err(WriteError::Guest)?;
            sent = match buffers.write_to(self.fd()) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                Err(_) => return Err(WriteError::Broken),
            };
        }
        let rest = u32::try_from(sent).ok().and_then(|sent| payload.split_at(sent));
        let Some((_, rest)) = rest.filter(|(_, rest)| !rest.is_empty()) else { return Ok(sent) };
        self.keep(memory, rest).map_err(WriteError::Guest)?;
        // An edge is only promised after a write that was refused.
        Ok(sent.saturating_add(self.flush().map_err(|_| WriteError::Broken)?))
    }

    fn keep(&mut self, memory: &GuestMemory, rest: Segments<'_>) -> Result<(), QueueError> {
        self.backlog.drain(..self.taken);
        self.taken = 0;
        let old = self.backlog.len();
        self.backlog.resize(old.saturating_add(rest.len() as usize), 0);
        rest.read(memory, self.backlog.get_mut(old..).unwrap_or_default())?;
        Ok(())
    }

    /// Writes what is buffered, as far as the descriptor takes it. Returns how many bytes it took.
    pub fn flush(&mut self) -> io::Result<usize> {
        let before = self.taken;
        while let Some(rest) = self.backlog.get(self.taken..).filter(|rest| !rest.is_empty()) {
            match write(self.fd(), rest) {
                Ok(count) => self.taken = self.taken.saturating_add(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        let flushed = self.taken.saturating_sub(before);
        if self.is_flushed() {
            self.discard();
        }
        Ok(flushed)
    }

    /// Forgets what is buffered and frees the buffer.
    pub fn discard(&mut self) {
        self.backlog = Vec::new();
        self.taken = 0;
    }

    /// Writes bytes of the host's own before any of the guest's: the descriptor is fresh, so it
    /// takes a short line or is broken.
    pub fn greet(&self, line: &[u8]) -> io::Result<()> {
        if write(self.fd(), line)? == line.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    /// The guest sends no more: the reader on the host sees the end.
    pub fn end_writing(&self) {
        self.shutdown(libc::SHUT_WR);
    }

    /// The guest takes no more: the writer on the host sees a broken pipe.
    pub fn end_reading(&self) {
        self.shutdown(libc::SHUT_RD);
    }

    fn shutdown(&self, how: libc::c_int) {
        // A FIFO has one direction, which ends when the connection is dropped.
        if let HostEnd::Duplex(fd) = &self.end {
            // SAFETY: the descriptor is open; no memory is involved. A failure means that the
            // other end is gone already, which it will learn no more.
            let _ = unsafe { libc::shutdown(fd.as_raw_fd(), how) };
        }
    }
}

fn write(fd: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
    // SAFETY: the pointer and length are those of a live slice.
    let count = unsafe { libc::write(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len()) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: plain calls on an open descriptor without memory.
    let done = unsafe {
        let flags = libc::fcntl(fd.as_raw_fd(), libc::F_GETFL);
        flags != -1 && libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) != -1
    };
    if done { Ok(()) } else { Err(io::Error::last_os_error()) }
}
