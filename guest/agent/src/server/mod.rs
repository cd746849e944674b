//! The agent API: ttrpc on one port, standard streams on another, the log, the debug console and the making of templates
//! beside them.

mod console;
mod health;
mod quiet;
mod service;
mod status;

use std::sync::Arc;

use agent_proto::{TEMPLATE_PORT, agent_ttrpc, health_ttrpc};
use anyhow::{Context, Result};

use crate::log;
use crate::params::Params;
use crate::reaper::Reaper;
use crate::sandbox::Sandbox;
use crate::stdio::Connections;
use crate::transport::Transport;

/// Threads for calls that block: mounts, cgroups, netlink. They end when idle.
pub const MAX_BLOCKING_THREADS: usize = 8;

/// Serves until the sandbox is destroyed.
pub async fn run(transport: Transport, params: Params) -> Result<()> {
    let (records, log_connection) = log::init(params.log_level);
    let reaper = Reaper::default();
    tokio::spawn(reaper.clone().run());

    let connections = Connections::default();
    let stdio = transport.listen(params.stdio_port).context("Listening for standard streams")?;
    tokio::spawn(connections.clone().accept_all(stdio));

    let sandbox = Sandbox::new(reaper, connections);
    tokio::spawn(sandbox.oom().clone().run());

    let service = Arc::new(service::Service::new(sandbox.clone()));
    let mut server = ttrpc::r#async::Server::new()
        .bind(&transport.ttrpc_address(params.agent_port))
        .context("Listening for the agent API")?
        .register_service(agent_ttrpc::create_agent_service(service))
        .register_service(health_ttrpc::create_health(Arc::new(health::Service)));
    server.start().await.context("Serving the agent API")?;
    if params.debug_console {
        let listener = transport.listen(params.debug_console_port).context("Listening for the debug console")?;
        tokio::spawn(console::serve(listener));
    }

    let templates = transport.listen(TEMPLATE_PORT).context("Listening for the maker of a template")?;
    tokio::spawn(quiet::serve(templates, sandbox.clone(), log_connection));

    // Last: to the host this connection means that the agent listens.
    let connect = move || transport.connect_to_host(params.log_port);
    let first = tokio::task::spawn_blocking(connect.clone()).await.context("Connecting to the log")?;
    let refused = first.as_ref().err().map(ToString::to_string);
    log::drain(records, first.ok(), connect);
    tracing::info!(version = env!("CARGO_PKG_VERSION"), log_refused = refused, "The agent listens");
    for warning in &params.warnings {
        tracing::warn!("{warning}");
    }

    sandbox.destroyed().await;
    // Waits until the connections have written what is on its way, the answer to DestroySandbox among it.
    server.shutdown().await.context("Ending the agent API")
}
