//! Which pages of memory come from which snapshot.

use std::ops::Range;

use super::layers::LayersError;
use crate::memory::PAGE_SIZE;

/// Pages of one snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The first of them, counted over all of memory as its file has it.
    pub page: u64,
    /// How many; not none.
    pub count: u64,
    /// The snapshot's place, from the topmost on.
    pub layer: usize,
}

impl Piece {
    /// Checks the runs of pages of a manifest, for a memory of `length` bytes.
    pub fn list(runs: &[(u64, u64)], length: u64, layer: usize) -> Result<Vec<Self>, LayersError> {
        let mut end = 0;
        let piece = |(page, count): &(u64, u64)| {
            let next = page.checked_add(*count).filter(|next| *next <= length / PAGE_SIZE && next > page);
            match next {
                Some(next) if *page >= end => end = next,
                _ => return Err(LayersError::Pages(*page)),
            }
            Ok(Self { page: *page, count: *count, layer })
        };
        runs.iter().map(piece).collect()
    }

    /// Bytes of memory, as its file has it.
    pub fn bytes(&self) -> Range<u64> {
        self.page * PAGE_SIZE..self.end() * PAGE_SIZE
    }

    fn end(&self) -> u64 {
        self.page + self.count
    }
}

/// Both lists as one in order: of `lower` only what `upper` does not cover.
pub fn beneath(upper: Vec<Piece>, lower: &[Piece]) -> Vec<Piece> {
    let mut merged = Vec::with_capacity(upper.len() + lower.len());
    let mut upper = upper.into_iter().peekable();
    for piece in lower {
        let mut page = piece.page;
        while page < piece.end() {
            // Those before are done with, but the last may reach into the piece.
            match upper.peek() {
                Some(cover) if cover.page <= page => {
                    page = page.max(cover.end());
                    // One that reaches beyond covers of the next as well.
                    if cover.end() > piece.end() {
                        break;
                    }
                    merged.extend(upper.next());
                }
                next => {
                    let end = next.map_or(piece.end(), |cover| cover.page.min(piece.end()));
                    merged.push(Piece { page, count: end - page, ..*piece });
                    page = end;
                }
            }
        }
    }
    merged.extend(upper);
    merged
}

/// The runs of pages of which the bit is set, counted from `first` on: their first page, and how many.
pub fn runs(words: &[u64], pages: u64, first: u64) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for (word, base) in words.iter().zip((0..pages).step_by(64)) {
        let mut rest = *word;
        while rest != 0 {
            let page = base + u64::from(rest.trailing_zeros());
            rest &= rest - 1;
            if page >= pages {
                break;
            }
            match runs.last_mut() {
                Some((start, count)) if *start + *count == first + page => *count += 1,
                _ => runs.push((first + page, 1)),
            }
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn piece(page: u64, count: u64, layer: usize) -> Piece {
        Piece { page, count, layer }
    }

    #[test]
    fn what_is_above_covers_what_is_below() {
        let upper = vec![piece(2, 2, 0), piece(6, 1, 0), piece(20, 5, 0)];
        let lower = [piece(0, 3, 1), piece(3, 5, 1), piece(21, 1, 1), piece(24, 3, 1)];
        let expected = [(0, 2, 1), (2, 2, 0), (4, 2, 1), (6, 1, 0), (7, 1, 1), (20, 5, 0), (25, 2, 1)]
            .map(|(a, b, c)| piece(a, b, c));
        assert_eq!(beneath(upper, &lower), expected);
    }

    #[test]
    fn lists_of_pages_are_in_order_and_in_memory() {
        let list = |runs: &[(u64, u64)]| Piece::list(runs, 16 * PAGE_SIZE, 0);
        list(&[(0, 1), (1, 2), (15, 1)]).expect("in order");
        for wrong in [&[(16, 1)][..], &[(15, 2)], &[(3, 0)], &[(3, 2), (4, 1)], &[(4, 1), (3, 1)], &[(1, u64::MAX)]] {
            assert!(matches!(list(wrong), Err(LayersError::Pages(_))), "{wrong:?}");
        }
    }

    #[test]
    fn bits_become_runs_and_those_past_the_end_nothing() {
        assert_eq!(runs(&[0b1101, 1 << 63, 0b11], 130, 100), [(100, 1), (102, 2), (227, 3)]);
        assert_eq!(runs(&[u64::MAX], 3, 0), [(0, 3)]);
        assert_eq!(runs(&[0, 0], 128, 0), []);
    }

    proptest! {
        /// Against a page at a time.
        #[test]
        fn merging_is_what_each_page_says(words in prop::collection::vec(prop::collection::vec(any::<u64>(), 3), 1..5)) {
            const PAGES: usize = 170;
            let mut merged = Vec::new();
            let mut expected = vec![None; PAGES];
            for (layer, words) in words.iter().enumerate() {
                let list = Piece::list(&runs(words, PAGES as u64, 0), PAGES as u64 * PAGE_SIZE, layer).expect("in order");
                merged = beneath(merged, &list);
                for page in 0..PAGES {
                    if words[page / 64] >> (page % 64) & 1 == 1 && expected[page].is_none() {
                        expected[page] = Some(layer);
                    }
                }
            }
            let mut found = vec![None; PAGES];
            let mut end = 0;
            for Piece { page, count, layer } in merged {
                prop_assert!(page >= end && count > 0);
                end = page + count;
                let at = |page: u64| usize::try_from(page).expect("small");
                found[at(page)..at(end)].fill(Some(layer));
            }
            prop_assert_eq!(found, expected);
        }
    }
}
