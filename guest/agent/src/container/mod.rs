//! Containers: their life, one verb a file, and what they are made of.
//!
//! ```text
//!   create -> Created -start-> Running <-pause/resume-> Paused
//!                 \____________ | _______________________/
//!                             ended (the first process has an exit code) -> remove
//! ```

pub mod cgroup;
mod create;
mod exec;
mod launch;
mod lifecycle;
pub mod oom;
mod plan;
mod remove;
mod rootfs;
mod spec;
pub mod stats;

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::unistd::Pid;
use thiserror::Error;

use crate::reaper::Exit;
use crate::sandbox::storage;
use crate::stdio::{self, Streams};
use cgroup::Cgroup;
pub use create::create;
pub use exec::exec;
use launch::Program;
pub use lifecycle::{set_paused, signal, start, update};
pub use remove::remove;
pub use spec::Error as SpecError;

/// Bundles, one directory a container.
pub const BUNDLES: &str = "/run/inlay/containers";
/// containerd's limit for identifiers is 76; Kubernetes' are 64.
const MAX_ID: usize = 128;
/// Ended exec processes that are remembered, for callers that still wait for them or read their output.
const MAX_ENDED: usize = 64;

/// A verb failed.
#[derive(Debug, Error)]
pub enum Error {
    /// An id that cannot be a path component.
    #[error("The id {0:?} is not valid")]
    InvalidId(String),
    /// No such container.
    #[error("Container {0:?} does not exist")]
    NoContainer(String),
    /// No such process.
    #[error("Process {exec:?} does not exist in container {container:?}")]
    NoProcess {
        /// The container.
        container: String,
        /// The exec id.
        exec: String,
    },
    /// The id is in use.
    #[error("{0:?} already exists")]
    Exists(String),
    /// The verb does not go with the state the container is in.
    #[error("Container {container:?} is {state}, so it cannot be {verb}")]
    State {
        /// The container.
        container: String,
        /// Its state.
        state: &'static str,
        /// The verb's participle.
        verb: &'static str,
    },
    /// A signal number that no signal has.
    #[error("{0} is not a signal")]
    Signal(u32),
    /// The specification.
    #[error(transparent)]
    Spec(#[from] spec::Error),
    /// The runtime could not make the process; the text is runc's where runc has one.
    #[error("unable to start container process: {0}")]
    Process(String),
    /// Standard streams.
    #[error(transparent)]
    Stdio(#[from] stdio::Error),
    /// What the container's file systems come from.
    #[error(transparent)]
    Storage(#[from] storage::Error),
    /// The operating system refused.
    #[error("{what} failed")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// Processes of the container did not end in time.
    #[error("Container {0:?} did not end in time")]
    Timeout(String),
}

fn failed(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    let what = what.into();
    move |source| Error::Io { what, source }
}

/// Runs what may block beside the agent's thread.
async fn off_thread<T: Send + 'static>(work: impl FnOnce() -> Result<T, Error> + Send + 'static) -> Result<T, Error> {
    let lost = |error| Err(failed("Running beside the agent's thread")(io::Error::other(error)));
    tokio::task::spawn_blocking(work).await.unwrap_or_else(lost)
}

/// Checks that an id can be a path component and the name of a cgroup: what containerd allows, and nothing else.
pub fn validate_id(id: &str) -> Result<(), Error> {
    let sound = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if id.is_empty() || id.len() > MAX_ID || id.starts_with(['.', '-']) || !id.chars().all(sound) {
        return Err(Error::InvalidId(id.to_owned()));
    }
    Ok(())
}

/// A process that was made. Cheap to clone.
#[derive(Clone)]
pub struct Process {
    /// Its number in the agent's PID namespace.
    pub pid: Pid,
    /// Its end.
    pub exit: Exit,
    /// Its standard streams.
    pub streams: Arc<Streams>,
}

impl Process {
    fn has_ended(&self) -> bool {
        self.exit.borrow().is_some()
    }
}

/// What may be done with a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The first process waits for the start.
    Created,
    /// It runs, or has ended.
    Running,
    /// Its cgroup is frozen.
    Paused,
}

/// A container.
pub struct Container {
    /// The first process.
    pub init: Process,
    /// What may be done now.
    pub phase: Phase,
    /// Its cgroup.
    pub cgroup: Cgroup,
    /// Until the start: how to know that the first process has become its program.
    program: Option<Program>,
    directory: PathBuf,
    rootfs: PathBuf,
    mounts: storage::Mounts,
    /// Of this container alone: its end is the end of all its processes.
    own_pid_namespace: bool,
    processes: HashMap<String, Process>,
    /// Exec ids that are taken by processes which are being made.
    starting: HashSet<String>,
    ended: VecDeque<String>,
}

impl Container {
    /// Whether its processes are alone in their PID namespace.
    pub fn has_own_pid_namespace(&self) -> bool {
        self.own_pid_namespace
    }

