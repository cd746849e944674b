//! Pages into the memory file. No thread and no waiting: the tests hold it against a model of the kernel.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::super::memory::write_pages;
use super::{Contents, CopyError, Progress};
use crate::memory::PAGE_SIZE;
use crate::memory::lazy::pages::{Layout, PageSet};
use crate::memory::uffd::{Message, Writes};

/// Most bytes that are copied before it is asked again who waits.
pub const STEP: u64 = 256 << 10;

/// What comes with a page that somebody waits to write to: its neighbours are likely to be written next, and a message costs as much as
/// copying some pages.
pub const RUN: u64 = 64 << 10;

/// What is in the file, and what brings the rest there.
pub struct Copier<W, C> {
    writes: W,
    contents: C,
    layout: Arc<Layout>,
    file: File,
    progress: Arc<Progress>,
    /// Pages that are in the file: they may have been written since.
    done: PageSet,
    /// Before this all are.
    came_to: u64,
    messages: Vec<Message>,
    buffer: Vec<u8>,
}

impl<W: Writes, C: Contents> Copier<W, C> {
    /// Nothing is in `file` yet, which is as long as the memory.
    pub fn new(writes: W, contents: C, layout: Arc<Layout>, file: File, progress: Arc<Progress>) -> Self {
        let (length, unit) = (layout.length, layout.unit);
        let buffer = vec![0; usize::try_from(STEP.max(unit)).unwrap_or_default()];
        let done = PageSet::new(length, unit);
        Self { writes, contents, layout, file, progress, done, came_to: 0, messages: Vec::new(), buffer }
    }

    /// What makes writers wait.
    pub fn writes(&self) -> &W {
        &self.writes
    }

    /// Copies all, and lets writers go on wherever that is done.
    pub fn run(&mut self) -> Result<(), CopyError> {
        while self.turn()? {}
        Ok(())
    }

    /// Copies what is waited for, or else a step of the rest. False when all is copied.
    pub fn turn(&mut self) -> Result<bool, CopyError> {
        if self.progress.is_stopped() {
            return Err(CopyError::Stopped);
        }
        if !self.serve()? && self.came_to < self.layout.length {
            let end = self.layout.length.min(self.came_to + STEP.max(self.layout.unit));
            self.copy(self.came_to..end)?;
            self.came_to = end;
        }
        self.progress.done.store(self.done.count() * self.layout.unit, Ordering::Relaxed);
        Ok(self.came_to < self.layout.length)
    }

    /// Copies what is waited for; false when nothing is.
    fn serve(&mut self) -> Result<bool, CopyError> {
        let mut messages = std::mem::take(&mut self.messages);
        messages.clear();
        self.writes.read(&mut messages).map_err(CopyError::Messages)?;
        for message in &messages {
            let Message::Fault(address) = *message else { continue };
            let Some(offset) = self.layout.offset_of(address) else { continue };
            self.progress.waits.fetch_add(1, Ordering::Relaxed);
            let run = RUN.max(self.layout.unit);
            let start = offset / run * run;
            self.copy(start..self.layout.length.min(start + run))?;
        }
        let served = !messages.is_empty();
        self.messages = messages;
        Ok(served)
    }

    /// Copies what is not in the file yet of a range of at most the buffer's length, then lets who waits for any of it go on.
    fn copy(&mut self, range: Range<u64>) -> Result<(), CopyError> {
        let mut offset = range.start;
        while let Some((host, room)) = self.layout.host_of(offset).filter(|_| offset < range.end) {
            let end = range.end.min(offset + room);
            let mut from = offset;
            while from < end {
                let (done, to) = self.done.run(from..end);
                if !done {
                    self.copy_existing(from..to)?;
                    self.done.set_range(from..to, true);
                }
                from = to;
            }
            // In this order: from here on it may be written.
            self.writes.lift(host, end - offset).map_err(CopyError::Lift)?;
            offset = end;
        }
        Ok(())
    }

    /// Copies the pages of a range of one mapping that exist; the file has zeros for the others.
    fn copy_existing(&mut self, range: Range<u64>) -> Result<(), CopyError> {
        let mut from = range.start;
        while from < range.end {
            let exists = self.contents.exists(from);
            let mut to = from + PAGE_SIZE;
            while to < range.end && self.contents.exists(to) == exists {
                to += PAGE_SIZE;
            }
            if exists {
                let length = usize::try_from(to - from).unwrap_or(usize::MAX);
                let missing = || CopyError::Read(std::io::ErrorKind::InvalidInput.into());
                let chunk = self.buffer.get_mut(..length).ok_or_else(missing)?;
                self.contents.read(from, chunk).map_err(CopyError::Read)?;
                write_pages(chunk, &self.file, from).map_err(CopyError::Write)?;
            }
            from = to;
        }
        Ok(())
    }
}
