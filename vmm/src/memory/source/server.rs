//! Serving a template's chunks to other machines.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use seccomp::{Confinement, Role};
use vmm_sys_util::eventfd::EventFd;

use super::SourceError;
use super::chunked::ChunkFile;
use super::index::{Chunk, ChunkIndex, Sum};
use super::stream::Stream;
use super::wire::{self, LENGTH, MAX_MESSAGE, Reply, Request};

/// Clients at a time: more machines than one template is started on at once. Each costs a thread.
pub const MAX_CLIENTS: usize = 256;

/// How long a client may take for a request that it has begun, and for taking its reply. Between requests it may take as long as it likes.
const PATIENCE: Duration = Duration::from_secs(10);

/// Where clients come from.
#[derive(Debug)]
pub enum Listener {
    /// This host.
    Unix(UnixListener),
    /// Anywhere. There is neither encryption nor authentication: for networks whose every machine may have the template.
    Tcp(TcpListener),
}

/// What is served.
#[derive(Debug)]
struct Stock {
    /// The index's file.
    index: Vec<u8>,
    chunks: HashMap<Sum, Chunk>,
    file: File,
}

/// A server of chunks.
#[derive(Debug)]
pub struct ChunkServer {
    stock: Arc<Stock>,
    stop: Arc<EventFd>,
    clients: Arc<AtomicUsize>,
    confinement: Confinement,
}

impl ChunkServer {
    /// Serves `index` and the chunks of `file`. `stop` ends it when it becomes readable.
    pub fn new(
        index: &ChunkIndex,
        file: File,
        stop: Arc<EventFd>,
        confinement: Confinement,
    ) -> Result<Self, SourceError> {
        ChunkFile::new(file.try_clone().map_err(|source| SourceError::Read { offset: 0, source })?, index)?;
        let bytes = index.encode().map_err(|_| SourceError::Nonsense)?;
        let chunks = index.chunks().iter().map(|chunk| (chunk.sum, chunk.clone())).collect();
        Ok(Self { stock: Arc::new(Stock { index: bytes, chunks, file }), stop, clients: Arc::default(), confinement })
    }

    /// Serves who comes to `listener`, each in a thread, until it is told to stop. Who comes when there are [`MAX_CLIENTS`] is sent away.
    pub fn run(&self, listener: &Listener) -> io::Result<()> {
        listener.set_nonblocking()?;
        while self.wait_for_client(listener)? {
            let stream = match listener.accept() {
                Ok(stream) => stream,
                Err(error) => {
                    // Gone again, or no descriptor is left for it: neither is a reason to leave the others.
                    tracing::debug!(%error, "A client of chunks cannot be accepted");
                    continue;
                }
            };
            let Some(seat) = Seat::take(&self.clients) else {
                tracing::warn!("A client of chunks is sent away: there are {MAX_CLIENTS} already");
                continue;
            };
            self.welcome(stream, seat)?;
        }
        Ok(())
    }

    fn welcome(&self, mut stream: Stream, seat: Seat) -> io::Result<()> {
        stream.give_up_on(Arc::clone(&self.stop));
        let stock = Arc::clone(&self.stock);
        seccomp::spawn(self.confinement, Role::Api, "chunks".to_owned(), move || {
            let _seat = seat;
            if let Err(error) = stock.serve(&mut stream) {
                tracing::debug!(%error, "A client of chunks is gone");
            }
        })?;
        Ok(())
    }

    /// False: it is time to stop.
    fn wait_for_client(&self, listener: &Listener) -> io::Result<bool> {
        let entry = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        loop {
            let mut entries = [entry(listener.as_raw_fd()), entry(self.stop.as_raw_fd())];
            // SAFETY: two entries, which live through the call.
            if unsafe { libc::poll(entries.as_mut_ptr(), 2, -1) } < 0 {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(error);
            }
            let [_, stop] = entries;
            return Ok(stop.revents == 0);
        }
    }
}

impl Listener {
    fn set_nonblocking(&self) -> io::Result<()> {
        match self {
            Self::Unix(listener) => listener.set_nonblocking(true),
            Self::Tcp(listener) => listener.set_nonblocking(true),
        }
    }

    fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Unix(listener) => Stream::accepted_unix(listener.accept()?.0),
            Self::Tcp(listener) => Stream::accepted_tcp(listener.accept()?.0),
        }
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Self::Unix(listener) => listener.as_raw_fd(),
            Self::Tcp(listener) => listener.as_raw_fd(),
        }
    }
}

/// One of the clients that there may be.
struct Seat(Arc<AtomicUsize>);

impl Seat {
    fn take(clients: &Arc<AtomicUsize>) -> Option<Self> {
        let one_more = |count| (count < MAX_CLIENTS).then_some(count + 1);
        clients.fetch_update(Ordering::AcqRel, Ordering::Acquire, one_more).ok()?;
        Some(Self(Arc::clone(clients)))
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Stock {
    /// Answers one client's requests until it leaves.
    fn serve(&self, stream: &mut Stream) -> io::Result<()> {
        let mut bytes = Vec::new();
        loop {
            let mut length = [0; LENGTH];
            let (first, rest) = length.split_at_mut(1);
            stream.read_exact(first, None)?;
            let deadline = Instant::now() + PATIENCE;
            stream.read_exact(rest, Some(deadline))?;
            let mut message = [0; MAX_MESSAGE];
            let body = wire::length(length).and_then(|length| message.get_mut(..length));
            let body = body.ok_or(io::ErrorKind::InvalidData)?;
            stream.read_exact(body, Some(deadline))?;
            let request = wire::decode(body).ok_or(io::ErrorKind::InvalidData)?;
            let reply = self.answer(&request, &mut bytes)?;
            let deadline = Instant::now() + PATIENCE;
            stream.write_all(&wire::encode(&reply), deadline)?;
            stream.write_all(&bytes, deadline)?;
        }
    }

    /// The reply to a request, and the bytes that follow it.
    fn answer(&self, request: &Request, bytes: &mut Vec<u8>) -> io::Result<Reply> {
        bytes.clear();
        match request {
            Request::Index => bytes.extend(&self.index),
            Request::Chunk(sum) => match self.chunks.get(sum) {
                Some(chunk) => {
                    bytes.resize(usize::try_from(chunk.stored).unwrap_or_default(), 0);
                    self.file.read_exact_at(bytes, chunk.offset)?;
                }
                None => return Ok(Reply::Missing),
            },
        }
        Ok(Reply::Found(u32::try_from(bytes.len()).map_err(io::Error::other)?))
    }
}

#[cfg(test)]
mod tests;
