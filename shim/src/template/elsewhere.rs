//! A template whose memory is elsewhere: in chunks, of which a server on another node has all, and this node's cache some.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use vmm::memory::source::chunked::ChunkStore;
use vmm::memory::source::remote::PATIENCE;
use vmm::memory::source::{Address, ChunkCache, ChunkIndex, ChunkedSource, NoChunks, RemoteChunks, SourceError, index};

use super::record::INDEX;
use super::{Store, Template, TemplateError, file_error};
use crate::bootstrap::with_causes;
use crate::config::Config;
use crate::run_dir::hex;

/// How long a server may take to be connected to, and to send a first chunk: a start that waits longer had better boot.
const CONNECT: Duration = Duration::from_secs(2);

/// Where the memory of a template is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Elsewhere {
    /// The server of its chunks.
    pub chunks: Address,
    /// SHA-256 of the index of chunks, in hexadecimal: whatever the server sends is compared with that.
    pub index_sha256: String,
}

impl Elsewhere {
    /// All of the memory from its server, whatever this node has of it.
    pub fn memory(&self, template: &Template) -> Result<ChunkedSource, TemplateError> {
        let index = Arc::new(template.index(self)?);
        let server = self.connect(template, &index)?;
        ChunkedSource::new(index, server, None).map_err(file_error("unpack", &template.directory().join(INDEX)))
    }

    fn connect(&self, template: &Template, index: &ChunkIndex) -> Result<RemoteChunks, TemplateError> {
        let (name, address) = (template.record().name.clone(), self.chunks.clone());
        connect(&self.chunks, index).map_err(|source| TemplateError::Unreachable { name, address, source })
    }
}

/// A memory that can be had, for one sandbox.
#[derive(Debug)]
pub struct Chunks {
    /// What a machine is restored with.
    pub source: ChunkedSource,
    /// Whether all of it must be brought before the guest goes on, as nobody has what the cache loses.
    pub at_once: bool,
}

impl Chunks {
    /// Finds the memory of a template that is elsewhere; `None` for one that is here. To be called before the process is
    /// confined, because then it has no way to the network.
    pub fn find(template: &Template, store: &Store, config: &Config) -> Result<Option<Self>, TemplateError> {
        let record = template.record();
        let Some(elsewhere) = &record.elsewhere else { return Ok(None) };
        if seccomp::is_confined() {
            return Err(TemplateError::Confined(record.name.clone()));
        }
        let index = Arc::new(template.index(elsewhere)?);
        let mut cache = open_cache(store, config, &index);
        let made = match elsewhere.connect(template, &index) {
            Ok(server) => ChunkedSource::new(index, server, cache).map(|source| Self { source, at_once: false }),
            Err(error) => {
                if !cache.as_mut().is_some_and(|cache| cache.has_all(&index)) {
                    return Err(error);
                }
                tracing::warn!("All of it comes from this node's cache: {}", with_causes(&error));
                ChunkedSource::new(index, NoChunks, cache).map(|source| Self { source, at_once: true })
            }
        };
        made.map(Some).map_err(file_error("unpack", &store.chunks()))
    }
}

/// Connects to a server that has at least the first chunk.
pub fn connect(address: &Address, index: &ChunkIndex) -> Result<RemoteChunks, SourceError> {
    let mut server = RemoteChunks::connect(address, CONNECT)?;
    if let Some(chunk) = index.chunks().first() {
        server.want(&[chunk])?;
        server.take(chunk, &mut Vec::new())?;
    }
    server.be_patient(PATIENCE);
    Ok(server)
}

/// The index of chunks in `directory`, if it has this SHA-256, which is told in hexadecimal.
pub fn read_index(directory: &Path, sha256: &str) -> Result<Option<ChunkIndex>, TemplateError> {
    let path = directory.join(INDEX);
    let mut bytes = Vec::new();
    let read = File::open(&path).and_then(|file| file.take(index::MAX_LEN + 1).read_to_end(&mut bytes));
    read.map_err(file_error("read", &path))?;
    let is_it = hex(&Sha256::digest(&bytes)) == sha256;
    Ok(ChunkIndex::decode(&bytes).ok().filter(|_| is_it))
}

/// A memory comes without one as well, and slower.
fn open_cache(store: &Store, config: &Config, index: &ChunkIndex) -> Option<ChunkCache> {
    let limit = config.factory.chunk_cache_mib << 20;
    if limit == 0 {
        return None;
    }
    let opened = ChunkCache::open(&store.chunks(), index.chunk_size(), limit);
    opened.inspect_err(|error| tracing::warn!(%error, "Chunks are not cached on this node")).ok()
}
