//! A bounded cache of unpacked chunks in a file, which any number of processes share without a lock.
//!
//! A chunk has two places that follow from its checksum. A place has the checksum and the chunk, and what is read is
//! compared with what is wanted: whatever others write there meanwhile, the worst is that it is not found.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use sha2::{Digest, Sha256};

use super::index::Sum;

/// Bytes of a checksum before each chunk.
const SUM: u64 = 32;

/// A cache of chunks of one size.
#[derive(Debug)]
pub struct ChunkCache {
    file: File,
    slot: u64,
    slots: u64,
    /// Which of the two places of a chunk is overwritten next.
    second: bool,
}

impl ChunkCache {
    /// The cache in the file at `path`, which is made where it does not exist, of chunks of `chunk` bytes. It takes at most `limit` bytes, of which
    /// those of a chunk are the least.
    pub fn open(path: &Path, chunk: u64, limit: u64) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        let slot = chunk + SUM;
        let slots = limit / slot;
        if slots == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the cache has no room for a chunk"));
        }
        // With another limit most chunks are elsewhere.
        file.set_len(slots * slot)?;
        Ok(Self { file, slot, slots, second: false })
    }

    /// The chunk with this checksum and length, if it is there.
    pub fn get(&mut self, sum: &Sum, length: u64) -> Option<Vec<u8>> {
        self.places(sum).into_iter().find_map(|place| {
            let mut found = [0; 32];
            self.file.read_exact_at(&mut found, place).ok().filter(|()| found == *sum)?;
            let mut bytes = vec![0; usize::try_from(length).ok()?];
            self.file.read_exact_at(&mut bytes, place + SUM).ok()?;
            (Sum::from(Sha256::digest(&bytes)) == *sum).then_some(bytes)
        })
    }

    /// Puts a chunk there, if that works.
    pub fn put(&mut self, sum: &Sum, bytes: &[u8]) {
        if bytes.len() as u64 > self.slot - SUM {
            return;
        }
        let [first, second] = self.places(sum);
        let place = if self.second { second } else { first };
        self.second = !self.second;
        let written = self.file.write_all_at(sum, place).and_then(|()| self.file.write_all_at(bytes, place + SUM));
        if let Err(error) = written {
            tracing::debug!(%error, "A chunk cannot be cached");
        }
    }

    fn places(&self, sum: &Sum) -> [u64; 2] {
        let (halves, _) = sum.as_chunks::<8>();
        let place =
            |index: usize| halves.get(index).map_or(0, |half| u64::from_le_bytes(*half)) % self.slots * self.slot;
        [place(0), place(1)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(number: u8) -> (Sum, Vec<u8>) {
        let bytes = vec![number; 4096];
        (Sha256::digest(&bytes).into(), bytes)
    }

    #[test]
    fn chunks_are_found_and_its_size_has_a_limit() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("cache");
        let limit = 20 * (4096 + SUM) + 5;
        let mut cache = ChunkCache::open(&path, 4096, limit).expect("open");
        for number in 1..=200 {
            let (sum, bytes) = chunk(number);
            assert_eq!(cache.get(&sum, 4096), None);
            cache.put(&sum, &bytes);
            assert_eq!(cache.get(&sum, 4096), Some(bytes));
        }
        assert!(std::fs::metadata(&path).expect("metadata").len() <= limit);
        // Another process finds what is there.
        let mut other = ChunkCache::open(&path, 4096, limit).expect("open");
        let found = (1..=200).filter(|number| other.get(&chunk(*number).0, 4096).is_some()).count();
        assert!((10..=20).contains(&found), "{found}");
        assert!(ChunkCache::open(&path, 4096, 4096 + SUM - 1).is_err());
        ChunkCache::open(&path, 4096, 4096 + SUM).expect("room for one");
    }

    #[test]
    fn what_was_damaged_or_half_written_is_not_found() {
        let directory = tempfile::tempdir().expect("directory");
        let mut cache = ChunkCache::open(&directory.path().join("cache"), 4096, 4096 + SUM).expect("open");
        let (sum, bytes) = chunk(7);
        cache.put(&sum, &bytes);
        cache.file.write_all_at(&[8], SUM + 4095).expect("damage");
        assert_eq!(cache.get(&sum, 4096), None);
        cache.put(&sum, &bytes);
        assert_eq!(cache.get(&sum, 4096), Some(bytes.clone()));
        // Of another length it is another chunk, and one that is too long is not taken.
        assert_eq!(cache.get(&sum, 4095), None);
        cache.put(&sum, &[1; 4097]);
        assert_eq!(cache.get(&sum, 4096), Some(bytes));
    }
}
