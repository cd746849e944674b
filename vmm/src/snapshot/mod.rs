//! A machine in a directory.
//!
//! | file | what |
//! | --- | --- |
//! | `memory` | guest memory, region after region; pages of zeros are holes |
//! | `state` | everything else, see [`codec`] |
//! | `manifest` | what the other two must be: JSON, written last, so that without it there is no snapshot |
//!
//! `docs/snapshots.md` says which versions understand each other and what a restored guest must be told.

pub mod codec;
pub mod manifest;
mod memory;
mod state;

use std::io;
use std::path::{Path, PathBuf};

pub use codec::CodecError;
pub use manifest::{Manifest, ManifestError};
pub use memory::{VerifyError, verify};
pub use state::MachineState;

use devices::virtio::SaveError;

pub(crate) use memory::{open as open_memory, read_state, write as write_memory};

/// The memory file.
pub const MEMORY: &str = "memory";
/// The state file.
pub const STATE: &str = "state";
/// The manifest.
pub const MANIFEST: &str = "manifest";

/// Why a machine could not be saved. It is paused then and can go on.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// It has ended.
    #[error(transparent)]
    State(#[from] crate::StateError),
    /// It was stopped while it was being saved.
    #[error("The machine was stopped while it was being saved")]
    Gone,
    /// A device that cannot be saved.
    #[error("Device {position} cannot be saved")]
    Device {
        /// Its place in the order of attachment.
        position: usize,
        /// Why.
        #[source]
        source: SaveError,
    },
    /// A processor.
    #[error("A processor cannot be saved")]
    Vcpu(#[from] crate::arch::x86_64::ArchError),
    /// A call to KVM for the whole machine failed.
    #[error("Cannot save the virtual machine: {call} failed")]
    Kvm {
        /// The call.
        call: &'static str,
        /// What KVM said.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The state does not encode.
    #[error("The machine's state cannot be encoded")]
    Encode(#[from] CodecError),
    /// A file could not be written.
    #[error("Cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

impl SnapshotError {
    pub(crate) fn write(path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Write { path: path.to_owned(), source }
    }
}

/// What `sha256sum` prints.
pub(crate) fn hex(digest: &[u8]) -> String {
    use std::fmt::Write;
    digest.iter().fold(String::with_capacity(digest.len() * 2), |mut text, byte| {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
