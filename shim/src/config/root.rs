//! What the guest's first programs come from: an initrd, or an image on a drive.

use std::path::{Path, PathBuf};

use super::ConfigError;
use super::section::{self, Section};

const DEFAULT_INITRD: &str = "/usr/share/inlay/inlay-minimal.initrd";

/// The guest's root file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestRoot {
    /// An archive that the kernel unpacks into memory: `initrd`.
    Initrd(PathBuf),
    /// A file system on a drive, which the guest reads as it needs it and never writes: `image`.
    Image {
        /// The drive's content.
        path: PathBuf,
        /// What is on it, if that is said: `rootfs_type`. Else the kernel tries what it knows.
        kind: Option<ImageType>,
    },
}

/// File systems that the guest's kernel has for an image, with its own names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageType {
    /// `ext4`
    Ext4,
    /// `erofs`
    Erofs,
}

impl GuestRoot {
    /// The file.
    pub fn path(&self) -> &Path {
        match self {
            Self::Initrd(path) | Self::Image { path, .. } => path,
        }
    }

    /// What it is, which is also the key that names it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Initrd(_) => "initrd",
            Self::Image { .. } => "image",
        }
    }
}

impl Default for GuestRoot {
    fn default() -> Self {
        Self::Initrd(DEFAULT_INITRD.into())
    }
}

impl ImageType {
    /// The kernel's name for it, in `rootfstype=`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Erofs => "erofs",
        }
    }
}

/// Takes `initrd`, `image` and `rootfs_type`. The last one says nothing about an initrd, but kata's files have it in any case.
pub fn read(section: &mut Section) -> Result<GuestRoot, ConfigError> {
    let mut path = |key| Ok::<_, ConfigError>(section.text(key)?.filter(|path| !path.is_empty()));
    let (initrd, image) = (path("initrd")?, path("image")?);
    let Some(image) = image else {
        section.text("rootfs_type")?;
        return Ok(initrd.map_or_else(GuestRoot::default, |initrd| GuestRoot::Initrd(initrd.into())));
    };
    if initrd.is_some() {
        let expected = "empty where initrd is not, as a guest has one of them";
        return Err(section::wrong(section.full("image"), expected, &toml::Value::String(image)));
    }
    let kind = section.choice("rootfs_type", "\"ext4\" or \"erofs\"", |text| {
        [ImageType::Ext4, ImageType::Erofs].into_iter().find(|kind| kind.name() == text)
    })?;
    Ok(GuestRoot::Image { path: image.into(), kind })
}
