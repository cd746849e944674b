//! What a template must have in common with the machine that is wanted.

use std::fmt;
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sys::utsname::uname;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use vmm::snapshot::{codec, manifest};

use super::{TemplateError, file_error};
use crate::config::Config;
use crate::ids::Id;
use crate::run_dir::hex;
use crate::sandbox::machine;

/// Everything about a machine that cannot be changed when it is restored, but for the content of its images.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Key {
    /// Inlay's version.
    inlay: String,
    /// Versions of the saved state and of the files around it.
    formats: (u32, u32),
    /// The host's kernel, and with it KVM. What KVM offers is checked again when the machine is restored.
    host: String,
    /// The host's processor: vendor and signature (CPUID leaves 0 and 1).
    cpu: String,
    /// The guest kernel's command line.
    command_line: String,
    /// Virtio devices in their order.
    devices: Vec<String>,
    /// Processors.
    vcpus: u8,
    /// Memory.
    memory_mib: u64,
}

/// Guest kernel and what the guest's root comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Images {
    kernel: Image,
    root: Image,
}

/// A file that a machine has booted from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Image {
    path: PathBuf,
    stamp: Stamp,
    sha256: String,
}

/// What changes whenever a file is written to or replaced. As long as it is the same, the content is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stamp {
    device: u64,
    inode: u64,
    length: u64,
    /// Seconds and nanoseconds.
    modified: (i64, i64),
    /// Of the inode: unlike the other, no program can set it.
    changed: (i64, i64),
}

/// In what a template and a machine differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    what: &'static str,
    saved: String,
    wanted: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "its {} is {}, and {} is wanted", self.what, self.saved, self.wanted)
    }
}

impl Key {
    /// The key of the machine that `config` describes. Reads nothing.
    pub fn of(config: &Config, name: &Id) -> Self {
        // Paths are not part of the key.
        let machine = machine::machine_config(name, config, Path::new(""), Path::new(""));
        Self {
            inlay: env!("CARGO_PKG_VERSION").to_owned(),
            formats: (codec::VERSION, manifest::FORMAT),
            host: uname().map_or_else(|_| String::new(), |name| name.release().to_string_lossy().into_owned()),
            cpu: cpu(),
            command_line: machine.boot.cmdline.clone(),
            devices: machine::devices(&machine, &config.hypervisor.root),
            vcpus: machine.vcpus,
            memory_mib: machine.memory.size >> 20,
        }
    }

    /// Bytes of memory.
    pub fn memory(&self) -> u64 {
        self.memory_mib << 20
    }

    /// The first thing in which this key, a template's, differs from the `wanted` one.
    pub fn difference(&self, wanted: &Self) -> Option<Difference> {
        let list = |devices: &[String]| devices.join(", ");
        let formats = |(state, files): (u32, u32)| format!("{state} in files of format {files}");
        let mib = |key: &Self| format!("{} MiB", key.memory_mib);
        let pairs = [
            ("version of Inlay", self.inlay.clone(), wanted.inlay.clone()),
            ("state's version", formats(self.formats), formats(wanted.formats)),
            ("host's kernel", self.host.clone(), wanted.host.clone()),
            ("host's processor", self.cpu.clone(), wanted.cpu.clone()),
            ("memory", mib(self), mib(wanted)),
            ("number of vCPUs", self.vcpus.to_string(), wanted.vcpus.to_string()),
            ("list of devices", list(&self.devices), list(&wanted.devices)),
            ("kernel's command line", format!("{:?}", self.command_line), format!("{:?}", wanted.command_line)),
        ];
        pairs.into_iter().find(|(_, saved, wanted)| saved != wanted).map(|(what, saved, wanted)| Difference {
            what,
            saved,
            wanted,
        })
    }
}

impl Images {
    /// Reads the images that `config` names.
    pub fn read(config: &Config) -> Result<Self, TemplateError> {
        let hypervisor = &config.hypervisor;
        Ok(Self { kernel: Image::read(&hypervisor.kernel)?, root: Image::read(hypervisor.root.path())? })
    }

    /// In what the images of a template differ from those that `config` names now. They are read only if they are not
    /// the very files that the template was made from.
    pub fn difference(&self, config: &Config) -> Result<Option<Difference>, TemplateError> {
        let hypervisor = &config.hypervisor;
        let kernel = self.kernel.difference("kernel", &hypervisor.kernel)?;
        let root = &hypervisor.root;
        kernel.map_or_else(|| self.root.difference(root.name(), root.path()), |found| Ok(Some(found)))
    }

    /// In what these, of another host, differ from the `present` ones that `config` names on this one. Only contents count.
    pub fn difference_to(&self, present: &Self, config: &Config) -> Option<Difference> {
        let kernel = self.kernel.difference_to("kernel", &present.kernel);
        kernel.or_else(|| self.root.difference_to(config.hypervisor.root.name(), &present.root))
    }

