//! Bringing a guest to the point at which it can be saved as a template.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use agent_proto::{QUIET, TEMPLATE_PORT};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vmm::{HostEnd, Machine};

use super::guest::{ConnectError, Guest, connect};

/// Longest time for dropping caches and clearing free memory: at a page of 4 KiB in 10 us, twenty GiB.
const PATIENCE: Duration = Duration::from_secs(60);
/// Longest answer that is read.
const MAX_ANSWER: u64 = 4 << 10;
/// Nothing in the guest listens on this port.
const CLOSED_PORT: u32 = 1029;

/// Why a guest does not become quiet.
#[derive(Debug, thiserror::Error)]
pub enum QuietError {
    /// The agent does not know how, or is gone.
    #[error("The guest's agent makes no templates")]
    Connect(#[from] ConnectError),
    /// The connection broke.
    #[error("The guest's agent does not answer")]
    Io(#[from] io::Error),
    /// It said why not.
    #[error("The guest cannot be made quiet: {0}")]
    Refused(String),
    /// It takes too long.
    #[error("The guest did not become quiet within {} s", PATIENCE.as_secs())]
    Deadline,
}

impl Guest {
    /// Ends all connections and has the agent drop and clear what a template need not hold. `mark`, letters and digits,
    /// goes to the guest's kernel log. The machine that is returned still runs and does nothing.
    pub async fn quieten(self, mark: &str) -> Result<Arc<Machine>, QuietError> {
        let Self { machine, connector, agent, .. } = self;
        // The agent of a template knows no host.
        drop(agent);
        let quieten = async {
            let (ours, theirs) = UnixStream::pair()?;
            connect(&connector, TEMPLATE_PORT, HostEnd::Duplex(theirs.into())).await?;
            let answer = ask(ours, mark).await?;
            if answer != QUIET {
                return Err(QuietError::Refused(answer));
            }
            // Packets are handled in order: after this refusal the guest's kernel has forgotten the connections above.
            let (_ours, theirs) = UnixStream::pair()?;
            let _refused = connect(&connector, CLOSED_PORT, HostEnd::Duplex(theirs.into())).await;
            Ok(())
        };
        tokio::time::timeout(PATIENCE, quieten).await.map_err(|_| QuietError::Deadline)??;
        Ok(machine)
    }
}

/// Sends the mark and reads the answer to the connection's end.
async fn ask(stream: UnixStream, mark: &str) -> io::Result<String> {
    stream.set_nonblocking(true)?;
    let mut stream = tokio::net::UnixStream::from_std(stream)?;
    stream.write_all(format!("{mark}\n").as_bytes()).await?;
    let mut answer = Vec::new();
    stream.take(MAX_ANSWER).read_to_end(&mut answer).await?;
    Ok(String::from_utf8_lossy(&answer).trim_end().to_owned())
}
