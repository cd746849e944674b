//! From a directory to the store.

use std::path::Path;
use std::sync::Arc;

use sha2::{Digest, Sha256};
use vmm::memory::source::index::{self, DEFAULT_CHUNK, Sum};
use vmm::memory::source::pack::unpack;
use vmm::memory::source::{Address, ChunkedSource};
use vmm::memory::working_set::{self, WORKING_SET, WRITTEN_SET};
use vmm::snapshot::{MANIFEST, MEMORY, STATE, codec, manifest};

use super::{Exported, TransferError, chunk_file, copy, create};
use crate::config::Config;
use crate::ids::Id;
use crate::template::elsewhere::{Elsewhere, connect};
use crate::template::key::Images;
use crate::template::record::{Files, INDEX, Record};
use crate::template::{Key, Store, Template, TemplateError, file_error};

/// A server that has the memory of an exported template.
#[derive(Debug)]
pub struct Server {
    address: Address,
    index_sha256: String,
}

impl Server {
    /// The server at `address`, which must answer and have the chunks of what was exported to `directory`. To be called
    /// before the process is confined.
    pub fn find(address: Address, directory: &Path) -> Result<Self, TransferError> {
        let exported = Exported::read(directory)?;
        let index = exported.index(directory)?;
        let misfit = |_| TransferError::Misfit { path: directory.join(INDEX), why: "it cannot be encoded" };
        let expected = Sum::from(Sha256::digest(index.encode().map_err(misfit)?));
        let mut server = connect(&address, &index).map_err(|error| TransferError::Server(error.into()))?;
        server.index(&expected).map_err(TransferError::Server)?;
        Ok(Self { address, index_sha256: exported.index_sha256 })
    }
}

/// Makes the template `name` of what was exported to `directory`, if `config`'s machine can be restored from it. With a
/// `server` its memory stays there. A template that has the name is replaced, or kept when this fails.
pub fn import(
    store: &Store,
    name: &Id,
    config: &Config,
    directory: &Path,
    server: Option<Server>,
) -> Result<Template, TransferError> {
    let exported = Exported::read(directory)?;
    let images = images_of_this_host(&exported, name, config)?;
    // Waits for whoever is making one of that name.
    let Some(lock) = store.lock(name, true)? else { return Err(TemplateError::Missing(name.clone()).into()) };
    let draft = store.draft(name, &lock)?;
    let to = draft.path();
    copy_same(MANIFEST, directory, to, manifest::MAX_LEN, &exported.manifest_sha256)?;
    // The manifest has its checksum.
    copy(STATE, directory, to, codec::MAX_LEN)?;
    for (set, sha256) in [(WORKING_SET, &exported.working_set_sha256), (WRITTEN_SET, &exported.written_set_sha256)] {
        if let Some(expected) = sha256 {
            copy_same(set, directory, to, working_set::MAX_LEN, expected)?;
        }
    }
    let elsewhere = match server {
        None => {
            unpack_memory(&exported, directory, to)?;
            None
        }
        Some(Server { address, index_sha256 }) => {
            copy_same(INDEX, directory, to, index::MAX_LEN, &index_sha256)?;
            if exported.index(to)?.chunk_size() != u64::from(DEFAULT_CHUNK) {
                // They share a cache, whose places are of one size.
                let why = "its chunks are not of the size that all have";
                return Err(TransferError::Misfit { path: directory.join(INDEX), why });
            }
            Some(Elsewhere { chunks: address, index_sha256 })
        }
    };
    let Exported { made, mark, key, .. } = exported;
    let record = Record { name: name.clone(), made, mark, key, images, files: Files::look(to)?, elsewhere };
    record.write(to)?;
    Template::check_draft(to, name)?;
    store.publish(name, draft, &lock)?;
    Ok(Template::open(store, name)?)
}

/// The images of this host's configuration, which must be those that the template's machine has booted from.
fn images_of_this_host(exported: &Exported, name: &Id, config: &Config) -> Result<Images, TemplateError> {
    let differs = |difference| TemplateError::Differs { name: exported.name.clone(), difference };
    if let Some(difference) = exported.key.difference(&Key::of(config, name)) {
        return Err(differs(difference));
    }
    let images = Images::read(config)?;
    match exported.images.difference_to(&images, config) {
        Some(difference) => Err(differs(difference)),
        None => Ok(images),
    }
}

fn copy_same(name: &str, from: &Path, to: &Path, most: u64, sha256: &str) -> Result<(), TransferError> {
    if copy(name, from, to, most)? == sha256 { Ok(()) } else { Err(TransferError::Changed(from.join(name))) }
}

/// The memory file, of the chunks that are beside it.
fn unpack_memory(exported: &Exported, from: &Path, to: &Path) -> Result<(), TransferError> {
    let index = Arc::new(exported.index(from)?);
    let path = to.join(MEMORY);
    let store = chunk_file(from, &index)?;
    let mut source = ChunkedSource::new(index, store, None).map_err(file_error("unpack", &path))?;
    Ok(unpack(&mut source, &create(&path)?)?)
}
