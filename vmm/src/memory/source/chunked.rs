//! A memory in chunks: unpacked, and compared with the index, before anything of it is used.

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use sha2::{Digest, Sha256};
use vmm_sys_util::eventfd::EventFd;

use super::cache::ChunkCache;
use super::index::{Chunk, ChunkIndex, Sum};
use super::{Run, Source, SourceError};

/// Bytes of unpacked chunks that are kept, for the next faults beside the last ones.
const RECENT: u64 = 1 << 20;

/// Where packed chunks come from.
pub trait ChunkStore: fmt::Debug + Send {
    /// These chunks are wanted next, in this order.
    fn want(&mut self, chunks: &[&Chunk]) -> Result<(), SourceError>;

    /// Fills `packed` with the next chunk that was wanted, which is this one.
    fn take(&mut self, chunk: &Chunk, packed: &mut Vec<u8>) -> Result<(), SourceError>;

    /// As [`Source::give_up_on`].
    fn give_up_on(&mut self, ended: Arc<EventFd>) {
        let _ = ended;
    }
}

/// A file of chunks.
#[derive(Debug)]
pub struct ChunkFile(File);

impl ChunkFile {
    /// A file that has all chunks of `index`.
    pub fn new(file: File, index: &ChunkIndex) -> Result<Self, SourceError> {
        let read = |source| SourceError::Read { offset: 0, source };
        let present = file.metadata().map_err(read)?.len();
        let ends = index.chunks().iter().map(|chunk| chunk.offset + u64::from(chunk.stored));
        match ends.max().unwrap_or_default() {
            length if length > present => Err(SourceError::Cut { length, present }),
            _ => Ok(Self(file)),
        }
    }
}

impl ChunkStore for ChunkFile {
    fn want(&mut self, _: &[&Chunk]) -> Result<(), SourceError> {
        Ok(())
    }

    fn take(&mut self, chunk: &Chunk, packed: &mut Vec<u8>) -> Result<(), SourceError> {
        packed.resize(usize::try_from(chunk.stored).unwrap_or_default(), 0);
        let failed = |source| SourceError::Read { offset: chunk.offset, source };
        self.0.read_exact_at(packed, chunk.offset).map_err(failed)
    }
}

/// A memory in chunks of a store, with a cache before it where there is one.
pub struct ChunkedSource {
    index: Arc<ChunkIndex>,
    store: Box<dyn ChunkStore>,
    cache: Option<ChunkCache>,
    pub(super) recent: VecDeque<(Sum, Vec<u8>)>,
    unpacker: zstd::bulk::Decompressor<'static>,
    packed: Vec<u8>,
}

impl ChunkedSource {
    /// The memory that `index` describes, whose chunks come from `store`.
    pub fn new(
        index: Arc<ChunkIndex>,
        store: impl ChunkStore + 'static,
        cache: Option<ChunkCache>,
    ) -> io::Result<Self> {
        let unpacker = zstd::bulk::Decompressor::new()?;
        Ok(Self { index, store: Box::new(store), cache, recent: VecDeque::new(), unpacker, packed: Vec::new() })
    }

    /// Makes the chunks in a range of the memory recent.
    fn load(&mut self, start: u64, end: u64) -> Result<(), SourceError> {
        let index = Arc::clone(&self.index);
        let mut missing: Vec<(&Chunk, u64)> = Vec::new();
        let mut at = start / index.chunk_size() * index.chunk_size();
        while at < end {
            if let Some(chunk) = index.at(at)
                && !self.has(&chunk.sum)
                && !missing.iter().any(|(other, _)| other.sum == chunk.sum)
                && !self.load_cached(chunk, index.length_at(at))
            {
                missing.push((chunk, index.length_at(at)));
            }
            at += index.chunk_size();
        }
        let chunks: Vec<&Chunk> = missing.iter().map(|(chunk, _)| *chunk).collect();
        self.store.want(&chunks)?;
        for (chunk, length) in missing {
            self.store.take(chunk, &mut self.packed)?;
            let bytes = self.unpack(chunk, length)?;
            if let Some(cache) = &mut self.cache {
                cache.put(&chunk.sum, &bytes);
            }
            self.keep(chunk.sum, bytes);
        }
        Ok(())
    }

