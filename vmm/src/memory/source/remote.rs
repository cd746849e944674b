//! Chunks of another process or another machine, which is not trusted: what it sends is compared with the index.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};
use vmm_sys_util::eventfd::EventFd;

use super::chunked::ChunkStore;
use super::index::{self, Chunk, ChunkIndex, IndexError, Sum};
use super::stream::{Address, Stream};
use super::wire::{self, LENGTH, MAX_MESSAGE, Reply, Request};
use super::{SourceError, short};

/// How long a chunk is waited for where nothing else is said. The guest stands still meanwhile; its own watchdogs bark after 20 s.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// A server of chunks.
#[derive(Debug)]
pub struct RemoteChunks {
    stream: Stream,
    patience: Duration,
    /// When each chunk that was asked for must be there.
    wanted: VecDeque<Sum>,
}

/// Why there is no index.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// The server does not answer, or not sensibly.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// It has another template.
    #[error("The server of chunks has another template than the one that is wanted")]
    Other,
    /// The index itself.
    #[error(transparent)]
    Index(#[from] IndexError),
}

impl RemoteChunks {
    /// Connects to the server at `address`. It may take `patience` to connect, and to answer each request.
    pub fn connect(address: &Address, patience: Duration) -> Result<Self, SourceError> {
        let stream = Stream::connect(address, patience).map_err(|source| lost(source, patience))?;
        Ok(Self { stream, patience, wanted: VecDeque::new() })
    }

    /// Each request after this may take so long to be answered.
    pub fn be_patient(&mut self, patience: Duration) {
        self.patience = patience;
    }

    /// The server's index, which must have this SHA-256: the one in the template's manifest.
    pub fn index(&mut self, expected: &Sum) -> Result<ChunkIndex, RemoteError> {
        let deadline = Instant::now() + self.patience;
        self.ask(&Request::Index, deadline)?;
        let length = match self.reply(deadline)? {
            Reply::Found(length) if u64::from(length) <= index::MAX_LEN => length,
            Reply::Found(_) | Reply::Missing => return Err(RemoteError::Other),
        };
        let mut bytes = Vec::new();
        self.receive(length, &mut bytes, deadline)?;
        if Sum::from(Sha256::digest(&bytes)) != *expected {
            return Err(RemoteError::Other);
        }
        Ok(ChunkIndex::decode(&bytes)?)
    }

    fn ask(&mut self, request: &Request, deadline: Instant) -> Result<(), SourceError> {
        let patience = self.patience;
        self.stream.write_all(&wire::encode(request), deadline).map_err(|error| lost(error, patience))
    }

    fn reply(&mut self, deadline: Instant) -> Result<Reply, SourceError> {
        let nonsense = || SourceError::Nonsense;
        let mut length = [0; LENGTH];
        self.fill(&mut length, deadline)?;
        let mut message = [0; MAX_MESSAGE];
        let body = wire::length(length).and_then(|length| message.get_mut(..length)).ok_or_else(nonsense)?;
        self.stream.read_exact(body, Some(deadline)).map_err(|error| lost(error, self.patience))?;
        wire::decode(body).ok_or_else(nonsense)
    }

    fn receive(&mut self, length: u32, bytes: &mut Vec<u8>, deadline: Instant) -> Result<(), SourceError> {
        bytes.resize(usize::try_from(length).unwrap_or_default(), 0);
        self.fill(bytes, deadline)
    }

    fn fill(&mut self, bytes: &mut [u8], deadline: Instant) -> Result<(), SourceError> {
        self.stream.read_exact(bytes, Some(deadline)).map_err(|error| lost(error, self.patience))
    }
}

impl ChunkStore for RemoteChunks {
    fn want(&mut self, chunks: &[&Chunk]) -> Result<(), SourceError> {
        // Some of a kind at most, as a read is bounded: they fit into the socket's buffers.
        let deadline = Instant::now() + self.patience;
        for chunk in chunks {
            self.ask(&Request::Chunk(chunk.sum), deadline)?;
            self.wanted.push_back(chunk.sum);
        }
        Ok(())
    }

    fn take(&mut self, chunk: &Chunk, packed: &mut Vec<u8>) -> Result<(), SourceError> {
        let deadline = Instant::now() + self.patience;
        if self.wanted.pop_front() != Some(chunk.sum) {
            return Err(SourceError::Nonsense);
        }
        match self.reply(deadline)? {
            Reply::Found(length) if length == chunk.stored => self.receive(length, packed, deadline),
            Reply::Found(_) => Err(SourceError::Damaged { sum: short(&chunk.sum) }),
            Reply::Missing => Err(SourceError::Missing { sum: short(&chunk.sum) }),
        }
    }

    fn give_up_on(&mut self, ended: Arc<EventFd>) {
        self.stream.give_up_on(ended);
    }
}

fn lost(error: io::Error, patience: Duration) -> SourceError {
    match error.kind() {
        io::ErrorKind::TimedOut => SourceError::Slow { patience },
        io::ErrorKind::ConnectionAborted => SourceError::GivenUp,
        _ => SourceError::Gone(error),
    }
}
