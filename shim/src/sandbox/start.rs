//! Starting a sandbox. Each step yields a value that undoes it when it is dropped, so a start that fails at any step
//! leaves nothing.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use agent_proto::agent::{CreateSandboxRequest, Storage};
use containerd_shim_protos::events::task::TaskOOM;
use containerd_shim_protos::topics::TASK_OOM_EVENT_TOPIC;
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

use super::agent::{Agent, AgentError};
use super::guest::{BootError, Guest};
use super::persist::{PersistError, Record, SandboxDir};
use super::{Resources, Sandbox, StartTimes, State};
use crate::config::Config;
use crate::events::Publisher;
use crate::ids::Id;
use crate::resources::ResourceError;
use crate::resources::cgroup::{CgroupPath, Placement};
use crate::resources::share::{GUEST_SHARE, Share, TAG};
use crate::resources::volumes::GUEST_SHM;
use crate::run_dir::RunDir;

/// Shortest time between two reports that a container ran out of memory.
const OOM_INTERVAL: Duration = Duration::from_millis(100);

/// What a sandbox is to be.
pub struct SandboxRequest {
    /// Its name, which is that of the container that makes it.
    pub id: Id,
    /// containerd's namespace.
    pub namespace: String,
    /// The socket on which the shim serves it.
    pub socket: Option<PathBuf>,
    /// The guest's host name.
    pub hostname: String,
    /// Where the shim belongs in the host's control groups.
    pub cgroup: Option<CgroupPath>,
    /// When the request arrived.
    pub t0: u64,
}

/// Why a sandbox was not started: the stage that failed, and its cause.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The directory for its state.
    #[error("Cannot make the sandbox's directory")]
    Directory(#[from] PersistError),
    /// The identity of this process.
    #[error("Cannot record the sandbox's process")]
    Identity(#[source] io::Error),
    /// The control group.
    #[error("Cannot place the sandbox in its control group")]
    Cgroup(#[source] ResourceError),
    /// The shared directory.
    #[error("Cannot make the sandbox's shared directory")]
    Share(#[source] ResourceError),
    /// The process.
    #[error("Cannot confine the sandbox's process")]
    Confine(#[from] seccomp::ConfineError),
    /// The machine and the guest in it.
    #[error("Cannot boot the sandbox's guest")]
    Boot(#[from] BootError),
    /// The agent's part.
    #[error("The guest's agent cannot set up the sandbox")]
    Agent(#[source] AgentError),
}

impl Sandbox {
    /// Starts a sandbox.
    pub async fn start(
        request: SandboxRequest,
        config: Config,
        run_dir: &RunDir,
        events: Arc<Publisher>,
    ) -> Result<Arc<Self>, StartError> {
        let dir = SandboxDir::create(run_dir, &request.id)?;
        let mut placement = request.cgroup.map(Placement::make).transpose().map_err(StartError::Cgroup)?;
        let made = placement.as_ref().map(|placement| placement.made().clone()).unwrap_or_default();
        let record = Record::of_this_process(&request.id, &request.namespace, request.socket, made);
        dir.save(&record.map_err(StartError::Identity)?)?;
        if let Some(placement) = &mut placement {
            placement.join().map_err(StartError::Cgroup)?;
        }
        let share = Share::create(dir.path()).map_err(StartError::Share)?;
        let resources = Resources { share, _placement: placement, dir };

        seccomp::confine_sandbox(config.runtime.confinement)?;
        let guest =
            Guest::boot(&request.id, &config, resources.share.exported(), &resources.dir.vsock_socket()).await?;
        let sandbox_request = sandbox_request(&request.id, request.hostname);
        if let Err(error) = guest.agent.create_sandbox(&sandbox_request).await {
            super::guest::console(guest.machine());
            guest.stop().await;
            return Err(StartError::Agent(error));
        }

        let points = guest.machine().trace();
        let times = StartTimes {
            t0: request.t0,
            t1: points.vm_created(),
            t2: points.first_run(),
            t3: points.guest_init(),
            t4: Some(guest.answered_at),
            ..StartTimes::default()
        };
        let agent = guest.agent.clone();
        let sandbox = Arc::new(Self {
            id: request.id,
            namespace: request.namespace,
            config,
            events,
            state: watch::Sender::new(State::Running),
            guest: Mutex::new(Some(Arc::new(guest))),
            resources: Mutex::new(Some(resources)),
            containers: Mutex::new(HashMap::new()),
            times: Mutex::new(times),
        });
        tokio::spawn(report_oom(Arc::clone(&sandbox), agent));
        sandbox.watch_machine();
        Ok(sandbox)
    }
}

fn sandbox_request(id: &Id, hostname: String) -> CreateSandboxRequest {
    let share = Storage {
        driver: "virtio-fs".to_owned(),
        source: TAG.to_owned(),
        fstype: "virtiofs".to_owned(),
        mount_point: GUEST_SHARE.to_owned(),
        ..Storage::default()
    };
    let words = ["noexec", "nosuid", "nodev", "mode=1777", "size=65536k"];
    let shm = Storage {
        driver: "ephemeral".to_owned(),
        source: "shm".to_owned(),
        fstype: "tmpfs".to_owned(),
        options: words.map(str::to_owned).to_vec(),
        mount_point: GUEST_SHM.to_owned(),
        ..Storage::default()
    };
    CreateSandboxRequest {
        hostname,
        sandbox_id: id.to_string(),
        storages: vec![share, shm],
        ..CreateSandboxRequest::default()
    }
}

/// Passes on which containers run out of memory, until the agent is gone. The guest is not trusted: it may speak only
/// of containers that are there, and not all the time.
async fn report_oom(sandbox: Arc<Sandbox>, agent: Agent) {
    let mut turns = tokio::time::interval(OOM_INTERVAL);
    turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        turns.tick().await;
        match agent.oom_event().await {
            Ok(id) => {
                let Some(container) = Id::try_from(id).ok().and_then(|id| sandbox.container(&id)) else { continue };
                tracing::warn!(container = %container.id, "A container ran out of memory");
                let event = TaskOOM { container_id: container.id.to_string(), ..TaskOOM::default() };
                sandbox.events.publish(TASK_OOM_EVENT_TOPIC, &event);
            }
            Err(error) => {
                tracing::debug!(%error, "No more events of the guest's memory");
                return;
            }
        }
    }
}
