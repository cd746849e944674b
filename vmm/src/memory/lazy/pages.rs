//! Where guest memory is in this process, and what is known of each of its pages.

use std::ops::Range;

use vm_memory::{GuestMemory as _, GuestMemoryRegion, MemoryRegionAddress};

use devices::GuestMemory;

/// A mapping of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Its host address.
    pub host: u64,
    /// Where it starts in the memory, region after region, as in the memory file.
    pub start: u64,
    /// Bytes.
    pub length: u64,
}

/// All mappings of guest memory, in the order of the memory file.
#[derive(Debug)]
pub struct Layout {
    spans: Vec<Span>,
    /// Bytes of a page: what is given at the least.
    pub unit: u64,
    /// Bytes of all.
    pub length: u64,
    /// Whether pages of zeros take no memory until they are written to: no file is behind the memory.
    pub free_zeros: bool,
}

impl Layout {
    /// The mappings of `memory`, which is of pages of `unit` bytes.
    pub fn of(memory: &GuestMemory, unit: u64) -> Option<Self> {
        let mut spans = Vec::new();
        let mut start = 0;
        for region in memory.iter() {
            let host = region.get_host_address(MemoryRegionAddress(0)).ok()? as u64;
            spans.push(Span { host, start, length: region.len() });
            start += region.len();
        }
        let free_zeros = memory.iter().all(|region| region.file_offset().is_none());
        Some(Self { free_zeros, ..Self::from_spans(spans, unit) })
    }

    /// These mappings of private memory, which follow one another in the memory.
    pub fn from_spans(spans: Vec<Span>, unit: u64) -> Self {
        let length = spans.iter().map(|span| span.length).sum();
        Self { spans, unit, length, free_zeros: true }
    }

    /// The mappings.
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }

    /// Where in the memory the page at a host address is.
    pub fn offset_of(&self, host: u64) -> Option<u64> {
        self.spans.iter().find_map(|span| {
            let inside = host.checked_sub(span.host).filter(|inside| *inside < span.length)?;
            Some((span.start + inside) / self.unit * self.unit)
        })
    }

    /// The host address of a place in the memory, and how many bytes follow in the same mapping.
    pub fn host_of(&self, offset: u64) -> Option<(u64, u64)> {
        self.spans.iter().find_map(|span| {
            let inside = offset.checked_sub(span.start).filter(|inside| *inside < span.length)?;
            Some((span.host + inside, span.length - inside))
        })
    }

    /// The parts of the memory in a range of host addresses, in whole pages that are all inside of it.
    pub fn offsets_in(&self, host: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        self.spans.iter().filter_map(move |span| {
            let start = host.start.max(span.host).checked_sub(span.host)?.next_multiple_of(self.unit);
            let end = host.end.min(span.host + span.length).checked_sub(span.host)? / self.unit * self.unit;
            (start < end).then(|| span.start + start..span.start + end)
        })
    }
}

/// One bit for each page of the memory.
#[derive(Debug)]
pub struct PageSet {
    words: Vec<u64>,
    unit: u64,
    count: u64,
}

impl PageSet {
    /// None of the pages of `unit` bytes of a memory of `length`.
    pub fn new(length: u64, unit: u64) -> Self {
        let words = length.div_ceil(unit).div_ceil(u64::from(u64::BITS));
        Self { words: vec![0; usize::try_from(words).unwrap_or_default()], unit, count: 0 }
    }

    /// How many pages are in the set.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// How many pages are in this set and in another one of the same memory.
    pub fn count_of_both(&self, other: &Self) -> u64 {
        self.words.iter().zip(&other.words).map(|(a, b)| u64::from((a & b).count_ones())).sum()
    }

    /// Whether the page at an offset of the memory is.
    pub fn has(&self, offset: u64) -> bool {
        let (word, bit) = self.place(offset);
        self.words.get(word).is_some_and(|word| word & bit != 0)
    }

    /// Adds the page at an offset, or takes it out; true when that changed something.
    pub fn set(&mut self, offset: u64, is_in: bool) -> bool {
        let (word, bit) = self.place(offset);
        let Some(word) = self.words.get_mut(word) else { return false };
        if (*word & bit != 0) == is_in {
            return false;
        }
        *word ^= bit;
        if is_in {
            self.count += 1;
        } else {
            self.count -= 1;
        }
        true
    }

