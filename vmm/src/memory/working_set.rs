//! The pages that a guest asks for in its first moments after a restore, in their order: recorded once, and brought ahead
//! of the faults each time after.
//!
//! The file: a header of [`HEADER_LEN`] bytes, then the memory's length and the runs in postcard's format.
//!
//! | bytes | what |
//! | --- | --- |
//! | 8 | [`MAGIC`] |
//! | 4 | version, little-endian |
//! | 32 | SHA-256 of the version and what follows the header |

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::PAGE_SIZE;
use super::lazy::PageSet;

/// The file of the pages that a start asks for, beside the memory file.
pub const WORKING_SET: &str = "working-set";

/// The file of those that a start writes to.
pub const WRITTEN_SET: &str = "written-set";

/// The first bytes of the file.
pub const MAGIC: [u8; 8] = *b"INLAYWS\x01";

/// The version that is written and read.
pub const VERSION: u32 = 1;

/// Bytes before the runs.
pub const HEADER_LEN: usize = 44;

/// Runs that are recorded and read: pages all over a guest of 512 MiB, every other one. What comes later is left out, for it is not what
/// a start waits for.
pub const MAX_RUNS: usize = 1 << 16;

/// Largest file: the most runs with the largest numbers.
pub const MAX_LEN: u64 = 2 << 20;

/// Pages of a memory in the order in which they are needed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkingSet {
    /// Bytes of the memory.
    length: u64,
    /// Pages of 4 KiB: the first, and how many. No page is in two runs.
    runs: Vec<(u64, u64)>,
}

/// Why there is no working set.
#[derive(Debug, thiserror::Error)]
pub enum WorkingSetError {
    /// The file cannot be read.
    #[error("Cannot read the working set {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The file cannot be written.
    #[error("Cannot write the working set {}", path.display())]
    Write {
        /// Which.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Something else, or too long to be one.
    #[error("The working set does not begin as one does, or is too long")]
    Magic,
    /// Another version.
    #[error("The working set has version {0}; version {VERSION} can be read")]
    Version(u32),
    /// Changed since it was written.
    #[error("The working set is damaged: its checksum does not fit")]
    Checksum,
    /// Right checksum, wrong contents.
    #[error("The working set has the right checksum and makes no sense")]
    Contents,
    /// It is of another memory.
    #[error("The working set is of a memory of {present} bytes, not of {expected}")]
    Length {
        /// Of which it is.
        present: u64,
        /// Of which it should be.
        expected: u64,
    },
}

impl WorkingSet {
    /// None of the pages of a memory of `length` bytes.
    pub fn new(length: u64) -> Self {
        Self { length, runs: Vec::new() }
    }

    /// Bytes of the memory whose pages these are.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Bytes of its pages.
    pub fn bytes(&self) -> u64 {
        self.runs.iter().map(|(_, count)| count * PAGE_SIZE).sum()
    }

    /// Whether it has no page.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Its pages as ranges of bytes of the memory, in order.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u64>> {
        self.runs.iter().map(|(first, count)| first * PAGE_SIZE..(first + count) * PAGE_SIZE)
    }

    /// Adds pages that are not in it yet, behind all others. False: it has the most runs already.
    pub fn push(&mut self, range: Range<u64>) -> bool {
        let (first, count) = (range.start / PAGE_SIZE, (range.end - range.start) / PAGE_SIZE);
        if let Some((last, length)) = self.runs.last_mut()
            && *last + *length == first
        {
            *length += count;
            return true;
        }
        let room = self.runs.len() < MAX_RUNS;
        if room {
            self.runs.push((first, count));
        }
        room
    }

    /// Its pages in their order, then those of `later` that it does not have. Two orders of the same starts make the same set whenever
    /// they are merged: `a.merge(a)` is `a`.
    pub fn merge(&self, later: &Self) -> Result<Self, WorkingSetError> {
        if self.length != later.length {
            return Err(WorkingSetError::Length { present: later.length, expected: self.length });
        }
        let mut merged = self.clone();
        let mut pages = PageSet::new(self.length, PAGE_SIZE);
        self.ranges().for_each(|range| pages.set_range(range, true));
        for range in later.ranges() {
            let mut start = range.start;
            while start < range.end {
                let (known, end) = pages.run(start..range.end);
                if !known {
                    pages.set_range(start..end, true);
                    if !merged.push(start..end) {
                        return Ok(merged);
                    }
                }
                start = end;
            }
        }
        Ok(merged)
    }

