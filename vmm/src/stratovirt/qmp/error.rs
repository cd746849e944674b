//! Why a command is refused, and the class that clients look at.

use std::error::Error;
use std::io;

use serde::Serialize;

use super::framing::FramingError;
use super::rate::MAX_REQUESTS_PER_SECOND;
use crate::hotplug::HotplugError;
use crate::machine::StateError;
use crate::snapshot::SnapshotError;
use crate::stratovirt::drive::DriveError;
use devices::virtio::balloon::BalloonError;
use devices::virtio::mem::MemError;
use devices::virtio::net::TapError;

/// The classes that StratoVirt's clients know and that apply here. What StratoVirt does not know is a `GenericError` to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum ErrorClass {
    /// Anything else.
    GenericError,
    /// The device exists, but not in this machine.
    DeviceNotActive,
    /// Too many requests.
    OperationThrottled,
}

/// Why a command is refused.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The bytes are no JSON, or too many.
    #[error(transparent)]
    Framing(FramingError),
    /// The JSON is no request.
    #[error("The JSON expression is not a request")]
    NoRequest(#[source] serde_json::Error),
    /// Nobody knows the command.
    #[error("There is no command {0}")]
    Unknown(String),
    /// The command does not take these arguments.
    #[error("Invalid arguments")]
    Arguments(#[source] serde_json::Error),
    /// The command came too soon after too many others.
    #[error("More than {MAX_REQUESTS_PER_SECOND} requests received during 1 second")]
    Throttled,
    /// The command makes no sense for this machine, or an argument does not.
    #[error("{0}")]
    Refused(String),
    /// The machine has no device of the kind.
    #[error("No {0} device has been activated")]
    NotActive(&'static str),
    /// Something is in the way on the host.
    #[error("{what}")]
    Host {
        /// What was tried, a sentence.
        what: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The machine could not be saved.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The balloon does not do it.
    #[error(transparent)]
    Balloon(#[from] BalloonError),
    /// The interface cannot be used.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The machine is in another state.
    #[error(transparent)]
    State(#[from] StateError),
    /// A device could not be plugged or unplugged.
    #[error(transparent)]
    Hotplug(#[from] HotplugError),
    /// A drive cannot be used.
    #[error(transparent)]
    Drive(#[from] DriveError),
    /// The memory that can be plugged does not do it.
    #[error(transparent)]
    Memory(#[from] MemError),
}

impl CommandError {
    /// A refusal that is said in `sentence`.
    pub fn refused(sentence: impl Into<String>) -> Self {
        Self::Refused(sentence.into())
    }

    /// The class, for programs.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Throttled => ErrorClass::OperationThrottled,
            Self::NotActive(_) => ErrorClass::DeviceNotActive,
            _ => ErrorClass::GenericError,
        }
    }

    /// The error with its causes, for people.
    pub fn description(&self) -> String {
        let mut text = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        text
    }
}
