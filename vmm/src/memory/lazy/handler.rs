//! What the thread of a lazy memory does: messages first, then who waits, then what can be done ahead.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::fill::{Filler, Loss, STEP};
use super::pages::{Layout, PageSet};
use super::{Fill, Record};
use crate::memory::uffd::{Faults, Message};
use crate::memory::working_set::WorkingSet;

/// How long it takes until pages that the kernel did not take are tried again. Nothing tells when a removal is over; it
/// is as soon as its thread has run for a moment.
const RETRY: Duration = Duration::from_millis(1);

/// How often pages are brought in the background.
const TICK: Duration = Duration::from_millis(10);

/// After so long without a fault nothing is brought in the background: the guest has what it needs.
const IDLE: Duration = Duration::from_secs(2);

/// What a turn leaves to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// More.
    Turn,
    /// Nothing until something happens, or for so long.
    Wait(Option<Duration>),
    /// All memory is there.
    Done,
}

/// A thread that waits for a page.
#[derive(Debug)]
struct Waiting {
    offset: u64,
    since: Instant,
}

/// The state of the thread.
pub struct Handler<F> {
    filler: Filler<F>,
    layout: Arc<Layout>,
    record: Arc<Record>,
    messages: Vec<Message>,
    waiting: Vec<Waiting>,
    /// What is brought ahead, in reverse order.
    ahead: Vec<std::ops::Range<u64>>,
    /// The pages of the working set.
    expected: Option<PageSet>,
    /// Pages that were asked for.
    recorded: Option<PageSet>,
    fill: Fill,
    filled_to: u64,
    last_fault: Instant,
}

impl<F: Faults> Handler<F> {
    /// Brings what `set` has first. Records what is asked for where `recording` says so.
    pub fn new(filler: Filler<F>, record: Arc<Record>, set: Option<&WorkingSet>, recording: bool, fill: Fill) -> Self {
        let layout = Arc::clone(filler.layout());
        let (length, unit) = (layout.length, layout.unit);
        let pages =
            |range: &std::ops::Range<u64>| range.start / unit * unit..range.end.next_multiple_of(unit).min(length);
        let mut ahead: Vec<_> = set.iter().flat_map(|set| set.ranges()).map(|range| pages(&range)).collect();
        let expected = set.map(|_| {
            let mut expected = PageSet::new(length, unit);
            ahead.iter().for_each(|range| expected.set_range(range.clone(), true));
            expected
        });
        ahead.reverse();
        Self {
            filler,
            layout,
            record,
            messages: Vec::new(),
            waiting: Vec::new(),
            ahead,
            expected,
            recorded: recording.then(|| PageSet::new(length, unit)),
            fill,
            filled_to: 0,
            last_fault: Instant::now(),
        }
    }

    /// Does what can be done without waiting for anything but the source, for a moment.
    pub fn turn(&mut self) -> Result<Next, Loss> {
        self.listen()?;
        self.serve()?;
        if !self.waiting.is_empty() {
            return Ok(Next::Wait(Some(RETRY)));
        }
        if let Some(range) = self.ahead.pop() {
            return self.prefetch(range);
        }
        if self.filler.is_complete() {
            return Ok(Next::Done);
        }
        if self.record.completion_wanted.load(Ordering::Acquire) {
            return self.complete();
        }
        self.fill()
    }

    /// Takes what the kernel tells. What was given back comes first: a page that is asked for and given back at a time is
    /// zeros, and a page must not come from the template any more once it has been told that it is not wanted.
    fn listen(&mut self) -> Result<(), Loss> {
        self.messages.clear();
        self.filler.faults().read(&mut self.messages).map_err(Loss::Messages)?;
        for message in &self.messages {
            if let Message::Removed(start, end) = *message {
                self.filler.remove(start..end);
            }
        }
        for message in &self.messages {
            let Message::Fault(address) = *message else { continue };
            let Some(offset) = self.layout.offset_of(address) else { continue };
            let now = Instant::now();
            self.last_fault = now;
            self.waiting.push(Waiting { offset, since: now });
            note(&self.filler, &self.record, self.expected.as_ref(), self.recorded.as_mut(), offset);
        }
        Ok(())
    }

    /// Gives the pages that are waited for, as far as the kernel takes them.
    fn serve(&mut self) -> Result<(), Loss> {
        let mut index = 0;
        while let Some(Waiting { offset, since }) = self.waiting.get(index) {
            if self.filler.serve(*offset)? {
                let metrics = &self.record.metrics;
                metrics.faults.add(1);
                metrics.fault_nanoseconds.add(u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX));
                self.waiting.swap_remove(index);
            } else {
                index += 1;
            }
        }
        Ok(())
    }

    fn prefetch(&mut self, range: std::ops::Range<u64>) -> Result<Next, Loss> {
        let before = self.filler.placed_bytes();
        let came_to = self.filler.advance(range.clone())?;
        self.record.metrics.prefetched_bytes.add(self.filler.placed_bytes() - before);
        if came_to < range.end {
            self.ahead.push(came_to..range.end);
        }
        Ok(pace(came_to > range.start))
    }

    /// Brings all that is missing, as fast as it goes.
    fn complete(&mut self) -> Result<Next, Loss> {
        let came_to = self.fill_on()?;
        Ok(pace(came_to))
    }

    /// Brings a little of what is missing, if that is wanted.
    fn fill(&mut self) -> Result<Next, Loss> {
        let bytes_per_second = match self.fill {
            Fill::Background { bytes_per_second } if self.last_fault.elapsed() <= IDLE => bytes_per_second,
            Fill::All { bytes_per_second } => bytes_per_second,
            Fill::Off | Fill::Background { .. } => return Ok(Next::Wait(None)),
        };
        let ticks = u64::try_from(Duration::from_secs(1).as_millis() / TICK.as_millis()).unwrap_or(1);
        let mut left = bytes_per_second / ticks;
        loop {
            let before = self.filler.placed_bytes();
            if !self.fill_on()? || self.filler.is_complete() {
                break;
            }
            left = left.saturating_sub((self.filler.placed_bytes() - before).max(STEP));
            if left == 0 {
                break;
            }
        }
        Ok(Next::Wait(Some(TICK)))
    }

    /// Goes on bringing all memory in order. False: the kernel takes nothing now.
    fn fill_on(&mut self) -> Result<bool, Loss> {
        let length = self.layout.length;
        if self.filled_to >= length {
            // Pages that were given back while they were on their way, and are zeros where they are asked for.
            self.filled_to = 0;
        }
        let came_to = self.filler.advance(self.filled_to..length)?;
        let moved = came_to > self.filled_to;
        self.filled_to = came_to;
        Ok(moved)
    }
}

fn pace(moved: bool) -> Next {
    if moved { Next::Turn } else { Next::Wait(Some(RETRY)) }
}

/// Remembers that a page was asked for, with what comes with it, and whether the working set would have had it.
fn note<F: Faults>(
    filler: &Filler<F>,
    record: &Record,
    expected: Option<&PageSet>,
    recorded: Option<&mut PageSet>,
    offset: u64,
) {
    match expected.map(|expected| expected.has(offset)) {
        Some(true) if !filler.is_placed(offset) => record.metrics.working_set_late.add(1),
        Some(false) => record.metrics.working_set_misses.add(1),
        _ => {}
    }
    let Some(recorded) = recorded.filter(|recorded| !recorded.has(offset)) else { return };
    // Two may ask for pages of the same zeros at a time.
    let (_, end) = recorded.run(filler.asked_with(offset));
    recorded.set_range(offset..end, true);
    record.note(offset..end);
}
