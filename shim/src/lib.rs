//! Inlay's program: containerd's shim and the operator's command in one binary.
//!
//! ```text
//! containerd ── start/delete ──▶ bootstrap ── serve ──▶ service ──▶ sandbox ──▶ machine (vmm)
//!                                                          │           ├─▶ agent (guest, ttrpc over vsock)
//!                                                          │           ├─▶ resources (rootfs, volumes, cgroup)
//!                                                          │           ├─▶ template (restored instead of booted)
//!                                                          │           │      └─ pool (restored before it is asked for)
//!                                                          │           └─▶ metrics ──▶ Prometheus
//!                                                          └──▶ events ──▶ containerd
//! ```
//!
//! One process serves one sandbox, which is one virtual machine. Called `containerd-shim-*` the program speaks
//! containerd's shim protocol ([`shim`]); called `stratovirt` it runs a machine with StratoVirt's command line
//! ([`stratovirt`]); under any other name it is the operator's command ([`operator`]).

// A guest, an image or a client must not end a sandbox's process by what it says.
#![cfg_attr(
    not(test),
    deny(
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::string_slice,
        clippy::todo,
        clippy::unimplemented,
        clippy::unreachable,
        clippy::unwrap_used
    )
)]

mod bootstrap;
mod cli;
mod config;
mod container;
mod events;
mod file_lock;
mod helper;
mod ids;
mod lock;
mod log;
mod main_thread;
mod metrics;
mod oci;
mod pool;
mod readiness;
mod resources;
mod run_dir;
mod sandbox;
mod service;
mod start_queue;
mod template;

pub use bootstrap::main as shim;
pub use cli::main as operator;
pub use cli::stratovirt;
