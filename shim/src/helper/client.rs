//! The shim's side: requests, and values that give back what they stand for.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt::ReceiveTimeout};
use nix::sys::time::TimeVal;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use tokio::io::Interest;

use super::grounds::Named;
use super::wire::{self, Answer, Done, Program, Request};
use crate::bootstrap::ProcessIdentity;
use crate::ids::Id;
use crate::lock::lock;
use crate::readiness;
use crate::resources::ResourceError;
use crate::resources::mount::Mount;
use crate::resources::share::{GUEST_SHARE, MOUNTS, ROOTFS, SHARED};

/// How long the helper may take for a request. Mounts of file systems that do not answer take for ever.
const PATIENCE: Duration = Duration::from_secs(60);

/// Why the helper has not done something.
#[derive(Debug, thiserror::Error)]
pub enum HelperError {
    /// It is gone, or was given up.
    #[error(
        "The sandbox's helper process has ended: nothing can be mounted or started any more, what runs goes on running"
    )]
    Gone,
    /// The message could not be sent, or its answer not be received in time.
    #[error("The sandbox's helper process cannot be asked")]
    Socket(#[source] io::Error),
    /// Its own words.
    #[error("{0}")]
    Refused(String),
}

/// The helper process of this shim. Calls wait for its answer, so they belong on a thread that may wait.
#[derive(Debug)]
pub struct Helper {
    pid: Pid,
    identity: ProcessIdentity,
    /// Whether it can be asked: after an answer that did not come, the next one would be to an old question.
    socket: Mutex<(OwnedFd, bool)>,
}

impl Helper {
    pub(super) fn new(socket: OwnedFd, pid: Pid) -> io::Result<Self> {
        let seconds = i64::try_from(PATIENCE.as_secs()).unwrap_or(i64::MAX);
        setsockopt(&socket, ReceiveTimeout, &TimeVal::new(seconds, 0))?;
        Ok(Self { pid, identity: ProcessIdentity::of_child(pid)?, socket: Mutex::new((socket, true)) })
    }

    /// Who it is: for whoever cleans up when the shim cannot.
    pub fn identity(&self) -> ProcessIdentity {
        self.identity
    }

    /// Says in the log when it ends before the shim. Must be called within a tokio runtime.
    pub fn watch(&self) -> io::Result<()> {
        let Some(process) = self.identity.open()? else { return Ok(()) };
        let process = readiness::watch(process, Interest::READABLE)?;
        let pid = self.pid;
        tokio::spawn(async move {
            if process.readable().await.is_ok() {
                let end = waitpid(pid, Some(WaitPidFlag::WNOHANG));
                tracing::error!(?end, "The helper process has ended: no container can be made any more");
            }
        });
        Ok(())
    }

    /// Says where the sandbox's directory and the bundles are, where that is not what it was made with.
    pub fn adopt(&self, sandbox: &Path, bundles: &Path) -> Result<(), HelperError> {
        self.ask(&Request::Adopt { sandbox: sandbox.to_owned(), bundles: bundles.to_owned() }).map(drop)
    }

    /// The guest is about to run: what is asked for from now on may be its wish.
    pub fn seal(&self) -> Result<(), HelperError> {
        self.ask(&Request::Seal).map(drop)
    }

