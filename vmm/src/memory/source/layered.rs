//! The memory files of a snapshot that is the difference to another one.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;

use super::{FileSource, Run, Source, SourceError};

/// Pieces of files over another one: each at the place in its file that it has in memory.
#[derive(Debug)]
pub struct LayeredSource {
    whole: FileSource,
    differences: Vec<FileSource>,
    /// In order and apart, with the place of their file in `differences`.
    pieces: Vec<(Range<u64>, usize)>,
}

impl LayeredSource {
    /// `pieces` in order over `whole`, each with the number of its layer and that layer's file.
    pub fn new(whole: FileSource, pieces: &[(Range<u64>, usize, &File)]) -> io::Result<Self> {
        let mut places = BTreeMap::new();
        let mut differences = Vec::new();
        for (_, layer, file) in pieces {
            if !places.contains_key(layer) {
                places.insert(*layer, differences.len());
                differences.push(FileSource::new(file.try_clone()?)?);
            }
        }
        let place = |(range, layer, _): &(Range<u64>, usize, &File)| Some((range.clone(), *places.get(layer)?));
        let pieces = pieces.iter().filter_map(place).collect();
        Ok(Self { whole, differences, pieces })
    }

    /// The difference in which an offset is, none for the whole file; and where the next part begins.
    fn part(&self, offset: u64) -> (Option<usize>, u64) {
        let next = self.pieces.partition_point(|(range, _)| range.end <= offset);
        match self.pieces.get(next) {
            Some((range, place)) if range.start <= offset => (Some(*place), range.end),
            Some((range, _)) => (None, range.start),
            None => (None, self.whole.length()),
        }
    }
}

impl Source for LayeredSource {
    fn length(&self) -> u64 {
        self.whole.length()
    }

    fn run(&self, offset: u64) -> Run {
        let (place, end) = self.part(offset);
        let file = place.and_then(|place| self.differences.get(place)).unwrap_or(&self.whole);
        let run = file.run(offset);
        Run { end: run.end.min(end), ..run }
    }

    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), SourceError> {
        let (mut rest, mut at) = (buffer, offset);
        while !rest.is_empty() {
            let (place, end) = self.part(at);
            let length = usize::try_from(end.saturating_sub(at)).unwrap_or(usize::MAX).min(rest.len());
            // Behind the end there is nothing, and the file says so.
            let length = if length == 0 { rest.len() } else { length };
            let (part, others) = rest.split_at_mut_checked(length).unwrap_or_default();
            match place.and_then(|place| self.differences.get_mut(place)) {
                Some(difference) => difference.read(at, part)?,
                None => self.whole.read(at, part)?,
            }
            at += length as u64;
            rest = others;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    const PAGE: u64 = 4096;
    const PAGES: u64 = 64;

    fn file(pages: Range<u64>, byte: u8) -> File {
        let file = tempfile::tempfile().expect("file");
        file.set_len(PAGES * PAGE).expect("length");
        pages.for_each(|page| file.write_all_at(&[byte; 4096], page * PAGE).expect("write"));
        file
    }

    #[test]
    fn each_page_comes_from_the_piece_that_covers_it() {
        let (whole, upper, lower) = (file(0..32, 1), file(0..PAGES, 2), file(0..PAGES, 3));
        let pieces =
            [(2 * PAGE..4 * PAGE, 5, &lower), (4 * PAGE..5 * PAGE, 0, &upper), (40 * PAGE..PAGES * PAGE, 5, &lower)];
        let mut source = LayeredSource::new(FileSource::new(whole).expect("source"), &pieces).expect("source");
        let expected = |page: u64| match page {
            2 | 3 | 40.. => 3,
            4 => 2,
            5..32 | 0 | 1 => 1,
            _ => 0,
        };
        let mut all = vec![0xaa; usize::try_from(PAGES * PAGE).expect("small")];
        source.read(0, &mut all).expect("read");
        for (page, bytes) in (0..).zip(all.chunks(4096)) {
            assert!(bytes.iter().all(|byte| *byte == expected(page)), "{page}");
            let mut one = [0xaa; 4096];
            source.read(page * PAGE, &mut one).expect("read");
            assert_eq!(one[0], expected(page));
            let run = source.run(page * PAGE);
            assert!(run.end > page * PAGE && run.end <= source.length());
            assert!(!run.zeros || expected(page) == 0, "{page}");
        }
        assert!(source.read(PAGES * PAGE, &mut [0; 1]).is_err());
    }
}
