//! `start`: a shim for the container, or the one that already serves its pod.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::flags::Flags;
use super::serve::LISTENER_FD;
use crate::config::Config;
use crate::ids::{Id, IdError};
use crate::oci::{Role, SpecError};
use crate::pool::{self, Claim, Refill};
use crate::run_dir::{RunDir, address_of};
use crate::{events, template};

/// File in the bundle from which containerd 1.6 learns the address again after its own restart.
const ADDRESS_FILE: &str = "address";
/// Name under which the serving process runs, whatever the file is called.
const SHIM_NAME: &str = "containerd-shim-inlay-v2";

/// Why a shim was not started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The container's identifier is no file name.
    #[error(transparent)]
    Id(#[from] IdError),
    /// The bundle's `config.json` does not say which pod the container belongs to.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// A pod's container came, but its sandbox has no shim.
    #[error("No shim serves the sandbox {sandbox} of the container {container}")]
    NoSandbox {
        /// The container.
        container: Id,
        /// The sandbox it belongs to.
        sandbox: Id,
    },
    /// A shim of that name lives.
    #[error("A shim already serves {0}")]
    Alive(Id),
    /// A file or socket could not be made.
    #[error("Cannot {what} {}", path.display())]
    File {
        /// The verb.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The serving process could not be started.
    #[error("Cannot start the serving process")]
    Spawn(#[source] io::Error),
}

/// Makes sure that a shim serves the container and returns its address.
pub fn run(flags: &Flags) -> Result<String, StartError> {
    let bundle = super::bundle(flags).map_err(StartError::Spawn)?;
    let id = Id::try_from(flags.id.as_str())?;
    let run_dir = RunDir::from_environment();
    let socket = |id: &Id| run_dir.socket(&flags.address, &flags.namespace, id);
    let path = match Role::of_bundle(&bundle)? {
        Role::Member { sandbox } => {
            let path = socket(&sandbox);
            if UnixStream::connect(&path).is_err() {
                return Err(StartError::NoSandbox { container: id, sandbox });
            }
            path
        }
        Role::Sandbox => {
            let path = socket(&id);
            let listener = listen(&path, &id)?;
            start(flags, &run_dir, &bundle, &listener, id).inspect_err(|_| {
                let _ = fs::remove_file(&path);
            })?;
            path
        }
    };
    let address = address_of(&path);
    write_address(&bundle, &address)?;
    Ok(address)
}

/// Binds the socket. One that a dead shim left is replaced.
fn listen(path: &Path, id: &Id) -> Result<UnixListener, StartError> {
    let failed = |what| move |source| StartError::File { what, path: path.into(), source };
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(failed("make the directory of the socket"))?;
    }
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
        bound => return bound.map_err(failed("listen on")),
    }
    if UnixStream::connect(path).is_ok() {
        return Err(StartError::Alive(id.clone()));
    }
    fs::remove_file(path).map_err(failed("remove the stale socket"))?;
    UnixListener::bind(path).map_err(failed("listen on"))
}

/// Has a spare become the shim, if there is one, or starts a shim; and has the pool refilled afterwards.
///
/// Which configuration the container names is known only when it is created, so the usual one counts.
fn start(flags: &Flags, run_dir: &RunDir, bundle: &Path, listener: &UnixListener, id: Id) -> Result<(), StartError> {
    // What is wrong with the configuration is said when the sandbox is made.
    if !Config::load(None).is_ok_and(|(config, _)| pool::has_a_pool(&config)) {
        return spawn(flags, bundle, listener, Stdio::null());
    }
    let name = template::name_for(None);
    let claim = Claim {
        id,
        namespace: flags.namespace.clone(),
        address: flags.address.clone(),
        events: events::address_from_environment(),
        bundle: bundle.to_owned(),
        debug: flags.debug,
    };
    // Sent first: whoever has the sign must have it from the beginning.
    let refill = Refill::send();
    let sign = refill.as_ref().map(Refill::sign);
    match pool::claim(run_dir, &name, &claim, listener.as_fd(), sign.map(AsFd::as_fd)) {
        Some(pid) => {
            raise_oom_score(pid);
            Ok(())
        }
        None => spawn(flags, bundle, listener, refill.map_or_else(Stdio::null, |refill| OwnedFd::from(refill).into())),
    }
}

/// Starts this program again, in a session of its own, with the listener in its hands. `sign` is its standard input.
fn spawn(flags: &Flags, bundle: &Path, listener: &UnixListener, sign: Stdio) -> Result<(), StartError> {
    let program = std::env::current_exe().map_err(StartError::Spawn)?;
    let listener: OwnedFd = listener.try_clone().map_err(StartError::Spawn)?.into();
    let fd = listener.as_raw_fd();
    let mut command = Command::new(program);
    command.arg0(SHIM_NAME).args(flags.to_arguments()).current_dir(bundle);
    command.stdin(sign).stdout(Stdio::null()).stderr(Stdio::null());
    // SAFETY: between fork and exec only async-signal-safe calls are made: setsid, dup2 and fcntl.
    unsafe {
        command.pre_exec(move || {
            check(libc::setsid())?;
            if fd == LISTENER_FD {
                // dup2 onto itself would keep the close-on-exec flag.
                check(libc::fcntl(fd, libc::F_SETFD, 0))?;
            } else {
                check(libc::dup2(fd, LISTENER_FD))?;
            }
            Ok(())
        });
    }
    let child = command.spawn().map_err(StartError::Spawn)?;
    raise_oom_score(child.id());
    Ok(())
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// containerd protects itself from the OOM killer, and what it starts inherits that. The shim, which is the sandbox,
/// must go before containerd: its score is one above containerd's. Best effort: a container's limits do not hang on it.
fn raise_oom_score(pid: u32) {
    let parent = format!("/proc/{}/oom_score_adj", nix::unistd::getppid());
    let score = fs::read_to_string(parent).ok().and_then(|text| text.trim().parse::<i32>().ok());
    if let Some(score) = score.map(|score| (score + 1).min(1000)) {
        let _ = fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string());
    }
}

/// Written beside and renamed, so that a reader never sees half an address.
fn write_address(bundle: &Path, address: &str) -> Result<(), StartError> {
    let (path, temporary) = (bundle.join(ADDRESS_FILE), bundle.join(".address"));
    fs::write(&temporary, address).and_then(|()| fs::rename(&temporary, &path)).map_err(|source| StartError::File {
        what: "write",
        path,
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s/socket");
        let id = Id::try_from("x").unwrap();
        let first = listen(&path, &id).unwrap();
        assert!(matches!(listen(&path, &id), Err(StartError::Alive(_))));
        drop(first);
        assert!(path.exists());
        let second = listen(&path, &id).unwrap();
        UnixStream::connect(&path).unwrap();
        drop(second);
    }

    #[test]
    fn the_address_is_written_whole() {
        let dir = tempfile::tempdir().unwrap();
        write_address(dir.path(), "unix:///run/x").unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("address")).unwrap(), "unix:///run/x");
        assert!(!dir.path().join(".address").exists());
    }
}
