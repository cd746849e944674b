//! From the store to a directory.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};
use vmm::memory::source::ChunkedSource;
use vmm::memory::source::index::DEFAULT_CHUNK;
use vmm::memory::source::pack::pack;
use vmm::memory::working_set::{self, WORKING_SET, WRITTEN_SET};
use vmm::snapshot::{MANIFEST, MEMORY, STATE, codec, manifest, verify_elsewhere};

use super::{CHUNKS, Exported, HEADER, TransferError, chunk_file, copy, create};
use crate::run_dir::hex;
use crate::template::record::{FILE, INDEX};
use crate::template::{Template, TemplateError, file_error, sealed};

/// Writes all that another node needs of a template to `directory`, which is made, or empty. What was packed is read
/// again and compared with the template's own checksums. When this fails, nothing is left.
pub fn export(template: &Template, directory: &Path) -> Result<Exported, TransferError> {
    let record = template.record().clone();
    if record.elsewhere.is_some() {
        return Err(TransferError::Elsewhere(record.name));
    }
    let target = Target::fresh(directory)?;
    let from = template.directory();
    let manifest_sha256 = copy(MANIFEST, &from, directory, manifest::MAX_LEN)?;
    if manifest_sha256 != record.files.manifest_sha256() {
        return Err(TemplateError::Manifest(record.name).into());
    }
    copy(STATE, &from, directory, codec::MAX_LEN)?;
    let copy_set = |set: &str| match template.working_set(set)? {
        Some(_) => copy(set, &from, directory, working_set::MAX_LEN).map(Some),
        None => Ok(None),
    };
    let (working_set_sha256, written_set_sha256) = (copy_set(WORKING_SET)?, copy_set(WRITTEN_SET)?);
    let index_sha256 = export_memory(template, directory)?;
    let exported = Exported {
        name: record.name,
        made: record.made,
        mark: record.mark,
        key: record.key,
        images: record.images,
        manifest_sha256,
        working_set_sha256,
        written_set_sha256,
        index_sha256,
    };
    // The last one: without it there is no exported template.
    let path = directory.join(FILE);
    sealed::write(&path, HEADER, &exported).map_err(file_error("write", &path))?;
    target.keep();
    Ok(exported)
}

/// Writes chunks and index, and returns the SHA-256 of the latter.
fn export_memory(template: &Template, directory: &Path) -> Result<String, TransferError> {
    let path = template.directory().join(MEMORY);
    let memory = File::open(&path).map_err(file_error("open", &path))?;
    let path = directory.join(CHUNKS);
    let mut chunks = create(&path)?;
    let index = Arc::new(pack(memory, &mut chunks, DEFAULT_CHUNK)?);
    chunks.sync_all().map_err(file_error("write", &path))?;

    let path = directory.join(INDEX);
    let misfit = |_| TransferError::Misfit { path: path.clone(), why: "it cannot be encoded" };
    let bytes = index.encode().map_err(misfit)?;
    let mut file = create(&path)?;
    file.write_all(&bytes).and_then(|()| file.sync_all()).map_err(file_error("write", &path))?;

    let store = chunk_file(directory, &index)?;
    let mut packed = ChunkedSource::new(index, store, None).map_err(file_error("unpack", &path))?;
    let name = template.record().name.clone();
    verify_elsewhere(directory, &mut packed).map_err(|source| TemplateError::Damaged { name, source })?;
    Ok(hex(&Sha256::digest(&bytes)))
}

/// The directory that is written to. Dropped, what was written is gone.
struct Target {
    path: PathBuf,
    /// Whether it was made for this.
    is_new: bool,
    is_kept: bool,
}

impl Target {
    fn fresh(path: &Path) -> Result<Self, TransferError> {
        let is_new = match DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
            made => made.map(|()| true).map_err(file_error("make", path))?,
        };
        if !is_new && fs::read_dir(path).map_err(file_error("read", path))?.next().is_some() {
            return Err(TransferError::NotEmpty(path.to_owned()));
        }
        Ok(Self { path: path.to_owned(), is_new, is_kept: false })
    }

    fn keep(mut self) {
        self.is_kept = true;
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if self.is_kept {
            return;
        }
        for name in [MANIFEST, STATE, WORKING_SET, WRITTEN_SET, CHUNKS, INDEX, FILE] {
            let _ = fs::remove_file(self.path.join(name));
        }
        if self.is_new {
            let _ = fs::remove_dir(&self.path);
        }
    }
}
