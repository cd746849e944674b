//! What shim and helper say to each other: one packet a request, one packet an answer.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::PathBuf;

use nix::cmsg_space;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::grounds::Named;
use crate::ids::Id;
use crate::resources::mount::Mount;

/// Longest packet in bytes. The longest requests name the layers of an image, of which overlayfs takes 500: paths of a
/// hundred bytes each. Below what a socket of this kind sends at once (212,992 bytes, socket(7)).
pub const MAX_PACKET: usize = 64 << 10;
/// Most descriptors of a packet: a logging program's standard output, standard error, and its sign that it is ready.
pub const MAX_DESCRIPTORS: usize = 3;

/// A logging program: `binary:///path?key=value`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// The program.
    pub path: PathBuf,
    /// Its arguments: keys and values of the query in turn.
    pub arguments: Vec<String>,
}

/// What the shim asks for.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// The directory that the guest sees. What containerd has named so far is the measure of what may be named later.
    MakeShare(Named),
    /// The sandbox was made before anybody asked for it, and gets its place.
    Adopt {
        /// Its directory, which the share is in.
        sandbox: PathBuf,
        /// The directory with the bundles of the namespace's containers.
        bundles: PathBuf,
    },
    /// The guest is about to run: from now on the shim is not believed.
    Seal,
    /// A container's place in the share.
    AddContainer(Id),
    /// A container's root file system: what the snapshotter gave, or the bundle's where it gave nothing.
    MountRootfs(Id, Vec<Mount>),
    /// A file or directory of the host for a container.
    AddVolume {
        /// The container.
        container: Id,
        /// As the container's specification has it.
        source: PathBuf,
        /// Nothing can be written to it.
        read_only: bool,
    },
    /// Everything of a container.
    RemoveContainer(Id),
    /// The share, which has no containers any more.
    RemoveShare,
    /// A logging program, with three descriptors: see [`MAX_DESCRIPTORS`].
    StartLogger {
        /// The program.
        program: Program,
        /// The container that it is for.
        container: String,
        /// containerd's namespace.
        namespace: String,
    },
}

/// What was done.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Done {
    /// What was asked for.
    It,
    /// A volume was added, under this name.
    Volume(String),
}

/// The answer: what was done, or a sentence why not.
pub type Answer = Result<Done, String>;

/// Sends a packet.
pub fn send<T: Serialize>(socket: BorrowedFd<'_>, message: &T, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let packet = serde_json::to_vec(message)?;
    if packet.len() > MAX_PACKET {
        let text = format!("A message has {MAX_PACKET} bytes at most, not {}", packet.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let raw: Vec<_> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[][..] } else { &rights };
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&packet)], control, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// Receives a packet and the descriptors that came with it. `None` when the other end is closed.
pub fn receive<T: DeserializeOwned>(socket: BorrowedFd<'_>) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut buffer = vec![0; MAX_PACKET];
    let mut control = cmsg_space!([std::os::fd::RawFd; MAX_DESCRIPTORS]);
    let mut parts = [IoSliceMut::new(&mut buffer)];
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC)?;
    // Owned before anything is looked at: a packet that is refused leaves nothing open.
    let mut descriptors = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = part {
            // SAFETY: the kernel has just made these descriptors for this process, and nobody else knows them.
            descriptors.extend(raw.into_iter().map(|raw| unsafe { OwnedFd::from_raw_fd(raw) }));
        }
    }
    let (length, cut) = (message.bytes, message.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC));
    if cut {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "A message is too long"));
    }
    if length == 0 {
        return Ok(None);
    }
    let packet = buffer.get(..length).unwrap_or_default();
    let parsed = serde_json::from_slice(packet).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    Ok(Some((parsed, descriptors)))
}
