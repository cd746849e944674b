//! The manifest: what goes into the initrd, as a person writes it in TOML.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Deserialize;

/// A flavour of the guest's initrd.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// How the archive is compressed.
    pub compression: Compression,
    /// Files given on the command line.
    #[serde(default, rename = "file")]
    pub files: Vec<GivenFile>,
    /// Debian packages.
    #[serde(default, rename = "package")]
    pub packages: Vec<Package>,
}

/// Compressions that the guest kernel unpacks.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// Stored as it is.
    None,
    /// gzip -9, as the seed does.
    Gzip,
    /// zstd -19.
    Zstd,
}

/// A file that the command line names.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GivenFile {
    /// Which of the files that the command line names.
    pub source: String,
    /// Absolute path in the guest.
    pub target: PathBuf,
    /// Permission bits.
    pub mode: u32,
}

/// A Debian package, and which of its files the guest gets.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Package {
    /// The package's name.
    pub name: String,
    /// Files to copy. Shared libraries that they need are found in all listed packages.
    #[serde(default)]
    pub files: Vec<PathBuf>,
    /// Symbolic links to one of the files.
    pub applets: Option<Applets>,
}

/// Links that make one program answer to many names.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Applets {
    /// Where the links point.
    pub to: PathBuf,
    /// The links, absolute paths.
    pub links: Vec<PathBuf>,
}

impl Manifest {
    /// Reads a manifest file.
    pub fn load(path: &Path) -> Result<Self> {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("Cannot read the manifest {}", path.display()))?;
        toml::from_str(&text).with_context(|| format!("{} is not a manifest", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shipped_manifests_parse() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("manifests");
        for flavour in ["minimal.toml", "full.toml", "tools.toml"] {
            let manifest = Manifest::load(&dir.join(flavour)).unwrap();
            assert_eq!(manifest.files[0].target, Path::new("/init"), "{flavour} has no init");
        }
    }

    #[test]
    fn an_unknown_key_is_refused() {
        assert!(toml::from_str::<Manifest>("compression = \"zstd\"\nfiels = []").is_err());
    }
}
