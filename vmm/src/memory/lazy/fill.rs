//! Bringing pages from the source into guest memory. No thread and no waiting: the tests hold it against a model of the kernel.

use std::ops::Range;
use std::sync::Arc;

use super::Record;
use super::pages::{Layout, PageSet};
use crate::memory::source::{Source, SourceError};
use crate::memory::uffd::{Faults, Placed};

/// Most bytes that are read and given at once: what a fault that comes meanwhile waits for.
pub const STEP: u64 = 256 << 10;

/// Why guest memory cannot be provided any more.
#[derive(Debug, thiserror::Error)]
pub enum Loss {
    /// The source failed.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The kernel takes no page.
    #[error("The kernel does not take the pages at {offset:#x}")]
    Refused {
        /// Where in the memory.
        offset: u64,
        /// What it said.
        #[source]
        source: std::io::Error,
    },
    /// The kernel tells nothing.
    #[error("The kernel does not tell of page faults any more")]
    Messages(#[source] std::io::Error),
    /// The thread that serves faults has panicked.
    #[error("The thread that serves page faults has ended")]
    Thread,
}

/// What is there of guest memory, and what brings the rest.
pub struct Filler<F> {
    faults: F,
    layout: Arc<Layout>,
    source: Box<dyn Source>,
    /// Whether there are pages of zeros that take no memory.
    zero_pages: bool,
    /// Pages that the guest has given back: whatever the source has, they are zeros from then on.
    removed: PageSet,
    /// Pages that are there.
    placed: PageSet,
    buffer: Vec<u8>,
    record: Arc<Record>,
}

impl<F: Faults> Filler<F> {
    /// Nothing is there yet.
    pub fn new(faults: F, layout: Arc<Layout>, source: Box<dyn Source>, zero_pages: bool, record: Arc<Record>) -> Self {
        let (length, unit) = (layout.length, layout.unit);
        let buffer = vec![0; usize::try_from(STEP.max(unit)).unwrap_or_default()];
        let (removed, placed) = (PageSet::new(length, unit), PageSet::new(length, unit));
        Self { faults, layout, source, zero_pages, removed, placed, buffer, record }
    }

    /// The kernel.
    pub fn faults(&self) -> &F {
        &self.faults
    }

    /// Where memory is.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// Whether the page at an offset has been given.
    pub fn is_placed(&self, offset: u64) -> bool {
        self.placed.has(offset)
    }

    /// Bytes of the pages that are there.
    pub fn placed_bytes(&self) -> u64 {
        self.placed.count() * self.layout.unit
    }

    /// Whether every page has been given, or given back.
    pub fn is_complete(&self) -> bool {
        let pages = self.layout.length / self.layout.unit;
        // In this order: counting takes longer.
        self.placed.count() + self.removed.count() >= pages && self.placed.count() + self.removed_only() == pages
    }

    /// The guest has given back what is in a range of host addresses.
    pub fn remove(&mut self, host: Range<u64>) {
        for range in self.layout.offsets_in(host) {
            self.record.metrics.removed_bytes.add(range.end - range.start);
            self.placed.set_range(range.clone(), false);
            self.removed.set_range(range, true);
        }
    }

    /// Gives the page at an offset of the memory, for which a thread waits, and those of zeros behind it: see
    /// [`asked_with`](Self::asked_with). False: not now, the kernel takes none.
    pub fn serve(&mut self, offset: u64) -> Result<bool, Loss> {
        let range = self.asked_with(offset);
        Ok(self.give(range)? >= offset + self.layout.unit)
    }

    /// The page at an offset, and where the template has zeros there, all that are missing up to the next multiple of a
    /// [`STEP`], if they take no memory: a guest that makes use of free memory would ask for each of them.
    pub fn asked_with(&self, offset: u64) -> Range<u64> {
        let page = offset..offset + self.layout.unit;
        if !self.zero_pages || !self.layout.free_zeros || self.placed.has(offset) || self.removed.has(offset) {
            return page;
        }
        let (_, end) = self.placed.run(offset..(offset / STEP + 1) * STEP);
        match self.contents(offset..end.min(self.layout.length)) {
            (true, end) => offset..end.max(page.end),
            (false, _) => page,
        }
    }

    /// Gives at most a [`STEP`] of the pages in a range that are not there yet, and that the guest has not given back. Returns to where it came: the
    /// same offset, when the kernel takes none now.
    pub fn advance(&mut self, range: Range<u64>) -> Result<u64, Loss> {
        // Looking at pages takes time too.
        let range = range.start..range.end.min(range.start.saturating_add(16 * STEP.max(self.layout.unit)));
        let (placed, end) = self.placed.run(range.clone());
        if placed {
            return Ok(end);
        }
        let (removed, end) = self.removed.run(range.start..end);
        if removed {
            return Ok(end);
        }
        let end = end.min(range.start.saturating_add(STEP.max(self.layout.unit)));
        self.give(range.start..end)
    }

    /// Pages that were given back and have not been asked for since.
    fn removed_only(&self) -> u64 {
        self.removed.count() - self.removed.count_of_both(&self.placed)
    }

