//! A template that can be restored, or the sentence why not.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use vmm::WorkingSet;
use vmm::memory::source::ChunkIndex;
use vmm::memory::working_set::{WORKING_SET, WRITTEN_SET};
use vmm::snapshot::{Head, LayersError, MEMORY, VerifyError};

use super::elsewhere::{Elsewhere, read_index};
use super::key::Key;
use super::record::{Files, Record};
use super::{Store, TemplateError, file_error};
use crate::config::Config;
use crate::file_lock::is_named;
use crate::ids::Id;

/// What a start asks for first, and what it writes to first.
pub const SETS: [&str; 2] = [WORKING_SET, WRITTEN_SET];
/// Unit of `st_blocks` (stat(2)).
const BLOCK: u64 = 512;

/// A template whose directory is open: it can be restored from even when another one takes its name, or none.
#[derive(Debug)]
pub struct Template {
    directory: File,
    record: Record,
}

impl Template {
    /// Opens the template `name`. Its files must be those that were saved; they are read only where they may not be.
    pub fn open(store: &Store, name: &Id) -> Result<Self, TemplateError> {
        let path = store.path(name);
        loop {
            let opened = OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW).open(&path);
            let directory = match opened {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return Err(TemplateError::Missing(name.clone()));
                }
                opened => opened.map_err(file_error("open", &path))?,
            };
            let seen = directory.try_clone().map_err(file_error("open", &path))?;
            match Self::read(name, directory) {
                // It has lost its name meanwhile, and is taken apart: that is not what is wrong with it.
                Err(_) if !is_named(&seen, &path) => {}
                read => return read,
            }
        }
    }

    /// Compares all that is here of a template that has not got its name yet.
    pub fn check_draft(directory: &Path, name: &Id) -> Result<(), TemplateError> {
        let opened = File::open(directory).map_err(file_error("open", directory))?;
        Self::read(name, opened)?.verify_what_is_here()
    }

    fn read(name: &Id, directory: File) -> Result<Self, TemplateError> {
        let record = Record::read(name, &through(&directory))?;
        let template = Self { directory, record };
        template.check_files(name)?;
        Ok(template)
    }

    /// That the template is of the machine that `config` describes.
    pub fn check(&self, config: &Config) -> Result<(), TemplateError> {
        let name = &self.record.name;
        let difference = match self.record.key.difference(&Key::of(config, name)) {
            None => self.record.images.difference(config)?,
            found => found,
        };
        match difference {
            None => Ok(()),
            Some(difference) => Err(TemplateError::Differs { name: name.clone(), difference }),
        }
    }

    /// Compares all files with the checksums that were taken when they were written, and a memory that is elsewhere too:
    /// all of it is fetched.
    pub fn verify(&self) -> Result<(), TemplateError> {
        self.verify_what_is_here()?;
        let Some(elsewhere) = &self.record.elsewhere else { return Ok(()) };
        let name = self.record.name.clone();
        let mut memory = elsewhere.memory(self)?;
        vmm::snapshot::verify_elsewhere(&self.directory(), &mut memory).map_err(|error| match error {
            LayersError::Files(VerifyError::Source(source)) => {
                TemplateError::Unreachable { name, address: elsewhere.chunks.clone(), source }
            }
            source => TemplateError::Damaged { name, source },
        })
    }

    fn verify_what_is_here(&self) -> Result<(), TemplateError> {
        let name = &self.record.name;
        if !self.look()?.same_manifest(&self.record.files) {
            return Err(TemplateError::Manifest(name.clone()));
        }
        let verified = match &self.record.elsewhere {
            None => vmm::snapshot::verify(&self.directory()),
            Some(elsewhere) => {
                self.index(elsewhere)?;
                Head::open(&self.directory()).map(drop)
            }
        };
        verified.map_err(|source| TemplateError::Damaged { name: name.clone(), source })?;
        SETS.iter().try_for_each(|set| self.working_set(set).map(drop))
    }

    /// The index of the chunks of a memory that is elsewhere.
    pub fn index(&self, elsewhere: &Elsewhere) -> Result<ChunkIndex, TemplateError> {
        let index = read_index(&self.directory(), &elsewhere.index_sha256)?;
        let fits = index.filter(|index| index.length() == self.record.key.memory());
        fits.ok_or_else(|| TemplateError::Index(self.record.name.clone()))
    }

    /// How much of its memory is not zeros, and how much there is.
    pub fn size(&self) -> Result<(u64, u64), TemplateError> {
        if let Some(elsewhere) = &self.record.elsewhere {
            let index = self.index(elsewhere)?;
            return Ok((index.stored_bytes(), index.length()));
        }
        let path = self.directory().join(MEMORY);
        let metadata = path.metadata().map_err(file_error("examine", &path))?;
        Ok((metadata.blocks().saturating_mul(BLOCK), metadata.len()))
    }

    /// Where its files are, whatever has its name by now.
    pub fn directory(&self) -> PathBuf {
        through(&self.directory)
    }

    /// One of the [`SETS`], where it was recorded.
    pub fn working_set(&self, set: &str) -> Result<Option<WorkingSet>, TemplateError> {
        let name = &self.record.name;
        WorkingSet::read(&self.directory(), set, self.record.key.memory())
            .map_err(|source| TemplateError::WorkingSet { name: name.clone(), source })
    }

    /// What it says about itself.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Whether `path` is this template still.
    pub fn is_at(&self, path: &Path) -> bool {
        is_named(&self.directory, path)
    }

    /// A file that nobody has written to since it was saved need not be read. One that was, or that was copied, is
    /// compared with its checksums.
    fn check_files(&self, name: &Id) -> Result<(), TemplateError> {
        if self.record.name != *name {
            return Err(TemplateError::Record { name: name.clone(), why: "it is that of another template" });
        }
        let present = self.look()?;
        if present == self.record.files {
            return Ok(());
        }
        self.verify_what_is_here()?;
        tracing::warn!(template = %name, "The template's files are not the very ones that were saved: each start reads all of them");
        Ok(())
    }

    fn look(&self) -> Result<Files, TemplateError> {
        Files::look(&self.directory())
    }
}

