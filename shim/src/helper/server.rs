//! The helper's side: one request after the other, until the shim is gone.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

use super::grounds::Grounds;
use super::logger;
use super::wire::{self, Answer, Done, MAX_DESCRIPTORS, Request};
use crate::bootstrap::with_causes;
use crate::ids::Id;
use crate::resources::ResourceError;
use crate::resources::mount::Mount;
use crate::resources::share::{ContainerShare, Share};

/// The process's name, at most 15 characters.
const NAME: &std::ffi::CStr = c"inlay-helper";
/// Descriptors below are a logging program's. The C library's and Rust's own must not lie there when one is started.
const FIRST_FREE_DESCRIPTOR: i32 = 6;

/// Longest sentence in bytes that is sent: what a refused request names may be as long as the request.
const MAX_SENTENCE: usize = 4096;

/// Makes this process, which is a copy of the shim before it had a guest, the helper.
pub fn become_helper() -> io::Result<()> {
    nix::sys::prctl::set_name(NAME)?;
    loop {
        let place_holder = OwnedFd::from(File::open("/dev/null")?);
        if std::os::fd::AsRawFd::as_raw_fd(&place_holder) >= FIRST_FREE_DESCRIPTOR {
            break;
        }
        // Kept as long as the process lives.
        std::mem::forget(place_holder);
    }
    seccomp::confine_helper().map_err(io::Error::other)
}

struct Server {
    sandbox: PathBuf,
    grounds: Grounds,
    // Dropped in this order.
    containers: HashMap<Id, ContainerShare>,
    share: Option<Share>,
}

/// Serves the shim until it closes its end of `socket`, which its end does too. Then nothing is left mounted.
pub fn serve(socket: OwnedFd, sandbox: PathBuf, grounds: Grounds) -> io::Result<()> {
    let mut server = Server { sandbox, grounds, containers: HashMap::new(), share: None };
    // Signals to the sandbox's processes are the shim's, whose end is this one's. Children are waited for.
    let signals: SigSet = [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().collect();
    signals.thread_block()?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    loop {
        let mut events =
            [PollFd::new(socket.as_fd(), PollFlags::POLLIN), PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        match poll(&mut events, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            polled => polled?,
        };
        let [asked, signalled] = events.map(|event| event.any().unwrap_or_default());
        if signalled {
            while let Ok(Some(_)) = signals.read_signal() {}
            while matches!(waitpid(None, Some(WaitPidFlag::WNOHANG)), Ok(status) if status != WaitStatus::StillAlive) {}
        }
        if asked && !server.answer_one(&socket)? {
            return Ok(());
        }
    }
}

impl Server {
    /// Answers a request; `false` when there will be none any more.
    fn answer_one(&mut self, socket: &OwnedFd) -> io::Result<bool> {
        let answer: Answer = match wire::receive(socket.as_fd()) {
            Ok(None) => return Ok(false),
            Ok(Some((request, descriptors))) => self.handle(request, descriptors).map_err(|error| with_causes(&*error)),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => Err(error.to_string()),
            Err(error) => return Err(error),
        };
        let answer = answer.map_err(cut);
        match wire::send(socket.as_fd(), &answer, &[]) {
            // The shim has ended meanwhile; the next look at the socket says so.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(true),
            sent => sent.map(|()| true),
        }
    }

    fn handle(&mut self, request: Request, descriptors: Vec<OwnedFd>) -> Result<Done, Box<dyn std::error::Error>> {
        match request {
            Request::MakeShare(named) => {
                self.grounds.admit(named)?;
                if self.share.is_none() {
                    self.share = Some(Share::create(&self.sandbox)?);
                }
            }
            Request::Adopt { sandbox, bundles } => {
                self.grounds.adopt(&bundles)?;
                if let Some(share) = &mut self.share {
                    share.moved_to(&sandbox);
                }
                self.sandbox = sandbox;
            }
            Request::Seal => self.grounds.seal(),
            Request::AddContainer(id) => {
                let share = self.share.as_ref().ok_or(ResourceError::NoShare)?;
                let place = share.add_container(&id)?;
                self.containers.insert(id, place);
            }
            Request::MountRootfs(id, mounts) => self.mount_rootfs(&id, &mounts)?,
            Request::AddVolume { container, source, read_only } => {
                let (opened, name) = self.grounds.volume(&container, &source)?;
                let place = self.container(&container)?;
                return Ok(Done::Volume(place.add_volume(opened.as_fd(), &name, read_only)?));
            }
            Request::RemoveContainer(id) => drop(self.containers.remove(&id)),
            Request::RemoveShare => {
                self.containers.clear();
                self.share = None;
            }
            Request::StartLogger { program, container, namespace } => {
                self.grounds.logger(&program)?;
                let descriptors: [OwnedFd; MAX_DESCRIPTORS] =
                    descriptors.try_into().map_err(|_| "A logging program has three descriptors")?;
                logger::start(&program, &container, &namespace, &descriptors)?;
            }
        }
        Ok(Done::It)
    }

    fn mount_rootfs(&mut self, id: &Id, mounts: &[Mount]) -> Result<(), Box<dyn std::error::Error>> {
        if mounts.is_empty() {
            let rootfs = self.grounds.bundle_rootfs(id)?;
            return Ok(self
                .container(id)?
                .mount_rootfs(&Mount::bind("the bundle's root file system", false), Some(rootfs.as_fd()))?);
        }
        for mount in mounts {
            let bound = self.grounds.rootfs(mount)?;
            self.container(id)?.mount_rootfs(mount, bound.as_ref().map(AsFd::as_fd))?;
        }
        Ok(())
    }

    fn container(&mut self, id: &Id) -> Result<&mut ContainerShare, ResourceError> {
        self.containers.get_mut(id).ok_or_else(|| ResourceError::NoPlace(id.to_string()))
    }
}

fn cut(mut sentence: String) -> String {
    while sentence.len() > MAX_SENTENCE {
        sentence.pop();
    }
    sentence
}
