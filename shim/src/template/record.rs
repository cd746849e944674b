//! The file in which a template says what it is: a [sealed] one.

use std::fs;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use vmm::memory::working_set::{WORKING_SET, WRITTEN_SET};
use vmm::snapshot::{MANIFEST, MEMORY, STATE};

use super::elsewhere::Elsewhere;
use super::key::{Images, Key, Stamp};
use super::{TemplateError, file_error, sealed};
use crate::ids::Id;
use crate::run_dir::hex;

/// Its name in the template's directory.
pub const FILE: &str = "template";
/// What the first line begins with. The number is raised when the rest changes its meaning.
const HEADER: &str = "inlay template 2 ";
/// The index of its chunks, where its memory is elsewhere.
pub const INDEX: &str = "index";

/// What a template is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Its name.
    pub name: Id,
    /// When it was made, in seconds since 1970.
    pub made: u64,
    /// What its guest's kernel log says, and nothing else knows.
    pub mark: String,
    /// The machine.
    pub key: Key,
    /// What the machine has booted from.
    pub images: Images,
    /// The files beside this one.
    pub files: Files,
    /// Where its memory is, if it is not beside this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub elsewhere: Option<Elsewhere>,
}

/// The files that hold the machine, as they were written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Files {
    /// Of the memory, where it is here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    memory: Option<Stamp>,
    /// Of the index of chunks, where it is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    index: Option<Stamp>,
    state: Stamp,
    /// Of the working set, where one was recorded.
    #[serde(default)]
    working_set: Option<Stamp>,
    /// Of the set of pages that starts write to, likewise.
    #[serde(default)]
    written_set: Option<Stamp>,
    manifest_sha256: String,
}

impl Files {
    /// Looks at the files in `directory`.
    pub fn look(directory: &Path) -> Result<Self, TemplateError> {
        let stamp = |name: &str| {
            let path = directory.join(name);
            // Not through a link: that would be another file tomorrow.
            fs::symlink_metadata(&path).map(|metadata| Stamp::of(&metadata)).map_err(file_error("examine", &path))
        };
        let manifest = directory.join(MANIFEST);
        let bytes = fs::read(&manifest).map_err(file_error("read", &manifest))?;
        let stamp_if_there = |name: &str| match stamp(name) {
            Err(TemplateError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
            stamp => stamp.map(Some),
        };
        Ok(Self {
            memory: stamp_if_there(MEMORY)?,
            index: stamp_if_there(INDEX)?,
            state: stamp(STATE)?,
            working_set: stamp_if_there(WORKING_SET)?,
            written_set: stamp_if_there(WRITTEN_SET)?,
            manifest_sha256: hex(&Sha256::digest(bytes)),
        })
    }

    /// SHA-256 of the manifest, in hexadecimal.
    pub fn manifest_sha256(&self) -> &str {
        &self.manifest_sha256
    }

    /// Whether the manifest is the same.
    pub fn same_manifest(&self, other: &Self) -> bool {
        self.manifest_sha256 == other.manifest_sha256
    }
}

impl Record {
    /// Writes the record to a template's directory.
    pub fn write(&self, directory: &Path) -> Result<(), TemplateError> {
        let path = directory.join(FILE);
        sealed::write(&path, HEADER, self).map_err(file_error("write", &path))
    }

    /// Reads the record of the template `name` from its directory.
    pub fn read(name: &Id, directory: &Path) -> Result<Self, TemplateError> {
        let path = directory.join(FILE);
        let bytes = match sealed::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(TemplateError::Record { name: name.clone(), why: "the file is missing" });
            }
            read => read.map_err(file_error("read", &path))?,
        };
        Self::parse(&bytes).map_err(|why| TemplateError::Record { name: name.clone(), why })
    }

    fn parse(bytes: &[u8]) -> Result<Self, &'static str> {
        sealed::parse(HEADER, bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, GuestRoot};

    fn record(dir: &Path) -> Record {
        for name in [MEMORY, STATE, MANIFEST, "k"] {
            fs::write(dir.join(name), name).unwrap();
        }
        let name = Id::try_from("t").unwrap();
        let mut config = Config::default();
        (config.hypervisor.kernel, config.hypervisor.root) = (dir.join("k"), GuestRoot::Initrd(dir.join("k")));
        let (key, images, files) = (Key::of(&config, &name), Images::read(&config).unwrap(), Files::look(dir).unwrap());
        Record { name, made: 1, mark: "m".into(), key, images, files, elsewhere: None }
    }

    #[test]
    fn a_record_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let record = record(dir.path());
        record.write(dir.path()).unwrap();
        assert_eq!(Record::read(&record.name, dir.path()).unwrap(), record);
        // It is written once.
        assert!(record.write(dir.path()).is_err());
    }

    #[test]
    fn each_truncation_and_each_flipped_bit_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        record(dir.path()).write(dir.path()).unwrap();
        let bytes = fs::read(dir.path().join(FILE)).unwrap();
        assert!(Record::parse(&bytes).is_ok());
        for length in 0..bytes.len() {
            assert!(Record::parse(&bytes[..length]).is_err(), "{length}");
        }
        for position in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[position] ^= 1 << (position % 8);
            assert!(Record::parse(&flipped).is_err(), "{position}");
        }
    }

    #[test]
    fn another_version_and_too_much_are_refused_by_name() {
        assert_eq!(
            Record::parse(b"inlay template 3 x\n{}"),
            Err("its first line is that of another version, or damaged")
        );
        let longest = usize::try_from(sealed::MAX_LEN).unwrap();
        assert_eq!(Record::parse(&vec![b'x'; longest]), Err("it has no first line"));
        assert_eq!(Record::parse(&vec![b'x'; longest + 1]), Err("it is too long"));
        let name = Id::try_from("t").unwrap();
        let missing = Record::read(&name, Path::new("/nonexistent")).unwrap_err();
        assert_eq!(missing.to_string(), "The template t has no record that can be read: the file is missing");
    }

    #[test]
    fn a_write_to_a_file_shows() {
        let dir = tempfile::tempdir().unwrap();
        let record = record(dir.path());
        assert_eq!(Files::look(dir.path()).unwrap(), record.files);
        fs::write(dir.path().join(MEMORY), "MEMORY").unwrap();
        let now = Files::look(dir.path()).unwrap();
        assert!(now != record.files && now.same_manifest(&record.files));
        fs::write(dir.path().join(WORKING_SET), "set").unwrap();
        assert_ne!(Files::look(dir.path()).unwrap(), now);
        fs::write(dir.path().join(MANIFEST), "other").unwrap();
        assert!(!Files::look(dir.path()).unwrap().same_manifest(&record.files));
    }
}
