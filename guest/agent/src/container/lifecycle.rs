//! StartContainer, SignalProcess, PauseContainer, ResumeContainer, UpdateContainer.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;

use agent_proto::oci;
use nix::errno::Errno;

use super::{Container, Error, Phase, failed, off_thread, spec};
use crate::helper;
use crate::sandbox::Sandbox;

/// Highest signal number on Linux (signal(7): SIGRTMAX).
const MAX_SIGNAL: u32 = 64;

/// Lets the first process become its program, and waits until it has.
pub async fn start(sandbox: &Sandbox, id: &str) -> Result<(), Error> {
    let program = sandbox.with_container(id, |container| {
        if container.phase != Phase::Created || container.init.has_ended() {
            return Err(Error::State { container: id.to_owned(), state: container.state(), verb: "started" });
        }
        let socket = Path::new(helper::STATE_ROOT).join(id).join(helper::START_SOCKET);
        // What is sent does not matter, only that the connection is made and closed again.
        UnixStream::connect(socket)
            .and_then(|mut stream| stream.write_all(b"start"))
            .map_err(failed("Starting the first process"))?;
        container.phase = Phase::Running;
        Ok(container.program.take())
    })?;
    if let Some(program) = program {
        program.begun().await;
    }
    Ok(())
}

/// Sends a signal. To a process that has ended it is no error; SIGKILL to the first process is for all of the
/// container's, whatever cgroup or session they moved to below it.
pub fn signal(sandbox: &Sandbox, id: &str, exec: &str, signal: u32) -> Result<(), Error> {
    let number = i32::try_from(signal).ok().filter(|_| signal <= MAX_SIGNAL).ok_or(Error::Signal(signal))?;
    sandbox.with_container(id, |container| {
        let process = container.process(id, exec)?;
        let all = number == libc::SIGKILL && (exec.is_empty() || exec == id);
        if all {
            container.cgroup.kill().map_err(failed("Killing the container's processes"))?;
        }
        if process.has_ended() {
            return Ok(());
        }
        // The process has not been reaped, so the number is still its own: reaping happens on this thread.
        // SAFETY: kill takes two integers and touches no memory of this process.
        match unsafe { libc::kill(process.pid.as_raw(), number) } {
            0 => Ok(()),
            _ => match Errno::last() {
                Errno::ESRCH => Ok(()),
                errno => Err(failed(format!("Sending signal {signal}"))(errno.into())),
            },
        }
    })
}

/// Freezes or thaws the container's cgroup and waits until the kernel has done it.
pub async fn set_paused(sandbox: &Sandbox, id: &str, paused: bool) -> Result<(), Error> {
    let (from, to, verb) =
        if paused { (Phase::Running, Phase::Paused, "paused") } else { (Phase::Paused, Phase::Running, "resumed") };
    let cgroup = sandbox.with_container(id, |container| {
        if container.phase != from || container.init.has_ended() {
            return Err(Error::State { container: id.to_owned(), state: container.state(), verb });
        }
        Ok(container.cgroup.clone())
    })?;
    let frozen = failed("Freezing or thawing the container");
    off_thread(move || cgroup.freeze(paused).map_err(frozen)).await?;
    sandbox.with_container(id, |container| {
        container.phase = to;
        Ok(())
    })
}

/// Sets limits.
pub async fn update(sandbox: &Sandbox, id: &str, given: &oci::LinuxResources) -> Result<(), Error> {
    let resources = spec::resources(given)?;
    let cgroup = sandbox.with_container(id, |container: &mut Container| Ok(container.cgroup.clone()))?;
    off_thread(move || cgroup.update(&resources).map_err(failed("Setting the container's limits"))).await
}
