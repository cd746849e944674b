//! A machine in a directory, and how its memory comes from there.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use vmm::config::RestoreMemory;
use vmm::memory::working_set::{WORKING_SET, WRITTEN_SET};
use vmm::{Fill, LazyConfig, LazyError, Machine, MachineConfig, RestoreError, WorkingSet};

use super::guest::BootError;
use super::machine::ImageError;
use crate::bootstrap::with_causes;
use crate::config::TemplateMemory;
use crate::template::{Chunks, Ready, Template};

/// A machine that was saved.
pub struct Saved {
    directory: PathBuf,
    memory: Memory,
    /// Keeps the directory.
    _template: Option<Arc<Template>>,
}

#[derive(Debug)]
enum Memory {
    Mapped,
    Lazy,
    Recorded,
    Elsewhere(Box<Chunks>),
}

/// Bytes of a memory that is elsewhere that are brought in a second though nobody asks for them, zeros included: a guest
/// of 256 MiB needs its server for 10 s. A network of 1 Gbit/s has room for ten such guests.
const FILL: u64 = 25 << 20;

impl Saved {
    /// A template, whose memory comes as the configuration says, or page by page from where it is.
    pub fn template(Ready { template, chunks }: Ready, memory: TemplateMemory) -> Self {
        let memory = match (chunks, memory) {
            (Some(chunks), _) => Memory::Elsewhere(Box::new(chunks)),
            (None, TemplateMemory::Mapped) => Memory::Mapped,
            (None, TemplateMemory::Lazy) => Memory::Lazy,
        };
        Self { directory: template.directory(), memory, _template: Some(template) }
    }

    /// A template that is being made, to see which pages are asked for, or written to where all of them are mapped.
    pub fn rehearsal(directory: PathBuf, memory: TemplateMemory) -> Self {
        let memory = match memory {
            TemplateMemory::Mapped => Memory::Mapped,
            TemplateMemory::Lazy => Memory::Recorded,
        };
        Self { directory, memory, _template: None }
    }

    /// Makes the machine. Where the host serves no page faults its memory is mapped, if it is here; `config` makes a
    /// configuration each time.
    pub fn restore(self, config: impl Fn() -> Result<MachineConfig, ImageError>) -> Result<Machine, BootError> {
        let mut first = config()?;
        let how = match self.memory {
            Memory::Mapped => {
                let written = working_set(&self.directory, WRITTEN_SET, first.memory.size);
                RestoreMemory::Mapped { written }
            }
            Memory::Lazy => {
                let working_set = working_set(&self.directory, WORKING_SET, first.memory.size);
                RestoreMemory::Lazy(LazyConfig { working_set, ..LazyConfig::default() })
            }
            Memory::Recorded => RestoreMemory::Lazy(LazyConfig { record: true, ..LazyConfig::default() }),
            Memory::Elsewhere(chunks) => {
                let working_set = working_set(&self.directory, WORKING_SET, first.memory.size);
                first.memory.prealloc = chunks.at_once;
                let (source, fill) = (Some(Box::new(chunks.source) as _), Fill::All { bytes_per_second: FILL });
                let lazy = LazyConfig { source, working_set, record: false, fill };
                let restored = Machine::restore_with(first, &self.directory, RestoreMemory::Lazy(lazy));
                return restored.map_err(BootError::Restore);
            }
        };
        let restored = match Machine::restore_with(first, &self.directory, how) {
            Err(RestoreError::Lazy(LazyError::Uffd(error))) => {
                tracing::warn!("The template's memory is mapped: {}", with_causes(&error));
                Machine::restore(config()?, &self.directory)
            }
            restored => restored,
        };
        restored.map_err(BootError::Restore)
    }
}

/// What is brought ahead; a hint, so one that is missing or cannot be read is none.
fn working_set(directory: &Path, name: &str, memory: u64) -> Option<WorkingSet> {
    WorkingSet::read(directory, name, memory).unwrap_or_else(|error| {
        tracing::warn!("The template's memory comes without its {name}: {}", with_causes(&error));
        None
    })
}

/// Whether `template` is of no use to anybody after this. What lacks memory or time today may have it tomorrow, and a
/// server of its memory may be another; what does not fit, or is damaged, never will.
pub fn is_hopeless(error: &RestoreError, template: &Template) -> bool {
    never_restores(error, template.record().elsewhere.is_some())
}

fn never_restores(error: &RestoreError, is_elsewhere: bool) -> bool {
    match error {
        RestoreError::Build(_) => false,
        RestoreError::Lazy(_) if is_elsewhere => false,
        RestoreError::Lazy(error) => matches!(error, LazyError::Lost(_) | LazyError::Length { .. }),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_is_given_up_for_what_it_is_and_not_for_the_hosts_state() {
        let lost = RestoreError::Lazy(LazyError::Lost("The memory file was cut".into()));
        let differs = RestoreError::Differs { what: "vCPUs", saved: 1, configured: 2 };
        let full = RestoreError::Lazy(LazyError::Event(std::io::ErrorKind::OutOfMemory.into()));
        let stopped = RestoreError::Lazy(LazyError::Stopped);
        for (error, here, elsewhere) in
            [(lost, true, false), (differs, true, true), (full, false, false), (stopped, false, false)]
        {
            assert_eq!((never_restores(&error, false), never_restores(&error, true)), (here, elsewhere), "{error}");
        }
    }

    #[test]
    fn a_working_set_that_cannot_be_read_is_none() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(working_set(directory.path(), WORKING_SET, 1 << 20), None);
        WorkingSet::new(1 << 20).write(directory.path(), WORKING_SET).unwrap();
        assert!(working_set(directory.path(), WORKING_SET, 1 << 20).is_some());
        assert_eq!(working_set(directory.path(), WORKING_SET, 2 << 20), None);
    }
}