    fn state(&self) -> &'static str {
        match self.phase {
            _ if self.init.has_ended() => "stopped",
            Phase::Created => "created",
            Phase::Running => "running",
            Phase::Paused => "paused",
        }
    }

    /// The process that a request names; an empty exec id, or the container's own, is the first one.
    pub fn process(&self, id: &str, exec: &str) -> Result<&Process, Error> {
        if exec.is_empty() || exec == id {
            return Ok(&self.init);
        }
        let unknown = || Error::NoProcess { container: id.to_owned(), exec: exec.to_owned() };
        self.processes.get(exec).ok_or_else(unknown)
    }

    /// Remembers a process, and forgets the oldest of those that have ended when they are many: probes that run every
    /// few seconds for months must not grow the agent.
    fn remember(&mut self, exec: &str, process: Process) {
        self.processes.insert(exec.to_owned(), process);
        self.ended.retain(|name| name != exec);
        for (name, process) in &self.processes {
            if process.has_ended() && !self.ended.contains(name) {
                self.ended.push_back(name.clone());
            }
        }
        while self.ended.len() > MAX_ENDED {
            if let Some(oldest) = self.ended.pop_front() {
                self.processes.remove(&oldest);
            }
        }
    }
}

fn bundle(id: &str) -> PathBuf {
    Path::new(BUNDLES).join(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_one_path_component() {
        for id in ["c1", "a.b_c-d", &"x".repeat(MAX_ID)] {
            assert!(validate_id(id).is_ok(), "{id}");
        }
        for id in ["", ".", "..", "a/b", "-x", "a b", "a\0", "ä", &"x".repeat(MAX_ID + 1)] {
            assert!(matches!(validate_id(id), Err(Error::InvalidId(_))), "{id}");
        }
    }

    #[tokio::test]
    async fn ended_processes_are_forgotten_oldest_first_and_running_ones_never() {
        let process = |code| Process {
            pid: Pid::from_raw(1),
            exit: tokio::sync::watch::channel(code).1,
            streams: Arc::default(),
        };
        let mut container = Container {
            init: process(None),
            phase: Phase::Running,
            program: None,
            cgroup: Cgroup::new("c", "/c".into()),
            directory: PathBuf::new(),
            rootfs: PathBuf::new(),
            mounts: storage::Mounts::default(),
            own_pid_namespace: true,
            processes: HashMap::new(),
            starting: HashSet::new(),
            ended: VecDeque::new(),
        };
        container.remember("runs", process(None));
        for number in 0..200 {
            container.remember(&format!("e{number}"), process(Some(0)));
        }
        assert!(container.process("c", "runs").is_ok());
        assert!(container.process("c", "e199").is_ok());
        assert!(matches!(container.process("c", "e0"), Err(Error::NoProcess { .. })));
        assert!(container.processes.len() <= MAX_ENDED + 1);
    }
}
