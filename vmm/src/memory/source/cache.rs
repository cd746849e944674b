//! A bounded cache of unpacked chunks in a file, which any number of processes share without a lock.
//!
//! A chunk has eight places that follow from its checksum: where a quarter of the cache is used, one chunk in 65,000
//! finds none of them free. A place has the checksum and the chunk, and what is read is compared with what is wanted:
//! whatever others write there meanwhile, the worst is that it is not found.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use sha2::{Digest, Sha256};

use super::SourceError;
use super::chunked::ChunkStore;
use super::index::{Chunk, ChunkIndex, Sum};

/// Bytes of a checksum before each chunk.
const SUM: u64 = 32;

/// Places that a chunk may have: as many as its checksum has words of four bytes.
const PLACES: usize = 8;

/// A cache of chunks of one size.
#[derive(Debug)]
pub struct ChunkCache {
    file: File,
    slot: u64,
    slots: u64,
    /// Which place of a chunk is overwritten next, where none is free.
    next: usize,
}

impl ChunkCache {
    /// The cache in the file at `path`, which is made where it does not exist, of chunks of `chunk` bytes. It takes at most `limit` bytes, of which
    /// those of a chunk are the least.
    pub fn open(path: &Path, chunk: u64, limit: u64) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW);
        let file = options.open(path)?;
        let slot = chunk + SUM;
        let slots = limit / slot;
        if slots == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the cache has no room for a chunk"));
        }
        // With another limit most chunks are elsewhere.
        file.set_len(slots * slot)?;
        Ok(Self { file, slot, slots, next: 0 })
    }

    /// The chunk with this checksum and length, if it is there.
    pub fn get(&mut self, sum: &Sum, length: u64) -> Option<Vec<u8>> {
        self.places(sum).into_iter().find_map(|place| {
            self.sum_at(place).filter(|found| found == sum)?;
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
        let places = self.places(sum);
        // One that is its own may be damaged.
        let own_or_free = |place: &&u64| self.sum_at(**place).is_none_or(|found| found == *sum || found == [0; 32]);
        let place = places.iter().find(own_or_free).or(places.get(self.next));
        let Some(place) = place.copied() else { return };
        self.next = (self.next + 1) % PLACES;
        let written = self.file.write_all_at(sum, place).and_then(|()| self.file.write_all_at(bytes, place + SUM));
        if let Err(error) = written {
            tracing::debug!(%error, "A chunk cannot be cached");
        }
    }

    /// Whether all chunks of `index` are there now. Reads them.
    pub fn has_all(&mut self, index: &ChunkIndex) -> bool {
        let starts = (0..index.length()).step_by(usize::try_from(index.chunk_size()).unwrap_or(usize::MAX));
        let mut chunks = starts.filter_map(|start| Some((index.at(start)?.sum, index.length_at(start))));
        chunks.all(|(sum, length)| self.get(&sum, length).is_some())
    }

    fn sum_at(&self, place: u64) -> Option<Sum> {
        let mut found = [0; 32];
        self.file.read_exact_at(&mut found, place).ok().map(|()| found)
    }

    fn places(&self, sum: &Sum) -> [u64; PLACES] {
        let (words, _) = sum.as_chunks::<4>();
        let word = |index: usize| words.get(index).map_or(0, |word| u32::from_le_bytes(*word));
        std::array::from_fn(|index| u64::from(word(index)) % self.slots * self.slot)
    }
}

/// Who has no chunks: what the cache has is all that there is.
#[derive(Debug)]
pub struct NoChunks;

impl ChunkStore for NoChunks {
    fn want(&mut self, chunks: &[&Chunk]) -> Result<(), SourceError> {
        if chunks.is_empty() { Ok(()) } else { Err(SourceError::Gone(io::ErrorKind::NotConnected.into())) }
    }

    fn take(&mut self, _: &Chunk, _: &mut Vec<u8>) -> Result<(), SourceError> {
        Err(SourceError::Nonsense)
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
        assert!((15..=20).contains(&found), "{found}");
        assert!(ChunkCache::open(&path, 4096, 4096 + SUM - 1).is_err());
        ChunkCache::open(&path, 4096, 4096 + SUM).expect("room for one");
    }

    #[test]
    fn a_quarter_of_the_cache_has_room_for_all_that_is_put_there() {
        let directory = tempfile::tempdir().expect("directory");
        let mut cache = ChunkCache::open(&directory.path().join("cache"), 4096, 1000 * (4096 + SUM)).expect("open");
        for number in 1..=250 {
            let (sum, bytes) = chunk(number);
            cache.put(&sum, &bytes);
        }
        let found = (1..=250).filter(|number| cache.get(&chunk(*number).0, 4096).is_some()).count();
        assert_eq!(found, 250);
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
