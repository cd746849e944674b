//! QMP: what an operator says to a machine that runs, in JSON over a stream socket.
//!
//! ```text
//!   socket ── connection ── framing ──▶ Request ──▶ commands ──▶ monitor, backends, queries ──▶ Machine
//!     ▲           (bytes, descriptors)               (table)          │
//!     └────────────────── Reply, then its events ◀───────────────────┘
//! ```
//!
//! One thread serves a socket, one client at a time. A client is not trusted to be sensible: requests, descriptors, names and
//! what it leaves unread are bounded, and a client that does not read is not listened to.

mod arguments;
mod backends;
mod block;
pub mod commands;
mod connection;
mod error;
mod event;
mod framing;
mod front;
mod memory;
mod message;
mod migration;
mod monitor;
mod queries;
mod rate;
mod server;
mod types;

pub use front::Front;
pub use server::QmpServer;
