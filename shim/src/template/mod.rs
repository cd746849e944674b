//! Templates: a machine whose agent answers, saved once and restored for each sandbox.
//!
//! | file | what |
//! | --- | --- |
//! | `key` | what a template must have in common with the machine that is wanted |
//! | `record` | the file in which a template says what it is |
//! | `sealed` | a file of JSON with its checksum, which the record is |
//! | `store` | the directory of templates: names, locks, publishing, removing |
//! | `create` | boot, make quiet, save, publish |
//! | `open` | a template that can be restored, or the sentence why not |
//! | `first_use` | what a start does: restore, or boot and have a template made |
//! | `transfer` | to a directory and from one, for other nodes |
//! | `elsewhere` | a memory that stays on another node |
//!
//! `docs/templates.md` tells it from the operator's side.

pub mod create;
mod elsewhere;
mod first_use;
mod key;
mod open;
mod record;
mod sealed;
pub mod store;
pub mod transfer;

use std::io;
use std::path::{Path, PathBuf};

use crate::ids::Id;

pub use elsewhere::Chunks;
pub use first_use::{Plan, Ready, name_for, plan};
pub use key::Key;
pub use open::Template;
pub use store::Store;

/// Why there is no template that can be used.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// None of that name.
    #[error("There is no template {0}")]
    Missing(Id),
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
    /// The record is none.
    #[error("The template {name} has no record that can be read: {why}")]
    Record {
        /// The template.
        name: Id,
        /// What is wrong with it.
        why: &'static str,
    },
    /// It was made for another machine.
    #[error("The template {name} was made for another machine: {difference}")]
    Differs {
        /// The template.
        name: Id,
        /// What differs.
        difference: key::Difference,
    },
    /// Its files are not those that were saved.
    #[error("The template {name} is damaged")]
    Damaged {
        /// The template.
        name: Id,
        /// Where.
        source: vmm::snapshot::LayersError,
    },
    /// Its working set is.
    #[error("The template {name} is damaged")]
    WorkingSet {
        /// The template.
        name: Id,
        /// How.
        source: vmm::WorkingSetError,
    },
    /// Its manifest is another one.
    #[error("The template {0} is damaged: its manifest is not the one that was saved")]
    Manifest(Id),
    /// Its index of chunks is.
    #[error("The template {0} is damaged: its index of chunks is not the one that was imported")]
    Index(Id),
    /// Its memory is elsewhere, and does not come.
    #[error("The memory of the template {name} does not come from {address}")]
    Unreachable {
        /// The template.
        name: Id,
        /// Where its memory is.
        address: vmm::memory::source::Address,
        /// Why.
        source: vmm::memory::source::SourceError,
    },
    /// The process has no way to it.
    #[error("The memory of the template {0} is elsewhere, and this process is confined already")]
    Confined(Id),
}

impl TemplateError {
    /// Whether making the template anew helps.
    pub fn is_curable(&self) -> bool {
        !matches!(self, Self::File { .. } | Self::Unreachable { .. } | Self::Confined(_))
    }
}

/// An error of [`TemplateError::File`], to be completed by what the system said.
fn file_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> TemplateError {
    let path = path.to_owned();
    move |source| TemplateError::File { what, path, source }
}