    /// As [`set`](Self::set), for all pages of a range.
    pub fn set_range(&mut self, range: Range<u64>, is_in: bool) {
        let mut offset = range.start;
        while offset < range.end {
            self.set(offset, is_in);
            offset += self.unit;
        }
    }

    /// Whether the page at the start of `range` is in the set, and where the pages of which that is true end.
    pub fn run(&self, range: Range<u64>) -> (bool, u64) {
        let is_in = self.has(range.start);
        let mut end = range.start + self.unit;
        while end < range.end && self.has(end) == is_in {
            end += self.unit;
        }
        (is_in, end.min(range.end))
    }

    fn place(&self, offset: u64) -> (usize, u64) {
        let page = offset / self.unit;
        let word = usize::try_from(page / u64::from(u64::BITS)).unwrap_or(usize::MAX);
        (word, 1 << (page % u64::from(u64::BITS)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 4096;

    fn layout(unit: u64) -> Layout {
        let spans = vec![
            Span { host: 0x10_0000_0000, start: 0, length: 8 << 20 },
            Span { host: 0x20_0000_0000, start: 8 << 20, length: 4 << 20 },
        ];
        Layout::from_spans(spans, unit)
    }

    #[test]
    fn addresses_are_found_both_ways() {
        let layout = layout(PAGE);
        assert_eq!(layout.offset_of(0x10_0000_1fff), Some(PAGE));
        assert_eq!(layout.offset_of(0x20_0000_0000), Some(8 << 20));
        assert_eq!(layout.host_of((8 << 20) - PAGE), Some((0x10_007f_f000, PAGE)));
        assert_eq!(layout.host_of(8 << 20), Some((0x20_0000_0000, 4 << 20)));
        for nowhere in [0, 0xf_ffff_ffff, 0x10_0080_0000, 0x20_0040_0000, u64::MAX] {
            assert_eq!(layout.offset_of(nowhere), None, "{nowhere:#x}");
        }
        assert_eq!(layout.host_of(12 << 20), None);
    }

    #[test]
    fn a_range_is_cut_to_the_whole_pages_of_each_mapping() {
        let small: Vec<_> = layout(PAGE).offsets_in(0x10_007f_f000..0x20_0000_2000).collect();
        assert_eq!(small, [(8 << 20) - PAGE..8 << 20, 8 << 20..(8 << 20) + 2 * PAGE]);
        let huge: Vec<_> = layout(2 << 20).offsets_in(0x10_0010_0000..0x10_0050_0000).collect();
        assert_eq!(huge.iter().map(|range| (range.start, range.end)).collect::<Vec<_>>(), [(2 << 20, 4 << 20)]);
        assert_eq!(layout(PAGE).offsets_in(0..0x1000).count(), 0);
        assert_eq!(layout(PAGE).offsets_in(0x30_0000_0000..u64::MAX).count(), 0);
    }

    #[test]
    fn a_set_has_its_pages_and_their_number() {
        let mut set = PageSet::new(200 * PAGE, PAGE);
        assert!(set.set(130 * PAGE + 5, true));
        assert!(!set.set(130 * PAGE, true));
        set.set_range(2 * PAGE..5 * PAGE, true);
        assert_eq!(set.count(), 4);
        let mut other = PageSet::new(200 * PAGE, PAGE);
        other.set_range(4 * PAGE..7 * PAGE, true);
        assert_eq!(set.count_of_both(&other), 1);
        assert_eq!(set.run(0..200 * PAGE), (false, 2 * PAGE));
        assert_eq!(set.run(2 * PAGE..200 * PAGE), (true, 5 * PAGE));
        assert_eq!(set.run(3 * PAGE..4 * PAGE), (true, 4 * PAGE));
        set.set_range(0..200 * PAGE, false);
        assert_eq!(set.count(), 0);
        // Past the end there is nothing.
        assert!(!set.set(1 << 40, true) && !set.has(1 << 40));
    }
}