    fn has(&self, sum: &Sum) -> bool {
        self.recent.iter().any(|(recent, _)| recent == sum)
    }

    fn load_cached(&mut self, chunk: &Chunk, length: u64) -> bool {
        let found = self.cache.as_mut().and_then(|cache| cache.get(&chunk.sum, length));
        let is_found = found.is_some();
        if let Some(bytes) = found {
            self.keep(chunk.sum, bytes);
        }
        is_found
    }

    fn keep(&mut self, sum: Sum, bytes: Vec<u8>) {
        self.recent.push_back((sum, bytes));
    }

    /// Forgets what is not so recent any more.
    fn forget(&mut self) {
        let most = usize::try_from((RECENT / self.index.chunk_size()).max(1)).unwrap_or(1);
        while self.recent.len() > most {
            self.recent.pop_front();
        }
    }

    /// What was packed, if it is the chunk that it should be. No more is unpacked than that has.
    fn unpack(&mut self, chunk: &Chunk, length: u64) -> Result<Vec<u8>, SourceError> {
        let damaged = || SourceError::Damaged { sum: super::short(&chunk.sum) };
        let mut bytes = vec![0; usize::try_from(length).unwrap_or_default()];
        let unpacked = self.unpacker.decompress_to_buffer(&self.packed, &mut bytes);
        let whole = unpacked.is_ok_and(|unpacked| unpacked == bytes.len());
        if whole && Sum::from(Sha256::digest(&bytes)) == chunk.sum { Ok(bytes) } else { Err(damaged()) }
    }
}

impl fmt::Debug for ChunkedSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChunkedSource").field("store", &self.store).finish_non_exhaustive()
    }
}

impl Source for ChunkedSource {
    fn length(&self) -> u64 {
        self.index.length()
    }

    fn run(&self, offset: u64) -> Run {
        let zeros = self.index.at(offset).is_none();
        let mut end = offset / self.index.chunk_size() * self.index.chunk_size() + self.index.chunk_size();
        while end < self.length() && self.index.at(end).is_none() == zeros {
            end += self.index.chunk_size();
        }
        Run { zeros, end: end.min(self.length()) }
    }

    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), SourceError> {
        let end = offset + buffer.len() as u64;
        self.load(offset, end)?;
        let mut at = offset;
        while at < end {
            let start = at / self.index.chunk_size() * self.index.chunk_size();
            let stop = end.min(start + self.index.chunk_size());
            let place = |offset: u64, base: u64| usize::try_from(offset - base).unwrap_or(usize::MAX);
            let part = buffer.get_mut(place(at, offset)..place(stop, offset)).unwrap_or_default();
            match self.index.at(at).map(|chunk| chunk.sum) {
                None => part.fill(0),
                Some(sum) => {
                    let chunk = self.recent.iter().find(|(recent, _)| *recent == sum);
                    let bytes = chunk.and_then(|(_, bytes)| bytes.get(place(at, start)..place(stop, start)));
                    // Past the end of the memory nobody asks.
                    let bytes = bytes.ok_or_else(|| SourceError::Damaged { sum: super::short(&sum) })?;
                    part.copy_from_slice(bytes);
                }
            }
            at = stop;
        }
        self.forget();
        Ok(())
    }

    fn give_up_on(&mut self, ended: Arc<EventFd>) {
        self.store.give_up_on(ended);
    }
}

#[cfg(test)]
mod tests {
    use super::super::pack::packed;
    use super::*;

    const CHUNK: u64 = 65536;

