//! Processes: start, wait, signal, add.

use std::sync::Arc;
use std::time::Duration;

use agent_proto::agent::ExecProcessRequest;
use containerd_shim_protos::events::task::{TaskExecAdded, TaskExecStarted, TaskExit, TaskStart};
use containerd_shim_protos::topics::{
    TASK_EXEC_ADDED_EVENT_TOPIC, TASK_EXEC_STARTED_EVENT_TOPIC, TASK_EXIT_EVENT_TOPIC, TASK_START_EVENT_TOPIC,
};

use super::agent::AgentError;
use super::first_output::FirstOutput;
use super::{Sandbox, SandboxError, State, trace};
use crate::container::state::{Exit, KILLED, State as ProcessState};
use crate::container::{Container, Process};
use crate::ids::Id;
use crate::lock::lock;

/// How long a start's report waits for the first byte of output.
const FIRST_OUTPUT_PATIENCE: Duration = Duration::from_secs(10);

/// How long a container that was never started may take to end.
const UNSTARTED_PATIENCE: Duration = Duration::from_secs(5);
/// signal(7).
const SIGKILL: u32 = 9;

/// What containerd is told to be the process id of everything in a sandbox: the shim's, as guest processes have none
/// on the host.
pub fn reported_pid() -> u32 {
    std::process::id()
}

impl Sandbox {
    /// Starts the container's first process.
    pub async fn start_container(self: &Arc<Self>, container: &Arc<Container>) -> Result<(), SandboxError> {
        let _steps = container.steps.lock().await;
        let running = container.init.state().start()?;
        let guest = self.guest()?;
        let started = guest.agent.start_container(&container.id).await;
        let failed = |error| SandboxError::Agent { what: "OCI runtime start failed", source: guest.blame(error) };
        started.map_err(failed)?;
        if self.is_made_by(&container.id) {
            lock(&self.times).t5 = Some(trace::now());
        }
        container.init.set(running);
        let event = TaskStart { container_id: container.id.to_string(), pid: reported_pid(), ..TaskStart::default() };
        self.events.publish(TASK_START_EVENT_TOPIC, &event);
        Ok(())
    }

    /// Adds a process, which is not started.
    pub fn add_process(&self, container: &Container, exec: Id, process: Process) -> Result<(), SandboxError> {
        container.init.state().exec()?;
        if !container.add(exec.clone(), process) {
            return Err(SandboxError::Exists(exec));
        }
        let event = TaskExecAdded {
            container_id: container.id.to_string(),
            exec_id: exec.to_string(),
            ..TaskExecAdded::default()
        };
        self.events.publish(TASK_EXEC_ADDED_EVENT_TOPIC, &event);
        Ok(())
    }

    /// Starts an added process.
    pub async fn start_added(
        self: &Arc<Self>,
        container: &Arc<Container>,
        exec: &Id,
        process: &Arc<Process>,
    ) -> Result<(), SandboxError> {
        let _steps = container.steps.lock().await;
        let running = process.state().start()?;
        container.init.state().exec()?;
        let guest = self.guest()?;
        let (stdio, ports) = self.open_streams(&guest, &container.id, &process.streams).await?;
        let request = ExecProcessRequest {
            container_id: container.id.to_string(),
            exec_id: exec.to_string(),
            process: process.take_specification().into(),
            stdin_port: ports.stdin,
            stdout_port: ports.stdout,
            stderr_port: ports.stderr,
            ..ExecProcessRequest::default()
        };
        let started = guest.agent.exec_process(&request).await;
        if let Err(source) = started {
            // There is nothing to start again: its specification is used up.
            process.end(Exit::now(KILLED));
            return Err(SandboxError::Agent { what: "OCI runtime exec failed", source: guest.blame(source) });
        }
        process.keep_stdio(Arc::new(stdio));
        process.set(running);
        let event = TaskExecStarted {
            container_id: container.id.to_string(),
            exec_id: exec.to_string(),
            pid: reported_pid(),
            ..TaskExecStarted::default()
        };
        self.events.publish(TASK_EXEC_STARTED_EVENT_TOPIC, &event);
        self.watch_exit(container, Some(exec.clone()), process);
        Ok(())
    }

