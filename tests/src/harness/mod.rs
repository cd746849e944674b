//! What the end-to-end tests use inside the host: containerd, its runtimes, and a comparer of the
//! host's state before and after.

mod containerd;
mod kvm;
mod memory;
mod processes;
mod scene;
pub mod standalone;
mod state;
mod stuck;
mod terminal;
pub mod trace;

pub use containerd::{Containerd, HOME, Output, unique};
pub use kvm::statistic;
pub use memory::Pss;
pub use processes::{Processes, Thread};
pub use scene::{CONFIGURATION, Parts, Runtime, Scene, configure, containerd, play};
pub use state::HostState;
pub use terminal::converse;
