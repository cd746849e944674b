//! containerd's Task service.
//!
//! Requests become calls of [`Sandbox`]; nothing is decided here but which container and process are meant, and how an
//! answer looks. The same service is registered as `containerd.task.v2.Task`, which containerd 1.x calls, and as
//! `containerd.task.v3.Task`, which containerd 2.x may call: the messages are the same.

mod create;
mod error;
mod metrics;
mod options;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse,
    DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse,
    ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest,
    StateResponse, StatsRequest, StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::events::task::{TaskDelete, TaskPaused, TaskResumed};
use containerd_shim_protos::shim_async::{Task, create_task};
use containerd_shim_protos::topics::{TASK_DELETE_EVENT_TOPIC, TASK_PAUSED_EVENT_TOPIC, TASK_RESUMED_EVENT_TOPIC};
use tokio::sync::watch;
use ttrpc::r#async::{Service, TtrpcContext};

use crate::container::state::State;
use crate::container::stdio::Streams;
use crate::container::{Container, Process};
use crate::events::Publisher;
use crate::ids::Id;
use crate::lock::lock;
use crate::oci;
use crate::pool::Spare;
use crate::run_dir::RunDir;
use crate::sandbox::{Host, Sandbox, SandboxError, reported_pid};
use error::ServiceError;

type Answer<T> = ttrpc::Result<T>;
type Services = std::collections::HashMap<String, Service>;

/// How long the last events may take when the shim ends.
const EVENTS_PATIENCE: Duration = Duration::from_secs(5);

/// The service of one shim process.
pub struct TaskService {
    namespace: String,
    run_dir: RunDir,
    socket: Option<PathBuf>,
    host: Host,
    events: Arc<Publisher>,
    /// For the first sandbox.
    spare: Mutex<Option<Spare>>,
    /// Closed when the first container was started, or was not: who refills the pool waits for it.
    sign: Mutex<Option<OwnedFd>>,
    sandbox: RwLock<Option<Arc<Sandbox>>>,
    /// Held while a sandbox is being started: there is one in a process.
    starting: tokio::sync::Mutex<()>,
    /// Whether containerd, or a signal, wants the shim to end.
    ending: watch::Sender<bool>,
}

impl TaskService {
    /// A service for a namespace of containerd, served on `socket`.
    pub fn new(
        namespace: String,
        run_dir: RunDir,
        socket: Option<PathBuf>,
        host: Host,
        events: Publisher,
        spare: Option<Spare>,
        sign: Option<OwnedFd>,
    ) -> Self {
        Self {
            namespace,
            run_dir,
            socket,
            host,
            events: Arc::new(events),
            spare: Mutex::new(spare),
            sign: Mutex::new(sign),
            sandbox: RwLock::new(None),
            starting: tokio::sync::Mutex::default(),
            ending: watch::Sender::new(false),
        }
    }

    /// The service under both of its names.
    pub fn register(self: &Arc<Self>) -> [Services; 2] {
        let service: Arc<dyn Task + Send + Sync> = Arc::<Self>::clone(self);
        let v3 = create_task(Arc::clone(&service));
        let v2 = create_task(service);
        let v2 = v2.into_iter().map(|(name, service)| (name.replace("task.v3", "task.v2"), service)).collect();
        [v2, v3]
    }

    /// Waits until containerd asks the shim to end.
    pub async fn shutdown_requested(&self) {
        // The sender is in this object, so the wait cannot fail.
        let _ = self.ending.subscribe().wait_for(|ending| *ending).await;
    }

    /// Ends the sandbox, if there is one, and sends the last events.
    pub async fn finish(&self) {
        // A start that is under way is given up, which undoes it.
        self.ending.send_replace(true);
        let _starting = self.starting.lock().await;
        let sandbox = self.sandbox();
        if let Some(sandbox) = sandbox {
            sandbox.stop().await;
        }
        self.events.close(EVENTS_PATIENCE).await;
    }

