//! Processors: one thread each, which runs the guest until it exits to a device, is told to pause,
//! or ends the machine.

mod control;
mod exits;
mod fault;
mod gate;
mod kick;
mod state;
mod thread;

pub use control::Control;
pub use exits::Buses;
pub use fault::VcpuFault;
pub use state::{VcpuRestoreError, VcpuState};
pub use thread::{Seat, SpawnError, VcpuThread};
