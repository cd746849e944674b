//! Ending a sandbox and giving everything back.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::guest::{self, Guest};
use super::{Sandbox, State};
use crate::ids::Id;
use crate::lock::lock;

/// How long a machine outlives its container for the sake of other processes in it.
const EXIT_PATIENCE: Duration = Duration::from_secs(5);
/// How long an explicit end waits for clients that do not read.
pub const DRAIN_PATIENCE: Duration = Duration::from_secs(2);

impl Sandbox {
    /// Ends the machine and gives back what the sandbox took from the host. Containers remain known, as ended ones.
    /// When somebody else does it already, waits for it.
    pub async fn stop(self: &Arc<Self>) {
        let mut states = self.state.subscribe();
        if !self.state.send_if_modified(State::begin_stop) {
            // The sender is in this object, so the wait cannot fail.
            let _ = states.wait_for(|state| *state == State::Stopped).await;
            return;
        }
        let guest = lock(&self.guest).take();
        if let Some(guest) = guest {
            guest.stop().await;
        }
        let sandbox = Arc::clone(self);
        // Unmounting may wait for a file system.
        let released = tokio::task::spawn_blocking(move || sandbox.release()).await;
        if let Err(error) = released {
            tracing::error!(%error, "Giving back the sandbox's resources panicked");
        }
        self.state.send_replace(State::Stopped);
        tracing::info!("The sandbox has stopped");
    }

    fn release(&self) {
        for container in self.all_containers() {
            // The machine is gone, and with it all that it had open.
            container.release_share(|_| ());
        }
        let resources = lock(&self.resources).take();
        drop(resources);
    }

    /// Ends the machine once all processes have ended and their output is with its readers: a slow reader loses
    /// nothing.
    pub(super) async fn stop_when_drained(self: &Arc<Self>) {
        for container in self.all_containers() {
            for (_, process) in container.processes() {
                let _ = tokio::time::timeout(EXIT_PATIENCE, process.exited()).await;
                if let Some(stdio) = process.stdio() {
                    stdio.drained().await;
                }
            }
        }
        self.stop().await;
    }

    /// Removes a container, which must have ended. The sandbox ends with the container that made it.
    pub async fn remove_container(self: &Arc<Self>, id: &Id) {
        let Some(container) = self.container(id) else { return };
        if let Some(stdio) = container.init.stdio() {
            stdio.drained_within(DRAIN_PATIENCE).await;
        }
        if self.is_made_by(id) {
            self.stop().await;
        } else if let Ok(agent) = self.agent()
            && let Err(error) = agent.remove_container(id).await
        {
            tracing::warn!(container = %id, error = crate::bootstrap::with_causes(&error), "The guest cannot remove a container");
        }
        container.init.release_stdio();
        let removed = lock(&self.containers).remove(id);
        self.set_memory_limit(id, None);
        let guest = self.guest().ok();
        let forget = move |mounted: &Path| {
            // A guest's memory of a name keeps the mount busy and removed files on the disk.
            if let Some(Err(error)) = guest.as_ref().map(|guest| guest.machine().release_mount(mounted)) {
                tracing::warn!(mount = %mounted.display(), %error, "The guest does not let go of a mount");
            }
        };
        let release = move || removed.map(|container| container.release_share(forget));
        let released = tokio::task::spawn_blocking(release).await;
        if let Err(error) = released {
            tracing::error!(%error, "Giving back a container's resources panicked");
        }
    }

    /// Ends the sandbox when its machine ends by itself.
    pub(super) fn watch_machine(self: &Arc<Self>) {
        let Ok(guest) = self.guest() else { return };
        let sandbox = Arc::clone(self);
        tokio::spawn(async move {
            let ended = guest.ended();
            drop(guest);
            let Ok(()) = ended.await.inspect_err(|error| tracing::error!(%error, "Cannot watch the machine")) else {
                return;
            };
            if *sandbox.state.borrow() == State::Running {
                if let Ok(guest) = sandbox.guest() {
                    report_end(&guest);
                }
                sandbox.stop().await;
            }
        });
    }
}

fn report_end(guest: &Guest) {
    let reason = guest.machine().exit_reason().map(|reason| reason.to_string());
    tracing::error!(reason, "The guest has ended, and its containers with it");
    guest::console(guest.machine());
}
