//! The guest agent's ttrpc API, wire-compatible with kata's agent.
//!
//! The contract is the table in `tests/golden/fields.tsv`: package and service names, field numbers and field types.
//! The proto files under `protos/` are this project's own and are held to that table by a test. Clients are
//! [`agent_ttrpc::AgentServiceClient`] and [`health_ttrpc::HealthClient`]; a server implements
//! [`agent_ttrpc::AgentService`] and [`health_ttrpc::Health`] and registers what
//! [`agent_ttrpc::create_agent_service`] and [`health_ttrpc::create_health`] return. All of it is async.
//!
//! Requests and answers that carry nothing are [`Empty`].

#[allow(missing_docs, clippy::all, clippy::pedantic)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/modules.rs"));
}

pub use generated::{agent, agent_ttrpc, health, health_ttrpc, oci, types};
pub use protobuf::well_known_types::empty::Empty;

/// vsock port on which the agent serves this API.
pub const AGENT_PORT: u32 = 1024;
/// vsock port of the host to which the agent connects and writes its log, one JSON record a line.
pub const LOG_PORT: u32 = 1025;
/// vsock port of the agent's debug console; closed unless the guest's command line asks for it.
pub const DEBUG_CONSOLE_PORT: u32 = 1026;
/// vsock port on which the agent takes one connection for each standard stream of a process.
pub const STDIO_PORT: u32 = 1027;
/// vsock port on which the agent makes a guest without a sandbox ready to be saved as a template: the host sends the
/// template's mark as one line, and gets [`QUIET`] or the reason why not, as one line.
pub const TEMPLATE_PORT: u32 = 1028;
/// The agent's answer on [`TEMPLATE_PORT`] when the guest is quiet.
pub const QUIET: &str = "quiet";
/// Longest mark of a template, in bytes.
pub const MAX_MARK: usize = 64;
/// In place of a stream's port: the stream is `/dev/null`. No socket can have this port (`VMADDR_PORT_ANY`).
///
/// Ports of 0 mean streams by RPC, but only when all three are 0; a 0 beside a real port is `/dev/null` too.
pub const NULL_STREAM_PORT: u32 = u32::MAX;
