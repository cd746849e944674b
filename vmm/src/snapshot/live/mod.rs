//! Guest memory to its file while the guest runs: what it was at one moment.
//!
//! | room | what |
//! | --- | --- |
//! | [`copier`] | pages into the file: those that somebody waits to write to first |
//! | [`thread`] | the thread that does it |
//!
//! ```text
//! prepare() ─▶ protect() ─▶ copying ── every page is in the file ──▶ ordinary memory again
//!  guest runs   it stands      └────── anything fails, or the machine is stopped ─▶ the same, without a snapshot
//! ```
//!
//! Whatever happens, memory has what it should: protection only makes writers wait, and is gone with the descriptor.

mod copier;
mod thread;

#[cfg(test)]
mod tests;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vm_memory::{Bytes, GuestMemory as _, GuestMemoryRegion, MemoryRegionAddress};

use devices::GuestMemory;

use super::memory::Existing;
use crate::memory::PAGE_SIZE;
use crate::memory::backing::page_size;
use crate::memory::lazy::pages::Layout;
use crate::memory::source::Source;
use crate::memory::uffd::{Message, Uffd, UffdError, Writes};

pub(crate) use copier::Copier;
pub(crate) use thread::{CopierThread, Copying};

/// Why memory was not copied. The guest's is what it should be all the same.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// It cannot be read.
    #[error("Guest memory cannot be read")]
    Read(#[source] io::Error),
    /// The file takes no more.
    #[error("The memory file cannot be written")]
    Write(#[source] io::Error),
    /// Writes cannot be made to wait.
    #[error("Guest memory cannot be protected from being written")]
    Protect(#[source] io::Error),
    /// Who waits cannot be let go on.
    #[error("The protection of guest memory cannot be lifted")]
    Lift(#[source] io::Error),
    /// The kernel tells nothing.
    #[error("The kernel does not tell who waits to write")]
    Messages(#[source] io::Error),
    /// There is no thread to do it, or it has panicked.
    #[error("The thread that copies guest memory has ended")]
    Thread(#[source] Option<io::Error>),
    /// Nobody wants it any more.
    #[error("Copying was given up, as was asked for")]
    Stopped,
}

impl CopyError {
    /// Whether this is what somebody asked for.
    pub(crate) fn is_wanted(&self) -> bool {
        matches!(self, Self::Stopped)
    }
}

/// How far copying has come, and whether it should go on. For whoever asks.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    /// Bytes of the memory that are in the file, zeros that take no place there included.
    pub done: AtomicU64,
    /// Bytes of the memory; 0 before that is known.
    pub total: AtomicU64,
    /// How often somebody waited to write.
    pub waits: AtomicU64,
    stopped: AtomicBool,
}

impl Progress {
    /// Copying comes to an end without a result.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
    }

    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }
}

/// Memory whose pages can be protected from being written.
#[derive(Debug)]
pub(crate) struct Protection {
    uffd: Uffd,
    layout: Arc<Layout>,
}

impl Protection {
    /// Finds out whether the host can do it for the mappings of `layout`. Nothing is protected yet, and what can be said here needs not
    /// be said while the guest stands still.
    pub fn prepare(layout: Arc<Layout>) -> Result<Self, UffdError> {
        let uffd = Uffd::open_for_writes()?;
        for span in layout.spans() {
            let (start, length) = (usize::try_from(span.host), usize::try_from(span.length));
            uffd.register_writes(start.unwrap_or_default(), length.unwrap_or_default())?;
        }
        Ok(Self { uffd, layout })
    }

    /// From now on all writes to pages that exist wait.
    pub fn protect(&self) -> Result<(), CopyError> {
        let mut spans = self.layout.spans().iter();
        spans.try_for_each(|span| self.uffd.protect(span.host, span.length)).map_err(CopyError::Protect)
    }

    /// Memory is ordinary again. Dropping does the same.
    fn end(&self) {
        for span in self.layout.spans() {
            let (start, length) = (usize::try_from(span.host), usize::try_from(span.length));
            if let Err(error) = self.uffd.unregister(start.unwrap_or_default(), length.unwrap_or_default()) {
                tracing::debug!(%error, "Memory that was copied cannot be unregistered");
            }
        }
    }
}

impl Writes for Protection {
    fn read(&self, messages: &mut Vec<Message>) -> io::Result<()> {
        Writes::read(&self.uffd, messages)
    }

    fn lift(&self, start: u64, length: u64) -> io::Result<()> {
        self.uffd.lift(start, length)
    }
}

/// Memory that nobody writes to, as the guest stands still.
#[derive(Debug)]
pub(crate) struct Still;

impl Writes for Still {
    fn read(&self, _: &mut Vec<Message>) -> io::Result<()> {
        Ok(())
    }

    fn lift(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
}

/// What a restored machine's memory is a private mapping of. It does not change.
pub(crate) type Template = Arc<Mutex<Box<dyn Source>>>;

/// The pages that the guest had not written when it stood still.
pub(crate) struct Untouched {
    template: Template,
    written: Arc<Existing>,
}

impl Contents for Untouched {
    fn exists(&self, offset: u64) -> bool {
        !self.written.has(offset)
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let mut template = self.template.lock().unwrap_or_else(PoisonError::into_inner);
        template.read(offset, buffer).map_err(io::Error::other)
    }
}

/// Where `memory` is in this process.
pub(crate) fn layout(memory: &GuestMemory) -> io::Result<Arc<Layout>> {
    let mut unit = PAGE_SIZE;
    for file in memory.iter().filter_map(|region| region.file_offset()) {
        unit = unit.max(page_size(file.file())?);
    }
    Layout::of(memory, unit).map(Arc::new).ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

/// What is in memory.
pub(crate) trait Contents {
    /// Whether the page at an offset may have had something in it when the guest stood still.
    fn exists(&self, offset: u64) -> bool;
    /// Reads a part of one mapping.
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
}

/// The guest's memory, with the pages that it had when it stood still.
pub(crate) struct AtRest {
    memory: GuestMemory,
    existing: Arc<Existing>,
}

impl AtRest {
    /// To be called while nobody writes to `memory`.
    pub fn of(memory: &GuestMemory) -> Result<Self, CopyError> {
        let existing = Existing::of(memory).map_err(CopyError::Read)?;
        Ok(Self { memory: memory.clone(), existing: Arc::new(existing) })
    }

    /// As [`of`](Self::of), of a private mapping of `template`: the pages that were written, and what has all others.
    pub fn over(memory: &GuestMemory, template: Template) -> Result<(Self, Untouched), CopyError> {
        let written = Arc::new(Existing::written(memory).map_err(CopyError::Read)?);
        Ok((Self { memory: memory.clone(), existing: Arc::clone(&written) }, Untouched { template, written }))
    }
}

impl Contents for AtRest {
    fn exists(&self, offset: u64) -> bool {
        self.existing.has(offset)
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let mut start = 0;
        for region in self.memory.iter() {
            if let Some(inside) = offset.checked_sub(start).filter(|inside| *inside < region.len()) {
                return region.read_slice(buffer, MemoryRegionAddress(inside)).map_err(io::Error::other);
            }
            start += region.len();
        }
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}
