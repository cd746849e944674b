//! Standard streams: containerd's FIFOs, files and logging programs, tied to vsock streams.
//!
//! The bytes go between descriptor and guest memory in the muxer; this module opens the descriptors and knows when a
//! stream has ended. containerd's rules for FIFOs:
//!
//! - The shim holds a read end of each output FIFO, so that the container can write before, between and after clients.
//! - The shim holds a write end of the input FIFO until `CloseIO`, so that a client that leaves is no end of file.

mod copy;
mod logger;
mod target;

use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;

use crate::helper::{Helper, HelperError, Program};
use crate::lock::lock;
use crate::readiness;
use target::Target;

/// Where a process's standard streams go, as containerd says: paths and URIs, empty for none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Streams {
    /// Standard input.
    pub stdin: String,
    /// Standard output, or everything that a terminal shows.
    pub stdout: String,
    /// Standard error; nothing with a terminal.
    pub stderr: String,
    /// The process has a terminal.
    pub terminal: bool,
}

impl Streams {
    /// The logging program, if there is one.
    pub fn logger(&self) -> Option<Program> {
        match Target::parse(&self.stdout) {
            Ok(Some(Target::Binary(program))) => Some(program),
            _ => None,
        }
    }

    /// The FIFO of standard output, if it is one.
    pub fn fifo_of_stdout(&self) -> Option<PathBuf> {
        match Target::parse(&self.stdout) {
            Ok(Some(Target::Fifo(path))) => Some(path),
            _ => None,
        }
    }
}

/// Why a stream cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// A FIFO or file cannot be opened.
    #[error("Cannot open {} as a standard stream", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A pipe cannot be made, or not be used asynchronously.
    #[error("Cannot make a pipe for a standard stream")]
    Pipe(#[source] io::Error),
    /// A scheme that is not among containerd's.
    #[error("The standard stream {0} has an unknown form: a path, fifo://, file:// and binary:// are known")]
    Scheme(String),
    /// The logging program did not start.
    #[error("Cannot start the logging program {program}")]
    Logger {
        /// The program.
        program: String,
        /// Why.
        source: HelperError,
    },
    /// The logging program did not get ready.
    #[error("The logging program {program} does not get ready")]
    LoggerReady {
        /// The program.
        program: String,
        /// What the system said.
        source: io::Error,
    },
}

/// Descriptors for the guest's ends of the streams; none where there is no stream.
#[derive(Debug, Default)]
pub struct GuestEnds {
    /// The guest reads from it.
    pub stdin: Option<OwnedFd>,
    /// The guest writes to it.
    pub stdout: Option<OwnedFd>,
    /// The guest writes to it.
    pub stderr: Option<OwnedFd>,
}

/// The shim's hold on a process's streams.
#[derive(Debug, Default)]
pub struct Stdio {
    stdin: Mutex<Option<OwnedFd>>,
    outputs: Vec<Output>,
}

/// An output stream, as long as the guest may write to it.
#[derive(Debug)]
enum Output {
    /// A read end of the pipe that the guest's bytes go into.
    Pipe(AsyncFd<OwnedFd>),
    /// A task that copies into a file.
    Copy(tokio::sync::Mutex<Option<JoinHandle<()>>>),
}

impl Stdio {
    /// Opens the streams. Must be called within a tokio runtime. `container` and `namespace` are for a logging program,
    /// which `helper` starts.
    pub async fn open(
        streams: &Streams,
        container: &str,
        namespace: &str,
        helper: &Arc<Helper>,
    ) -> Result<(Self, GuestEnds), StdioError> {
        let mut stdio = Self::default();
        let mut ends = GuestEnds::default();
        if let Some(Target::Fifo(path)) = Target::parse(&streams.stdin)? {
            let (read, write) = open_fifo(&path)?;
            ends.stdin = Some(read);
            stdio.stdin = Mutex::new(Some(write));
        }
        let stdout = Target::parse(&streams.stdout)?;
        let stderr = if streams.terminal { None } else { Target::parse(&streams.stderr)? };
        if let Some(Target::Binary(program)) = stdout {
            let pipes = logger::start(program, container, namespace, helper).await?;
            stdio.hold(pipes.stdout_read)?;
            stdio.hold(pipes.stderr_read)?;
            ends.stdout = Some(pipes.stdout_write);
            ends.stderr = (!streams.terminal).then_some(pipes.stderr_write);
            return Ok((stdio, ends));
        }
        if let Some(target) = stdout {
            ends.stdout = Some(stdio.output(target)?);
        }
        if let Some(target) = stderr {
            ends.stderr = Some(stdio.output(target)?);
        }
        Ok((stdio, ends))
    }

    /// Waits until the guest has closed its outputs and everything it wrote is with whoever reads.
    pub async fn drained(&self) {
        for output in &self.outputs {
            match output {
                Output::Pipe(read) => {
                    // The last writer's end is a hang-up. Data is of no interest here, so it does not wake anybody.
                    let _ = read.ready(Interest::PRIORITY).await;
                }
                Output::Copy(task) => {
                    if let Some(task) = task.lock().await.take() {
                        let _ = task.await;
                    }
                }
            }
        }
    }

    /// As [`drained`](Self::drained), but not longer than `patience`.
    pub async fn drained_within(&self, patience: Duration) {
        if tokio::time::timeout(patience, self.drained()).await.is_err() {
            tracing::warn!("A process has ended, but its output streams are still open");
        }
    }

    /// `CloseIO`: standard input ends when its clients have left.
    pub fn close_stdin(&self) {
        *lock(&self.stdin) = None;
    }

    fn output(&mut self, target: Target) -> Result<OwnedFd, StdioError> {
        match target {
            Target::Fifo(path) => {
                let (read, write) = open_fifo(&path)?;
                self.hold(read)?;
                Ok(write)
            }
            Target::File(path) => {
                let (task, write) = copy::to_file(&path)?;
                self.outputs.push(Output::Copy(tokio::sync::Mutex::new(Some(task))));
                Ok(write)
            }
            Target::Binary(program) => Err(StdioError::Scheme(format!("binary://{}", program.path.display()))),
        }
    }

    /// Interest in "priority" data, which pipes do not have: so only a hang-up is an event.
    fn hold(&mut self, read: OwnedFd) -> Result<(), StdioError> {
        let read = readiness::watch(read, Interest::PRIORITY).map_err(StdioError::Pipe)?;
        self.outputs.push(Output::Pipe(read));
        Ok(())
    }
}

/// Both ends of a FIFO. The read end comes first, as without one the write end cannot be opened without waiting.
fn open_fifo(path: &Path) -> Result<(OwnedFd, OwnedFd), StdioError> {
    let open = |options: &mut OpenOptions| {
        options
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map(OwnedFd::from)
            .map_err(|source| StdioError::Open { path: path.to_owned(), source })
    };
    let read = open(OpenOptions::new().read(true))?;
    let write = open(OpenOptions::new().write(true))?;
    Ok((read, write))
}

fn is_fifo(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_fifo())
}

#[cfg(test)]
mod tests;
