//! The nested host: a whole Linux host with KVM, emulated by QEMU, where the machine has none.
//!
//! The machine's own `/` is the nested host's root, below an overlay in memory. See the README.

mod channel;
mod image;
mod inside;
pub mod machine;
mod modules;
mod qemu;
mod session;
mod signals;
pub mod soak;
mod supervise;
pub mod trial;

pub use image::Image;
pub use inside::run as run_inside;
pub use qemu::{Shape, build as build_qemu};
pub use session::Session;
pub use signals::install as install_signals;
pub use supervise::{Ending, HostFailure, Output, Run};
