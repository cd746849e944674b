//! The agent in the guest, as the shim calls it.

use std::os::unix::net::UnixStream;
use std::time::{Duration, SystemTime};

use agent_proto::agent::{
    CreateContainerRequest, CreateSandboxRequest, ExecProcessRequest, GetOOMEventRequest, PauseContainerRequest,
    RemoveContainerRequest, ReseedRandomDevRequest, ResumeContainerRequest, SetGuestDateTimeRequest,
    SignalProcessRequest, StartContainerRequest, StatsContainerRequest, StatsContainerResponse, TtyWinResizeRequest,
    UpdateContainerRequest, WaitProcessRequest,
};
use agent_proto::agent_ttrpc::AgentServiceClient;
use agent_proto::health::CheckRequest;
use agent_proto::health_ttrpc::HealthClient;
use agent_proto::oci::LinuxResources;
use ttrpc::r#async::Client;
use ttrpc::r#async::transport::Socket;
use ttrpc::context::{Context, with_duration, with_timeout};

use crate::ids::Id;

/// Longest time for a call that only touches the agent's own state or a process.
const CALL_DEADLINE: Duration = Duration::from_secs(30);
/// How long the agent may wait for a container's processes to go, in seconds.
const REMOVE_PATIENCE: u32 = 10;
/// The guest is not trusted to be brief: what it says ends up in containerd's answers and logs.
const MAX_MESSAGE: usize = 4 << 10;