    /// The two with their paths and checksums, for people.
    pub fn describe(&self) -> [String; 2] {
        [&self.kernel, &self.root].map(|image| format!("{} {}", image.sha256, image.path.display()))
    }
}

impl Image {
    fn read(path: &Path) -> Result<Self, TemplateError> {
        let read = || {
            let mut file = File::open(path)?;
            let stamp = Stamp::of(&file.metadata()?);
            let mut hash = Sha256::new();
            io::copy(&mut file, &mut hash)?;
            Ok(Self { path: path.to_owned(), stamp, sha256: hex(&hash.finalize()) })
        };
        read().map_err(file_error("read", path))
    }

    fn difference(&self, what: &'static str, path: &Path) -> Result<Option<Difference>, TemplateError> {
        let present = std::fs::metadata(path).map_err(file_error("examine", path))?;
        if self.stamp == Stamp::of(&present) {
            return Ok(None);
        }
        Ok(self.difference_to(what, &Self::read(path)?))
    }

    fn difference_to(&self, what: &'static str, present: &Self) -> Option<Difference> {
        let name = |image: &Self| {
            format!("{} (SHA-256 {}...)", image.path.display(), image.sha256.get(..12).unwrap_or_default())
        };
        (self.sha256 != present.sha256).then(|| Difference { what, saved: name(self), wanted: name(present) })
    }
}

impl Stamp {
    /// The stamp of a file.
    pub fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            length: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// Vendor and signature of the processor on which this runs.
fn cpu() -> String {
    use std::arch::x86_64::__cpuid;
    let vendor = __cpuid(0);
    let name: Vec<u8> = [vendor.ebx, vendor.edx, vendor.ecx].into_iter().flat_map(u32::to_le_bytes).collect();
    format!("{} {:#010x}", String::from_utf8_lossy(&name), __cpuid(1).eax)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::GuestRoot;

    fn key() -> Key {
        Key::of(&Config::default(), &Id::try_from("t").unwrap())
    }

    #[test]
    fn what_differs_is_told_by_name_and_values() {
        assert_eq!(key().difference(&key()), None);
        let sentence = |change: fn(&mut Key)| {
            let mut other = key();
            change(&mut other);
            key().difference(&other).map(|difference| difference.to_string()).unwrap_or_default()
        };
        assert_eq!(sentence(|key| key.memory_mib = 512), "its memory is 256 MiB, and 512 MiB is wanted");
        assert_eq!(sentence(|key| key.vcpus = 2), "its number of vCPUs is 1, and 2 is wanted");
        assert!(sentence(|key| key.inlay = "9".into()).starts_with("its version of Inlay is "));
        assert!(sentence(|key| key.formats.0 += 1).contains("its state's version is "));
        assert!(sentence(|key| key.host = "5.4".into()).contains("and 5.4 is wanted"));
        assert!(sentence(|key| key.cpu = "Z80".into()).contains("and Z80 is wanted"));
        assert!(sentence(|key| drop(key.devices.pop())).starts_with("its list of devices is fs"));
        assert!(sentence(|key| key.command_line.push('x')).contains("command line"));
    }

    #[test]
    fn every_setting_of_the_guest_is_in_the_key() {
        let mut config = Config::default();
        config.agent.debug = true;
        config.hypervisor.kernel_params = "a=b".into();
        let name = Id::try_from("t").unwrap();
        assert!(key().difference(&Key::of(&config, &name)).is_some());
        config = Config::default();
        config.hypervisor.root = GuestRoot::Image { path: "/image".into(), kind: None };
        let difference = key().difference(&Key::of(&config, &name)).unwrap().to_string();
        assert!(difference.ends_with(", blk root, vsock 3, rng is wanted"), "{difference}");
        config = Config::default();
        config.hypervisor.memory_mib += 1;
        assert!(key().difference(&Key::of(&config, &name)).is_some());
    }

    #[test]
    fn images_are_the_same_by_stamp_or_by_content() {
        let dir = tempfile::tempdir().unwrap();
        let (kernel, initrd) = (dir.path().join("k"), dir.path().join("i"));
        std::fs::write(&kernel, "kernel").unwrap();
        std::fs::write(&initrd, "initrd").unwrap();
        let mut config = Config::default();
        (config.hypervisor.kernel, config.hypervisor.root) = (kernel.clone(), GuestRoot::Initrd(initrd.clone()));
        let images = Images::read(&config).unwrap();
        assert_eq!(images.difference(&config).unwrap(), None);
        // Another file with the same bytes.
        std::fs::remove_file(&kernel).unwrap();
        std::fs::write(&kernel, "kernel").unwrap();
        assert_eq!(images.difference(&config).unwrap(), None);
        std::fs::write(&initrd, "indrit").unwrap();
        let difference = images.difference(&config).unwrap().unwrap().to_string();
        assert!(difference.starts_with("its initrd is ") && difference.contains("SHA-256"), "{difference}");
        std::fs::remove_file(&initrd).unwrap();
        assert!(matches!(images.difference(&config), Err(TemplateError::File { .. })));
    }
}