/// The way through an open directory: no renaming leads elsewhere.
fn through(directory: &File) -> PathBuf {
    format!("/proc/self/fd/{}", directory.as_raw_fd()).into()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use vmm::snapshot::{MANIFEST, MEMORY, STATE};

    use super::*;
    use crate::config::GuestRoot;
    use crate::run_dir::RunDir;
    use crate::template::key::Images;

    fn publish(store: &Store, config: &Config, name: &Id, mark: usize) {
        let lock = store.lock(name, true).unwrap().unwrap();
        let draft = store.draft(name, &lock).unwrap();
        for file in [MEMORY, STATE, MANIFEST] {
            fs::write(draft.path().join(file), mark.to_string()).unwrap();
        }
        let (key, images, files) =
            (Key::of(config, name), Images::read(config).unwrap(), Files::look(draft.path()).unwrap());
        let record =
            Record { name: name.clone(), made: 0, mark: mark.to_string(), key, images, files, elsewhere: None };
        record.write(draft.path()).unwrap();
        store.publish(name, draft, &lock).unwrap();
    }

    #[test]
    fn a_hundred_starts_find_a_whole_template_while_it_is_rebuilt_all_the_time() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        fs::write(&image, "image").unwrap();
        let mut config = Config::default();
        (config.hypervisor.kernel, config.hypervisor.root) = (image.clone(), GuestRoot::Initrd(image));
        let store = Store::new(&config, &RunDir::at(dir.path().join("run")));
        let name = Id::try_from("t").unwrap();
        publish(&store, &config, &name, 0);
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let rebuilding = scope.spawn(|| {
                let mut rebuilt = 0;
                while !done.load(Ordering::Relaxed) {
                    rebuilt += 1;
                    publish(&store, &config, &name, rebuilt);
                }
                rebuilt
            });
            let starts: Vec<_> = (0..100)
                .map(|_| {
                    scope.spawn(|| {
                        let template = Template::open(&store, &name).unwrap();
                        template.check(&config).unwrap();
                    })
                })
                .collect();
            let failed = starts.into_iter().filter_map(|start| start.join().err()).count();
            done.store(true, Ordering::Relaxed);
            assert!(rebuilding.join().unwrap() > 1);
            assert_eq!(failed, 0);
        });
        store.remove(&name).unwrap();
        assert!(matches!(Template::open(&store, &name), Err(TemplateError::Missing(_))));
    }
}
