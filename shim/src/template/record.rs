//! The file in which a template says what it is.
//!
//! ```text
//! inlay template 1 <SHA-256 of the rest>
//! { JSON }
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use vmm::memory::working_set::WORKING_SET;
use vmm::snapshot::{MANIFEST, MEMORY, STATE};

use super::key::{Images, Key, Stamp};
use super::{TemplateError, file_error};
use crate::ids::Id;
use crate::run_dir::hex;

/// Its name in the template's directory.
pub const FILE: &str = "template";
/// What the first line begins with. The number is raised when the rest changes its meaning.
const HEADER: &str = "inlay template 1 ";
/// Longest file that is read: a command line and two paths take a few KiB.
const MAX_LEN: u64 = 64 << 10;

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
}

/// The files that hold the machine, as they were written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Files {
    memory: Stamp,
    state: Stamp,
    /// Of the working set, where one was recorded.
    #[serde(default)]
    working_set: Option<Stamp>,
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
        let working_set = match stamp(WORKING_SET) {
            Err(TemplateError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => None,
            stamp => Some(stamp?),
        };
        let manifest_sha256 = hex(&Sha256::digest(bytes));
        Ok(Self { memory: stamp(MEMORY)?, state: stamp(STATE)?, working_set, manifest_sha256 })
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
        let write = || {
            let json = serde_json::to_vec_pretty(self)?;
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
            writeln!(file, "{HEADER}{}", hex(&Sha256::digest(&json)))?;
            file.write_all(&json)?;
            file.sync_all()
        };
        write().map_err(file_error("write", &path))
    }

    /// Reads the record of the template `name` from its directory.
    pub fn read(name: &Id, directory: &Path) -> Result<Self, TemplateError> {
        let path = directory.join(FILE);
        let mut bytes = Vec::new();
        let read = File::open(&path).and_then(|file| file.take(MAX_LEN + 1).read_to_end(&mut bytes));
        match read {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(TemplateError::Record { name: name.clone(), why: "the file is missing" });
            }
            read => read.map_err(file_error("read", &path))?,
        };
        Self::parse(&bytes).map_err(|why| TemplateError::Record { name: name.clone(), why })
    }

    /// Pure: whatever the bytes are, it returns.
    fn parse(bytes: &[u8]) -> Result<Self, &'static str> {
        if bytes.len() as u64 > MAX_LEN {
            return Err("it is too long");
        }
        let line_end = bytes.iter().position(|byte| *byte == b'\n').ok_or("it has no first line")?;
        let (line, json) = bytes.split_at(line_end);
        let json = json.get(1..).unwrap_or_default();
        let sum =
            line.strip_prefix(HEADER.as_bytes()).ok_or("its first line is that of another version, or damaged")?;
        if sum != hex(&Sha256::digest(json)).as_bytes() {
            return Err("its checksum does not fit");
        }
        serde_json::from_slice(json).map_err(|_| "it has the right checksum and makes no sense")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn record(dir: &Path) -> Record {
        for name in [MEMORY, STATE, MANIFEST, "k"] {
            fs::write(dir.join(name), name).unwrap();
        }
        let name = Id::try_from("t").unwrap();
        let mut config = Config::default();
        (config.hypervisor.kernel, config.hypervisor.initrd) = (dir.join("k"), dir.join("k"));
        let (key, images, files) = (Key::of(&config, &name), Images::read(&config).unwrap(), Files::look(dir).unwrap());
        Record { name, made: 1, mark: "m".into(), key, images, files }
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
            Record::parse(b"inlay template 2 x\n{}"),
            Err("its first line is that of another version, or damaged")
        );
        let longest = usize::try_from(MAX_LEN).unwrap();
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
