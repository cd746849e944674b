//! How many sandboxes of a node start at a time, and in which order.
//!
//! Shims share nothing but the directory of run-time state, so the queue is made of files there:
//!
//! ```text
//! /run/inlay/starts/ticket-<time>  a start that waits; who comes later waits for the end of the one before it
//! /run/inlay/starts/slot-<n>       a start that is under way
//! ```
//!
//! Each is a FIFO that its owner has locked and open for writing. A process that ends, however it does, loses the lock
//! and then the FIFO's writer, in this order, and the kernel tells that to whoever has it open for reading. So nobody
//! polls, one waiter wakes for one that goes, and a dead shim holds nothing up.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::future::poll_fn;
use std::io;
use std::num::NonZeroU32;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::task::Poll;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::stat::Mode;
use nix::time::{ClockId, clock_gettime};
use nix::unistd::mkfifo;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::file_lock::is_named;
use crate::readiness;
use crate::run_dir::RunDir;

const TICKET: &str = "ticket-";
const SLOT: &str = "slot-";

/// Why a start got no turn.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// A file of the queue.
    #[error("Cannot {what} {}", path.display())]
    File {
        /// The verb.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Time ran out.
    #[error(
        "No turn came within {milliseconds} ms: at most {most} may start at a time (simultaneous_starts), and {ahead} \
         waited before this one"
    )]
    Deadline {
        /// The configured time.
        milliseconds: u128,
        /// The configured number.
        most: NonZeroU32,
        /// How many were still before this one.
        ahead: usize,
    },
}

/// The right to start. Dropped, it is the next one's.
#[derive(Debug)]
pub struct Turn {
    _slot: Held,
}

/// Waits until fewer than `most` sandboxes are starting and all that came before have had their turn.
pub async fn turn(run_dir: &RunDir, most: NonZeroU32, deadline: Duration) -> Result<Turn, QueueError> {
    let queue = Queue { base: run_dir.starts(), most };
    queue.make_base()?;
    let ticket = queue.ticket()?;
    match tokio::time::timeout(deadline, queue.wait(&ticket)).await {
        Ok(turn) => turn,
        Err(_) => {
            let ahead = queue.tickets()?.iter().filter(|path| **path < ticket.path).count();
            Err(QueueError::Deadline { milliseconds: deadline.as_millis(), most, ahead })
        }
    }
}

struct Queue {
    base: PathBuf,
    most: NonZeroU32,
}

impl Queue {
    async fn wait(&self, ticket: &Held) -> Result<Turn, QueueError> {
        while let Some(end) = self.before(ticket)? {
            end.readable().await.map_err(file_error("wait for", &ticket.path))?.retain_ready();
        }
        loop {
            let mut ends = Vec::new();
            for slot in 0..self.most.get() {
                let path = self.base.join(format!("{SLOT}{slot}"));
                // Before the attempt, so that no end is missed.
                let end = watch(open_or_make(&path, false)?, &path)?;
                if let Some(slot) = hold(&path)? {
                    return Ok(Turn { _slot: slot });
                }
                ends.push(end);
            }
            any_ends(&ends).await.map_err(file_error("wait for a slot in", &self.base))?;
        }
    }

    /// A place at the queue's end.
    fn ticket(&self) -> Result<Held, QueueError> {
        loop {
            let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
            let path = self.base.join(format!("{TICKET}{:020}", now.as_nanos()));
            match mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR) {
                // Somebody came at the same time.
                Err(Errno::EEXIST) => continue,
                made => made.map_err(|errno| file_error("make", &path)(errno.into()))?,
            }
            // `None`: somebody has looked at it before it was locked, and found nobody.
            if let Some(ticket) = hold(&path)? {
                return Ok(ticket);
            }
        }
    }

    /// What tells of the end of the one before `ticket`; `None` at the head of the queue.
    fn before(&self, ticket: &Held) -> Result<Option<AsyncFd<OwnedFd>>, QueueError> {
        loop {
            let Some(path) = self.tickets()?.into_iter().filter(|path| *path < ticket.path).max() else {
                return Ok(None);
            };
            let file = match open(&path, false) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                opened => opened.map_err(file_error("open", &path))?,
            };
            match Flock::lock(file, FlockArg::LockSharedNonblock) {
                Err((file, Errno::EWOULDBLOCK)) => return watch(file, &path).map(Some),
                Err((_, errno)) => return Err(file_error("lock", &path)(errno.into())),
                Ok(dead) => {
                    if is_named(&dead, &path) {
                        remove(&path);
                    }
                }
            }
        }
    }

    fn tickets(&self) -> Result<Vec<PathBuf>, QueueError> {
        let entries = fs::read_dir(&self.base).map_err(file_error("read", &self.base))?;
        let mut paths = Vec::new();
        for entry in entries {
            let entry = entry.map_err(file_error("read", &self.base))?;
            if entry.file_name().as_encoded_bytes().starts_with(TICKET.as_bytes()) {
                paths.push(entry.path());
            }
        }
        Ok(paths)
    }

    fn make_base(&self) -> Result<(), QueueError> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.base).map_err(file_error("make", &self.base))
    }
}

/// A FIFO that is locked by this process.
#[derive(Debug)]
struct Held {
    path: PathBuf,
    _file: Flock<File>,
}

impl Drop for Held {
    fn drop(&mut self) {
        // Before the lock goes: the name is its owner's to remove.
        remove(&self.path);
    }
}

/// Takes the FIFO `path`, unless somebody has it.
fn hold(path: &Path) -> Result<Option<Held>, QueueError> {
    loop {
        match Flock::lock(open_or_make(path, true)?, FlockArg::LockExclusiveNonblock) {
            Ok(file) if is_named(&file, path) => return Ok(Some(Held { path: path.to_owned(), _file: file })),
            // Whoever had it has removed it.
            Ok(_) | Err((_, Errno::EINTR)) => {}
            Err((_, Errno::EWOULDBLOCK)) => return Ok(None),
            Err((_, errno)) => return Err(file_error("lock", path)(errno.into())),
        }
    }
}

fn open_or_make(path: &Path, for_writing: bool) -> Result<File, QueueError> {
    loop {
        match open(path, for_writing) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            opened => return opened.map_err(file_error("open", path)),
        }
        match mkfifo(path, Mode::S_IRUSR | Mode::S_IWUSR) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(errno) => return Err(file_error("make", path)(errno.into())),
        }
    }
}

fn open(path: &Path, for_writing: bool) -> io::Result<File> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    OpenOptions::new().read(true).write(for_writing).custom_flags(flags).open(path)
}

/// Readable from the moment on at which nobody has the FIFO open for writing any more.
fn watch(file: File, path: &Path) -> Result<AsyncFd<OwnedFd>, QueueError> {
    readiness::watch(file.into(), Interest::READABLE).map_err(file_error("watch", path))
}

async fn any_ends(ends: &[AsyncFd<OwnedFd>]) -> io::Result<()> {
    poll_fn(|context| {
        for end in ends {
            if let Poll::Ready(ready) = end.poll_read_ready(context) {
                return Poll::Ready(ready.map(|mut guard| guard.retain_ready()));
            }
        }
        Poll::Pending
    })
    .await
}

fn remove(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(file = %path.display(), %error, "Cannot remove a file of the queue of starts");
        }
        _ => {}
    }
}

/// An error of [`QueueError::File`], to be completed by what the system said.
fn file_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> QueueError {
    let path = path.to_owned();
    move |source| QueueError::File { what, path, source }
}

#[cfg(test)]
mod tests;
