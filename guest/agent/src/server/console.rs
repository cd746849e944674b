//! The debug console: a shell in the guest for whoever connects. Closed unless the guest's command line asks for it.

use std::process::{Command, Stdio};

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::copy_bidirectional;
use tokio::net::UnixStream;

use crate::transport::{Connection, Listener};

const SHELL: &str = "/bin/sh";

/// Takes connections for as long as the agent runs.
pub async fn serve(listener: Listener) {
    loop {
        match listener.accept().await {
            Ok((connection, _)) => {
                if let Err(error) = start_shell(connection) {
                    tracing::warn!(%error, "The debug console has no shell to offer");
                }
            }
            Err(error) => {
                tracing::warn!(%error, "The debug console is closed");
                return;
            }
        }
    }
}

/// The shell is reaped like any other child of PID 1; the connection ends when it closes its side.
fn start_shell(mut connection: Connection) -> io::Result<()> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    let theirs = OwnedFd::from(theirs);
    Command::new(SHELL)
        .arg("-i")
        .stdin(Stdio::from(theirs.try_clone()?))
        .stdout(Stdio::from(theirs.try_clone()?))
        .stderr(Stdio::from(theirs))
        .spawn()?;
    ours.set_nonblocking(true)?;
    let mut ours = UnixStream::from_std(ours)?;
    tokio::spawn(async move {
        let _ = copy_bidirectional(&mut connection, &mut ours).await;
    });
    Ok(())
}
