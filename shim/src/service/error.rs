//! Errors as containerd gets them: a code that its clients act on, and a sentence with the causes.

use ttrpc::Code;

use crate::bootstrap::with_causes;
use crate::config::ConfigError;
use crate::container::state::IllegalStep;
use crate::ids::{Id, IdError};
use crate::oci::SpecError;
use crate::sandbox::agent::AgentError;
use crate::sandbox::{CreateError, SandboxError, StartError};
use crate::start_queue::QueueError;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// No container of that name.
    #[error("Container {0} not found")]
    NoContainer(String),
    /// No process of that name.
    #[error("Process {exec} of container {container} not found")]
    NoProcess {
        /// The container.
        container: Id,
        /// The process.
        exec: String,
    },
    /// The container's sandbox is not here.
    #[error("Container {container} belongs to the sandbox {sandbox}, which this shim does not serve")]
    NoSandbox {
        /// The container.
        container: Id,
        /// The sandbox.
        sandbox: Id,
    },
    /// A second sandbox in one process.
    #[error("This shim serves the sandbox {0} already")]
    Occupied(Id),
    /// A request that came too late.
    #[error("The shim is about to end")]
    Ending,
    /// What Inlay does not do.
    #[error("{0} is not supported")]
    Unsupported(&'static str),
    /// An identifier that is none.
    #[error(transparent)]
    Id(#[from] IdError),
    /// The runtime options that came with the request.
    #[error("The runtime options cannot be read")]
    Options(#[source] containerd_shim_protos::protobuf::Error),
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The specification.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// Too many others start.
    #[error("Cannot have a turn in the queue of starts")]
    Queue(#[from] QueueError),
    /// The sandbox was not started.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The container was not made.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// Something in a running sandbox.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
}

impl From<IllegalStep> for ServiceError {
    fn from(error: IllegalStep) -> Self {
        Self::Sandbox(error.into())
    }
}

impl ServiceError {
    /// The code that fits. containerd's clients look at `NOT_FOUND` above all: it ends a deletion well.
    fn code(&self) -> Code {
        match self {
            Self::NoContainer(_) | Self::NoProcess { .. } | Self::Sandbox(SandboxError::Ended) => Code::NOT_FOUND,
            Self::Create(CreateError::Exists(_)) | Self::Sandbox(SandboxError::Exists(_)) | Self::Occupied(_) => {
                Code::ALREADY_EXISTS
            }
            Self::NoSandbox { .. }
            | Self::Ending
            | Self::Sandbox(SandboxError::Step(_))
            | Self::Create(CreateError::Ended) => Code::FAILED_PRECONDITION,
            Self::Unsupported(_) => Code::UNIMPLEMENTED,
            Self::Id(_) | Self::Options(_) | Self::Config(_) | Self::Spec(_) => Code::INVALID_ARGUMENT,
            Self::Create(CreateError::Agent(source)) | Self::Sandbox(SandboxError::Agent { source, .. }) => {
                agent_code(source)
            }
            Self::Queue(_) | Self::Start(_) | Self::Create(_) | Self::Sandbox(_) => Code::UNKNOWN,
        }
    }
}

/// The agent's code, where containerd would take it for the same thing.
fn agent_code(error: &AgentError) -> Code {
    match error {
        AgentError::Refused {
            code: code @ (Code::NOT_FOUND | Code::UNIMPLEMENTED | Code::FAILED_PRECONDITION),
            ..
        } => *code,
        _ => Code::UNKNOWN,
    }
}

impl From<ServiceError> for ttrpc::Error {
    fn from(error: ServiceError) -> Self {
        ttrpc::Error::RpcStatus(ttrpc::get_status(error.code(), with_causes(&error)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::state::State;

    #[test]
    fn codes_are_those_that_clients_act_on() {
        let status = |error: ServiceError| match ttrpc::Error::from(error) {
            ttrpc::Error::RpcStatus(status) => (status.code(), status.message().to_owned()),
            other => panic!("{other}"),
        };
        assert_eq!(status(ServiceError::NoContainer("x".into())), (Code::NOT_FOUND, "Container x not found".into()));
        assert_eq!(status(State::Running.start().unwrap_err().into()).0, Code::FAILED_PRECONDITION);
        assert_eq!(status(ServiceError::Unsupported("Checkpoint")).0, Code::UNIMPLEMENTED);
        let refused = AgentError::Refused {
            code: Code::INTERNAL,
            message: "exec: \"nope\": executable file not found in $PATH".into(),
        };
        assert_eq!(
            status(CreateError::Agent(refused).into()),
            (Code::UNKNOWN, "OCI runtime create failed: exec: \"nope\": executable file not found in $PATH".into())
        );
    }
}
