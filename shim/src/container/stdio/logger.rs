//! A logging program, as containerd defines it: it is ready when it closes the third of its descriptors. The helper
//! starts it, as this process may not.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use super::StdioError;
use crate::helper::{Helper, Program};

/// containerd's own limit for a logger to get ready.
const READY_DEADLINE: Duration = Duration::from_secs(10);

/// Pipes into a logging program. It ends by itself when the streams end, and is not killed: what it read is not lost.
pub struct Pipes {
    /// Read ends that the shim keeps, to learn of the end.
    pub stdout_read: OwnedFd,
    /// As above.
    pub stderr_read: OwnedFd,
    /// For the guest.
    pub stdout_write: OwnedFd,
    /// For the guest.
    pub stderr_write: OwnedFd,
}

/// Has the program started and waits until it is ready.
pub async fn start(
    program: Program,
    container: &str,
    namespace: &str,
    helper: &Arc<Helper>,
) -> Result<Pipes, StdioError> {
    let name = program.path.display().to_string();
    let late = |source| StdioError::LoggerReady { program: name.clone(), source };
    let pair = || nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(|errno| StdioError::Pipe(errno.into()));
    let ((stdout_read, stdout_write), (stderr_read, stderr_write)) = (pair()?, pair()?);
    let (ready_write, mut ready) = pipe::pipe().map_err(StdioError::Pipe)?;
    let ready_write = ready_write.into_blocking_fd().map_err(StdioError::Pipe)?;

    let (helper, container, namespace) = (Arc::clone(helper), container.to_owned(), namespace.to_owned());
    let pipes = tokio::task::spawn_blocking(move || {
        let descriptors = [stdout_read.as_fd(), stderr_read.as_fd(), ready_write.as_fd()];
        helper.start_logger(&program, &container, &namespace, descriptors)?;
        Ok(Pipes { stdout_read, stderr_read, stdout_write, stderr_write })
    });
    let pipes = pipes.await.map_err(io::Error::other).map_err(late)?;
    let pipes = pipes.map_err(|source| StdioError::Logger { program: name.clone(), source })?;
    let mut nothing = [0];
    let ended = tokio::time::timeout(READY_DEADLINE, ready.read(&mut nothing)).await;
    ended.map_err(|_| late(io::ErrorKind::TimedOut.into()))?.map_err(late)?;
    Ok(pipes)
}
