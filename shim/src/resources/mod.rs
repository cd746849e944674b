//! What a sandbox takes from the host: mounts, directories, a place in the cgroup hierarchy.
//!
//! Each is a value that gives its resource back when it is dropped, so a start that fails at any step leaves nothing.

pub mod below;
pub mod cgroup;
pub mod mount;
mod overlay;
pub mod share;
pub mod volumes;

use std::io;
use std::path::PathBuf;

/// Why a resource could not be had.
#[derive(Debug, thiserror::Error)]
pub enum ResourceError {
    /// A file or directory.
    #[error("Cannot {what} {}", path.display())]
    File {
        /// The verb.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A mount.
    #[error("Cannot mount {source_name} of type {fs_type} on {}", target.display())]
    Mount {
        /// What is mounted.
        source_name: String,
        /// Its file system type.
        fs_type: String,
        /// Where.
        target: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A mount option that only a tool outside the kernel understands.
    #[error("The mount option {option} of {source_name} is not supported")]
    Option {
        /// The option.
        option: String,
        /// What is mounted.
        source_name: String,
    },
    /// A bind mount of nothing.
    #[error("The source {} of the mount on {destination} cannot be used", path.display())]
    VolumeSource {
        /// The file on the host.
        path: PathBuf,
        /// Where the container wants it.
        destination: String,
        /// Why.
        source: Box<ResourceError>,
    },
    /// A bind mount of a device node of the host.
    #[error("The mount of the host device {} on {destination} is not supported: the guest has no such device", path.display())]
    VolumeDevice {
        /// The device node.
        path: PathBuf,
        /// Where the container wants it.
        destination: String,
    },
    /// The helper has not done it.
    #[error(transparent)]
    Helper(#[from] crate::helper::HelperError),
    /// The share is not there.
    #[error("The sandbox has no share")]
    NoShare,
    /// The container has no place in the share.
    #[error("The share has no container {0}")]
    NoPlace(String),
    /// A container of that name has its directory already.
    #[error("The share already has a container {0}")]
    Taken(String),
}

/// An error of [`ResourceError::File`], to be completed by what the system said.
fn file_error(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> ResourceError {
    let path = path.into();
    move |source| ResourceError::File { what, path, source }
}
