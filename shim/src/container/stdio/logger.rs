//! A logging program, as containerd defines it: it finds standard output on descriptor 3, standard error on 4, and
//! closes 5 when it is ready.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};

use super::StdioError;
use super::target::Program;

/// containerd's own limit for a logger to get ready.
const READY_DEADLINE: Duration = Duration::from_secs(10);
/// First descriptor of the protocol.
const FIRST_FD: RawFd = 3;

/// A running logging program. It ends by itself when the streams end, and is not killed: what it read is not lost.
#[derive(Debug)]
pub struct Logger {
    _child: Child,
}

/// Pipes into the program.
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

impl Logger {
    /// Starts the program and waits until it is ready.
    pub async fn start(program: &Program, container: &str, namespace: &str) -> Result<(Self, Pipes), StdioError> {
        let failed = |source| StdioError::Logger { program: program.path.display().to_string(), source };
        let pair = || nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(|errno| StdioError::Pipe(errno.into()));
        let ((stdout_read, stdout_write), (stderr_read, stderr_write)) = (pair()?, pair()?);
        let (ready_write, mut ready) = pipe::pipe().map_err(StdioError::Pipe)?;
        let ready_write = ready_write.into_blocking_fd().map_err(StdioError::Pipe)?;

        let mut command = Command::new(&program.path);
        command.args(&program.arguments);
        command.env("CONTAINER_ID", container).env("CONTAINER_NAMESPACE", namespace);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let given = [&stdout_read, &stderr_read, &ready_write].map(AsRawFd::as_raw_fd);
        // SAFETY: between fork and exec only async-signal-safe calls are made: fcntl and dup2.
        unsafe { command.pre_exec(move || place(given)) };
        let child = command.spawn().map_err(failed)?;
        drop((command, ready_write));
        let mut nothing = [0];
        let ended = tokio::time::timeout(READY_DEADLINE, ready.read(&mut nothing)).await;
        ended.map_err(|_| failed(io::ErrorKind::TimedOut.into()))?.map_err(failed)?;
        Ok((Self { _child: child }, Pipes { stdout_read, stderr_read, stdout_write, stderr_write }))
    }
}

/// Puts descriptors on 3, 4 and 5. They may lie there already in another order, so all move out of the way first.
fn place(descriptors: [RawFd; 3]) -> io::Result<()> {
    const OUT_OF_THE_WAY: RawFd = FIRST_FD + 3;
    let mut moved = [0; 3];
    for (slot, fd) in moved.iter_mut().zip(descriptors) {
        // SAFETY: plain calls on open descriptors without memory, here and below.
        *slot = check(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, OUT_OF_THE_WAY) })?;
    }
    for (target, fd) in (FIRST_FD..).zip(moved) {
        // SAFETY: as above. dup2 clears close-on-exec.
        check(unsafe { libc::dup2(fd, target) })?;
    }
    Ok(())
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