    /// Gives all pages of a range, and returns to where it came.
    fn give(&mut self, range: Range<u64>) -> Result<u64, Loss> {
        let mut offset = range.start;
        while offset < range.end {
            let Some((_, room)) = self.layout.host_of(offset) else { return Ok(range.end) };
            let (zeros, end) = self.contents(offset..range.end.min(offset + room));
            let (came_to, end) = if zeros {
                (self.give_zeros(offset..end)?, end)
            } else {
                let end = end.min(offset + self.buffer.len() as u64);
                (self.give_bytes(offset..end)?, end)
            };
            offset = came_to;
            if offset < end {
                break;
            }
        }
        Ok(offset)
    }

    /// Whether the pages at the start of `range` are known to be zeros, and where those of which that is true end.
    fn contents(&self, range: Range<u64>) -> (bool, u64) {
        let unit = self.layout.unit;
        let (removed, end) = self.removed.run(range.clone());
        if removed {
            return (true, end);
        }
        let run = self.source.run(range.start);
        let (whole_pages, started) = (run.end / unit * unit, run.end.next_multiple_of(unit));
        if run.zeros && whole_pages > range.start {
            return (true, whole_pages.min(end));
        }
        // A page that is zeros in part is read.
        (false, started.max(range.start + unit).min(end))
    }

    /// Reads pages that are not longer than the buffer, and gives them.
    fn give_bytes(&mut self, range: Range<u64>) -> Result<u64, Loss> {
        let length = usize::try_from(range.end - range.start).unwrap_or_default();
        let Some(bytes) = self.buffer.get_mut(..length) else { return Ok(range.start) };
        if let Err(error) = self.source.read(range.start, bytes) {
            self.record.metrics.source_errors.add(1);
            return Err(error.into());
        }
        let unit = usize::try_from(self.layout.unit).unwrap_or(usize::MAX);
        let mut offset = range.start;
        let pages: Vec<&[u8]> = self.buffer.get(..length).unwrap_or_default().chunks(unit).collect();
        let runs: Vec<(bool, usize)> = pages
            .chunk_by(|a, b| is_zero(a) == is_zero(b))
            .map(|run| (run.first().is_some_and(|page| is_zero(page)), run.len() * unit))
            .collect();
        for (zeros, length) in runs {
            let end = offset + length as u64;
            let came_to = if zeros && self.zero_pages {
                self.give_zeros(offset..end)?
            } else {
                self.give_buffer(offset..end, range.start)?
            };
            offset = came_to;
            if offset < end {
                break;
            }
        }
        Ok(offset)
    }

    /// Gives a part of the buffer, which holds the memory from `base` on.
    fn give_buffer(&mut self, range: Range<u64>, base: u64) -> Result<u64, Loss> {
        let (faults, buffer) = (&self.faults, &self.buffer);
        let place = |offset: u64, host: u64| {
            let part = |offset: u64| usize::try_from(offset - base).unwrap_or(usize::MAX);
            let bytes = buffer.get(part(offset)..part(range.end)).unwrap_or_default();
            faults.copy(host, bytes)
        };
        let came_to = place_all(faults, &self.layout, range.clone(), place)?;
        self.record.metrics.bytes_copied.add(came_to - range.start);
        self.placed.set_range(range.start..came_to, true);
        Ok(came_to)
    }

    fn give_zeros(&mut self, range: Range<u64>) -> Result<u64, Loss> {
        if !self.zero_pages {
            // Huge pages: there is none of zeros.
            let end = range.end.min(range.start + self.buffer.len() as u64);
            self.buffer.fill(0);
            return self.give_buffer(range.start..end, range.start);
        }
        let faults = &self.faults;
        let end = range.end;
        let came_to = place_all(faults, &self.layout, range.clone(), |offset, host| faults.zero(host, end - offset))?;
        self.record.metrics.zero_pages.add((came_to - range.start) / self.layout.unit);
        self.placed.set_range(range.start..came_to, true);
        Ok(came_to)
    }
}

/// Gives the pages of a range that is in one mapping, over those that are there already. Returns to where it came before the kernel took none.
fn place_all<F: Faults>(
    faults: &F,
    layout: &Layout,
    range: Range<u64>,
    place: impl Fn(u64, u64) -> Placed,
) -> Result<u64, Loss> {
    let mut offset = range.start;
    while offset < range.end {
        let Some((host, _)) = layout.host_of(offset) else { break };
        match place(offset, host) {
            Placed::All => offset = range.end,
            Placed::Part(bytes) => offset += bytes.min(range.end - offset),
            Placed::Exists => {
                // Whoever waits for it may have begun to after it was given.
                faults.wake(host, layout.unit);
                offset += layout.unit;
            }
            Placed::Busy => break,
            // Nobody waits there any more.
            Placed::Gone => offset = range.end,
            Placed::Failed(source) => return Err(Loss::Refused { offset, source }),
        }
    }
    Ok(offset)
}

fn is_zero(page: &[u8]) -> bool {
    const PIECE: usize = 4096;
    static ZEROS: [u8; PIECE] = [0; PIECE];
    page.chunks(PIECE).all(|piece| ZEROS.starts_with(piece))
}
