//! Which chunks make up a memory, by their checksums: the part of a template that is trusted when the chunks are not.
//!
//! The file: a header of [`HEADER_LEN`] bytes, then a [`ChunkIndex`] in postcard's format.
//!
//! | bytes | what |
//! | --- | --- |
//! | 8 | [`MAGIC`] |
//! | 4 | version, little-endian |
//! | 32 | SHA-256 of the version and what follows the header |

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::arch::x86_64::layout::MAX_MEMORY;

/// The first bytes of an index.
pub const MAGIC: [u8; 8] = *b"INLAYCI\x01";

/// The version that is written and read.
pub const VERSION: u32 = 1;

/// Bytes before the index.
pub const HEADER_LEN: usize = 44;

/// Chunks that are as small as a page, and as large as a huge one. A fault waits for a whole chunk.
pub const CHUNK_SIZES: std::ops::RangeInclusive<u32> = 4096..=2 << 20;

/// What a fault waits for is unpacked in some 50 µs, and packs well.
pub const DEFAULT_CHUNK: u32 = 64 << 10;

/// Largest index: that of 64 GiB in chunks of the default size, none of them twice.
pub const MAX_LEN: u64 = 64 << 20;

/// SHA-256 of a chunk as it is in memory.
pub type Sum = [u8; 32];

/// A chunk as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chunk {
    /// What it is.
    pub sum: Sum,
    /// Where it starts in the file of chunks.
    pub offset: u64,
    /// Bytes there, of one zstd frame.
    pub stored: u32,
}

/// The chunks of a memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkIndex {
    /// Bytes of the memory.
    length: u64,
    /// Bytes of a chunk; the last one may be shorter.
    chunk: u32,
    /// For each place in the memory 0, which is a chunk of zeros, or the number of one of `chunks`, from 1.
    places: Vec<u32>,
    /// Each chunk once.
    chunks: Vec<Chunk>,
}

/// Why bytes are no index.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// Something else, or too long to be one.
    #[error("The index of chunks does not begin as one does, or is too long")]
    Magic,
    /// Another version.
    #[error("The index of chunks has version {0}; version {VERSION} can be read")]
    Version(u32),
    /// Changed since it was written.
    #[error("The index of chunks is damaged: its checksum does not fit")]
    Checksum,
    /// Right checksum, wrong contents.
    #[error("The index of chunks has the right checksum and makes no sense")]
    Contents,
}

impl ChunkIndex {
    /// These chunks, if they make sense.
    pub fn new(length: u64, chunk: u32, places: Vec<u32>, chunks: Vec<Chunk>) -> Result<Self, IndexError> {
        let index = Self { length, chunk, places, chunks };
        if index.makes_sense() { Ok(index) } else { Err(IndexError::Contents) }
    }

    /// Bytes of the memory.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Bytes of a chunk.
    pub fn chunk_size(&self) -> u64 {
        self.chunk.into()
    }

    /// All chunks.
    pub fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    /// The chunk in which an offset of the memory lies; none is zeros.
    pub fn at(&self, offset: u64) -> Option<&Chunk> {
        let place = usize::try_from(offset / self.chunk_size()).ok()?;
        let number = self.places.get(place)?.checked_sub(1)?;
        self.chunks.get(usize::try_from(number).ok()?)
    }

    /// Bytes of the chunk in which an offset lies, as it is in memory.
    pub fn length_at(&self, offset: u64) -> u64 {
        let start = offset / self.chunk_size() * self.chunk_size();
        self.chunk_size().min(self.length.saturating_sub(start))
    }

    /// Bytes of the memory that are in chunks, and not zeros.
    pub fn stored_bytes(&self) -> u64 {
        let starts = (0..).map(|place| place * self.chunk_size()).zip(&self.places);
        starts.filter(|(_, number)| **number != 0).map(|(start, _)| self.length_at(start)).sum()
    }

    /// The bytes of the file.
    pub fn encode(&self) -> Result<Vec<u8>, IndexError> {
        let body = postcard::to_stdvec(self).map_err(|_| IndexError::Contents)?;
        let mut bytes = Vec::with_capacity(HEADER_LEN + body.len());
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(checksum(VERSION, &body));
        bytes.extend(body);
        Ok(bytes)
    }

