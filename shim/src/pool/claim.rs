//! What `start` says to a spare: one packet, with the socket of the shim that the spare becomes.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, accept4, connect, setsockopt, socket};
use nix::sys::time::TimeVal;
use serde::{Deserialize, Serialize};

use super::slot::{occupants, sockets};
use crate::helper::wire;
use crate::ids::Id;
use crate::run_dir::RunDir;

/// How long a spare may take to answer: it reads its configuration.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a spare that did not answer may take to be killed.
const KILL_PATIENCE: Duration = Duration::from_secs(20);

/// What the shim is told on its command line and in its environment when it is started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// The sandbox.
    pub id: Id,
    /// containerd's namespace.
    pub namespace: String,
    /// containerd's address, which is a part of the shim's identity.
    pub address: String,
    /// Where containerd takes events.
    pub events: Option<String>,
    /// The bundle.
    pub bundle: PathBuf,
    /// Log in detail.
    pub debug: bool,
}

/// The answer: the spare's process id, or why it cannot be had.
pub type Answer = Result<u32, String>;

/// What a spare gets with the claim.
#[derive(Debug)]
pub struct Handed {
    /// The socket on which containerd will call.
    pub listener: OwnedFd,
    /// To be closed when the start is over: see [`Refill`](super::Refill).
    pub sign: Option<OwnedFd>,
}

/// Has a spare of the template `name` become the shim of a sandbox, and returns its process id. `None` if there is no
/// spare: a shim is started, as ever.
pub fn claim(
    run_dir: &RunDir,
    name: &Id,
    claim: &Claim,
    listener: BorrowedFd<'_>,
    sign: Option<BorrowedFd<'_>>,
) -> Option<u32> {
    let descriptors: Vec<_> = [Some(listener), sign].into_iter().flatten().collect();
    sockets(run_dir, name).iter().find_map(|path| match ask(path, claim, &descriptors) {
        Ok(Some(Ok(pid))) => Some(pid),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            // It may serve the socket one day; then two would.
            end(run_dir, path);
            None
        }
        // It does not fit any more, or somebody was faster.
        Ok(_) | Err(_) => None,
    })
}

fn ask(path: &Path, claim: &Claim, descriptors: &[BorrowedFd<'_>]) -> io::Result<Option<Answer>> {
    let spare = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    connect(spare.as_raw_fd(), &UnixAddr::new(path)?)?;
    set_patience(spare.as_fd())?;
    wire::send(spare.as_fd(), claim, descriptors)?;
    Ok(wire::receive(spare.as_fd())?.map(|(answer, _)| answer))
}

/// Takes a claim from a connection.
pub fn receive(connection: BorrowedFd<'_>) -> io::Result<Option<(Claim, Handed)>> {
    set_patience(connection)?;
    let Some((claim, descriptors)) = wire::receive(connection)? else { return Ok(None) };
    let mut descriptors = descriptors.into_iter();
    let listener = descriptors.next().ok_or(io::ErrorKind::InvalidData)?;
    Ok(Some((claim, Handed { listener, sign: descriptors.next() })))
}

/// Answers a claim.
pub fn answer(connection: BorrowedFd<'_>, answer: &Answer) -> io::Result<()> {
    wire::send(connection, answer, &[])
}

/// The next connection of a listening socket.
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let connection = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
    // SAFETY: the kernel has just made the descriptor for this process, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(connection) })
}

fn set_patience(socket: BorrowedFd<'_>) -> io::Result<()> {
    let seconds = i64::try_from(PATIENCE.as_secs()).unwrap_or(i64::MAX);
    Ok(setsockopt(&socket, ReceiveTimeout, &TimeVal::new(seconds, 0))?)
}

fn end(run_dir: &RunDir, socket: &Path) {
    let slot = socket.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    for occupant in occupants(run_dir, None) {
        if let Some(process) = occupant.process.filter(|_| occupant.slot == slot) {
            let _ = process.kill(KILL_PATIENCE);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::super::slot::Slot;
    use super::*;

    fn a_claim() -> Claim {
        Claim {
            id: Id::of_literal("x"),
            namespace: "default".into(),
            address: "/run/c.sock".into(),
            events: Some("/run/c.sock.ttrpc".into()),
            bundle: "/run/b/x".into(),
            debug: true,
        }
    }

    #[test]
    fn a_spare_gets_the_claim_and_the_socket() {
        let root = tempfile::tempdir().unwrap();
        let (run_dir, name) = (RunDir::at(root.path().into()), Id::of_literal("default"));
        let listener: OwnedFd = UnixListener::bind(root.path().join("s")).unwrap().into();
        let claims = || claim(&run_dir, &name, &a_claim(), listener.as_fd(), None);
        assert_eq!(claims(), None);
        for (index, reply, claimed) in [(0, Err("It does not fit".into()), None), (1, Ok(7), Some(7))] {
            let slot = Slot::take(&run_dir, &name, index).unwrap().unwrap();
            let socket = slot.listen().unwrap();
            slot.open().unwrap();
            let spare = std::thread::spawn(move || {
                let mut waiting = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
                poll(&mut waiting, PollTimeout::NONE).unwrap();
                let connection = accept(socket.as_fd()).unwrap();
                let (claim, handed) = receive(connection.as_fd()).unwrap().unwrap();
                assert!(UnixListener::from(handed.listener).local_addr().unwrap().as_pathname().is_some());
                assert!(handed.sign.is_none());
                answer(connection.as_fd(), &reply).unwrap();
                claim
            });
            assert_eq!(claims(), claimed);
            assert_eq!(spare.join().unwrap(), a_claim());
        }
    }
}
