//! Which blocks are plugged.

use std::ops::Range;

/// Most runs of plugged blocks with gaps between them. Each costs the host process mappings, of which it
/// has 65,530 by default and needs some for itself. Linux plugs neighbours.
pub const MAX_RUNS: u32 = 4096;

const BITS: u64 = u64::BITS as u64;

/// What blocks have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockState {
    /// All are plugged.
    Plugged,
    /// None is.
    Unplugged,
    /// Some are.
    Mixed,
}

/// A bit for each block.
#[derive(Debug)]
pub struct Blocks {
    words: Vec<u64>,
    count: u64,
    plugged: u64,
    runs: u32,
}

impl Blocks {
    /// `count` blocks, none of them plugged.
    pub fn new(count: u64) -> Self {
        let words = usize::try_from(count.div_ceil(BITS)).unwrap_or_default();
        Self { words: vec![0; words], count, plugged: 0, runs: 0 }
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// How many are plugged.
    pub fn plugged(&self) -> u64 {
        self.plugged
    }

    fn get(&self, index: u64) -> bool {
        let word = usize::try_from(index.div_euclid(BITS)).ok().and_then(|at| self.words.get(at));
        word.is_some_and(|word| word & mask(index) != 0)
    }

    /// What the blocks of a range that is not empty have in common.
    pub fn state(&self, mut range: Range<u64>) -> BlockState {
        let first = range.next().is_some_and(|index| self.get(index));
        match (range.all(|index| self.get(index) == first), first) {
            (true, true) => BlockState::Plugged,
            (true, false) => BlockState::Unplugged,
            (false, _) => BlockState::Mixed,
        }
    }

    /// Runs of plugged blocks that there would be after a range, all of one state, has changed it.
    pub fn runs_after(&self, range: &Range<u64>, plug: bool) -> u32 {
        let before = range.start.checked_sub(1).is_some_and(|index| self.get(index));
        let after = self.get(range.end);
        // A range between two runs joins them or tears one apart; one beside a run moves its edge.
        let (more, fewer) = match (before, after, plug) {
            (false, false, true) | (true, true, false) => (1, 0),
            (true, true, true) | (false, false, false) => (0, 1),
            _ => (0, 0),
        };
        self.runs.saturating_add(more).saturating_sub(fewer)
    }

    /// Changes a range whose blocks are all in the other state.
    pub fn set(&mut self, range: Range<u64>, plug: bool) {
        self.runs = self.runs_after(&range, plug);
        let len = range.end.saturating_sub(range.start);
        self.plugged = if plug { self.plugged.saturating_add(len) } else { self.plugged.saturating_sub(len) };
        for index in range {
            let word = usize::try_from(index.div_euclid(BITS)).ok().and_then(|at| self.words.get_mut(at));
            if let Some(word) = word {
                *word = if plug { *word | mask(index) } else { *word & !mask(index) };
            }
        }
    }

    /// Unplugs all.
    pub fn clear(&mut self) {
        self.words.fill(0);
        (self.plugged, self.runs) = (0, 0);
    }
}

fn mask(index: u64) -> u64 {
    1_u64.rotate_left(u32::try_from(index.rem_euclid(BITS)).unwrap_or_default())
}