    /// The index in a file with these bytes. Pure: whatever the bytes are, it returns.
    pub fn decode(bytes: &[u8]) -> Result<Self, IndexError> {
        let (magic, rest) = bytes.split_first_chunk::<8>().ok_or(IndexError::Magic)?;
        let (version, rest) = rest.split_first_chunk::<4>().ok_or(IndexError::Magic)?;
        let (sum, body) = rest.split_first_chunk::<32>().ok_or(IndexError::Magic)?;
        let version = u32::from_le_bytes(*version);
        if *magic != MAGIC || bytes.len() as u64 > MAX_LEN {
            return Err(IndexError::Magic);
        }
        if version != VERSION {
            return Err(IndexError::Version(version));
        }
        if *sum != checksum(version, body) {
            return Err(IndexError::Checksum);
        }
        match postcard::take_from_bytes::<Self>(body) {
            Ok((index, [])) if index.makes_sense() => Ok(index),
            _ => Err(IndexError::Contents),
        }
    }

    fn makes_sense(&self) -> bool {
        let sizes = CHUNK_SIZES.contains(&self.chunk) && self.chunk.is_power_of_two() && self.length <= MAX_MEMORY;
        let places = sizes && self.places.len() as u64 == self.length.div_ceil(self.chunk_size());
        let known = |number: &u32| u64::from(*number) <= self.chunks.len() as u64;
        let stored = |chunk: &Chunk| {
            chunk.stored > 0
                && chunk.stored <= most_stored(self.chunk)
                && chunk.offset.checked_add(chunk.stored.into()).is_some()
        };
        places && self.places.iter().all(known) && self.chunks.iter().all(stored)
    }
}

/// Bytes that a chunk takes at most when it is packed and does not get smaller (zstd's own bound is below).
pub const fn most_stored(chunk: u32) -> u32 {
    chunk + chunk / 128 + 512
}

fn checksum(version: u32, body: &[u8]) -> Sum {
    Sha256::new().chain_update(version.to_le_bytes()).chain_update(body).finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index() -> ChunkIndex {
        let chunk = |byte, offset| Chunk { sum: [byte; 32], offset, stored: 100 };
        let chunks = vec![chunk(1, 0), chunk(2, 100)];
        ChunkIndex::new(5 * 65536 - 4096, 65536, vec![0, 1, 2, 1, 2], chunks).expect("index")
    }

    #[test]
    fn places_have_their_chunks() {
        let index = index();
        assert_eq!(index.at(65535), None);
        assert_eq!(index.at(65536).map(|chunk| chunk.sum[0]), Some(1));
        assert_eq!(index.at(5 * 65536 - 4097).map(|chunk| chunk.sum[0]), Some(2));
        assert_eq!(index.at(5 * 65536), None);
        assert_eq!(index.stored_bytes(), 4 * 65536 - 4096);
        assert_eq!((index.length_at(65537), index.length_at(4 * 65536)), (65536, 65536 - 4096));
    }

    #[test]
    fn each_truncation_and_each_flipped_bit_is_refused() {
        let bytes = index().encode().expect("encode");
        assert_eq!(ChunkIndex::decode(&bytes).expect("decode"), index());
        for length in 0..bytes.len() {
            assert!(ChunkIndex::decode(&bytes[..length]).is_err(), "{length}");
        }
        for position in 0..bytes.len() {
            for bit in 0..8 {
                let mut flipped = bytes.clone();
                flipped[position] ^= 1 << bit;
                assert!(ChunkIndex::decode(&flipped).is_err(), "{position} {bit}");
            }
        }
    }

    #[test]
    fn nonsense_is_refused() {
        let with = |adapt: &dyn Fn(&mut ChunkIndex)| {
            let mut other = index();
            adapt(&mut other);
            ChunkIndex::decode(&other.encode().expect("encode"))
        };
        with(&|_| ()).expect("sense");
        with(&|index| index.chunks[0].stored = most_stored(65536)).expect("the most");
        let nonsense: [&dyn Fn(&mut ChunkIndex); 8] = [
            &|index| index.chunk = 2048,
            &|index| index.chunk = 4 << 20,
            &|index| index.chunk = 65536 + 4096,
            &|index| index.length = MAX_MEMORY + 1,
            &|index| index.places[0] = 3,
            &|index| index.places.truncate(4),
            &|index| index.chunks[0].stored = most_stored(65536) + 1,
            &|index| index.chunks[1].offset = u64::MAX,
        ];
        for (position, adapt) in nonsense.iter().enumerate() {
            assert!(matches!(with(adapt), Err(IndexError::Contents)), "{position}");
        }
    }
}