    /// Sends a signal. A process that has ended takes it in silence.
    pub async fn signal(
        &self,
        container: &Container,
        exec: Option<&Id>,
        process: &Process,
        signal: u32,
    ) -> Result<(), SandboxError> {
        if process.state().exited().is_some() {
            return Ok(());
        }
        match self.agent()?.signal(&container.id, exec, signal).await {
            // It ended meanwhile.
            Err(AgentError::Refused { code: ttrpc::Code::NOT_FOUND, .. }) => Ok(()),
            sent => sent.map_err(|source| SandboxError::Agent { what: "Cannot send the signal", source }),
        }
    }

    /// Ends the first process of a container that was made and never started, so that containerd learns of its exit
    /// before it learns of its deletion.
    pub async fn end_unstarted(&self, container: &Container) {
        if container.init.state() != ProcessState::Created {
            return;
        }
        if let Err(error) = self.signal(container, None, &container.init, SIGKILL).await {
            tracing::warn!(container = %container.id, error = crate::bootstrap::with_causes(&error), "Cannot kill");
        }
        if tokio::time::timeout(UNSTARTED_PATIENCE, container.init.exited()).await.is_err() {
            tracing::warn!(container = %container.id, "A container that was never started does not end");
        }
    }

    /// Waits for a process's end in the background, and tells containerd.
    pub fn watch_exit(self: &Arc<Self>, container: &Arc<Container>, exec: Option<Id>, process: &Arc<Process>) {
        let (sandbox, container, process) = (Arc::clone(self), Arc::clone(container), Arc::clone(process));
        tokio::spawn(async move {
            let exit = sandbox.wait_in_guest(&container.id, exec.as_ref()).await;
            let steps = container.steps.lock().await;
            process.end(exit);
            let event = TaskExit {
                container_id: container.id.to_string(),
                id: exec.as_ref().unwrap_or(&container.id).to_string(),
                pid: reported_pid(),
                exit_status: exit.status,
                exited_at: Some(exit.at.into()).into(),
                ..TaskExit::default()
            };
            sandbox.events.publish(TASK_EXIT_EVENT_TOPIC, &event);
            drop(steps);
            if exec.is_none() && sandbox.is_made_by(&container.id) {
                sandbox.stop_when_drained().await;
            }
        });
    }

    /// A process's exit, or what stands for it when the machine ends first.
    async fn wait_in_guest(&self, container: &Id, exec: Option<&Id>) -> Exit {
        let Ok(agent) = self.agent() else { return Exit::now(KILLED) };
        let mut states = self.state.subscribe();
        let status = tokio::select! {
            biased;
            status = agent.wait(container, exec) => status,
            _ = states.wait_for(|state| *state == State::Stopped) => return Exit::now(KILLED),
        };
        match status {
            Ok(status) => Exit::now(u32::try_from(status).unwrap_or(KILLED)),
            Err(error) => {
                tracing::warn!(%container, error = crate::bootstrap::with_causes(&error), "The exit of a process is not known");
                Exit::now(KILLED)
            }
        }
    }

    /// Reports the times of the start, once the container has started and its first byte of output is there, or will
    /// not be soon. A container that is never started is not reported.
    pub(super) fn report_start(self: &Arc<Self>, container: &Arc<Container>, first_output: Option<FirstOutput>) {
        let (sandbox, container) = (Arc::clone(self), Arc::clone(container));
        tokio::spawn(async move {
            container.init.left_created().await;
            let mut states = sandbox.state.subscribe();
            if let Some(first_output) = first_output {
                let seen = tokio::select! {
                    biased;
                    seen = first_output.seen() => seen,
                    _ = states.wait_for(|state| *state != State::Running) => None,
                    () = tokio::time::sleep(FIRST_OUTPUT_PATIENCE) => None,
                };
                lock(&sandbox.times).t6 = seen;
            }
            let times = *lock(&sandbox.times);
            if times.t5.is_some() {
                times.report(&sandbox.id, sandbox.lazy_figures(), sandbox.config.runtime.trace_file.as_deref());
            }
        });
    }
}
