//! What all QMP sockets of a machine share.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::backends::Backends;
use super::migration::Migration;
use super::server::{self, QmpServer};
use crate::machine::Machine;
use crate::stratovirt::inventory::{Inventory, StreamEntry};

/// A machine and what its operators have said about it, on whatever socket.
#[derive(Clone)]
pub struct Front {
    machine: Arc<Machine>,
    shared: Arc<Shared>,
}

struct Shared {
    backends: Mutex<Backends>,
    streams: Vec<StreamEntry>,
    memory: Option<String>,
    iothreads: Vec<String>,
    migration: Migration,
}

impl Front {
    /// Of a machine that was made of `inventory`.
    pub fn new(machine: Arc<Machine>, inventory: Inventory) -> Self {
        let Inventory { drives, streams, memory, iothreads } = inventory;
        let (backends, migration) = (Mutex::new(Backends::new(drives)), Migration::default());
        Self { machine, shared: Arc::new(Shared { backends, streams, memory, iothreads, migration }) }
    }

    /// Serves QMP on a listening stream socket (unix or TCP) in a thread of its own. The thread holds the machine until it ends.
    pub fn serve(&self, listener: impl Into<OwnedFd>) -> io::Result<QmpServer> {
        server::serve(self.clone(), listener.into())
    }

    /// The machine.
    pub(super) fn machine(&self) -> &Machine {
        &self.machine
    }

    pub(super) fn backends(&self) -> MutexGuard<'_, Backends> {
        // What is said about a device is written after the device has changed, in one go.
        self.shared.backends.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn streams(&self) -> &[StreamEntry] {
        &self.shared.streams
    }

    pub(super) fn memory(&self) -> Option<&str> {
        self.shared.memory.as_deref()
    }

    pub(super) fn iothreads(&self) -> &[String] {
        &self.shared.iothreads
    }

    /// The machine, for somebody who outlives the call.
    pub(super) fn share_machine(&self) -> Arc<Machine> {
        Arc::clone(&self.machine)
    }

    pub(super) fn migration(&self) -> &Migration {
        &self.shared.migration
    }
}
