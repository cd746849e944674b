//! A machine in a directory.
//!
//! | file | what |
//! | --- | --- |
//! | `memory` | guest memory, region after region; pages of zeros are holes |
//! | `state` | everything else, see [`codec`] |
//! | `manifest` | what the other two must be: JSON, put in place last, so that without it there is no snapshot |
//! | `base` | a link to the directory of another snapshot, where this one is the difference to that |
//!
//! `docs/snapshots.md` says which versions understand each other and what a restored guest must be told.

pub mod codec;
pub(crate) mod dirty;
mod draft;
pub mod layers;
pub mod live;
pub mod manifest;
pub(crate) mod mapping;
mod memory;
pub mod pieces;
mod state;

use std::io;
use std::path::{Path, PathBuf};

pub use codec::CodecError;
pub use layers::{Head, Layers, LayersError, MAX_LAYERS};
pub use manifest::{Manifest, ManifestError};
pub use memory::{VerifyError, verify, verify_elsewhere};
pub use state::MachineState;

use devices::virtio::SaveError;

pub(crate) use draft::Draft;
pub(crate) use memory::{describe as describe_memory, write as write_memory, write_noted, write_pages, written_pages};

/// The memory file.
pub const MEMORY: &str = "memory";
/// The state file.
pub const STATE: &str = "state";
/// The manifest.
pub const MANIFEST: &str = "manifest";
/// The link to the snapshot that one is the difference to.
pub const BASE: &str = "base";

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
    /// A device whose writes to memory nobody knows.
    #[error(
        "There is no difference to save: the host's kernel or another process writes to memory for device {position}"
    )]
    Untold {
        /// Its place in the order of attachment.
        position: usize,
    },
    /// A difference to a snapshot that is not the machine's last.
    #[error(
        "There is no difference to {} to save: it is not the last snapshot that the machine was saved to or restored \
         from while it kept track of what is written",
        base.display()
    )]
    NotTheLast {
        /// What was asked for.
        base: PathBuf,
    },
    /// The base has no snapshot.
    #[error("There is no difference to {} to save", base.display())]
    NoBase {
        /// What was asked for.
        base: PathBuf,
        /// Why.
        #[source]
        source: LayersError,
    },
    /// A difference in the place of what it is the difference to.
    #[error("A difference cannot take the place of {}, which it needs", directory.display())]
    InPlace {
        /// Where it was to be written.
        directory: PathBuf,
    },
    /// No more differences.
    #[error("The snapshot in {} is made of {MAX_LAYERS} others already: save a whole one", base.display())]
    TooMany {
        /// The topmost of them.
        base: PathBuf,
    },
    /// One at a time.
    #[error("The machine is being saved while it runs: nothing else can be saved until that is done")]
    Live,
    /// What was copied while the guest ran is not complete. The guest has lost nothing by it.
    #[error("The machine's memory cannot be copied while it runs")]
    Copy(#[from] live::CopyError),
    /// A processor.
    #[error("A processor cannot be saved")]
    Vcpu(#[from] crate::arch::x86_64::ArchError),
    /// What has not come from the template yet does not come.
    #[error("The machine's memory cannot be completed")]
    Memory(#[from] crate::LazyError),
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
