//! CreateContainer: from the request to a first process that waits for the start.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fs;
use std::path::Path;

use agent_proto::agent;

use super::launch::{Launched, launch};
use super::{Container, Error, Phase, Process, bundle, cgroup, failed, off_thread, plan, validate_id};
use crate::helper;
use crate::sandbox::{Sandbox, storage};
use crate::stdio::{Ports, Prepared};

/// Makes a container. It is in the sandbox afterwards, or nothing of it is left.
pub async fn create(sandbox: &Sandbox, request: agent::CreateContainerRequest) -> Result<(), Error> {
    let id = request.container_id.clone();
    validate_id(&id)?;
    let reservation = sandbox.reserve(&id)?;
    let mounts = storage::mount_all(&request.storages).await?;
    let mut unfinished = Unfinished { id: id.clone(), mounts: Some(mounts), cgroup: None };
    let container = make(sandbox, request, &mut unfinished).await;
    match container {
        Ok(container) => {
            sandbox.oom().watch(&id, &container.cgroup);
            sandbox.watch_first_process(&container);
            unfinished.mounts = None;
            unfinished.cgroup = None;
            reservation.fill(container);
            Ok(())
        }
        Err(error) => {
            // Blocks until the processes are gone, so not on the agent's own thread.
            let _ = tokio::task::spawn_blocking(move || unfinished.undo()).await;
            Err(error)
        }
    }
}

/// What must go if the container does not come to be.
struct Unfinished {
    id: String,
    mounts: Option<storage::Mounts>,
    cgroup: Option<cgroup::Cgroup>,
}

impl Unfinished {
    fn undo(mut self) {
        if let Some(cgroup) = self.cgroup.take()
            && let Err(error) = cgroup.remove()
        {
            tracing::warn!(container = self.id, %error, "A cgroup is left over");
        }
        let _ = fs::remove_dir_all(Path::new(helper::STATE_ROOT).join(&self.id));
        let _ = fs::remove_dir_all(bundle(&self.id));
        if let Some(mounts) = self.mounts.take() {
            mounts.unmount();
        }
    }
}

async fn make(
    sandbox: &Sandbox,
    request: agent::CreateContainerRequest,
    unfinished: &mut Unfinished,
) -> Result<Container, Error> {
    let ports = Ports { stdin: request.stdin_port, stdout: request.stdout_port, stderr: request.stderr_port };
    let pid_namespace_of = if request.sandbox_pidns { sandbox.pid_namespace_holder() } else { None };
    let id = request.container_id.clone();
    let plan = off_thread(move || plan::container(request, pid_namespace_of)).await?;

    let console = plan.process.terminal.then(|| plan.directory.join(helper::CONSOLE_SOCKET));
    let (ends, waiting) = Prepared::new(sandbox.connections(), ports, console, plan.process.user).await?.split();
    let cgroup = cgroup::Cgroup::new(&id, plan.cgroup);
    unfinished.cgroup = Some(cgroup.clone());
    let above = cgroup.clone();
    let _making = off_thread(move || above.make_parents().map_err(failed("Making what is above the cgroup"))).await?;
    let Launched { pid, exit, program } = launch(sandbox.reaper(), helper::CREATE, &plan.directory, "", ends).await?;
    let streams = waiting.attach(&exit, plan.process.size).await?;
    Ok(Container {
        init: Process { pid, exit, streams },
        phase: Phase::Created,
        program: Some(program),
        cgroup,
        directory: plan.directory,
        rootfs: plan.rootfs,
        mounts: unfinished.mounts.clone().unwrap_or_default(),
        own_pid_namespace: pid_namespace_of.is_none(),
        processes: HashMap::new(),
        starting: HashSet::new(),
        ended: VecDeque::new(),
    })
}
