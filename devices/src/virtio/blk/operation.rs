//! What a request asks of an image, as steps that any engine can take.
//!
//! ```text
//!   transfer:  move ──▶ move ──▶ … ─────────────────────────────┐
//!   erase:     allocate range ──▶ … (or move zeroes, where the  ├──▶ sync, when it must be stable ──▶ done
//!              file system cannot)                              │
//!   flush:     ─────────────────────────────────────────────────┘
//! ```

use std::collections::VecDeque;
use std::io;

use super::transfer::{Call, Direction, Transfer};

/// A run of bytes of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ByteRange {
    pub position: u64,
    pub len: u64,
}

/// What is made of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Erasure {
    /// Its contents do not matter any more.
    Discard,
    /// It reads as zeroes, and keeps its place on the disk.
    Zero,
    /// It reads as zeroes, and may give its place on the disk back.
    ZeroUnmap,
}

/// One request's work on an image.
pub(super) struct Operation {
    work: Work,
    /// Whether it is not done before it is stable.
    sync: bool,
}

pub(super) enum Work {
    Transfer(Transfer),
    Erase(Erase),
    /// Only the sync.
    Flush,
}

pub(super) struct Erase {
    pub erasure: Erasure,
    /// What is left.
    pub ranges: VecDeque<ByteRange>,
    /// The first range, when zeroes are written to it one by one.
    writing: Option<Transfer>,
}

/// A call to the kernel. What it points to stays in place until its result is told.
#[derive(Clone, Copy, Debug)]
pub(super) enum Step {
    Read(Call),
    Write(Call),
    /// `fallocate` with these flags.
    Allocate {
        mode: libc::c_int,
        range: ByteRange,
    },
    /// `fdatasync`.
    Sync,
}

impl Operation {
    /// Moves bytes; `stable` is for writes that must survive a power failure once they are done.
    pub fn transfer(transfer: Transfer, stable: bool) -> Self {
        Self { work: Work::Transfer(transfer), sync: stable }
    }

    /// Erases `ranges` one after the other.
    pub fn erase(erasure: Erasure, ranges: VecDeque<ByteRange>, stable: bool) -> Self {
        Self { work: Work::Erase(Erase { erasure, ranges, writing: None }), sync: stable }
    }

    /// Makes what was written before stable.
    pub fn flush() -> Self {
        Self { work: Work::Flush, sync: true }
    }

    /// The work and whether a sync follows, for an image that does not work in steps.
    pub fn into_parts(self) -> (Work, bool) {
        (self.work, self.sync)
    }

    /// The next call to make, or `None` when the operation is done.
    pub fn step(&mut self) -> Option<Step> {
        let step = match &mut self.work {
            Work::Transfer(transfer) => transfer_step(transfer),
            Work::Erase(erase) => erase.step(),
            Work::Flush => None,
        };
        step.or_else(|| self.sync.then_some(Step::Sync))
    }

    /// Takes the result of the last [`step`](Self::step): what the call returned. An error ends
    /// the operation.
    pub fn finish(&mut self, result: io::Result<usize>) -> io::Result<()> {
        let result = match result {
            // Nothing was done, and the same step comes again.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            result => result,
        };
        match &mut self.work {
            Work::Transfer(transfer) if !transfer.is_done() => transfer.moved(result?),
            Work::Erase(erase) if !erase.ranges.is_empty() => erase.finish(result),
            _ => result.map(|_| self.sync = false),
        }
    }
}

fn transfer_step(transfer: &mut Transfer) -> Option<Step> {
    if transfer.is_done() {
        return None;
    }
    let call = transfer.next_call();
    Some(match transfer.direction() {
        Direction::Read => Step::Read(call),
        Direction::Write => Step::Write(call),
    })
}

impl Erase {
    fn step(&mut self) -> Option<Step> {
        let range = *self.ranges.front()?;
        if let Some(writing) = &mut self.writing {
            return transfer_step(writing);
        }
        let mode = libc::FALLOC_FL_KEEP_SIZE
            | match self.erasure {
                Erasure::Discard | Erasure::ZeroUnmap => libc::FALLOC_FL_PUNCH_HOLE,
                Erasure::Zero => libc::FALLOC_FL_ZERO_RANGE,
            };
        Some(Step::Allocate { mode, range })
    }

    fn finish(&mut self, result: io::Result<usize>) -> io::Result<()> {
        if let Some(writing) = &mut self.writing {
            writing.moved(result?)?;
            if writing.is_done() {
                self.writing = None;
                self.ranges.pop_front();
            }
            return Ok(());
        }
        match result {
            Ok(_) => {
                self.ranges.pop_front();
            }
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => match self.erasure {
                // To keep what does not matter is as good.
                Erasure::Discard => self.ranges.clear(),
                Erasure::Zero | Erasure::ZeroUnmap => {
                    self.writing = self.ranges.front().map(|range| Transfer::zeroes(range.position, range.len));
                }
            },
            Err(error) => return Err(error),
        }
        Ok(())
    }
}
