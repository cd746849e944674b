//! Where the pages of a template come from.
//!
//! | room | what |
//! | --- | --- |
//! | [`file`], [`layered`] | the memory file of a snapshot, and those of differences |
//! | [`chunked`], [`index`], [`pack`] | chunks, each once and packed, compared with their checksums |
//! | [`remote`], [`server`], [`wire`], [`stream`] | chunks of another process or another machine |
//! | [`cache`] | chunks that have come already, for all machines of a host |

pub mod cache;
pub mod chunked;
mod file;
pub mod index;
mod layered;
pub mod pack;
pub mod remote;
pub mod server;
pub mod stream;
pub mod wire;

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

pub use cache::{ChunkCache, NoChunks};
pub use chunked::{ChunkFile, ChunkedSource};
pub use file::FileSource;
pub use index::ChunkIndex;
pub use layered::LayeredSource;
pub use remote::RemoteChunks;
pub use server::{ChunkServer, Listener};
pub use stream::{Address, AddressError};

/// The memory of a template, read by one thread.
pub trait Source: fmt::Debug + Send {
    /// Bytes of the memory.
    fn length(&self) -> u64;

    /// What is known, without reading it, of the memory from `offset` on.
    fn run(&self, offset: u64) -> Run;

    /// Fills `buffer` with the memory from `offset` on, all of which is below the length. What this returns is what the template has, or an
    /// error: a source that is not trusted is compared with its index before.
    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), SourceError>;

    /// Once `ended` is readable, a source that waits for somebody gives up at once. It is never read.
    fn give_up_on(&mut self, ended: Arc<EventFd>) {
        let _ = ended;
    }
}

/// A part of the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Whether all of it is zeros. Where it is not, it still may be.
    pub zeros: bool,
    /// Where it ends.
    pub end: u64,
}

/// Why there are no pages.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// It cannot be read.
    #[error("The template's memory cannot be read at {offset:#x}")]
    Read {
        /// Where.
        offset: u64,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It is shorter than it was, or than its index says.
    #[error("The template's memory has {present} bytes where there were {length}: it was cut")]
    Cut {
        /// What there was.
        length: u64,
        /// What there is.
        present: u64,
    },
    /// A chunk has other contents.
    #[error("Chunk {sum} is not what the index says")]
    Damaged {
        /// The first digits of its checksum.
        sum: String,
    },
    /// A server has no such chunk.
    #[error("The server has no chunk {sum}")]
    Missing {
        /// The first digits of its checksum.
        sum: String,
    },
    /// A server is too slow.
    #[error("The server of chunks has not answered within {} s", patience.as_secs_f64())]
    Slow {
        /// How long it had.
        patience: Duration,
    },
    /// A server cannot be reached, or left.
    #[error("The server of chunks is gone")]
    Gone(#[source] io::Error),
    /// A server says what means nothing.
    #[error("The server of chunks does not keep to the protocol")]
    Nonsense,
    /// The machine ended meanwhile.
    #[error("The machine ended while its memory was on its way")]
    GivenUp,
}

/// The first digits of a checksum, for people.
fn short(sum: &index::Sum) -> String {
    sum.iter().take(4).map(|byte| format!("{byte:02x}")).collect()
}