    fn sandbox(&self) -> Option<Arc<Sandbox>> {
        self.sandbox.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_sandbox(&self, sandbox: Option<Arc<Sandbox>>) {
        *self.sandbox.write().unwrap_or_else(PoisonError::into_inner) = sandbox;
    }

    fn container(&self, id: &str) -> Result<(Arc<Sandbox>, Arc<Container>), ServiceError> {
        let missing = || ServiceError::NoContainer(id.to_owned());
        let sandbox = self.sandbox().ok_or_else(missing)?;
        let container = Id::try_from(id).ok().and_then(|id| sandbox.container(&id)).ok_or_else(missing)?;
        Ok((sandbox, container))
    }

    fn process(&self, id: &str, exec: &str) -> Result<Target, ServiceError> {
        let (sandbox, container) = self.container(id)?;
        let exec_id = if exec.is_empty() { None } else { Id::try_from(exec).ok() };
        let known = (exec.is_empty() || exec_id.is_some()).then(|| container.process(exec_id.as_ref())).flatten();
        let process =
            known.ok_or_else(|| ServiceError::NoProcess { container: container.id.clone(), exec: exec.to_owned() })?;
        Ok(Target { sandbox, container, exec: exec_id, process })
    }

    async fn delete_process(&self, request: DeleteRequest) -> Result<DeleteResponse, ServiceError> {
        let target = self.process(&request.id, &request.exec_id)?;
        target.process.state().delete()?;
        if target.exec.is_none() {
            target.sandbox.end_unstarted(&target.container).await;
        }
        let exit = target.process.state().exited();
        let response = DeleteResponse {
            pid: reported_pid(),
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: exit.map(|exit| exit.at.into()).into(),
            ..DeleteResponse::default()
        };
        if let Some(exec) = &target.exec {
            target.process.release_stdio();
            target.container.forget(exec);
            return Ok(response);
        }
        target.sandbox.remove_container(&target.container.id).await;
        let event = TaskDelete {
            container_id: target.container.id.to_string(),
            pid: response.pid,
            exit_status: response.exit_status,
            exited_at: response.exited_at.clone(),
            ..TaskDelete::default()
        };
        self.events.publish(TASK_DELETE_EVENT_TOPIC, &event);
        Ok(response)
    }

    fn add_process(&self, request: ExecProcessRequest) -> Result<(), ServiceError> {
        let (sandbox, container) = self.container(&request.id)?;
        let exec = Id::try_from(request.exec_id)?;
        let specification = oci::parse_process(&request.spec.get_or_default().value)?;
        let streams = Streams {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        };
        let mut process = oci::process(&specification);
        // The request decides: containerd lets a client run a terminal's specification without one.
        process.Terminal = request.terminal;
        sandbox.add_process(&container, exec, Process::new(streams, Some(process)))?;
        Ok(())
    }
}

/// What a request is about.
struct Target {
    sandbox: Arc<Sandbox>,
    container: Arc<Container>,
    exec: Option<Id>,
    process: Arc<Process>,
}

/// An error of the agent, with what was asked of it.
fn agent_error(what: &'static str) -> impl FnOnce(crate::sandbox::agent::AgentError) -> ServiceError {
    move |source| SandboxError::Agent { what, source }.into()
}

fn status(state: State) -> Status {
    match state {
        State::Created => Status::CREATED,
        State::Running => Status::RUNNING,
        State::Paused => Status::PAUSED,
        State::Stopped(_) => Status::STOPPED,
    }
}

#[async_trait]
impl Task for TaskService {
    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> Answer<StateResponse> {
        let Target { container, process, .. } = self.process(&request.id, &request.exec_id)?;
        let exit = process.state().exited();
        Ok(StateResponse {
            id: request.id,
            bundle: container.bundle.display().to_string(),
            pid: reported_pid(),
            status: status(process.state()).into(),
            stdin: process.streams.stdin.clone(),
            stdout: process.streams.stdout.clone(),
            stderr: process.streams.stderr.clone(),
            terminal: process.streams.terminal,
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: exit.map(|exit| exit.at.into()).into(),
            exec_id: request.exec_id,
            ..StateResponse::default()
        })
    }

