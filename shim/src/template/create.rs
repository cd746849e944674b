//! Making a template: boot, make quiet, save, publish.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use vmm::Machine;
use vmm::memory::working_set::{WORKING_SET, WRITTEN_SET};

use super::key::Images;
use super::record::{Files, Record};
use super::store::Draft;
use super::{Key, Store, Template, TemplateError, file_error};
use crate::bootstrap::with_causes;
use crate::config::{Config, TemplateMemory};
use crate::ids::Id;
use crate::main_thread::{Ended, MainThread};
use crate::run_dir::hex;
use crate::sandbox::guest::{BootError, Guest, Home};
use crate::sandbox::saved::Saved;
use crate::sandbox::{QuietError, clear_rehearsal, rehearse};

/// The empty directory that the template's guest could see if it looked.
const SHARE: &str = "share";
/// The socket of its debug console, if its configuration has one.
const SOCKET: &str = "vsock";
/// Bytes of a template's mark, which is written in hexadecimal.
const MARK: usize = 16;

/// When a template is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// In any case.
    Always,
    /// Unless there is one that fits. Who finds somebody at work waits for the outcome.
    Needed,
    /// Unless there is one that fits or somebody is at work.
    NeededAndFree,
}

/// What came of it.
#[derive(Debug)]
pub enum Outcome {
    /// It was made.
    Made(Box<Template>),
    /// There was one that fits.
    Present,
    /// Somebody else is making it.
    Busy,
}

/// Why a template was not made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// Files, or what is in the way.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The guest.
    #[error("Cannot boot the template's guest")]
    Boot(#[from] BootError),
    /// The guest does not come to rest.
    #[error(transparent)]
    Quiet(#[from] QuietError),
    /// Its machine cannot be saved.
    #[error("Cannot save the template's machine")]
    Snapshot(#[from] vmm::SnapshotError),
    /// The thread that makes machines is gone.
    #[error("Cannot make the template's machine")]
    Thread(#[from] Ended),
    /// A kernel, initrd or image was installed at the same time.
    #[error("The guest's kernel, initrd or image was changed while the template was made")]
    Changed,
}

/// Makes the template `name` of the machine that `config` describes. When this fails or is given up, nothing is left,
/// and a template that has the name keeps it. `main` is the thread that makes machines.
pub async fn create(
    store: &Store,
    name: &Id,
    config: &Config,
    when: When,
    main: &MainThread,
) -> Result<Outcome, CreateError> {
    // May wait for another process.
    let lock = store.lock(name, when != When::NeededAndFree)?;
    let Some(lock) = lock else { return Ok(Outcome::Busy) };
    if when != When::Always && fitting(store, name, config).is_ok() {
        return Ok(Outcome::Present);
    }
    let draft = store.draft(name, &lock)?;
    let images = Images::read(config)?;
    let mark = mark().map_err(file_error("read", Path::new("/dev/urandom")))?;
    save(name, config, &draft, &mark, main).await?;
    if images.difference(config)?.is_some() {
        return Err(CreateError::Changed);
    }
    let made = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let (key, files) = (Key::of(config, name), Files::look(draft.path())?);
    Record { name: name.clone(), made, mark, key, images, files, elsewhere: None }.write(draft.path())?;
    store.publish(name, draft, &lock)?;
    Ok(Outcome::Made(Box::new(Template::open(store, name)?)))
}

/// The template `name` if it is there, whole, and of the machine that `config` describes.
pub fn fitting(store: &Store, name: &Id, config: &Config) -> Result<Template, TemplateError> {
    let template = Template::open(store, name)?;
    template.check(config)?;
    Ok(template)
}

/// Boots a machine as a sandbox's and saves it in the draft.
async fn save(name: &Id, config: &Config, draft: &Draft, mark: &str, main: &MainThread) -> Result<(), CreateError> {
    let (share, socket) = (draft.path().join(SHARE), draft.path().join(SOCKET));
    DirBuilder::new().create(&share).map_err(file_error("make", &share))?;
    let home = Home { name, config, shared: &share, socket: &socket, main, before_start: &|| Ok(()) };
    let machine = Guest::boot(&home).await?.quieten(mark).await?;
    let directory = draft.path().to_owned();
    main.run(move || snapshot_and_stop(machine, &directory)).await??;
    record_working_set(&home, draft).await;
    clear_rehearsal(&share, name).map_err(file_error("clear", &share))?;
    fs::remove_dir(&share).map_err(file_error("remove", &share))?;
    Ok(())
}

/// What starts are to have ahead. A template without it is as good, and slower.
async fn record_working_set(home: &Home<'_>, draft: &Draft) {
    let memory = home.config.factory.memory;
    let name = match memory {
        TemplateMemory::Mapped => WRITTEN_SET,
        TemplateMemory::Lazy => WORKING_SET,
    };
    let recorded = rehearse(home, Saved::rehearsal(draft.path().to_owned(), memory), memory).await;
    let written = match &recorded {
        Ok(set) => set.write(draft.path(), name).map_err(|error| with_causes(&error)),
        Err(error) => Err(with_causes(error)),
    };
    if let Err(why) = written {
        tracing::warn!("The template has no {name}: {why}");
    }
}

fn snapshot_and_stop(machine: Arc<Machine>, directory: &Path) -> Result<(), vmm::SnapshotError> {
    let saved = machine.snapshot(directory);
    machine.stop();
    saved
}

fn mark() -> io::Result<String> {
    let mut bytes = [0; MARK];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(hex(&bytes))
}
