//! A sandbox: one machine, the containers in it, and what they take from the host.
//!
//! | file | verb |
//! | --- | --- |
//! | `start` | from a request to a guest whose agent has set itself up |
//! | `identity` | a guest that was restored becomes this sandbox's own |
//! | `rehearse` | which pages of a template a start asks for |
//! | `quiet` | a guest that has booted becomes a template |
//! | `create` | a container |
//! | `memory` | what its containers need beyond what the machine starts with |
//! | `process` | start, wait, signal, add |
//! | `observe` | what it tells about itself |
//! | `stop` | end the machine, give everything back |

// A guest chooses the numbers.
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

pub mod agent;
mod create;
mod first_output;
pub mod guest;
mod guest_log;
mod identity;
pub mod machine;
mod memory;
mod observe;
pub mod persist;
mod process;
mod quiet;
mod rehearse;
pub mod saved;
mod start;
mod state;
mod stop;
pub mod trace;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use tokio::sync::watch;

use crate::config::Config;
use crate::container::Container;
use crate::container::state::IllegalStep;
use crate::events::Publisher;
use crate::helper::{Helper, Share};
use crate::ids::Id;
use crate::lock::lock;
use crate::main_thread::MainThread;
use agent::{Agent, AgentError};
use guest::Guest;
use memory::{Demand, MemoryError};
use persist::SandboxDir;
use start::Placed;
use state::State;
use trace::StartTimes;

pub use create::{ContainerRequest, CreateError};
pub use process::reported_pid;
pub use quiet::QuietError;
pub use rehearse::{clear as clear_rehearsal, rehearse};
pub use start::{SandboxRequest, StartError, confine};

/// The parts of the process that can do what the service's threads may not.
#[derive(Clone)]
pub struct Host {
    /// Mounts, and starts programs.
    pub helper: Arc<Helper>,
    /// Builds machines, and takes them down.
    pub main: MainThread,
}

/// A sandbox that has started.
pub struct Sandbox {
    /// Its name.
    pub id: Id,
    namespace: String,
    config: Config,
    host: Host,
    events: Arc<Publisher>,
    state: watch::Sender<State>,
    /// Gone when the machine has ended, so that the guest's memory is free again.
    guest: Mutex<Option<Arc<Guest>>>,
    resources: Mutex<Option<Resources>>,
    containers: Mutex<HashMap<Id, Arc<Container>>>,
    demand: Demand,
    times: Mutex<StartTimes>,
}

/// What the sandbox took from the host. Given back in the order of the fields.
struct Resources {
    share: Share,
    _placement: Option<Placed>,
    dir: SandboxDir,
}

/// Why something could not be done in a running sandbox.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The machine has ended.
    #[error("The machine of the sandbox has ended")]
    Ended,
    /// The process is not in the right state.
    #[error(transparent)]
    Step(#[from] IllegalStep),
    /// The agent could not.
    #[error("{what}")]
    Agent {
        /// What was asked, in runc's words where runc has them.
        what: &'static str,
        /// What it said.
        source: AgentError,
    },
    /// Memory for a container's limit.
    #[error("The container cannot have more memory")]
    Memory(#[from] MemoryError),
    /// The streams of an added process.
    #[error("Cannot set up the standard streams of the process")]
    Stdio(#[from] crate::container::stdio::StdioError),
    /// The connections of an added process's streams.
    #[error("Cannot set up the standard streams of the process")]
    Stream(#[from] guest::ConnectError),
    /// The process's name is taken.
    #[error("A process {0} exists already")]
    Exists(Id),
}

impl Sandbox {
    /// The container of that name.
    pub fn container(&self, id: &Id) -> Option<Arc<Container>> {
        lock(&self.containers).get(id).cloned()
    }

    /// Whether no container is left.
    pub fn is_empty(&self) -> bool {
        lock(&self.containers).is_empty()
    }

    /// The agent, as long as there is one.
    pub fn agent(&self) -> Result<Agent, SandboxError> {
        Ok(self.guest()?.agent.clone())
    }

    fn guest(&self) -> Result<Arc<Guest>, SandboxError> {
        lock(&self.guest).clone().ok_or(SandboxError::Ended)
    }

    fn all_containers(&self) -> Vec<Arc<Container>> {
        lock(&self.containers).values().cloned().collect()
    }

    /// A sandbox ends with the container that made it.
    fn is_made_by(&self, container: &Id) -> bool {
        self.id == *container
    }
}
