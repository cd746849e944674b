//! `inlay metrics`: what all sandboxes of the node tell about themselves.

use std::io::{self, Write};
use std::process::ExitCode;

use crate::metrics::{families, node};
use crate::run_dir::RunDir;

/// What the help says beside the usage.
pub const AFTER_HELP: &str = "\
The text has each metric once, with the label sandbox=\"<id>\": how the sandbox has started (T0 to T6), what its process
takes of the host's memory, how its guest's memory came, its state and its containers. docs/metrics.md lists all.

A sandbox that does not answer within 3 s is named on standard error and counted in inlay_sandboxes_unreachable; the
command succeeds. For Prometheus, let the node exporter's textfile collector read the output:

  inlay metrics > /var/lib/node_exporter/inlay.prom.new && mv /var/lib/node_exporter/inlay.prom.new /var/lib/node_exporter/inlay.prom

One sandbox alone:

  curl --unix-socket /run/inlay/sandboxes/<id>/metrics http://localhost/metrics";

/// Prints the metrics.
pub fn run() -> ExitCode {
    match try_run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("inlay: Cannot read the sandboxes of this node: {error}");
            ExitCode::FAILURE
        }
    }
}

fn try_run() -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (node, sandboxes) = runtime.block_on(node::ask(&RunDir::from_environment()))?;
    io::stdout().write_all(families::text(Some(node), sandboxes).as_bytes())
}