    /// Eight chunks and a page: zeros, something, the same again, a hole, and pages that do not pack.
    fn memory() -> (File, Vec<u8>) {
        let mut bytes = vec![0; usize::try_from(8 * CHUNK + 4096).expect("small")];
        let chunk = usize::try_from(CHUNK).expect("small");
        bytes[chunk..2 * chunk].fill(7);
        bytes[2 * chunk..3 * chunk].fill(7);
        let mut state = 1_u32;
        for byte in &mut bytes[5 * chunk..] {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *byte = state.to_le_bytes()[3];
        }
        let file = tempfile::tempfile().expect("file");
        file.set_len(bytes.len() as u64).expect("length");
        file.write_all_at(&bytes[chunk..3 * chunk], CHUNK).expect("write");
        file.write_all_at(&bytes[5 * chunk..], 5 * CHUNK).expect("write");
        (file, bytes)
    }

    fn source(index: &Arc<ChunkIndex>, file: File) -> ChunkedSource {
        let store = ChunkFile::new(file, index).expect("store");
        ChunkedSource::new(Arc::clone(index), store, None).expect("source")
    }

    #[test]
    fn a_memory_comes_back_from_its_chunks() {
        let (memory, bytes) = memory();
        let (index, file) = packed(memory, 65536);
        // Twice the same is once, zeros are nothing: one and three and a page.
        assert_eq!(index.chunks().len(), 5);
        let mut source = source(&index, file);
        assert_eq!(source.length(), bytes.len() as u64);
        assert_eq!(source.run(0), Run { zeros: true, end: CHUNK });
        assert_eq!(source.run(CHUNK + 5), Run { zeros: false, end: 3 * CHUNK });
        assert_eq!(source.run(5 * CHUNK), Run { zeros: false, end: 8 * CHUNK + 4096 });
        for (offset, length) in [(0, bytes.len()), (CHUNK - 4096, 8192), (8 * CHUNK, 4096), (3 * CHUNK, 65536)] {
            let mut found = vec![0xaa; length];
            source.read(offset, &mut found).expect("read");
            let start = usize::try_from(offset).expect("small");
            assert!(found == bytes[start..start + length], "{offset:#x}");
        }
        assert!(source.recent.len() as u64 <= RECENT / CHUNK);
        // And in a file, with its holes.
        let unpacked = tempfile::tempfile().expect("file");
        super::super::pack::unpack(&mut source, &unpacked).expect("unpack");
        let mut found = vec![0; bytes.len()];
        unpacked.read_exact_at(&mut found, 0).expect("read");
        assert!(found == bytes);
        let unpacked = super::super::FileSource::new(unpacked).expect("source");
        assert_eq!((unpacked.length(), unpacked.run(0)), (bytes.len() as u64, Run { zeros: true, end: CHUNK }));
    }

    #[test]
    fn the_same_memory_makes_the_same_chunks() {
        let (first, second) = (packed(memory().0, 4096), packed(memory().0, 4096));
        assert_eq!(first.0, second.0);
        assert!(matches!(
            super::super::pack::pack(memory().0, &mut tempfile::tempfile().expect("file"), 5000),
            Err(super::super::pack::PackError::Sizes { chunk: 5000, .. })
        ));
    }

    #[test]
    fn a_chunk_that_is_not_what_it_should_be_is_not_used() {
        let (memory, _) = memory();
        let (index, file) = packed(memory, 65536);
        let first = &index.chunks()[0];
        let length = file.metadata().expect("metadata").len();
        // Each byte of the first chunk, and another chunk in its place.
        for position in 0..u64::from(first.stored) {
            let damaged = tempfile::tempfile().expect("file");
            let mut bytes = vec![0; usize::try_from(length).expect("small")];
            file.read_exact_at(&mut bytes, 0).expect("read");
            bytes[usize::try_from(position).expect("small")] ^= 0x10;
            damaged.write_all_at(&bytes, 0).expect("write");
            let error = source(&index, damaged).read(CHUNK, &mut [0; 4096]).err();
            // What is not part of the contents, as a flag of the frame, may be anything.
            if let Some(error) = error {
                assert!(error.to_string().contains("is not what the index says"), "{error}");
            } else {
                assert!(position < 10, "{position}");
            }
        }
        file.set_len(length - 1).expect("cut");
        assert!(matches!(ChunkFile::new(file, &index), Err(SourceError::Cut { .. })));
    }
}
