//! What the processors of a machine share, and whoever starts, pauses and ends it holds.

use std::io;
use std::sync::OnceLock;

use super::gate::Gate;
use super::thread::VcpuThread;
use crate::machine::RunState;
use crate::machine::exit::{ExitLatch, ExitReason};

/// The way to all processors of a machine at once.
pub struct Control {
    pub(super) gate: Gate,
    exit: ExitLatch,
    threads: OnceLock<Vec<VcpuThread>>,
}

impl Control {
    /// For a machine of `vcpus` processors, which wait until [`run`](Self::run).
    pub fn new(vcpus: u8) -> io::Result<Self> {
        Ok(Self { gate: Gate::new(vcpus.into()), exit: ExitLatch::new()?, threads: OnceLock::new() })
    }

    /// Hands over the threads. They hold this control and wait at its gate.
    pub fn adopt(&self, threads: Vec<VcpuThread>) {
        let adopted = self.threads.set(threads);
        debug_assert!(adopted.is_ok(), "a machine adopts its threads once");
    }

    /// The threads; empty before they are adopted.
    pub fn threads(&self) -> &[VcpuThread] {
        self.threads.get().map_or(&[], Vec::as_slice)
    }

    /// How the machine ended, if it has.
    pub fn exit(&self) -> &ExitLatch {
        &self.exit
    }

    /// Whether the processors may run.
    pub fn state(&self) -> RunState {
        self.gate.state()
    }

    /// Lets the processors run. False when the machine has ended.
    pub fn run(&self) -> bool {
        self.gate.open()
    }

    /// Waits until every processor's thread has told its identifier.
    pub fn wait_until_arrived(&self) {
        self.gate.wait_until_arrived();
    }

    /// Takes all processors out of the guest and waits until they are. False when the machine has
    /// ended. Must not be called by a processor's thread.
    pub fn pause(&self) -> bool {
        if !self.gate.hold() {
            return false;
        }
        self.kick();
        self.gate.wait_until_held();
        true
    }

    /// Ends the machine for `reason`, unless it has ended already. Does not wait, so that a
    /// processor's thread can call it.
    pub fn end(&self, reason: ExitReason) {
        // In this order: whoever has the reason finds the processors held for good.
        self.gate.end();
        self.exit.set(reason);
        self.kick();
    }

    /// Waits for the threads' end. Call [`end`](Self::end) first; must not be called by one of
    /// them.
    pub fn join(&self) {
        for thread in self.threads() {
            thread.join();
        }
    }

    fn kick(&self) {
        for thread in self.threads() {
            thread.kick();
        }
    }
}
