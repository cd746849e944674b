//! A container and its processes, as the shim knows them. What really runs is in the guest.

// A guest chooses the numbers.
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

pub mod state;
pub mod stdio;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use tokio::sync::watch;

use crate::helper::Place;
use crate::ids::Id;
use crate::lock::lock;
use state::{Exit, State};
use stdio::{Stdio, Streams};

/// A process of a container: its first one, or one that was added.
#[derive(Debug)]
pub struct Process {
    state: watch::Sender<State>,
    /// Where its standard streams go.
    pub streams: Streams,
    /// What is to be run; only of an added process before its start.
    specification: Mutex<Option<agent_proto::oci::Process>>,
    stdio: Mutex<Option<Arc<Stdio>>>,
}

impl Process {
    /// A process that is not started.
    pub fn new(streams: Streams, specification: Option<agent_proto::oci::Process>) -> Self {
        Self {
            state: watch::Sender::new(State::Created),
            streams,
            specification: Mutex::new(specification),
            stdio: Mutex::new(None),
        }
    }

    /// Where the process is in its life.
    pub fn state(&self) -> State {
        *self.state.borrow()
    }

    /// Moves on to `state`, unless the process has ended meanwhile.
    pub fn set(&self, state: State) {
        self.state.send_if_modified(|current| {
            let alive = current.exited().is_none();
            if alive {
                *current = state;
            }
            alive
        });
    }

    /// Moves on to the end. The first exit counts.
    pub fn end(&self, exit: Exit) {
        self.state.send_modify(|state| *state = state.exit(exit));
    }

    /// Waits for the end.
    pub async fn exited(&self) -> Exit {
        self.reaches(State::exited).await
    }

    /// Waits until the process was started, or ended before.
    pub async fn left_created(&self) {
        self.reaches(|state| (state != State::Created).then_some(())).await;
    }

    async fn reaches<T>(&self, goal: impl Fn(State) -> Option<T>) -> T {
        let mut states = self.state.subscribe();
        loop {
            if let Some(reached) = goal(*states.borrow_and_update()) {
                return reached;
            }
            // The sender is in this object, so it cannot be gone.
            let _ = states.changed().await;
        }
    }

    /// Hands out what is to be run, once.
    pub fn take_specification(&self) -> Option<agent_proto::oci::Process> {
        lock(&self.specification).take()
    }

    /// The shim's hold on the standard streams.
    pub fn stdio(&self) -> Option<Arc<Stdio>> {
        lock(&self.stdio).clone()
    }

    /// Keeps the hold on the standard streams until [`release_stdio`](Self::release_stdio).
    pub fn keep_stdio(&self, stdio: Arc<Stdio>) {
        *lock(&self.stdio) = Some(stdio);
    }

    /// Lets go of the standard streams.
    pub fn release_stdio(&self) {
        *lock(&self.stdio) = None;
    }
}

/// A container.
#[derive(Debug)]
pub struct Container {
    /// Its name.
    pub id: Id,
    /// Its bundle directory.
    pub bundle: PathBuf,
    /// Its first process.
    pub init: Arc<Process>,
    added: Mutex<HashMap<Id, Arc<Process>>>,
    share: Mutex<Option<Place>>,
    /// Steps of its processes' lives are taken one after the other, so that events come in the order of the steps.
    pub steps: tokio::sync::Mutex<()>,
}

impl Container {
    /// A container that the guest has made.
    pub fn new(id: Id, bundle: PathBuf, init: Process, share: Place) -> Self {
        Self {
            id,
            bundle,
            init: Arc::new(init),
            added: Mutex::default(),
            share: Mutex::new(Some(share)),
            steps: tokio::sync::Mutex::default(),
        }
    }

    /// The process of that name; the first one where the name is empty.
    pub fn process(&self, exec: Option<&Id>) -> Option<Arc<Process>> {
        match exec {
            None => Some(Arc::clone(&self.init)),
            Some(exec) => lock(&self.added).get(exec).cloned(),
        }
    }

    /// Adds a process; `false` when the name is taken.
    pub fn add(&self, exec: Id, process: Process) -> bool {
        let mut added = lock(&self.added);
        let free = !added.contains_key(&exec);
        if free {
            added.insert(exec, Arc::new(process));
        }
        free
    }

    /// Forgets an added process.
    pub fn forget(&self, exec: &Id) {
        lock(&self.added).remove(exec);
    }

    /// All processes with their names, the first one last.
    pub fn processes(&self) -> Vec<(Option<Id>, Arc<Process>)> {
        let mut all: Vec<_> =
            lock(&self.added).iter().map(|(id, process)| (Some(id.clone()), Arc::clone(process))).collect();
        all.push((None, Arc::clone(&self.init)));
        all
    }

    /// Gives back the container's place in the share. `forget` is told of each place where something is mounted before
    /// it is unmounted: whoever has files open there must let go of them.
    pub fn release_share(&self, forget: impl Fn(&Path)) {
        let Some(share) = lock(&self.share).take() else { return };
        share.mount_points().for_each(forget);
        drop(share);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn everybody_who_waits_learns_of_the_end() {
        let process = Arc::new(Process::new(Streams::default(), None));
        let waiting = tokio::spawn({
            let process = Arc::clone(&process);
            async move { process.exited().await }
        });
        process.set(State::Running);
        let exit = Exit::now(7);
        process.end(exit);
        assert_eq!(waiting.await.unwrap(), exit);
        assert_eq!(process.exited().await, exit);
        process.set(State::Running);
        assert_eq!(process.state(), State::Stopped(exit));
    }
}
