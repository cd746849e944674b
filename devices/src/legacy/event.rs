//! What a guest tells about itself through a port.

use std::sync::Arc;

/// Something that ends a machine or says that it will.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MachineEvent {
    /// The guest asks for a reset (keyboard controller).
    Reset,
    /// The guest's kernel panicked.
    Panicked,
    /// The guest has shut down in an orderly way and wants to be switched off.
    Shutdown,
}

/// Where devices send [`MachineEvent`]s. Called on the vCPU thread that made the access, so it
/// must not wait for that thread.
pub type EventSink = Arc<dyn Fn(MachineEvent) + Send + Sync>;

/// A sink and what it was given since the last look.
#[cfg(test)]
pub(super) fn recorder() -> (EventSink, impl Fn() -> Vec<MachineEvent>) {
    let (sender, receiver) = std::sync::mpsc::channel();
    let sender = std::sync::Mutex::new(sender);
    let sink = Arc::new(move |event| sender.lock().unwrap().send(event).unwrap());
    (sink, move || receiver.try_iter().collect())
}
