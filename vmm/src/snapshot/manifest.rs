//! What state and memory file must be.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::MANIFEST;

/// The version of the manifest and of the memory file that is written.
pub const FORMAT: u32 = 2;

/// The oldest one that is read. It knows no snapshots that are differences.
pub const OLDEST_FORMAT: u32 = 1;

/// Largest manifest: a checksum for each MiB of the most memory would be more, but such a machine has no place to be
/// saved to.
pub const MAX_LEN: u64 = 256 << 20;

/// A snapshot's table of contents.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`FORMAT`].
    pub format: u32,
    /// The version of this crate that wrote it; for people.
    pub writer: String,
    /// The machine's name; for people.
    pub machine: String,
    /// Processors.
    pub vcpus: u8,
    /// Types of the virtio devices in order (virtio 1.2 section 5).
    pub devices: Vec<u32>,
    /// The state file.
    pub state: StateFile,
    /// The memory file.
    pub memory: MemoryFile,
    /// Where this is the difference to another snapshot: to which.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<Base>,
}

/// The snapshot that another one is the difference to. It is in the directory that [`BASE`](super::BASE) leads to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Base {
    /// SHA-256 of its manifest in hexadecimal, and thereby of all that it is.
    pub manifest: String,
    /// The pages that are in this snapshot's memory file: runs of them in order, each its first page and how many. All
    /// others are the base's.
    pub pages: Vec<(u64, u64)>,
}

/// What the state file must be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateFile {
    /// Bytes.
    pub length: u64,
    /// SHA-256 in hexadecimal.
    pub sha256: String,
}

/// What the memory file must be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryFile {
    /// Bytes, holes included.
    pub length: u64,
    /// Bytes of a chunk; the last one may be shorter.
    pub chunk: u64,
    /// SHA-256 of each chunk in hexadecimal; none for one of zeros.
    pub sha256: Vec<Option<String>>,
}

/// Why a directory has no manifest that can be used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// It cannot be read.
    #[error("Cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It is too large to be one.
    #[error("The manifest has {0} bytes: too many to be one")]
    TooLarge(u64),
    /// It is no manifest.
    #[error("The manifest is malformed")]
    Json(#[source] serde_json::Error),
    /// Another format.
    #[error("The snapshot has format {0}; formats {OLDEST_FORMAT} to {FORMAT} can be read")]
    Format(u32),
}

impl Manifest {
    /// Reads the manifest of the snapshot in `directory`.
    pub fn read(directory: &Path) -> Result<Self, ManifestError> {
        Self::decode(&Self::read_bytes(directory)?)
    }

    /// The bytes of the manifest in `directory`.
    pub(crate) fn read_bytes(directory: &Path) -> Result<Vec<u8>, ManifestError> {
        let path = directory.join(MANIFEST);
        let bytes = fs::metadata(&path).and_then(|metadata| match metadata.len() {
            length if length > MAX_LEN => Ok(Err(ManifestError::TooLarge(length))),
            _ => fs::read(&path).map(Ok),
        });
        match bytes {
            Ok(bytes) => bytes,
            Err(source) => Err(ManifestError::Read { path, source }),
        }
    }

    /// The manifest in a file with these bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, ManifestError> {
        /// What all formats have.
        #[derive(Deserialize)]
        struct Any {
            format: u32,
        }
        let Any { format } = serde_json::from_slice(bytes).map_err(ManifestError::Json)?;
        if !(OLDEST_FORMAT..=FORMAT).contains(&format) {
            return Err(ManifestError::Format(format));
        }
        serde_json::from_slice(bytes).map_err(ManifestError::Json)
    }
}
