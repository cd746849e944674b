//! Cutting a memory file into chunks.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
#[cfg(test)]
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::index::{Chunk, ChunkIndex, IndexError, Sum};
use super::{FileSource, Source, SourceError};
use crate::snapshot::write_pages;

/// As zstd's own default: packing twice as well takes ten times as long.
const LEVEL: i32 = 3;

/// Bytes that are unpacked at a time.
const UNPACKED: usize = 256 << 10;

/// Why there are no chunks, or no memory of them.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// The memory cannot be read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The file of chunks, or of memory, cannot be written.
    #[error("Cannot write the template's memory")]
    Write(#[source] io::Error),
    /// Sizes that no index has.
    #[error("A memory of {length} bytes cannot be cut into chunks of {chunk}")]
    Sizes {
        /// Bytes of the memory.
        length: u64,
        /// Bytes of a chunk.
        chunk: u32,
        /// What is wrong.
        #[source]
        source: IndexError,
    },
}

/// Writes the chunks of `memory` to `file`, each once and none of zeros, and returns their index. The same memory always makes the same chunks.
pub fn pack(memory: File, file: &mut File, chunk: u32) -> Result<ChunkIndex, PackError> {
    let mut source = FileSource::new(memory).map_err(|source| SourceError::Read { offset: 0, source })?;
    let length = source.length();
    let sizes = |source| PackError::Sizes { length, chunk, source };
    let empty = vec![0; usize::try_from(length.div_ceil(u64::from(chunk).max(1))).unwrap_or_default()];
    // Checks the sizes before anything is done with them.
    ChunkIndex::new(length, chunk, empty, Vec::new()).map_err(sizes)?;

    let mut packer = Packer::new(file).map_err(PackError::Write)?;
    let mut buffer = vec![0; usize::try_from(chunk).unwrap_or_default()];
    let mut places = Vec::new();
    let mut offset = 0;
    while offset < length {
        let end = (offset + u64::from(chunk)).min(length);
        let run = source.run(offset);
        let hole = run.zeros && run.end >= end;
        let bytes = buffer.get_mut(..usize::try_from(end - offset).unwrap_or_default()).unwrap_or_default();
        if !hole {
            source.read(offset, bytes)?;
        }
        let zeros = hole || bytes.iter().all(|byte| *byte == 0);
        places.push(if zeros { 0 } else { packer.add(bytes).map_err(PackError::Write)? });
        offset = end;
    }
    ChunkIndex::new(length, chunk, places, packer.chunks).map_err(sizes)
}

/// Writes `memory` to a fresh file, without its zeros.
pub fn unpack(memory: &mut dyn Source, file: &File) -> Result<(), PackError> {
    let length = memory.length();
    file.set_len(length).map_err(PackError::Write)?;
    let mut buffer = vec![0; UNPACKED];
    let mut offset = 0;
    while offset < length {
        let run = memory.run(offset);
        let end = if run.zeros { run.end } else { run.end.min(offset + UNPACKED as u64) };
        if !run.zeros {
            let bytes = buffer.get_mut(..usize::try_from(end - offset).unwrap_or_default()).unwrap_or_default();
            memory.read(offset, bytes)?;
            write_pages(bytes, file, offset).map_err(PackError::Write)?;
        }
        offset = end;
    }
    file.sync_all().map_err(PackError::Write)
}

struct Packer<'a> {
    file: &'a mut File,
    written: u64,
    compressor: zstd::bulk::Compressor<'static>,
    chunks: Vec<Chunk>,
    known: HashMap<Sum, u32>,
}

impl<'a> Packer<'a> {
    fn new(file: &'a mut File) -> io::Result<Self> {
        let compressor = zstd::bulk::Compressor::new(LEVEL)?;
        Ok(Self { file, written: 0, compressor, chunks: Vec::new(), known: HashMap::new() })
    }

    /// The number of the chunk with these bytes.
    fn add(&mut self, bytes: &[u8]) -> io::Result<u32> {
        let sum: Sum = Sha256::digest(bytes).into();
        if let Some(number) = self.known.get(&sum) {
            return Ok(*number);
        }
        let packed = self.compressor.compress(bytes)?;
        self.file.write_all(&packed)?;
        let stored = u32::try_from(packed.len()).map_err(io::Error::other)?;
        self.chunks.push(Chunk { sum, offset: self.written, stored });
        self.written += u64::from(stored);
        let number = u32::try_from(self.chunks.len()).map_err(io::Error::other)?;
        self.known.insert(sum, number);
        Ok(number)
    }
}

/// An index and its file: for the tests of those who read them.
#[cfg(test)]
pub fn packed(memory: File, chunk: u32) -> (Arc<ChunkIndex>, File) {
    let mut file = tempfile::tempfile().expect("file");
    let index = pack(memory, &mut file, chunk).expect("pack");
    (Arc::new(index), file)
}
