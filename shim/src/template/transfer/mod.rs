//! Templates on their way from one node to another: a directory that any program may copy.
//!
//! | file | what |
//! | --- | --- |
//! | `template` | what was exported: a [sealed] file, with the checksums of the others |
//! | `manifest`, `state`, `working-set` | as in the store |
//! | `index`, `chunks` | the memory in chunks, packed, each with its checksum in the index |

mod export;
mod import;
#[cfg(test)]
mod tests;

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use vmm::memory::source::pack::PackError;
use vmm::memory::source::remote::RemoteError;
use vmm::memory::source::{ChunkFile, ChunkIndex, SourceError};

use super::elsewhere::read_index;
use super::key::{Images, Key};
use super::record::{FILE, INDEX};
use super::{TemplateError, file_error, sealed};
use crate::ids::Id;
use crate::run_dir::hex;

pub use export::export;
pub use import::{Server, import};

/// The chunks of an exported memory, one after the other.
const CHUNKS: &str = "chunks";
/// What the first line of what was exported begins with.
const HEADER: &str = "inlay exported template 2 ";

/// Why a template was not exported or imported.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// The template, or files of it.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// There is something where it should go.
    #[error("The directory {} has something in it: a template is exported to an empty one, or a new one", .0.display())]
    NotEmpty(PathBuf),
    /// It is not here as a whole.
    #[error("The memory of the template {0} is elsewhere: it is exported where it was made")]
    Elsewhere(Id),
    /// Nothing was exported there.
    #[error("The directory {} holds no exported template: {why}", directory.display())]
    Nothing {
        /// The directory.
        directory: PathBuf,
        /// What is wrong with its record.
        why: &'static str,
    },
    /// A file is not what was exported.
    #[error("The file {} is not the one that was exported", .0.display())]
    Changed(PathBuf),
    /// Right checksum, wrong contents.
    #[error("The file {} does not fit the template: {why}", path.display())]
    Misfit {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: &'static str,
    },
    /// The memory does not come out of its chunks, or into them.
    #[error("Cannot pack or unpack the template's memory")]
    Pack(#[from] PackError),
    /// The chunks' file.
    #[error("Cannot read the template's chunks")]
    Chunks(#[from] SourceError),
    /// The server that is to have them.
    #[error("Nothing is imported from the server of chunks")]
    Server(#[source] RemoteError),
}

/// What was exported.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exported {
    /// Its name, where it was made.
    pub name: Id,
    /// When it was made, in seconds since 1970.
    made: u64,
    /// What its guest's kernel log says, and nothing else knows.
    mark: String,
    /// The machine.
    key: Key,
    /// What the machine has booted from, by the paths of the host where it has.
    images: Images,
    /// SHA-256 of each file beside this one, in hexadecimal. State and chunks have theirs in the manifest and in the index.
    manifest_sha256: String,
    working_set_sha256: Option<String>,
    written_set_sha256: Option<String>,
    index_sha256: String,
}

impl Exported {
    /// What was exported to `directory`.
    pub fn read(directory: &Path) -> Result<Self, TransferError> {
        let path = directory.join(FILE);
        let nothing = |why| TransferError::Nothing { directory: directory.to_owned(), why };
        match sealed::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(nothing("its record is missing")),
            read => sealed::parse(HEADER, &read.map_err(file_error("read", &path))?).map_err(nothing),
        }
    }

    /// The index of the chunks in `directory`.
    pub fn index(&self, directory: &Path) -> Result<ChunkIndex, TransferError> {
        let index = read_index(directory, &self.index_sha256)?;
        let index = index.ok_or_else(|| TransferError::Changed(directory.join(INDEX)))?;
        if index.length() != self.key.memory() {
            let why = "it is the index of a memory of another size";
            return Err(TransferError::Misfit { path: directory.join(INDEX), why });
        }
        Ok(index)
    }
}

/// The file of chunks in an exported template's directory.
pub fn open_chunks(directory: &Path) -> Result<File, TransferError> {
    let path = directory.join(CHUNKS);
    Ok(File::open(&path).map_err(file_error("open", &path))?)
}

/// The same, for whoever reads all of them.
fn chunk_file(directory: &Path, index: &ChunkIndex) -> Result<ChunkFile, TransferError> {
    Ok(ChunkFile::new(open_chunks(directory)?, index)?)
}

/// A file for this user alone: guests have secrets.
fn create(path: &Path) -> Result<File, TemplateError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(0o600);
    options.open(path).map_err(file_error("make", path))
}

/// Copies the file `name` of at most `most` bytes, and returns the SHA-256 of what was copied, in hexadecimal.
fn copy(name: &str, from: &Path, to: &Path, most: u64) -> Result<String, TemplateError> {
    let (from, to) = (from.join(name), to.join(name));
    let mut source = File::open(&from).map_err(file_error("open", &from))?.take(most + 1);
    let mut target = create(&to)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        let length = source.read(&mut buffer).map_err(file_error("read", &from))?;
        let bytes = buffer.get(..length).unwrap_or_default();
        if bytes.is_empty() {
            break;
        }
        hash.update(bytes);
        target.write_all(bytes).map_err(file_error("write", &to))?;
    }
    if source.limit() == 0 {
        return Err(file_error("copy", &from)(io::ErrorKind::FileTooLarge.into()));
    }
    target.sync_all().map_err(file_error("write", &to))?;
    Ok(hex(&hash.finalize()))
}
