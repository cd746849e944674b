//! Errors of the agent as ttrpc statuses. The text is the whole chain of causes: it is what users read on the host.

use ttrpc::Code;

use crate::{container, helper, sandbox, stdio};

/// An error that has a place among ttrpc's codes.
pub trait Coded: std::error::Error {
    /// The code.
    fn code(&self) -> Code;
}

impl Coded for container::Error {
    fn code(&self) -> Code {
        match self {
            Self::InvalidId(_) | Self::Signal(_) => Code::INVALID_ARGUMENT,
            Self::NoContainer(_) | Self::NoProcess { .. } => Code::NOT_FOUND,
            Self::Exists(_) => Code::ALREADY_EXISTS,
            Self::State { .. } => Code::FAILED_PRECONDITION,
            Self::Timeout(_) => Code::DEADLINE_EXCEEDED,
            Self::Spec(error) => error.code(),
            Self::Stdio(error) => error.code(),
            Self::Storage(error) => error.code(),
            Self::Process(_) | Self::Io { .. } => Code::INTERNAL,
        }
    }
}

impl Coded for container::SpecError {
    fn code(&self) -> Code {
        match self {
            Self::Refused(_) => Code::UNIMPLEMENTED,
            Self::Missing(_) | Self::Invalid(_) | Self::CgroupPath(_) => Code::INVALID_ARGUMENT,
        }
    }
}

impl Coded for stdio::Error {
    fn code(&self) -> Code {
        match self {
            Self::PortTwice(_) => Code::INVALID_ARGUMENT,
            Self::NoConnection(_) => Code::DEADLINE_EXCEEDED,
            Self::NotOpen | Self::NoTerminal => Code::FAILED_PRECONDITION,
            Self::Io { .. } => Code::INTERNAL,
        }
    }
}

impl Coded for sandbox::storage::Error {
    fn code(&self) -> Code {
        match self {
            Self::Driver(_) => Code::UNIMPLEMENTED,
            Self::Path(_) | Self::Option(_) => Code::INVALID_ARGUMENT,
            Self::Mount { .. } => Code::INTERNAL,
        }
    }
}

impl Coded for sandbox::Error {
    fn code(&self) -> Code {
        match self {
            Self::Exists(_) => Code::ALREADY_EXISTS,
            Self::Refused(_) => Code::UNIMPLEMENTED,
            Self::Storage(error) => error.code(),
            Self::Io { .. } => Code::INTERNAL,
        }
    }
}

impl Coded for std::io::Error {
    fn code(&self) -> Code {
        match self.kind() {
            std::io::ErrorKind::NotFound => Code::NOT_FOUND,
            std::io::ErrorKind::InvalidInput => Code::INVALID_ARGUMENT,
            _ => Code::INTERNAL,
        }
    }
}

/// The status that the host gets.
pub fn status(error: &impl Coded) -> ttrpc::Error {
    ttrpc::error::get_rpc_status(error.code(), helper::chain(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_reads_the_whole_chain_and_each_sentence_once() {
        let source = std::io::Error::from_raw_os_error(libc::ENOENT);
        let error = container::Error::Io { what: "Opening the door".into(), source };
        let ttrpc::Error::RpcStatus(status) = status(&error) else { panic!("A status") };
        assert_eq!(status.message, "Opening the door failed: No such file or directory (os error 2)");
        assert_eq!(status.code(), Code::INTERNAL);
        let refused = container::Error::Spec(container::SpecError::Refused("A hook".into()));
        assert_eq!(refused.code(), Code::UNIMPLEMENTED);
    }
}
