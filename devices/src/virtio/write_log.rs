//! Which pages of guest memory this process has written: KVM's log knows only what the guest's processors write.
//!
//! Whatever a device writes lies in a buffer that the driver made available for writing, or in a used ring. So pages
//! are noted where a queue is taken over and where a chain is taken from it, before anything is written, and more than
//! are written in the end. Nothing is in flight while the log is looked at: devices are parked then.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryRegion};

use crate::GuestMemory;

/// Bytes that one bit stands for.
pub const LOG_PAGE: u64 = 4096;

/// Pages that one word stands for.
const PAGES_PER_WORD: u64 = 64;

/// A bit for each page of a machine's memory. Clones are the same log. Costs nothing until it is [kept](Self::keep).
#[derive(Clone, Debug, Default)]
pub struct WriteLog {
    regions: Arc<[Region]>,
}

/// The pages of one region of memory.
#[derive(Debug)]
struct Region {
    start: u64,
    length: u64,
    /// None before the log is kept.
    pages: OnceLock<Box<[AtomicU64]>>,
}

impl WriteLog {
    /// A log for `memory` that is not kept yet.
    pub fn new(memory: &GuestMemory) -> Self {
        let region = |region: &vm_memory::GuestRegionMmap<()>| Region {
            start: region.start_addr().0,
            length: region.len(),
            pages: OnceLock::new(),
        };
        Self { regions: memory.iter().map(region).collect() }
    }

    /// Keeps the log from now on, for as long as the machine lives.
    pub fn keep(&self) {
        for region in self.regions.iter() {
            region.pages.get_or_init(|| region.words().map(|_| AtomicU64::new(0)).collect());
        }
    }

    /// Whether the log is kept.
    pub fn is_kept(&self) -> bool {
        !self.regions.is_empty() && self.regions.iter().all(|region| region.pages.get().is_some())
    }

    /// Notes that `length` bytes from `address` on may be written. What is not memory is nobody's to write.
    pub fn mark(&self, address: GuestAddress, length: u64) {
        for region in self.regions.iter() {
            region.mark(address.0, length);
        }
    }

    /// Notes pages of the region `index`, a bit each, the lowest first.
    pub fn add(&self, index: usize, pages: &[u64]) {
        let region = self.regions.get(index).and_then(|region| region.pages.get());
        for (word, pages) in region.map(AsRef::as_ref).unwrap_or_default().iter().zip(pages) {
            word.fetch_or(*pages, Ordering::Relaxed);
        }
    }

    /// The pages of the region `index` that were noted since the last [`clear`](Self::clear), a bit each; none where the
    /// log is not kept.
    pub fn pages(&self, index: usize) -> Vec<u64> {
        let region = self.regions.get(index).and_then(|region| region.pages.get());
        let words = region.map(AsRef::as_ref).unwrap_or_default();
        words.iter().map(|word| word.load(Ordering::Relaxed)).collect()
    }

    /// Forgets what was noted.
    pub fn clear(&self) {
        for word in self.regions.iter().filter_map(|region| region.pages.get()).flatten() {
            word.store(0, Ordering::Relaxed);
        }
    }
}

impl Region {
    fn words(&self) -> std::ops::Range<u64> {
        0..self.length.div_ceil(LOG_PAGE).div_ceil(PAGES_PER_WORD)
    }

    fn mark(&self, address: u64, length: u64) {
        let Some(words) = self.pages.get() else { return };
        let end = address.saturating_add(length).min(self.start.saturating_add(self.length));
        let Some(from) = address.max(self.start).checked_sub(self.start) else { return };
        let Some(last) = end.checked_sub(self.start).and_then(|end| end.checked_sub(1)) else { return };
        for page in (from / LOG_PAGE)..=(last / LOG_PAGE) {
            let word = usize::try_from(page / PAGES_PER_WORD).ok().and_then(|word| words.get(word));
            if let Some(word) = word {
                word.fetch_or(1 << (page % PAGES_PER_WORD), Ordering::Relaxed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestAddress;

    /// Two regions with a gap: 70 pages from 0, 3 pages from 1 MiB.
    fn log() -> WriteLog {
        let memory =
            GuestMemory::from_ranges(&[(GuestAddress(0), 70 << 12), (GuestAddress(1 << 20), 3 << 12)]).unwrap();
        let log = WriteLog::new(&memory);
        log.keep();
        log
    }

    fn noted(log: &WriteLog) -> Vec<(usize, u64)> {
        let bits = |region: usize| {
            let pages = log.pages(region);
            (0..pages.len() as u64 * 64)
                .filter(move |page| pages[(page / 64) as usize] >> (page % 64) & 1 == 1)
                .map(move |page| (region, page))
                .collect::<Vec<_>>()
        };
        [bits(0), bits(1)].concat()
    }

    #[test]
    fn each_page_that_a_range_touches_is_noted() {
        for (address, length, pages) in [
            (0, 1, &[(0, 0)][..]),
            (0xfff, 1, &[(0, 0)]),
            (0xfff, 2, &[(0, 0), (0, 1)]),
            (63 << 12, 0x2000, &[(0, 63), (0, 64)]),
            (69 << 12, 0x1000, &[(0, 69)]),
            ((1 << 20) + 0x2fff, 1, &[(1, 2)]),
            // Nothing, the gap, past the end, and all there is.
            (0x1000, 0, &[]),
            (70 << 12, 0x1000, &[]),
            (u64::MAX, u64::MAX, &[]),
            ((1 << 20) - 1, 2, &[(1, 0)]),
        ] {
            let log = log();
            log.mark(GuestAddress(address), length);
            assert_eq!(noted(&log), pages, "{address:#x} {length:#x}");
        }
        let log = log();
        log.mark(GuestAddress(0), u64::MAX);
        assert_eq!(noted(&log).len(), 73);
    }

    #[test]
    fn a_log_that_is_not_kept_has_nothing() {
        let log = WriteLog::new(&crate::testkit::memory());
        log.mark(GuestAddress(0), 1);
        assert!(!log.is_kept());
        assert!(log.pages(0).is_empty());
        log.keep();
        assert!(log.is_kept());
        assert!(log.pages(0).iter().all(|word| *word == 0));
        assert!(!WriteLog::default().is_kept());
    }

    #[test]
    fn what_others_have_noted_is_added_and_all_is_forgotten_at_once() {
        let log = log();
        log.add(0, &[1 << 5]);
        log.clone().add(1, &[0b10, u64::MAX]);
        log.add(2, &[1]);
        assert_eq!(noted(&log), [(0, 5), (1, 1)]);
        log.clear();
        assert_eq!(noted(&log), []);
    }
}
