//! The helper: a small process that has the privileges which the shim gives up.
//!
//! ```text
//! serve ── fork ──▶ helper: mounts, starts logging programs. One thread, no guest memory
//!   │                 ▲
//!   │                 │ socket pair, one typed request at a time (wire)
//!   ▼                 │
//! shim: processors, devices, containerd's service. No mount(2), no execve(2), no capabilities but `fs`'s
//! ```
//!
//! The shim may be the guest's once the guest runs, so the helper believes it no longer then: `grounds` has the rules. It
//! ends when the other end of its socket is closed, which the kernel does when the shim ends in whatever way, and takes
//! down what it mounted. It is forked, not started anew: that costs the pages that it writes to, and no time.

mod client;
mod grounds;
mod logger;
mod server;
pub mod wire;

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::{ForkResult, fork};

pub use client::{Helper, HelperError, Place, Share};
pub use grounds::{Grounds, Named};
pub use wire::Program;

/// Which of the two processes goes on.
pub enum Forked {
    /// The one that asked.
    Shim(Helper),
    /// The helper, and its end of the socket: to be given to [`serve`].
    Helper(OwnedFd),
}

/// Makes the helper. Must be called while the process has one thread.
pub fn divide() -> io::Result<Forked> {
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    // SAFETY: there is one thread, as the caller sees to, so the child finds no lock held by another.
    match unsafe { fork() }? {
        ForkResult::Child => {
            drop(ours);
            Ok(Forked::Helper(theirs))
        }
        ForkResult::Parent { child } => Ok(Forked::Shim(Helper::new(ours, child)?)),
    }
}

/// Serves the shim until it ends. `sandbox` is the directory of the sandbox.
pub fn serve(socket: OwnedFd, sandbox: PathBuf, grounds: Grounds) -> io::Result<()> {
    server::become_helper()?;
    server::serve(socket, sandbox, grounds)
}

/// A helper in a thread, for tests of what it is asked for. `host` has the state and the bundles.
#[cfg(test)]
pub fn in_thread(host: &std::path::Path) -> std::sync::Arc<Helper> {
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
    let grounds = Grounds::new(host, host.join("state")).unwrap();
    let sandbox = host.join("state/sb");
    std::thread::spawn(move || server::serve(theirs, sandbox, grounds));
    // Nobody asks for its identity.
    std::sync::Arc::new(Helper::new(ours, nix::unistd::Pid::this()).unwrap())
}

#[cfg(test)]
mod tests;