    /// The bytes of the file.
    pub fn encode(&self) -> Result<Vec<u8>, WorkingSetError> {
        let body = postcard::to_stdvec(self).map_err(|_| WorkingSetError::Contents)?;
        let mut bytes = Vec::with_capacity(HEADER_LEN + body.len());
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(checksum(VERSION, &body));
        bytes.extend(body);
        Ok(bytes)
    }

    /// The working set in a file with these bytes. Pure: whatever the bytes are, it returns.
    pub fn decode(bytes: &[u8]) -> Result<Self, WorkingSetError> {
        let (magic, rest) = bytes.split_first_chunk::<8>().ok_or(WorkingSetError::Magic)?;
        let (version, rest) = rest.split_first_chunk::<4>().ok_or(WorkingSetError::Magic)?;
        let (sum, body) = rest.split_first_chunk::<32>().ok_or(WorkingSetError::Magic)?;
        let version = u32::from_le_bytes(*version);
        if *magic != MAGIC || bytes.len() as u64 > MAX_LEN {
            return Err(WorkingSetError::Magic);
        }
        if version != VERSION {
            return Err(WorkingSetError::Version(version));
        }
        if *sum != checksum(version, body) {
            return Err(WorkingSetError::Checksum);
        }
        match postcard::take_from_bytes::<Self>(body) {
            Ok((set, [])) if set.makes_sense() => Ok(set),
            _ => Err(WorkingSetError::Contents),
        }
    }

    /// Reads the one in the file `name` of the template in `directory`, which has a memory of `length` bytes; none where there is none yet.
    pub fn read(directory: &Path, name: &str, length: u64) -> Result<Option<Self>, WorkingSetError> {
        let path = directory.join(name);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(WorkingSetError::Read { path, source }),
        };
        let mut bytes = Vec::new();
        // One byte more, to see that there is one.
        if let Err(source) = file.take(MAX_LEN + 1).read_to_end(&mut bytes) {
            return Err(WorkingSetError::Read { path, source });
        }
        let set = Self::decode(&bytes)?;
        if set.length != length {
            return Err(WorkingSetError::Length { present: set.length, expected: length });
        }
        Ok(Some(set))
    }

    /// Writes it into the file `name` in `directory`, in place of the one that is there.
    pub fn write(&self, directory: &Path, name: &str) -> Result<(), WorkingSetError> {
        let (path, new) = (directory.join(name), directory.join(format!("{name}.new")));
        let bytes = self.encode()?;
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new);
        file.and_then(|mut file| file.write_all(&bytes).and_then(|()| file.sync_all()))
            .and_then(|()| fs::rename(&new, &path))
            .map_err(|source| WorkingSetError::Write { path, source })
    }

    /// Whether all runs are in the memory, and no page is in two of them.
    fn makes_sense(&self) -> bool {
        let pages = self.length / PAGE_SIZE;
        let inside =
            |(first, count): &(u64, u64)| *count > 0 && first.checked_add(*count).is_some_and(|end| end <= pages);
        if self.length > crate::arch::x86_64::layout::MAX_MEMORY || self.runs.len() > MAX_RUNS {
            return false;
        }
        if !self.runs.iter().all(inside) {
            return false;
        }
        let mut sorted = self.runs.clone();
        sorted.sort_unstable();
        sorted.iter().zip(sorted.iter().skip(1)).all(|((first, count), (next, _))| first + count <= *next)
    }
}

