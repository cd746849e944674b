//! The agent's ends of a process's streams.

use std::io;
use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;

use super::Terminal;

/// Takes what goes to standard input.
pub enum Sink {
    /// Of a pipe whose other end is descriptor 0.
    Pipe(pipe::Sender),
    /// Of a terminal, for all three descriptors.
    Terminal(Arc<Terminal>),
}

/// Gives what came from standard output or error.
pub enum Source {
    /// Of a pipe whose other end is descriptor 1 or 2.
    Pipe(pipe::Receiver),
    /// Of a terminal, for all three descriptors.
    Terminal(Arc<Terminal>),
}

impl Sink {
    /// Writes all of `data`, waiting for room.
    pub async fn write_all(&mut self, data: &[u8]) -> io::Result<()> {
        match self {
            Self::Pipe(pipe) => pipe.write_all(data).await,
            Self::Terminal(terminal) => terminal.write_all(data).await,
        }
    }
}

impl Source {
    /// 0 is the end: the last writer is gone and everything was read.
    pub async fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Pipe(pipe) => pipe.read(buffer).await,
            Self::Terminal(terminal) => terminal.read(buffer).await,
        }
    }
}
