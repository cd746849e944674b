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
use seccomp::{ConfineError, Confinement};
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

use super::agent::{Agent, AgentError};
use super::guest::{BootError, Guest, Home};
use super::memory::Demand;
use super::persist::{PersistError, Record, SandboxDir};
use super::saved::{Saved, is_hopeless};
use super::{Host, Resources, Sandbox, StartTimes, State, identity};
use crate::bootstrap::with_causes;
use crate::config::Config;
use crate::events::Publisher;
use crate::helper::{Named, Share};
use crate::ids::Id;
use crate::main_thread::{Ended, MainThread};
use crate::metrics::process::Meter;
use crate::pool::Spare;
use crate::resources::ResourceError;
use crate::resources::cgroup::{CgroupPath, MadeDirectories, Placement};
use crate::resources::share::{GUEST_SHARE, TAG};
use crate::resources::volumes::GUEST_SHM;
use crate::run_dir::RunDir;
use crate::template::{self, Plan, Store};

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
    /// What containerd has named of the host for the container that makes the sandbox.
    pub named: Named,
    /// The directory of the bundles of the namespace's containers.
    pub bundles: PathBuf,
    /// The configuration's file, if it is not the usual one.
    pub config_path: Option<PathBuf>,
    /// When the request arrived.
    pub t0: u64,
    /// When it had its turn in the queue of starts, where there is one.
    pub turn: Option<u64>,
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
    /// The thread that can make the control group is gone.
    #[error("Cannot place the sandbox in its control group")]
    MainThread(#[from] Ended),
    /// The shared directory.
    #[error("Cannot make the sandbox's shared directory")]
    Share(#[source] ResourceError),
    /// The process.
    #[error("Cannot confine the sandbox's process")]
    Confine(#[from] ConfineError),
    /// The machine and the guest in it.
    #[error("Cannot boot the sandbox's guest")]
    Boot(#[from] BootError),
    /// The agent's part.
    #[error("The guest's agent cannot set up the sandbox")]
    Agent(#[source] AgentError),
}

/// A place in the control groups, which the process's first thread has made and takes back.
pub struct Placed {
    placement: Option<Placement>,
    main: MainThread,
}

impl Placed {
    async fn make(path: CgroupPath, main: MainThread) -> Result<Self, StartError> {
        let placement = main.run(move || Placement::make(path)).await?.map_err(StartError::Cgroup)?;
        Ok(Self { placement: Some(placement), main })
    }

    async fn join(mut self) -> Result<Self, StartError> {
        if let Some(mut placement) = self.placement.take() {
            let joined = self.main.run(move || placement.join().map(|()| placement)).await?;
            self.placement = Some(joined.map_err(StartError::Cgroup)?);
        }
        Ok(self)
    }

    fn made(&self) -> MadeDirectories {
        self.placement.as_ref().map(|placement| placement.made().clone()).unwrap_or_default()
    }
}

impl Drop for Placed {
    fn drop(&mut self) {
        if let Some(placement) = self.placement.take() {
            self.main.give_back(placement);
        }
    }
}

impl Sandbox {
    /// Starts a sandbox: from `spare`, which was made before the request came, if it is what the request wants.
    pub async fn start(
        request: SandboxRequest,
        config: Config,
        run_dir: &RunDir,
        host: Host,
        events: Arc<Publisher>,
        spare: Option<Spare>,
    ) -> Result<Arc<Self>, StartError> {
        // A process that has, or had, a spare is confined.
        let confined = spare.is_some();
        let spare = spare.and_then(|spare| spare.if_made_for(&config));
        let (dir, share, plan) = match spare {
            Some(spare) => {
                let (dir, share, machine) = spare.become_sandbox(run_dir, &request)?;
                (dir, share, Plan::Wake(machine))
            }
            None => {
                let path = request.config_path.as_deref();
                let plan = template::plan(&config, path, run_dir, &host.main).await?;
                let dir = SandboxDir::create(run_dir, &request.id)?;
                if confined {
                    // The helper knows of the spare's place alone.
                    let adopted = host.helper.adopt(dir.path(), &request.bundles);
                    adopted.map_err(|error| StartError::Share(error.into()))?;
                }
                let share = Share::make(Arc::clone(&host.helper), dir.path(), request.named);
                (dir, share.map_err(StartError::Share)?, plan)
            }
        };
        let placement = match request.cgroup {
            Some(path) => Some(Placed::make(path, host.main.clone()).await?),
            None => None,
        };
        let made = placement.as_ref().map(Placed::made).unwrap_or_default();
        let helper = host.helper.identity();
        let record = Record::of_this_process(&request.id, &request.namespace, request.socket, made, Some(helper));
        dir.save(&record.map_err(StartError::Identity)?)?;
        let placement = match placement {
            Some(placement) => Some(placement.join().await?),
            None => None,
        };
        let resources = Resources { share, _placement: placement, dir };

        let meter = Meter::open().inspect_err(|error| tracing::debug!(%error, "The process's memory is not measured"));
        if !confined {
            confine(config.runtime.confinement)?;
        }
        let (guest, restored) = bring_up(&request.id, &config, &resources, plan, run_dir, &host).await?;
        let sandbox_request = sandbox_request(&request.id, request.hostname);
        let set_up = async {
            guest.agent.create_sandbox(&sandbox_request).await?;
            // When the guest has nothing else to do, so that it looks at once.
            if restored { identity::set_clock(&guest.agent).await } else { Ok(()) }
        };
        if let Err(error) = set_up.await {
            super::guest::console(guest.machine());
            guest.stop().await;
            return Err(StartError::Agent(error));
        }

        let points = guest.machine().trace();
        let times = StartTimes {
            t0: request.t0,
            turn: request.turn,
            // A spare's was there before the request.
            t1: points.vm_created().map(|created| created.max(request.t0)),
            t2: points.first_run(),
            t3: points.guest_init(),
            t4: Some(guest.answered_at),
            restored,
            ..StartTimes::default()
        };
        let agent = guest.agent.clone();
        let sandbox = Arc::new(Self {
            id: request.id,
            namespace: request.namespace,
            demand: Demand::new(&config.hypervisor),
            config,
            host,
            events,
            state: watch::Sender::new(State::Running),
            guest: Mutex::new(Some(Arc::new(guest))),
            resources: Mutex::new(Some(resources)),
            containers: Mutex::new(HashMap::new()),
            times: Mutex::new(times),
        });
        tokio::spawn(report_oom(Arc::clone(&sandbox), agent));
        sandbox.watch_machine();
        sandbox.serve_metrics(meter.ok());
        Ok(sandbox)
    }
}

/// The process goes under its ceiling, and this thread, which is the service's only one, into its role. Those that help
/// it to wait are started by it, so they are in it too.
pub fn confine(confinement: Confinement) -> Result<(), ConfineError> {
    seccomp::confine_process(confinement)?;
    seccomp::take_role(confinement, seccomp::Role::Api)
}

/// The sandbox's guest, and whether it comes from a template. One that cannot be restored is booted.
async fn bring_up(
    id: &Id,
    config: &Config,
    resources: &Resources,
    plan: Plan,
    run_dir: &RunDir,
    host: &Host,
) -> Result<(Guest, bool), BootError> {
    let home = Home {
        name: id,
        config,
        shared: resources.share.exported(),
        socket: &resources.dir.vsock_socket(),
        main: &host.main,
        before_start: &|| host.helper.seal(),
    };
    let (restored, template) = match plan {
        Plan::Boot => return Ok((Guest::boot(&home).await?, false)),
        Plan::BootAndReport(maker) => {
            tokio::spawn(maker.report());
            return Ok((Guest::boot(&home).await?, false));
        }
        Plan::Restore(ready) => {
            let template = Arc::clone(&ready.template);
            let saved = Saved::template(ready, config.factory.memory);
            (Guest::restore(&home, saved).await, Some(template))
        }
        Plan::Wake(machine) => (Guest::wake(machine, &home).await, None),
    };
    let error = match restored {
        Ok(guest) => return Ok((guest, true)),
        Err(error) => error,
    };
    tracing::warn!("The sandbox boots: {}", with_causes(&error));
    if let (Some(template), BootError::Restore(error)) = (template, &error)
        && is_hopeless(error, &template)
    {
        Store::new(config, run_dir).discard(&template);
    }
    Ok((Guest::boot(&home).await?, false))
}

/// What the agent is asked to set up before the first container.
pub(super) fn sandbox_request(id: &Id, hostname: String) -> CreateSandboxRequest {
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