fn checksum(version: u32, body: &[u8]) -> [u8; 32] {
    Sha256::new().chain_update(version.to_le_bytes()).chain_update(body).finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn set(pages: &[(u64, u64)]) -> WorkingSet {
        let mut set = WorkingSet::new(64 * MIB);
        for (first, count) in pages {
            assert!(set.push(first * PAGE_SIZE..(first + count) * PAGE_SIZE));
        }
        set
    }

    #[test]
    fn pages_stay_in_their_order_and_neighbours_become_one_run() {
        let set = set(&[(9, 1), (10, 2), (3, 1), (2, 1)]);
        assert_eq!(set.runs, [(9, 3), (3, 1), (2, 1)]);
        assert_eq!(set.bytes(), 5 * PAGE_SIZE);
        assert_eq!(set.ranges().next(), Some(9 * PAGE_SIZE..12 * PAGE_SIZE));
    }

    #[test]
    fn merging_adds_what_is_new_and_nothing_twice() {
        let (first, second) = (set(&[(9, 3), (2, 1)]), set(&[(1, 4), (11, 3)]));
        let merged = first.merge(&second).expect("merge");
        assert_eq!(merged.runs, [(9, 3), (2, 1), (1, 1), (3, 2), (12, 2)]);
        assert_eq!(merged.merge(&second).expect("merge"), merged);
        assert_eq!(first.merge(&first).expect("merge"), first);
        assert!(merged.makes_sense());
        assert!(matches!(first.merge(&WorkingSet::new(MIB)), Err(WorkingSetError::Length { .. })));
    }

    #[test]
    fn the_number_of_runs_has_a_limit() {
        let mut set = WorkingSet::new(4096 * MIB);
        for index in 0..MAX_RUNS as u64 {
            assert!(set.push(2 * index * PAGE_SIZE..(2 * index + 1) * PAGE_SIZE));
        }
        let next = 2 * MAX_RUNS as u64;
        assert!(!set.push(next * PAGE_SIZE..(next + 1) * PAGE_SIZE));
        // Still longer at its end.
        assert!(set.push((next - 1) * PAGE_SIZE..next * PAGE_SIZE));
        let bytes = set.encode().expect("encode");
        assert!(bytes.len() as u64 <= MAX_LEN);
        assert_eq!(WorkingSet::decode(&bytes).expect("decode"), set);
        set.runs.push((next + 7, 1));
        assert!(matches!(WorkingSet::decode(&set.encode().expect("encode")), Err(WorkingSetError::Contents)));
    }

    #[test]
    fn it_is_read_back_from_its_directory() {
        let directory = tempfile::tempdir().expect("directory");
        let length = 64 * MIB;
        assert_eq!(WorkingSet::read(directory.path(), WORKING_SET, length).expect("none yet"), None);
        let written = set(&[(9, 3), (2, 1)]);
        written.write(directory.path(), WORKING_SET).expect("write");
        assert_eq!(WorkingSet::read(directory.path(), WORKING_SET, length).expect("read"), Some(written));
        assert!(matches!(WorkingSet::read(directory.path(), WORKING_SET, MIB), Err(WorkingSetError::Length { .. })));
        let path = directory.path().join(WORKING_SET);
        fs::write(&path, vec![0; 3 << 20]).expect("write");
        assert!(matches!(WorkingSet::read(directory.path(), WORKING_SET, length), Err(WorkingSetError::Magic)));
    }

    #[test]
    fn each_truncation_and_each_flipped_bit_is_refused() {
        let bytes = set(&[(9, 3), (2, 1)]).encode().expect("encode");
        for length in 0..bytes.len() {
            assert!(WorkingSet::decode(&bytes[..length]).is_err(), "{length}");
        }
        for position in 0..bytes.len() {
            for bit in 0..8 {
                let mut flipped = bytes.clone();
                flipped[position] ^= 1 << bit;
                assert!(WorkingSet::decode(&flipped).is_err(), "{position} {bit}");
            }
        }
    }

    #[test]
    fn nonsense_with_a_right_checksum_is_refused() {
        let pages = 64 * MIB / PAGE_SIZE;
        for runs in [vec![(0, 0)], vec![(pages, 1)], vec![(pages - 1, 2)], vec![(1, u64::MAX)], vec![(5, 3), (7, 1)]] {
            let set = WorkingSet { length: 64 * MIB, runs };
            assert!(
                matches!(WorkingSet::decode(&set.encode().expect("encode")), Err(WorkingSetError::Contents)),
                "{set:?}"
            );
        }
        let set = WorkingSet { length: u64::MAX, runs: vec![(1 << 50, 1)] };
        assert!(WorkingSet::decode(&set.encode().expect("encode")).is_err());
    }
}
