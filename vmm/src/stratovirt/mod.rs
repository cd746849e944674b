//! The compatible front: StratoVirt's command line, and what becomes of it.
//!
//! ```text
//! words ── CommandLine::parse ──▶ CommandLine ── Launch::open ──▶ MachineConfig + console's input
//!          nothing is opened                     files, interfaces, sockets
//! ```

pub mod command_line;
pub mod console;
pub mod drive;
pub mod inventory;
pub mod launch;
pub mod qmp;

pub use command_line::{CommandLine, CommandLineError, Request};
pub use console::Console;
pub use inventory::Inventory;
pub use launch::{Launch, LaunchError};