    async fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> Answer<CreateTaskResponse> {
        self.create_task(request).await?;
        Ok(CreateTaskResponse { pid: reported_pid(), ..CreateTaskResponse::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> Answer<StartResponse> {
        let Target { sandbox, container, exec, process } = self.process(&request.id, &request.exec_id)?;
        let started = match &exec {
            None => sandbox.start_container(&container).await,
            Some(exec) => sandbox.start_added(&container, exec, &process).await,
        };
        drop(lock(&self.sign).take());
        started.map_err(ServiceError::from)?;
        Ok(StartResponse { pid: reported_pid(), ..StartResponse::default() })
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> Answer<DeleteResponse> {
        Ok(self.delete_process(request).await?)
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> Answer<PidsResponse> {
        self.container(&request.id)?;
        let shim = ProcessInfo { pid: reported_pid(), ..ProcessInfo::default() };
        Ok(PidsResponse { processes: vec![shim], ..PidsResponse::default() })
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> Answer<Empty> {
        let (sandbox, container) = self.container(&request.id)?;
        let _steps = container.steps.lock().await;
        let paused = container.init.state().pause().map_err(ServiceError::from)?;
        let agent = sandbox.agent().map_err(ServiceError::from)?;
        agent.pause(&container.id).await.map_err(agent_error("Cannot pause the container"))?;
        container.init.set(paused);
        let event = TaskPaused { container_id: request.id, ..TaskPaused::default() };
        self.events.publish(TASK_PAUSED_EVENT_TOPIC, &event);
        Ok(Empty::default())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> Answer<Empty> {
        let (sandbox, container) = self.container(&request.id)?;
        let _steps = container.steps.lock().await;
        let running = container.init.state().resume().map_err(ServiceError::from)?;
        let agent = sandbox.agent().map_err(ServiceError::from)?;
        agent.resume(&container.id).await.map_err(agent_error("Cannot resume the container"))?;
        container.init.set(running);
        let event = TaskResumed { container_id: request.id, ..TaskResumed::default() };
        self.events.publish(TASK_RESUMED_EVENT_TOPIC, &event);
        Ok(Empty::default())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> Answer<Empty> {
        Err(ServiceError::Unsupported("Checkpoint").into())
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> Answer<Empty> {
        let Target { sandbox, container, exec, process } = self.process(&request.id, &request.exec_id)?;
        sandbox.signal(&container, exec.as_ref(), &process, request.signal).await.map_err(ServiceError::from)?;
        Ok(Empty::default())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> Answer<Empty> {
        self.add_process(request)?;
        Ok(Empty::default())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> Answer<Empty> {
        let Target { sandbox, container, exec, process } = self.process(&request.id, &request.exec_id)?;
        // Clients resize when their window does, which may be before the start or after the end.
        if matches!(process.state(), State::Running | State::Paused) {
            let agent = sandbox.agent().map_err(ServiceError::from)?;
            let resized = agent.resize(&container.id, exec.as_ref(), request.height, request.width).await;
            resized.map_err(agent_error("Cannot resize the terminal"))?;
        }
        Ok(Empty::default())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> Answer<Empty> {
        let target = self.process(&request.id, &request.exec_id)?;
        if let Some(stdio) = target.process.stdio().filter(|_| request.stdin) {
            stdio.close_stdin();
        }
        Ok(Empty::default())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> Answer<Empty> {
        let (sandbox, container) = self.container(&request.id)?;
        let resources = oci::parse_resources(&request.resources.get_or_default().value).map_err(ServiceError::from)?;
        sandbox.update_container(&container, &resources).await.map_err(ServiceError::from)?;
        Ok(Empty::default())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> Answer<WaitResponse> {
        let target = self.process(&request.id, &request.exec_id)?;
        let exit = target.process.exited().await;
        Ok(WaitResponse { exit_status: exit.status, exited_at: Some(exit.at.into()).into(), ..WaitResponse::default() })
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> Answer<StatsResponse> {
        let (sandbox, container) = self.container(&request.id)?;
        let agent = sandbox.agent().map_err(ServiceError::from)?;
        let stats = agent.stats(&container.id).await.map_err(agent_error("Cannot read the container's figures"))?;
        Ok(StatsResponse { stats: Some(metrics::to_any(&stats)).into(), ..StatsResponse::default() })
    }

    async fn connect(&self, _: &TtrpcContext, _: ConnectRequest) -> Answer<ConnectResponse> {
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: reported_pid(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..ConnectResponse::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> Answer<Empty> {
        // As with every shim: containers keep it alive, unless containerd insists.
        let in_use = self.sandbox().is_some_and(|sandbox| !sandbox.is_empty());
        if request.now || !in_use {
            self.ending.send_replace(true);
        }
        Ok(Empty::default())
    }
}