/// A call that failed.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The agent answered that it cannot.
    #[error("{message}")]
    Refused {
        /// ttrpc's code, which is gRPC's.
        code: ttrpc::Code,
        /// The agent's words.
        message: String,
    },
    /// There was no answer.
    #[error("The agent did not answer {call}")]
    NoAnswer {
        /// The call.
        call: &'static str,
        /// What happened to the connection.
        source: ttrpc::Error,
    },
    /// There was none, and there will be none.
    #[error("The guest has ended: {0}")]
    Ended(vmm::ExitReason),
    /// The connection cannot be used.
    #[error("Cannot use the connection to the agent")]
    Connection(#[source] std::io::Error),
    /// There is no entropy for the guest.
    #[error("Cannot read the host's source of entropy")]
    Entropy(#[source] std::io::Error),
}

/// A connection to the agent. Clones share it.
#[derive(Clone)]
pub struct Agent {
    service: AgentServiceClient,
    health: HealthClient,
    create_deadline: Duration,
}

impl Agent {
    /// Speaks with the agent over `stream`. Must be called within a tokio runtime.
    pub fn new(stream: UnixStream, create_deadline: Duration) -> Result<Self, AgentError> {
        let client = Client::new(Socket::try_from(stream).map_err(AgentError::Connection)?);
        Ok(Self {
            service: AgentServiceClient::new(client.clone()),
            health: HealthClient::new(client),
            create_deadline,
        })
    }

    /// Asks whether the agent is there.
    pub async fn check(&self) -> Result<(), AgentError> {
        answer("Health.Check", self.health.check(short(), &CheckRequest::default()).await).map(drop)
    }

    /// Mixes `data` into the guest's random generator.
    pub async fn reseed_random_dev(&self, data: Vec<u8>) -> Result<(), AgentError> {
        let request = ReseedRandomDevRequest { data, ..Default::default() };
        answer("ReseedRandomDev", self.service.reseed_random_dev(short(), &request).await).map(drop)
    }

    /// Sets the guest's wall clock, to the microsecond.
    pub async fn set_guest_date_time(&self, time: SystemTime) -> Result<(), AgentError> {
        let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let request = SetGuestDateTimeRequest {
            Sec: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
            Usec: since.subsec_micros().into(),
            ..Default::default()
        };
        answer("SetGuestDateTime", self.service.set_guest_date_time(short(), &request).await).map(drop)
    }

    /// Sets the sandbox up.
    pub async fn create_sandbox(&self, request: &CreateSandboxRequest) -> Result<(), AgentError> {
        let context = with_duration(self.create_deadline);
        answer("CreateSandbox", self.service.create_sandbox(context, request).await).map(drop)
    }

    /// Makes a container.
    pub async fn create_container(&self, request: &CreateContainerRequest) -> Result<(), AgentError> {
        let context = with_duration(self.create_deadline);
        answer("CreateContainer", self.service.create_container(context, request).await).map(drop)
    }

    /// Starts a container's first process.
    pub async fn start_container(&self, container: &Id) -> Result<(), AgentError> {
        let request = StartContainerRequest { container_id: container.to_string(), ..Default::default() };
        answer("StartContainer", self.service.start_container(short(), &request).await).map(drop)
    }

    /// Removes a container with all that is left of it.
    pub async fn remove_container(&self, container: &Id) -> Result<(), AgentError> {
        let request = RemoveContainerRequest {
            container_id: container.to_string(),
            timeout: REMOVE_PATIENCE,
            ..Default::default()
        };
        answer("RemoveContainer", self.service.remove_container(short(), &request).await).map(drop)
    }

    /// Adds a process and starts it.
    pub async fn exec_process(&self, request: &ExecProcessRequest) -> Result<(), AgentError> {
        let context = with_duration(self.create_deadline);
        answer("ExecProcess", self.service.exec_process(context, request).await).map(drop)
    }

    /// Sends a signal to a process.
    pub async fn signal(&self, container: &Id, exec: Option<&Id>, signal: u32) -> Result<(), AgentError> {
        let request = SignalProcessRequest {
            container_id: container.to_string(),
            exec_id: name(exec),
            signal,
            ..Default::default()
        };
        answer("SignalProcess", self.service.signal_process(short(), &request).await).map(drop)
    }

    /// Waits for a process's end, however long it takes, and returns its status.
    pub async fn wait(&self, container: &Id, exec: Option<&Id>) -> Result<i32, AgentError> {
        let request =
            WaitProcessRequest { container_id: container.to_string(), exec_id: name(exec), ..Default::default() };
        answer("WaitProcess", self.service.wait_process(unlimited(), &request).await).map(|response| response.status)
    }

    /// Changes the size of a process's terminal.
    pub async fn resize(&self, container: &Id, exec: Option<&Id>, rows: u32, columns: u32) -> Result<(), AgentError> {
        let request = TtyWinResizeRequest {
            container_id: container.to_string(),
            exec_id: name(exec),
            row: rows,
            column: columns,
            ..Default::default()
        };
        answer("TtyWinResize", self.service.tty_win_resize(short(), &request).await).map(drop)
    }

    /// Freezes a container.
    pub async fn pause(&self, container: &Id) -> Result<(), AgentError> {
        let request = PauseContainerRequest { container_id: container.to_string(), ..Default::default() };
        answer("PauseContainer", self.service.pause_container(short(), &request).await).map(drop)
    }

    /// Thaws a container.
    pub async fn resume(&self, container: &Id) -> Result<(), AgentError> {
        let request = ResumeContainerRequest { container_id: container.to_string(), ..Default::default() };
        answer("ResumeContainer", self.service.resume_container(short(), &request).await).map(drop)
    }

    /// Changes a container's limits.
    pub async fn update(&self, container: &Id, resources: LinuxResources) -> Result<(), AgentError> {
        let request = UpdateContainerRequest {
            container_id: container.to_string(),
            resources: Some(resources).into(),
            ..Default::default()
        };
        answer("UpdateContainer", self.service.update_container(short(), &request).await).map(drop)
    }

    /// What a container uses.
    pub async fn stats(&self, container: &Id) -> Result<StatsContainerResponse, AgentError> {
        let request = StatsContainerRequest { container_id: container.to_string(), ..Default::default() };
        answer("StatsContainer", self.service.stats_container(short(), &request).await)
    }

    /// Waits for the next container that runs out of memory and returns its name.
    pub async fn oom_event(&self) -> Result<String, AgentError> {
        let request = GetOOMEventRequest::default();
        answer("GetOOMEvent", self.service.get_oom_event(unlimited(), &request).await).map(|event| event.container_id)
    }
}

fn name(exec: Option<&Id>) -> String {
    exec.map(Id::to_string).unwrap_or_default()
}

fn short() -> Context {
    with_duration(CALL_DEADLINE)
}

/// Zero is no limit (ttrpc's `with_timeout`).
fn unlimited() -> Context {
    with_timeout(0)
}

fn answer<T>(call: &'static str, result: ttrpc::Result<T>) -> Result<T, AgentError> {
    result.map_err(|error| match error {
        ttrpc::Error::RpcStatus(status) => AgentError::Refused { code: status.code(), message: cut(status.message()) },
        source => AgentError::NoAnswer { call, source },
    })
}

fn cut(message: &str) -> String {
    if message.len() <= MAX_MESSAGE {
        return message.to_owned();
    }
    let end = (0..=MAX_MESSAGE).rev().find(|&end| message.is_char_boundary(end)).unwrap_or_default();
    format!("{}...", message.get(..end).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_message_is_cut() {
        assert_eq!(cut(&"x".repeat(MAX_MESSAGE)).len(), MAX_MESSAGE);
        assert_eq!(cut(&"x".repeat(MAX_MESSAGE + 1)), format!("{}...", "x".repeat(MAX_MESSAGE)));
        // The limit is inside of a character.
        let text = format!("{}é!", "x".repeat(MAX_MESSAGE - 1));
        assert_eq!(cut(&text), format!("{}...", "x".repeat(MAX_MESSAGE - 1)));
    }
}
