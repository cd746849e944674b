//! What a spare has that a sandbox needs.

use std::path::Path;
use std::sync::Arc;

use vmm::Machine;

use crate::config::Config;
use crate::helper::{Named, Share};
use crate::ids::Id;
use crate::main_thread::MainThread;
use crate::resources::ResourceError;
use crate::run_dir::RunDir;
use crate::sandbox::guest::{BootError, Guest, Home};
use crate::sandbox::persist::{PersistError, SandboxDir};
use crate::sandbox::saved::Saved;
use crate::sandbox::{Host, SandboxRequest, StartError};
use crate::template::{Ready, Store, Template};

/// A machine that was restored and has not gone on, and the place of a sandbox for it.
pub struct Spare {
    // Dropped in this order.
    machine: Asleep,
    share: Share,
    dir: SandboxDir,
    config: Config,
    template: Arc<Template>,
    store: Store,
}

/// Why there is no spare.
#[derive(Debug, thiserror::Error)]
pub enum SpareError {
    /// The directory.
    #[error("Cannot make a spare's directory")]
    Directory(#[from] PersistError),
    /// The shared directory.
    #[error("Cannot make a spare's shared directory")]
    Share(#[from] ResourceError),
    /// The machine.
    #[error("Cannot restore a spare's machine")]
    Machine(#[from] BootError),
}

/// A machine that is taken down by the thread that has made it.
struct Asleep {
    machine: Option<Arc<Machine>>,
    main: MainThread,
}

impl Drop for Asleep {
    fn drop(&mut self) {
        if let Some(machine) = self.machine.take() {
            self.main.give_back(machine);
        }
    }
}

impl Spare {
    /// Makes one in `directory`. The process is confined already.
    pub async fn make(
        directory: &Path,
        name: &Id,
        config: Config,
        ready: Ready,
        store: Store,
        host: &Host,
    ) -> Result<Self, SpareError> {
        let dir = SandboxDir::create_nameless(directory.to_owned())?;
        // There are no bundles before it is claimed.
        host.helper.adopt(dir.path(), Path::new("/")).map_err(ResourceError::from)?;
        let share = Share::make(Arc::clone(&host.helper), dir.path(), Named::default())?;
        let home = Home {
            name,
            config: &config,
            shared: share.exported(),
            // Nobody could find a socket that moves: see `has_a_pool`.
            socket: Path::new(""),
            main: &host.main,
            before_start: &|| Ok(()),
        };
        let template = Arc::clone(&ready.template);
        let machine = Guest::asleep(&home, Saved::template(ready, config.factory.memory)).await?;
        let machine = Asleep { machine: Some(machine), main: host.main.clone() };
        Ok(Self { machine, share, dir, config, template, store })
    }

    /// Whether a new sandbox would be restored from the same template, as the same machine.
    pub fn is_made_for(&self, config: &Config) -> bool {
        self.config == *config && self.template.is_at(&self.store.path(&self.template.record().name))
    }

    /// This, if it is what `config` describes; else it is gone.
    pub fn if_made_for(self, config: &Config) -> Option<Self> {
        let fits = self.is_made_for(config);
        if !fits {
            tracing::info!("The machine that was restored beforehand is another one");
        }
        fits.then_some(self)
    }

    /// Gets the place of the sandbox that is asked for.
    pub fn become_sandbox(
        self,
        run_dir: &RunDir,
        request: &SandboxRequest,
    ) -> Result<(SandboxDir, Share, Arc<Machine>), StartError> {
        let Self { mut machine, mut share, mut dir, .. } = self;
        dir.become_sandbox(run_dir, &request.id)?;
        share.adopt(dir.path(), &request.bundles, request.named.clone()).map_err(StartError::Share)?;
        let machine = machine.machine.take().ok_or(crate::main_thread::Ended)?;
        Ok((dir, share, machine))
    }
}
