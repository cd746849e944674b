//! A logging program, as containerd defines it: it finds standard output on descriptor 3, standard error on 4, and
//! closes 5 when it is ready.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use super::wire::{MAX_DESCRIPTORS, Program};

/// First descriptor of the protocol.
const FIRST_FD: RawFd = 3;

/// Starts the program. It ends by itself when its streams end, and is not killed: what it read is not lost.
pub fn start(
    program: &Program,
    container: &str,
    namespace: &str,
    descriptors: &[OwnedFd; MAX_DESCRIPTORS],
) -> io::Result<()> {
    let mut command = Command::new(&program.path);
    command.args(&program.arguments);
    command.env("CONTAINER_ID", container).env("CONTAINER_NAMESPACE", namespace);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let given = descriptors.each_ref().map(AsRawFd::as_raw_fd);
    // SAFETY: between fork and exec only async-signal-safe calls are made: fcntl and dup2.
    unsafe { command.pre_exec(move || place(given)) };
    // The server waits for all of its children.
    command.spawn().map(drop)
}

/// Puts descriptors on 3, 4 and 5. They may lie there already in another order, so all move out of the way first.
fn place(descriptors: [RawFd; MAX_DESCRIPTORS]) -> io::Result<()> {
    const OUT_OF_THE_WAY: RawFd = FIRST_FD + 3;
    let mut moved = [0; MAX_DESCRIPTORS];
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