    /// Starts a logging program. `descriptors` are its standard output, its standard error, and its sign of readiness.
    pub fn start_logger(
        &self,
        program: &Program,
        container: &str,
        namespace: &str,
        descriptors: [BorrowedFd<'_>; wire::MAX_DESCRIPTORS],
    ) -> Result<(), HelperError> {
        let (program, container, namespace) = (program.clone(), container.to_owned(), namespace.to_owned());
        self.ask_with(&Request::StartLogger { program, container, namespace }, &descriptors).map(drop)
    }

    /// Ends the connection, as the end of this process does.
    #[cfg(test)]
    pub(super) fn close(&self) {
        nix::sys::socket::shutdown(
            std::os::fd::AsRawFd::as_raw_fd(&lock(&self.socket).0),
            nix::sys::socket::Shutdown::Both,
        )
        .unwrap();
    }

    /// Sends what no request is.
    #[cfg(test)]
    pub(super) fn ask_raw(&self, bytes: &[u8]) -> Result<Done, HelperError> {
        let guarded = lock(&self.socket);
        nix::unistd::write(&guarded.0, bytes).unwrap();
        let (answer, _) = wire::receive::<Answer>(guarded.0.as_fd()).unwrap().unwrap();
        answer.map_err(HelperError::Refused)
    }

    fn ask(&self, request: &Request) -> Result<Done, HelperError> {
        self.ask_with(request, &[])
    }

    fn ask_with(&self, request: &Request, descriptors: &[BorrowedFd<'_>]) -> Result<Done, HelperError> {
        let mut guarded = lock(&self.socket);
        let (socket, usable) = &mut *guarded;
        if !*usable {
            return Err(HelperError::Gone);
        }
        match wire::send(socket.as_fd(), request, descriptors) {
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => return Err(HelperError::Socket(error)),
            Err(error) => {
                *usable = false;
                return Err(gone_or(error));
            }
            Ok(()) => {}
        }
        match wire::receive::<Answer>(socket.as_fd()) {
            Ok(Some((answer, _))) => answer.map_err(HelperError::Refused),
            Ok(None) => {
                *usable = false;
                Err(HelperError::Gone)
            }
            Err(error) => {
                *usable = false;
                Err(gone_or(error))
            }
        }
    }
}

fn gone_or(error: io::Error) -> HelperError {
    match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => HelperError::Gone,
        _ => HelperError::Socket(error),
    }
}

/// A sandbox's share, removed when this value is dropped.
#[derive(Debug)]
pub struct Share {
    helper: Arc<Helper>,
    shared: PathBuf,
}

impl Share {
    /// Has the share made in the sandbox's directory. `named` is what containerd's request names.
    pub fn make(helper: Arc<Helper>, sandbox: &Path, named: Named) -> Result<Self, ResourceError> {
        helper.ask(&Request::MakeShare(named))?;
        Ok(Self { helper, shared: sandbox.join(SHARED) })
    }

    /// Says where the sandbox's directory is by now, and what containerd has named.
    pub fn adopt(&mut self, sandbox: &Path, bundles: &Path, named: Named) -> Result<(), ResourceError> {
        self.helper.adopt(sandbox, bundles)?;
        self.shared = sandbox.join(SHARED);
        self.helper.ask(&Request::MakeShare(named))?;
        Ok(())
    }

    /// The directory to be exported.
    pub fn exported(&self) -> &Path {
        &self.shared
    }

    /// Has a container's place made.
    pub fn add_container(&self, id: &Id) -> Result<Place, ResourceError> {
        self.helper.ask(&Request::AddContainer(id.clone()))?;
        Ok(Place {
            helper: Arc::clone(&self.helper),
            id: id.clone(),
            shared: self.shared.join(id.as_str()),
            guest: format!("{GUEST_SHARE}/{id}"),
            points: Vec::new(),
        })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        if let Err(error) = self.helper.ask(&Request::RemoveShare) {
            tracing::warn!(%error, "Cannot remove the sandbox's share");
        }
    }
}

/// A container's place in the share, removed when this value is dropped.
#[derive(Debug)]
pub struct Place {
    helper: Arc<Helper>,
    id: Id,
    shared: PathBuf,
    guest: String,
    points: Vec<PathBuf>,
}

impl Place {
    /// Has the root file system mounted from what the snapshotter gave, or from the bundle where it gave nothing.
    /// Returns the guest's path.
    pub fn mount_rootfs(&mut self, mounts: Vec<Mount>) -> Result<String, ResourceError> {
        self.helper.ask(&Request::MountRootfs(self.id.clone(), mounts))?;
        self.points.push(self.shared.join(ROOTFS));
        Ok(format!("{}/{ROOTFS}", self.guest))
    }

    /// Has a file or directory of the host mounted for the container, `source` being as its specification has it.
    /// Returns the guest's path.
    pub fn add_volume(&mut self, source: &Path, read_only: bool) -> Result<String, ResourceError> {
        let (container, source) = (self.id.clone(), source.to_owned());
        match self.helper.ask(&Request::AddVolume { container, source, read_only })? {
            Done::Volume(name) => {
                self.points.push(self.shared.join(MOUNTS).join(&name));
                Ok(format!("{}/{MOUNTS}/{name}", self.guest))
            }
            Done::It => Err(HelperError::Refused("The helper does not say where the volume is".to_owned()).into()),
        }
    }

    /// Where the root file system and the volumes are mounted, the latest first.
    pub fn mount_points(&self) -> impl Iterator<Item = &Path> {
        self.points.iter().rev().map(PathBuf::as_path)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Err(error) = self.helper.ask(&Request::RemoveContainer(self.id.clone())) {
            tracing::warn!(container = %self.id, %error, "Cannot remove a container's place in the share");
        }
    }
}
