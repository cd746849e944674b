//! Console device (virtio 1.2 section 5.3), which Linux calls virtio-serial: ports between the guest
//! and file descriptors of the host.
//!
//! Nothing is buffered in this process. Input is read into the guest's buffers when it has some and
//! waits with the host otherwise. Output of a port waits in its queue while the host does not take
//! it; output of a *console* is lost then, for Linux spins until a console has taken a line.

mod config;
mod control;
mod engine;
mod host;
mod port;
#[cfg(test)]
mod tests;

pub use config::{Console, ConsoleConfig, ConsoleError, MAX_PORTS, PortConfig};
pub use host::{PortEnd, pty};
