//! `delete`: whatever a container left, when its shim cannot be asked any more.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, SystemTime};

use containerd_shim_protos::api::{DeleteResponse, ShutdownRequest};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::shim_async::{Client, TaskClient};
use tracing_subscriber::filter::LevelFilter;
use ttrpc::context::with_duration;

use super::flags::Flags;
use crate::container::state::KILLED;
use crate::ids::{Id, IdError};
use crate::log;
use crate::oci::Role;
use crate::run_dir::{RunDir, address_of};
use crate::sandbox::persist::{self, PersistError, Record};

/// How long a killed shim may take to go: the kernel takes down the machine's memory first.
const KILL_PATIENCE: Duration = Duration::from_secs(20);
/// How long an idle shim may take to answer.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(2);

/// Why something is left.
#[derive(Debug, thiserror::Error)]
pub enum DeleteError {
    /// The container's identifier is no file name.
    #[error(transparent)]
    Id(#[from] IdError),
    /// A shim or its helper that cannot be killed.
    #[error("Cannot kill the shim's process {pid}")]
    Kill {
        /// Its process id.
        pid: u32,
        /// What the system said.
        source: io::Error,
    },
    /// Files, mounts.
    #[error(transparent)]
    Leftovers(#[from] PersistError),
    /// The reply.
    #[error("Cannot write the reply")]
    Reply(#[source] containerd_shim_protos::protobuf::Error),
}

/// Cleans up and returns the reply for containerd.
pub fn run(flags: &Flags) -> Result<Vec<u8>, DeleteError> {
    log::init(None, LevelFilter::WARN);
    let id = Id::try_from(flags.id.as_str())?;
    let run_dir = RunDir::from_environment();
    // The bundle may be gone already; then the container is taken for its own sandbox, or has nothing here.
    let role = super::bundle(flags).ok().and_then(|bundle| Role::of_bundle(&bundle).ok()).unwrap_or(Role::Sandbox);
    let pid = match role {
        Role::Sandbox => clean(&run_dir, flags, &id, true)?,
        Role::Member { sandbox } => clean(&run_dir, flags, &sandbox, false)?,
    };
    let response = DeleteResponse {
        pid,
        exit_status: KILLED,
        exited_at: Some(SystemTime::now().into()).into(),
        ..DeleteResponse::default()
    };
    response.write_to_bytes().map_err(DeleteError::Reply)
}

/// A shim without a sandbox has no record by which it could be killed, so it is asked to end.
fn end_idle_shim(socket: &Path) {
    if UnixStream::connect(socket).is_ok() {
        let asked = tokio::runtime::Builder::new_current_thread().enable_all().build().map(|runtime| {
            runtime.block_on(async {
                let client = Client::connect(&address_of(socket)).await?;
                let request = ShutdownRequest { now: true, ..ShutdownRequest::default() };
                TaskClient::new(client).shutdown(with_duration(SHUTDOWN_PATIENCE), &request).await
            })
        });
        tracing::debug!(?asked, "An idle shim was asked to end");
    }
    let _ = std::fs::remove_file(socket);
}

/// Removes what a sandbox left and returns its shim's process id. A shim that lives is killed if containerd gave up the
/// sandbox itself, and left alone if it gave up one of several containers.
fn clean(run_dir: &RunDir, flags: &Flags, sandbox: &Id, kill: bool) -> Result<u32, DeleteError> {
    let Some(record) = Record::load(run_dir, sandbox) else {
        // The shim never had a sandbox, died before it had a record, or has removed all by itself.
        if kill {
            persist::remove(run_dir, sandbox)?;
            end_idle_shim(&run_dir.socket(&flags.address, &flags.namespace, sandbox));
        }
        return Ok(0);
    };
    if record.namespace != flags.namespace {
        // Somebody else's, under the same name; ours was refused.
        return Ok(0);
    }
    let pid = record.shim.pid;
    if record.shim.is_alive() {
        if !kill {
            return Ok(pid);
        }
        record.shim.kill(KILL_PATIENCE).map_err(|source| DeleteError::Kill { pid, source })?;
    }
    if let Some(helper) = record.helper {
        // It ends with the shim, and takes down what it mounted; two who do that at once get in each other's way.
        helper.kill(KILL_PATIENCE).map_err(|source| DeleteError::Kill { pid: helper.pid, source })?;
    }
    persist::remove(run_dir, sandbox)?;
    Ok(pid)
}
