//! Where the pages of a template come from.

mod file;

use std::fmt;
use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

pub use file::FileSource;

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
    /// It is shorter than it was.
    #[error("The template's memory has {present} bytes where there were {length}: it was cut")]
    Cut {
        /// What there was.
        length: u64,
        /// What there is.
        present: u64,
    },
}
