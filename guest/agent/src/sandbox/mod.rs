//! The sandbox: what all containers of this guest share, and the table of containers.

pub mod storage;

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use agent_proto::agent;
use thiserror::Error;
use tokio::sync::Notify;

use crate::container::oom::OomWatch;
use crate::container::{self, Container};
use crate::reaper::{Reaper, ended};
use crate::stdio::Connections;

/// The sandbox could not be made.
#[derive(Debug, Error)]
pub enum Error {
    /// There is one already.
    #[error("The guest already is sandbox {0:?}")]
    Exists(String),
    /// Something that a guest does not do.
    #[error("{0} is not supported in the guest")]
    Refused(&'static str),
    /// A storage.
    #[error(transparent)]
    Storage(#[from] storage::Error),
    /// The operating system refused.
    #[error("{what} failed")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

/// Resolver configuration of the guest; containers get their own by a mount.
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// A place in the table.
enum Slot {
    /// The id is taken; the container is being made.
    Reserved,
    /// It is there.
    Ready(Box<Container>),
}

#[derive(Default)]
struct State {
    id: Option<String>,
    containers: HashMap<String, Slot>,
    mounts: storage::Mounts,
    /// The first process of the first container: the sandbox's PID namespace is that process's.
    pid_namespace_holder: Option<i32>,
}

struct Inner {
    state: Mutex<State>,
    reaper: Reaper,
    connections: Connections,
    oom: OomWatch,
    destroyed: Notify,
}

/// The sandbox. Cheap to clone. Its lock is held for the time of a table look-up and never across a wait, so that no
/// call can hold up another (a slow StatsContainer must not delay SignalProcess).
#[derive(Clone)]
pub struct Sandbox(Arc<Inner>);

/// An id that is taken for a container that is being made; given back when dropped.
pub struct Reservation {
    sandbox: Sandbox,
    id: String,
    filled: bool,
}

impl Sandbox {
    /// A guest that is no sandbox yet.
    pub fn new(reaper: Reaper, connections: Connections) -> Self {
        let oom = OomWatch::new();
        Self(Arc::new(Inner { state: Mutex::default(), reaper, connections, oom, destroyed: Notify::new() }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The book of children.
    pub fn reaper(&self) -> &Reaper {
        &self.0.reaper
    }

    /// Connections for standard streams.
    pub fn connections(&self) -> &Connections {
        &self.0.connections
    }

    /// The watch over OOM kills.
    pub fn oom(&self) -> &OomWatch {
        &self.0.oom
    }

    /// Which sandbox the guest is, if it is one.
    pub fn id(&self) -> Option<String> {
        self.state().id.clone()
    }

    /// CreateSandbox.
    pub async fn create(&self, request: &agent::CreateSandboxRequest) -> Result<(), Error> {
        if !request.guest_hook_path.is_empty() {
            return Err(Error::Refused("A directory of guest hooks"));
        }
        if !request.kernel_modules.is_empty() {
            // The kernel has everything built in.
            return Err(Error::Refused("Loading a kernel module"));
        }
        {
            let mut state = self.state();
            if let Some(id) = &state.id {
                return Err(Error::Exists(id.clone()));
            }
            state.id = Some(request.sandbox_id.clone());
        }
        let result = self.set_up(request).await;
        if result.is_err() {
            self.state().id = None;
        }
        result
    }

    async fn set_up(&self, request: &agent::CreateSandboxRequest) -> Result<(), Error> {
        let failed = |what| move |source| Error::Io { what, source };
        if !request.hostname.is_empty() {
            nix::unistd::sethostname(&request.hostname)
                .map_err(|errno| failed("Setting the hostname")(errno.into()))?;
        }
        if !request.dns.is_empty() {
            let mut text = request.dns.join("\n");
            text.push('\n');
            fs::create_dir_all("/etc").map_err(failed("Making /etc"))?;
            fs::write(RESOLV_CONF, text).map_err(failed("Writing /etc/resolv.conf"))?;
        }
        let mounts = storage::mount_all(&request.storages).await?;
        self.state().mounts = mounts;
        Ok(())
    }

    /// DestroySandbox: ends every container and has the agent end. Dirty data is written back by the power-off.
    pub async fn destroy(&self) {
        let ids: Vec<String> = self.state().containers.keys().cloned().collect();
        for id in ids {
            if let Err(error) = container::remove(self, &id, None).await {
                tracing::warn!(container = id, %error, "A container is left at the sandbox's end");
            }
        }
        let mounts = std::mem::take(&mut self.state().mounts);
        let _ = tokio::task::spawn_blocking(move || mounts.unmount()).await;
        self.0.oom.close();
        self.0.destroyed.notify_one();
    }

    /// Waits for the end of the sandbox.
    pub async fn destroyed(&self) {
        self.0.destroyed.notified().await;
    }

    /// Takes an id.
    pub fn reserve(&self, id: &str) -> Result<Reservation, container::Error> {
        let mut state = self.state();
        if state.containers.contains_key(id) {
            return Err(container::Error::Exists(id.to_owned()));
        }
        state.containers.insert(id.to_owned(), Slot::Reserved);
        Ok(Reservation { sandbox: self.clone(), id: id.to_owned(), filled: false })
    }

    /// Looks at a container under the lock. What is given must not block.
    pub fn with_container<T>(
        &self,
        id: &str,
        look: impl FnOnce(&mut Container) -> Result<T, container::Error>,
    ) -> Result<T, container::Error> {
        match self.state().containers.get_mut(id) {
            Some(Slot::Ready(container)) => look(container),
            Some(Slot::Reserved) | None => Err(container::Error::NoContainer(id.to_owned())),
        }
    }

    /// Takes a container out of the table.
    pub fn take(&self, id: &str) -> Option<Container> {
        let mut state = self.state();
        match state.containers.remove(id)? {
            Slot::Ready(container) => Some(*container),
            Slot::Reserved => {
                state.containers.insert(id.to_owned(), Slot::Reserved);
                None
            }
        }
    }

    /// The process whose PID namespace the containers of this sandbox share, if there is one yet.
    pub fn pid_namespace_holder(&self) -> Option<i32> {
        self.state().pid_namespace_holder.filter(|pid| Path::new("/proc").join(pid.to_string()).exists())
    }

    /// The end of a first process is the end of the container's other processes. In a PID namespace of the container's
    /// own the kernel sees to that; in a shared one they would live on.
    pub fn watch_first_process(&self, container: &Container) {
        {
            let mut state = self.state();
            state.pid_namespace_holder.get_or_insert(container.init.pid.as_raw());
        }
        if container.has_own_pid_namespace() {
            return;
        }
        let (exit, cgroup) = (container.init.exit.clone(), container.cgroup.clone());
        tokio::spawn(async move {
            ended(exit).await;
            if let Err(error) = cgroup.kill() {
                tracing::warn!(%error, "Processes of an ended container are left");
            }
        });
    }
}

impl Reservation {
    /// Puts the container in its place.
    pub fn fill(mut self, container: Container) {
        self.filled = true;
        self.sandbox.state().containers.insert(self.id.clone(), Slot::Ready(Box::new(container)));
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if !self.filled {
            self.sandbox.state().containers.remove(&self.id);
        }
    }
}
