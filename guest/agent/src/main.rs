//! PID 1 of the guest.
//!
//! Called without arguments by the kernel it boots the guest and serves the agent API on vsock. Called as
//! `ctr-helper` (by itself) it makes one container or one process in a container, single-threaded, and ends.
//! With `--listen unix:DIR` it serves on Unix sockets in DIR and boots nothing: this is how tests drive it on a
//! machine that is not a guest.

mod boot;
mod container;
mod guest;
mod helper;
mod log;
mod net;
mod params;
mod reaper;
mod sandbox;
mod server;
mod stdio;
mod transport;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use transport::Transport;

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let result = match args.next().as_deref() {
        Some(helper::VERB) => return helper::main(args),
        Some("--listen") => listen_address(args.next()).and_then(|directory| serve(Transport::Unix(directory))),
        // The kernel hands words of its command line that it does not know to init: they are not for us.
        _ => boot::bring_up().and_then(|()| serve(Transport::Vsock)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("inlay-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn listen_address(argument: Option<String>) -> Result<PathBuf> {
    let argument = argument.context("--listen needs an address: unix:DIRECTORY")?;
    match argument.strip_prefix("unix:") {
        Some(directory) if !directory.is_empty() => Ok(PathBuf::from(directory)),
        _ => bail!("{argument:?} is not an address to listen on: unix:DIRECTORY is"),
    }
}

/// Serves until the sandbox is destroyed, then powers the guest off.
fn serve(transport: Transport) -> Result<()> {
    let is_guest = matches!(transport, Transport::Vsock);
    let params = if is_guest { params::Params::from_kernel() } else { params::Params::default() };
    // One thread: an agent is idle nearly always, and each thread's stack and arena is in every guest's memory.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(server::MAX_BLOCKING_THREADS)
        .build()
        .context("Starting the async runtime")?;
    runtime.block_on(server::run(transport, params))?;
    if is_guest {
        boot::power_off();
    }
    Ok(())
}
