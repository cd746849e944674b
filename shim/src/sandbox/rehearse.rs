//! Which pages a start asks for first: a sandbox is started from a template that is being made, and given up.

use vmm::WorkingSet;

use super::agent::AgentError;
use super::guest::{BootError, Guest, Home};
use super::identity;
use super::saved::Saved;
use super::start::sandbox_request;

/// Why there is no working set.
#[derive(Debug, thiserror::Error)]
pub enum RehearsalError {
    /// The guest.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Its agent.
    #[error("The guest's agent cannot set up a sandbox")]
    Agent(#[from] AgentError),
    /// The host serves no page faults.
    #[error("The guest's memory does not come page by page on this host")]
    Mapped,
}

/// Starts a sandbox from `saved`, without a container, and returns the pages that were asked for, in their order.
pub async fn rehearse(home: &Home<'_>, saved: Saved) -> Result<WorkingSet, RehearsalError> {
    let guest = Guest::restore(home, saved).await?;
    let request = sandbox_request(home.name, home.name.to_string());
    let done = tokio::try_join!(guest.agent.create_sandbox(&request), identity::set_clock(&guest.agent));
    let memory = guest.machine().lazy_memory();
    guest.stop().await;
    done?;
    memory.map(|memory| memory.working_set()).ok_or(RehearsalError::Mapped)
}
